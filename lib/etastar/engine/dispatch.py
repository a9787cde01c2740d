"""Handing the segments of a sweep to workers, in this process or in others, until nothing is left of it."""

import itertools
import json
import queue
import subprocess
import sys
import threading
from collections import Counter, deque

import torch

from etastar.engine import run as runs
from etastar.engine.environment import one_thread_environment
from etastar.engine.plan import Node, Segment, critical_order
from etastar.engine.slots import stack_key
from etastar.engine.store import Store, StoreError
from etastar.engine.worker import Task, Worker
from etastar.observe import Observe
from etastar.text.corpora import prepare


class WorkerFailed(RuntimeError):
    """A worker process ended with an error; the message holds the last lines it wrote."""


class Dispatch:
    """Which segment of a sweep (engine.execute.Sweep) is next: those whose parent is stored, longest remaining path first.

    `slots` is by stack key how many runs of a shape a worker trains in step.
    """

    def __init__(self, sweep, slots: dict[str, int]):
        self.sweep, self.slots, self.bar, self.clock, self.trained = sweep, slots, None, Counter(), 0
        self.recipes = {recipe.run_id: recipe for recipe in sweep.recipes}
        order = critical_order(sweep.segments, {s.node.id: s.tokens for s in sweep.segments})
        self.produced = {(s.node.trunk, s.node.id) for s in order if s.start < s.stop}
        self.done: set[tuple[str, str]] = set()
        self.diverged = set(sweep.diverged)
        self.ready: deque[tuple[str, Segment]] = deque()  # with the stack key of each
        self.blocked: list[Segment] = list(order)
        self.left = len(order)
        self.tokens = sum(s.tokens for s in order)
        self._unblock()

    def take(self, held: list[Task]) -> list[Task]:
        """Tasks for a worker that holds some: more of their shape while it has slots, of another shape once it holds none."""
        if not self.ready:
            return []
        key = stack_key(held[0].recipe) if held else self.ready[0][0]
        chosen = list(itertools.islice((item for item in self.ready if item[0] == key), self.slots[key] - len(held)))
        for item in chosen:
            self.ready.remove(item)
        return [self._task(*item) for item in chosen]

    def give_back(self, tasks: list[Task]) -> None:
        """Tasks of a worker that died go to the front again."""
        by_node = {(s.node.trunk, s.node.id, s.start): s for s in self.sweep.segments}
        for task in tasks:
            start = task.parent.step if task.parent else 0
            self.ready.appendleft((stack_key(task.recipe), by_node[task.node.trunk, task.node.id, start]))

    def progress(self, tokens: int) -> None:
        """Move the bar."""
        self.trained += tokens
        self.bar.update(tokens)

    def finished(self, trunk: str, node_id: str, diverged: bool) -> None:
        """A segment ended; what stood on it may start, or has diverged with it."""
        self.left -= 1
        self.done.add((trunk, node_id))
        if diverged:
            self.diverged.add((trunk, node_id))
        self._unblock()

    def _unblock(self) -> None:
        changed = True
        while changed:
            changed, waiting = False, []
            for segment in self.blocked:
                parent = segment.parent and (segment.parent.trunk, segment.parent.id)
                if parent in self.diverged:
                    self._give_up(segment)
                    changed = True
                elif parent is None or parent in self.done or parent not in self.produced or segment.parent == segment.node:
                    self.ready.append((stack_key(segment.recipe), segment))
                else:
                    waiting.append(segment)
            self.blocked = waiting

    def _give_up(self, segment: Segment) -> None:
        """All runs that pass through a diverged state have diverged with it."""
        parent, store = segment.parent, self.sweep.store
        self.diverged.add((segment.node.trunk, segment.node.id))
        for run_id in segment.ends:
            recipe = self.recipes[run_id]
            end = self._last_state(parent)
            runs.write_run(store, recipe, end, self.sweep.observe, prepare(recipe.corpus).vocab)
        self.left -= 1
        self.bar and self.bar.update(segment.tokens)

    def _last_state(self, node: Node) -> Node:
        while self.sweep.store.node_meta(node) is None:
            node = next(s.parent for s in self.sweep.segments if s.node == node and s.start < s.stop)
        return node

    def _task(self, key: str, segment: Segment) -> Task:
        return Task(segment.recipe, segment.parent, segment.node, tuple(self.recipes[i] for i in segment.ends), self.slots[key])


