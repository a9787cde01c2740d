"""A worker: trains segments in the slots of one stack and puts what it made into the store.

Run as `python -m etastar.engine.worker CONFIG`, it reads tasks as JSON lines from standard input and reports on standard
output; when its input ends, because the sweep was stopped or its parent died, it saves where it stands and leaves.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import queue
import signal
import sys
import threading
import time

import numpy as np

from etastar.engine import run as runs
from etastar.engine.checkpoint import split_state, state_tensors, tensor_bytes
from etastar.engine.curve import with_logged
from etastar.engine.feature_log import slot_features
from etastar.engine.layout import verified
from etastar.engine.norm_log import slot_norms
from etastar.engine.plan import Node, controls, prefix_hash
from etastar.engine.slots import SlotStack, stack_key
from etastar.engine.store import Store
from etastar.observe import LOGS, Observe
from etastar.optim.adamw import turns
from etastar.recipe import Recipe
from etastar.text.corpora import prepare

POLL_SECONDS = 0.4  # how long a worker trains between looks at its input

SLOT_LOGS = {"norms": slot_norms, "features": slot_features}


@dataclasses.dataclass
class Task:
    """One segment as a worker gets it; `ends` are the recipes whose runs end with it, `slots` the stack it is to be trained in."""

    recipe: Recipe
    parent: Node | None
    node: Node
    ends: tuple[Recipe, ...]
    slots: int

    def to_json(self) -> dict:
        """For the pipe to a worker process."""
        return {"recipe": self.recipe.to_json(), "parent": self.parent and dataclasses.astuple(self.parent),
                "node": dataclasses.astuple(self.node), "ends": [recipe.to_json() for recipe in self.ends], "slots": self.slots}

    @staticmethod
    def from_json(body: dict) -> "Task":
        """What `to_json` wrote."""
        return Task(Recipe.from_json(body["recipe"]), Node(*body["parent"]) if body["parent"] else None,
                    Node(*body["node"]), tuple(Recipe.from_json(text) for text in body["ends"]), body["slots"])


class Job:
    """A task in a slot: where it stands and the curve since the state it can be resumed from."""

    def __init__(self, task: Task):
        self.task, self.lr, self.controls = task, task.recipe.lr(), controls(task.recipe)
        self.beta2_turns = frozenset(turns(task.recipe.beta2()))
        self.saved = task.parent
        self.step = self.saved_step = task.parent.step if task.parent else 0
        self.losses, self.norms, self.val_loss = [], [], {}
        self.logged: dict[int, dict[str, float]] = {}  # by step, then by column
        self.saved_at = time.monotonic()

    def frame(self):
        """The curve since `saved`."""
        losses, norms = (np.concatenate([np.empty(0, np.float32), *parts]) for parts in (self.losses, self.norms))
        frame = runs.curve_frame(self.task.recipe, self.saved_step, self.lr[self.saved_step : self.saved_step + len(losses)],
                                 losses, norms, self.val_loss)
        return with_logged(frame, self.logged)

    def here(self) -> Node:
        """The node of the state after `step` steps."""
        return Node(self.task.node.trunk, self.step, prefix_hash(self.controls[: self.step]).hexdigest()[:16])


class Worker:
    """The slots of one process. `take(wait)` gives tasks (None: stop); `report(body)` tells what happened.

    `clock` holds the seconds spent: compiling (first steps of a compiled stack), training, validating, norms and features (what is
    logged), loading, writing, waiting.
    """

    def __init__(self, store: Store, observe: Observe, snapshot_seconds: float = 60.0):
        self.store, self.observe, self.snapshot_seconds = store, observe, snapshot_seconds
        self.jobs: list[Job | None] = []
        self.waiting: list[Task] = []
        self.stack: SlotStack | None = None
        self.new_stack = False
        self.chunk_steps = 4
        self.clock: collections.Counter = collections.Counter()

    @contextlib.contextmanager
    def _clocked(self, part: str):
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock[part] += time.perf_counter() - began

    @property
    def tasks(self) -> list[Task]:
        """What it holds: in its slots and waiting for one."""
        return [job.task for job in self.jobs if job] + self.waiting

    @property
    def busy(self) -> bool:
        """Whether any slot is training."""
        return any(self.jobs)

    def work(self, take, report) -> None:
        """Train what `take` gives until it gives None; then save where every slot stands."""
        while True:
            with self._clocked("waiting"):
                tasks = take(not self.tasks)
            if tasks is None:
                return self._park()
            self.waiting += tasks
            self._fill(report)
            if self.busy:
                self._advance(report)

    def _fill(self, report) -> None:
        while self.waiting and (None in self.jobs or not self.busy):
            task = self.waiting[0]
            if self.stack is None or self.stack.key != stack_key(task.recipe):
                if self.busy:
                    return
                with self._clocked("loading"):
                    self.stack, slots = verified(functools.partial(_build, task.recipe, self.observe), task.slots)
                self.jobs = [None] * slots
                self.chunk_steps, self.new_stack = 4, True
            self.waiting.pop(0)
            slot = self.jobs.index(None)
            with self._clocked("loading"):
                self.stack.load(slot, task.recipe, split_state(self.store.node_state(task.parent)) if task.parent else None)
            self.jobs[slot] = Job(task)
            if task.parent == task.node:  # the state was there already, only its run has to be written
                self._look(slot, self.jobs[slot], report)

    def _advance(self, report) -> None:
        """Train all slots up to the next thing to do for any of them, or for about POLL_SECONDS."""
        busy = [(slot, job) for slot, job in enumerate(self.jobs) if job]
        steps = min([self.chunk_steps, *(self._steps_to_event(job) for _, job in busy)])
        lr_MxS = np.zeros((len(self.jobs), steps))
        for slot, job in busy:
            lr_MxS[slot] = job.lr[job.step : job.step + steps]
        began = time.monotonic()
        with self._clocked("compiling" if self.new_stack and self.stack.execution.compiled else "training"):
            losses_MxS, norms_MxS = self.stack.train(lr_MxS)
        self.new_stack = False
        self.chunk_steps = max(1, min(10_000, int(steps * POLL_SECONDS / (time.monotonic() - began))))
        for slot, job in busy:
            job.losses.append(losses_MxS[slot])
            job.norms.append(norms_MxS[slot])
            job.step += steps
            if job.step in job.beta2_turns:
                self.stack.set_beta2(slot, job.step)
        self._log(busy)
        for slot, job in busy:
            self._look(slot, job, report)
        report({"steps": steps * len(busy), "tokens": sum(steps * job.task.recipe.batch_tokens for _, job in busy)})

    def _steps_to_event(self, job: Job) -> int:
        batch_tokens = job.task.recipe.batch_tokens
        ahead = range(job.step + 1, min(job.task.node.step, job.step + self.chunk_steps) + 1)
        due = (step for step in ahead if step == job.task.node.step or step in job.beta2_turns
               or self.observe.val_due(step, batch_tokens) or self.observe.window_due(step, batch_tokens)
               or any(self.observe.log_due(log, step, batch_tokens) for log in self.observe.logs))
        return next(due, self.chunk_steps + job.step) - job.step

    def _log(self, held: list[tuple[int, Job]], stored: bool = False) -> None:
        """Log what is due of slots, of each log all slots at once, and all logs of states that are `stored` or end their segment.

        So the last row of a stored stretch has all logs, for the run that may end there; `engine.curve.passed` takes them from the others.
        """
        for log in self.observe.logs:
            wanted = [(slot, job) for slot, job in held if self.stack.is_alive(slot) and LOGS[log][0] not in job.logged.get(job.step, {})
                      and (stored or job.step == job.task.node.step
                           or self.observe.log_due(log, job.step, job.task.recipe.batch_tokens))]
            if wanted:
                with self._clocked(log):
                    found = SLOT_LOGS[log](self.stack, [slot for slot, _ in wanted])
                for (_, job), numbers in zip(wanted, found, strict=True):
                    job.logged.setdefault(job.step, {}).update(zip(LOGS[log], numbers, strict=True))

    def _look(self, slot: int, job: Job, report) -> None:
        """Validate, save, finish or give up a slot after a stretch of training."""
        if not self.stack.is_alive(slot):
            return self._finish(slot, job, report, diverged=True)
        done = job.step == job.task.node.step
        observed = job.step > job.saved_step and self.observe.val_due(job.step, job.task.recipe.batch_tokens)
        with self._clocked("validating"):
            validation = self.stack.validate(slot) if observed or (done and job.task.ends) else None
        if observed:
            job.val_loss[job.step] = validation[0]
        if job.step > job.saved_step and self.observe.window_due(job.step, job.task.recipe.batch_tokens):
            with self._clocked("writing"):  # before any state that stands on it
                runs.write_window(self.store, job.task.recipe, job.here(), self.observe.average_every_tokens,
                                  self.stack.window_mean(slot), self.stack.weights(slot))
        if done:
            with self._clocked("writing"):
                self._finish(slot, job, report, validation=validation)
        elif time.monotonic() - job.saved_at > self.snapshot_seconds:
            with self._clocked("writing"):
                self._snapshot(slot, job)

    def _finish(self, slot: int, job: Job, report, validation=None, diverged=False) -> None:
        task, frame = job.task, job.frame()
        state = model = None
        if diverged:
            finite = int(np.isfinite(frame.train_loss).sum())
            frame = frame.iloc[: finite + 1]  # one row of NaN marks the step that could not be taken
        else:
            state = self.stack.state(slot)
            model = self.stack.weights(slot) if task.ends else None
        diverged_at = job.saved_step + len(frame) if diverged else None
        if task.parent != task.node:
            self._write_node(job, task.node, frame, state, "end", diverged_at)
        for recipe in task.ends:
            runs.write_run(self.store, recipe, task.node, self.observe, self.stack.tokens.vocab, model, validation,
                           averages={} if state is None else state[1])
        if job.saved != task.parent:
            self.store.drop_state(job.saved)
        self.stack.clear(slot)
        self.jobs[slot] = None
        report({"node": task.node.id, "trunk": task.node.trunk, "diverged": diverged})

    def _snapshot(self, slot: int, job: Job) -> None:
        self._log([(slot, job)], stored=True)
        node = job.here()
        self._write_node(job, node, job.frame(), self.stack.state(slot), "snapshot", None)
        if job.saved != job.task.parent:
            self.store.drop_state(job.saved)
        job.saved, job.saved_step, job.saved_at = node, job.step, time.monotonic()
        job.losses, job.norms, job.val_loss, job.logged = [], [], {}, {}

    def _write_node(self, job, node, frame, state, kind, diverged_at) -> None:
        meta = {"kind": kind, "parent": [job.saved.step, job.saved.prefix] if job.saved else None,
                "diverged_at": diverged_at, **self.observe.to_meta()}
        data = None if state is None else tensor_bytes(state_tensors(*state))
        self.store.write_node(node, frame, data, meta)

    def _park(self) -> None:
        for slot, job in enumerate(self.jobs):
            if job and job.step > job.saved_step:
                self._snapshot(slot, job)


def _build(recipe: Recipe, observe: Observe, slots: int) -> SlotStack:
    """A stack for a recipe's shape; on a GPU it takes a step, for only then is it known whether the memory holds it."""
    stack = SlotStack(recipe, prepare(recipe.corpus), slots, observe=observe)
    if recipe.execution.device == "cuda":
        stack.load(0, recipe, None)
        stack.train(np.zeros((slots, 1)))
        stack.clear(0)
    return stack


def main() -> None:
    """Entry of a worker process."""
    config = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells us when to stop
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    torch.set_num_threads(config["threads"])
    torch.set_flush_denormal(True)
    inbox: queue.Queue = queue.Queue()
    threading.Thread(target=_read_lines, args=(inbox,), daemon=True).start()

    def report(body):
        with_pipe = json.dumps(body)
        try:
            pipe.write(with_pipe + "\n")
        except BrokenPipeError:
            inbox.put(None)

    def take(wait):
        tasks = []
        while True:
            try:
                line = inbox.get(block=wait and not tasks)
            except queue.Empty:
                return tasks
            if line is None:
                return None
            tasks.append(Task.from_json(json.loads(line)))

    worker = Worker(Store(config["store"]), Observe.from_meta(config), config["snapshot_seconds"])
    try:
        worker.work(take, report)
        report({"clock": worker.clock})
    except Exception as error:  # whatever it was, the parent shows it once and stops the sweep
        report({"error": f"{type(error).__name__}: {error}"})
        raise


def _read_lines(inbox: queue.Queue) -> None:
    for line in sys.stdin:
        inbox.put(line)
    inbox.put(None)


if __name__ == "__main__":
    main()