def train_inline(dispatch: Dispatch, snapshot_seconds: float) -> None:
    """Train in this process, on one thread: what a worker process does, bit for bit."""
    worker = Worker(dispatch.sweep.store, dispatch.sweep.observe, snapshot_seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    def take(wait):
        tasks = dispatch.take(worker.tasks)
        if wait and dispatch.left and not tasks:
            raise RuntimeError(f"{dispatch.left} segments left but none can start")
        return tasks if dispatch.left else None

    def report(body):
        _apply(dispatch, body)

    try:
        worker.work(take, report)
    except KeyboardInterrupt:
        worker._park()
        raise
    finally:
        dispatch.clock.update(worker.clock)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def _apply(dispatch: Dispatch, body: dict) -> None:
    if "tokens" in body:
        dispatch.progress(body["tokens"])
    if "node" in body:
        dispatch.finished(body["trunk"], body["node"], body["diverged"])
    if "error" in body:
        raise WorkerFailed(body["error"])


class WorkerProcess:
    """A worker in its own one-thread process, spoken to by JSON lines."""

    def __init__(self, number: int, store: Store, observe: Observe, snapshot_seconds: float, inbox: queue.Queue):
        self.tasks: list[Task] = []
        self.log = store.path / ".logs" / f"worker-{number}.log"
        self.log.parent.mkdir(exist_ok=True)
        config = {"store": str(store.path), "threads": 1, "snapshot_seconds": snapshot_seconds, **observe.to_meta()}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "etastar.engine.worker", json.dumps(config)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=one_thread_environment(store.compiled_code),
                pass_fds=store.lock_fds)
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: queue.Queue) -> None:
        for line in self.process.stdout:
            inbox.put((self, line))
        inbox.put((self, None))

    def send(self, tasks: list[Task]) -> None:
        """Hand over tasks."""
        for task in tasks:
            self.tasks.append(task)
            self.process.stdin.write(json.dumps(task.to_json()) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Tell the worker to save and leave, and wait for it."""
        if self.process.stdin and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_words(self) -> str:
        """The end of the worker's log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-12:]) or "(it wrote nothing)"


def train_in_processes(dispatch: Dispatch, workers: int, snapshot_seconds: float) -> None:
    """Keep worker processes busy until nothing is left; a worker that dies is replaced, three times at most."""
    sweep, replaced = dispatch.sweep, 0
    inbox: queue.Queue = queue.Queue()

    def start(number):
        return WorkerProcess(number, sweep.store, sweep.observe, snapshot_seconds, inbox)

    pool = [start(n) for n in range(workers)]
    try:
        while dispatch.left:
            for worker in pool:
                _feed(dispatch, worker)
            worker, line = inbox.get()
            if line is not None:
                _hear(dispatch, worker, json.loads(line))
                continue
            worker.close()
            replaced += 1
            if replaced > 3:
                raise WorkerFailed(f"worker processes keep dying (exit status {worker.process.returncode}); the last wrote:\n"
                                   f"{worker.last_words()}\nFinished runs are kept; run again to go on.")
            dispatch.give_back(worker.tasks)
            pool[pool.index(worker)] = start(workers + replaced)
    finally:
        for worker in pool:
            worker.close()
        _hear_the_rest(dispatch, inbox, len(pool))


def _hear_the_rest(dispatch: Dispatch, inbox: queue.Queue, ends: int) -> None:
    """What the workers told last: tokens of their last steps and the seconds each spent on what."""
    while ends:
        try:
            _, line = inbox.get(timeout=1)
        except queue.Empty:  # a reader that never came to its end
            return
        ends -= line is None
        body = json.loads(line) if line is not None else {}
        dispatch.clock.update(body.get("clock", {}))
        dispatch.progress(body.get("tokens", 0))


def _feed(dispatch: Dispatch, worker: WorkerProcess) -> None:
    if tasks := dispatch.take(worker.tasks):
        try:
            worker.send(tasks)
        except BrokenPipeError:  # it died; its end of the other pipe says so next
            pass


def _hear(dispatch: Dispatch, worker: WorkerProcess, body: dict) -> None:
    if "error" in body:
        if "No space left" in body["error"] or "Read-only" in body["error"]:
            raise StoreError(f"the store {dispatch.sweep.store.path} cannot be written: {body['error']}; finished runs are kept, "
                             "make room and run again")
        raise WorkerFailed(f"{body['error']}\nFinished runs are kept; the worker wrote:\n{worker.last_words()}")
    if "node" in body:
        worker.tasks = [t for t in worker.tasks if (t.node.trunk, t.node.id) != (body["trunk"], body["node"])]
    _apply(dispatch, body)
