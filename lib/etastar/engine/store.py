"""A store of runs on disk: one folder a run, shared states below `.nodes`, nothing half-written.

    store/RUN_ID/      recipe.json metrics.parquet validation.safetensors model.safetensors provenance.json summary.json
    store/.nodes/TRUNK/STEP-PREFIX/   meta.json chunk.parquet state.safetensors
    store/corpora.json                what each corpus held when its first run was trained
    store/execution.json              how each shape is computed, where that was chosen by measurement
    store/sweeps.jsonl                one line a sweep: its wall seconds, and those its workers spent by part
    store/.unfinished/SWEEP.json      the recipes of a sweep that has begun and not ended, by run id
    store/.beside/SWEEP/              a store of its own, of runs that are trained beside a sweep (engine.beside)
    store/.compiled/                  what torch.compile made

A run is done if and only if its summary is there and agrees with the files beside it.

Who may do what at the same time: one sweep writes runs and states (`.lock`); those beside it put in what is not there yet and take
nothing away; `runs gc` wants the store for itself, so all of these hold `.in-use` together and it alone. Readers need no lock.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd

from etastar.engine.checkpoint import Damaged, check_size, read_json, read_whole, tensors_of, write_json, write_whole
from etastar.engine.curve import LOGGED_COLUMNS, parquet, passed, read_parquet
from etastar.engine.folders import ALONE, TOGETHER, is_alive, lock_at_once, replace_folder, wait_for_lock
from etastar.engine.plan import Node
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.values import canonical_json

CURVE_COLUMNS = ("step", "tokens", "lr", "train_loss", "val_loss", "grad_norm", *LOGGED_COLUMNS)
STATE = "state.safetensors"
ORPHAN_SECONDS = 60.0  # how long the workers of a killed sweep may take to notice and to save; a step that is being compiled is longest

Seen = TypeVar("Seen")


class StoreError(ValueError):
    """A store that cannot be used as asked: in use, read-only, full, or made with another corpus."""


class Store:
    """The folder of a store; opening it creates nothing, `prepare()` does."""

    def __init__(self, path):
        self.path = Path(path)
        self.lock_fds: tuple[int, ...] = ()  # while `locked`: workers inherit them and hold the store until they leave, killed or not

    @staticmethod
    def at(path_or_store) -> "Store":
        """A store by its path; a store as it is."""
        return path_or_store if isinstance(path_or_store, Store) else Store(path_or_store)

    @property
    def home(self) -> "Store":
        """The store where finished runs end up: this one, except where it stands beside another."""
        return self

    @property
    def lock_file(self) -> Path:
        """Names the process that writes here, which holds it locked."""
        return self.path / ".lock"

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(self, needed_bytes: int = 0) -> None:
        """Create the folder and make sure it can hold `needed_bytes`; raises StoreError naming the folder."""
        try:
            self.nodes.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"x")
        except OSError as error:
            raise StoreError(f"cannot write to the store {self.path}: {error.strerror}; choose another with store=") from None
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise StoreError(
                f"the store {self.path} has {free / 2**20:.0f} MiB free but the plan needs {needed_bytes / 2**20:.0f} MiB; "
                "free some, choose another store, or drop old states with `etastar runs gc --states`"
            )

    @contextlib.contextmanager
    def locked(self):
        """Hold the store for one writer; raises StoreError naming the process that holds it."""
        with self._used() as used, _opened(self.lock_file) as file:
            patience = time.monotonic() + ORPHAN_SECONDS
            while not lock_at_once(file, ALONE):
                holder = self.lock_file.read_text()
                if is_alive(holder) or time.monotonic() > patience:
                    raise StoreError(self._in_use(holder or "unknown"))
                time.sleep(0.1)  # it was killed, and its workers still save the states from which it goes on
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            self.lock_fds = (used.fileno(), file.fileno())
            try:
                yield
            finally:
                self.lock_fds = ()
                file.truncate(0)

    def _in_use(self, holder: str) -> str:
        return (f"the store {self.path} is in use by process {holder}; wait for it to finish, choose another store, or train beside it "
                "with es.run(…, beside=True)")

    @contextlib.contextmanager
    def _used(self):
        """Keep `runs gc` away; raises StoreError while it is at work."""
        with _opened(self.home.path / ".in-use") as file:
            if not lock_at_once(file, TOGETHER):
                raise StoreError(f"the store {self.home.path} is being cleaned up by `runs gc`; try again when it is done")
            yield file

    @contextlib.contextmanager
    def _alone(self):
        """Hold the store against everybody; raises StoreError naming who uses it."""
        with _opened(self.path / ".in-use") as file:
            if not lock_at_once(file, ALONE):
                held = [lock.read_text() for lock in (self.lock_file, *self.path.glob(".beside/*.lock")) if lock.exists()]
                raise StoreError(f"the store {self.path} is in use by process {', '.join(pid for pid in held if pid and is_alive(pid))}; "
                                 "clean it up when nothing is being trained in it")
            yield

    @contextlib.contextmanager
    def announced(self, sweep: str, recipes: dict[str, Recipe]):
        """Leave the recipes of a sweep where `unfinished` finds them until it has ended well; they count as running while this lasts."""
        path = self.home.path / ".unfinished" / f"{sweep}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, ("{" + ",\n".join(f'"{run_id}":{recipe.to_json()}' for run_id, recipe in recipes.items()) + "}").encode())
        with open(path) as file:
            wait_for_lock(file)
            yield
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _noting(self):
        """Wait for whoever else changes one of the store's small files."""
        with _opened(self.path / ".notes.lock") as file:
            wait_for_lock(file)
            yield

    def check_corpora(self, recipes) -> dict[str, str]:
        """Fingerprint by corpus of the store and these recipes; StoreError where one changed since runs were made with it."""
        path = self.path / "corpora.json"
        known = read_json(path) if path.exists() else {}
        for corpus, found in {r.corpus: r.corpus_fingerprint for r in recipes}.items():
            was = known.setdefault(canonical_json(corpus), found)
            if was != found:
                raise StoreError(
                    f"the corpus {corpus.source!r} has changed under the store {self.path}: its runs were made with fingerprint "
                    f"{was[:12]}, it is now {found[:12]}; restore the corpus (`make setup` reinstalls the locked packages) or "
                    "start a new store. Finished runs stay readable."
                )
        return known

    def remember_corpora(self, recipes) -> None:
        """Write down what each corpus holds."""
        with self._noting():
            write_json(self.path / "corpora.json", self.check_corpora(recipes))

    def held_execution(self) -> dict[str, dict]:
        """The way of computing chosen for each shape when its first run was trained: {stack key: choice}."""
        path = self.path / "execution.json"
        return read_json(path) if path.exists() else {}

    def hold_execution(self, chosen: dict[str, dict]) -> None:
        """Keep what was chosen, so that a resumed sweep has the same bits."""
        if chosen:
            with self._noting():
                write_json(self.path / "execution.json", {**chosen, **self.held_execution()})

    def log_sweep(self, told: dict) -> None:
        """Add a line to sweeps.jsonl: how long a call of `run` took and what its workers spent their seconds on."""
        with open(self.home.path / "sweeps.jsonl", "a") as file:
            file.write(json.dumps(told) + "\n")  # short enough to be one write, so that lines of two processes do not mix

    # -- runs ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Path:
        """Folder of the shared states."""
        return self.path / ".nodes"

    def beside(self, sweep: str) -> Path:
        """Folder of a sweep that is trained beside others."""
        return self.path / ".beside" / sweep

    @property
    def compiled_code(self) -> Path:
        """Folder of what torch.compile made."""
        return self.home.path / ".compiled"

    def unfinished(self) -> dict[str, tuple[str, dict]]:
        """(sweep, recipe as JSON) by run id of runs that a sweep began and did not finish; where several did, one that is running."""
        return again(self._unfinished)

    def _unfinished(self):
        paths = sorted((self.path / ".unfinished").glob("*.json"), key=lambda path: self.is_running(path.stem))
        found = {run_id: (path.stem, recipe) for path in paths for run_id, recipe in read_json(path).items()}
        return {run_id: told for run_id, told in found.items() if not self.is_finished(run_id)}

    def is_running(self, sweep: str) -> bool:
        """Whether a process is at work on a sweep that `unfinished` names."""
        try:
            with open(self.path / ".unfinished" / f"{sweep}.json") as file:
                return not lock_at_once(file, TOGETHER)
        except FileNotFoundError:
            return False

    def is_finished(self, run_id: str) -> bool:
        """Whether a run is in its folder."""
        return (self.path / run_id / "summary.json").exists()

    def run_ids(self) -> list[str]:
        """Ids of all finished runs."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.path)
                      if not entry.name.startswith(".") and os.path.exists(os.path.join(entry.path, "summary.json")))

    def summary(self, run_id: str) -> dict | None:
        """The summary of a finished run, None where there is none; Damaged where its files are not as recorded."""
        return again(lambda: self._summary(run_id))

    def _summary(self, run_id: str) -> dict | None:
        folder = self.path / run_id
        if not (folder / "summary.json").exists():
            return None
        summary = read_json(folder / "summary.json")
        if summary.get("run_id") != run_id or "files" not in summary:
            raise Damaged(f"{folder / 'summary.json'} is not the summary of run {run_id}; set it aside with "
                          "`etastar runs gc --damaged`")
        for name, recorded in summary["files"].items():
            check_size(folder / name, recorded)
        return summary

    def read(self, run_id: str, name: str) -> bytes:
        """A file of a finished run, checked against its sha256."""
        return again(lambda: read_whole(self.path / run_id / name, self.summary(run_id)["files"][name]))

    def write_run(self, recipe: Recipe, files: dict[str, bytes], summary: dict) -> None:
        """Put a finished run in its place: all files first, the summary last, one rename."""
        folder, final = self._partial(recipe.run_id), self.path / recipe.run_id
        files = {"recipe.json": json.dumps(json.loads(recipe.to_json()), indent=1).encode(), **files}
        recorded = {name: write_whole(folder / name, data) for name, data in files.items()}
        write_json(folder / "summary.json", {**summary, "run_id": recipe.run_id, "files": recorded})
        replace_folder(folder, final)

    def table(self) -> pd.DataFrame:
        """One row a finished run, from the summaries alone; what it was observed by is a JSON text, as corpus and schedule are."""
        summaries = [read_json(self.path / run_id / "summary.json") for run_id in self.run_ids()]
        return pd.DataFrame([{name: json.dumps(item) if isinstance(item, dict) else item for name, item in told.items() if name != "files"}
                             for told in summaries])

    # -- shared states ---------------------------------------------------------------------------------------------

    def stored_nodes(self, trunk: str, observe: Observe) -> dict[str, dict]:
        """Meta by id of the states of one trunk that a run can start from: observed as asked, tensors there or diverged."""
        folder = self.nodes / trunk
        found = {entry.name: again(lambda entry=entry: self._startable(Path(entry.path), observe))
                 for entry in (os.scandir(folder) if folder.is_dir() else ())}
        return {name: meta for name, meta in found.items() if meta is not None}

    def _startable(self, folder: Path, observe: Observe) -> dict | None:
        meta = read_json(folder / "meta.json")
        has_state = (folder / STATE).exists()
        if not (has_state or meta["diverged_at"] is not None) or not Observe.from_meta(meta).covers(observe):
            return None
        if has_state:
            check_size(folder / STATE, meta["files"][STATE])
        return meta

    def has_state(self, node: Node) -> bool:
        """Whether the tensors of a state are there."""
        return (self.node_folder(node) / STATE).exists()

    def node_folder(self, node: Node) -> Path:
        """Folder of one shared state."""
        return self.nodes / node.trunk / node.id

    def node_meta(self, node: Node) -> dict | None:
        """What is known of a state, None where it is not stored."""
        path = self.node_folder(node) / "meta.json"
        return read_json(path) if path.exists() else None

    def write_node(self, node: Node, chunk: pd.DataFrame, state: bytes | None, meta: dict) -> None:
        """Put a state in its place, with the curve of the steps since its parent."""
        folder = self._partial(f"{node.trunk}-{node.id}")
        files = {"chunk.parquet": write_whole(folder / "chunk.parquet", parquet(chunk))}
        if state is not None:
            files[STATE] = write_whole(folder / STATE, state)
        write_json(folder / "meta.json", {**meta, "step": node.step, "files": files})
        self.node_folder(node).parent.mkdir(parents=True, exist_ok=True)
        replace_folder(folder, self.node_folder(node))

    def node_state(self, node: Node) -> dict:
        """The tensors of a state."""
        meta = self.node_meta(node)
        return tensors_of(read_whole(self.node_folder(node) / STATE, meta["files"][STATE]))

    def drop_state(self, node: Node) -> None:
        """Forget the tensors of a state but keep its curve."""
        (self.node_folder(node) / STATE).unlink(missing_ok=True)

    def curve_to(self, node: Node) -> pd.DataFrame:
        """The curve of a run that ends with a state, gathered along its ancestors: all that was logged of it, of them what was due."""
        chunks = []
        while node is not None:
            meta = self.node_meta(node)
            if meta is None:
                raise Damaged(f"{self.node_folder(node)} is missing though later states stand on it; drop them with "
                              "`etastar runs gc --states`")
            chunk = read_parquet(read_whole(self.node_folder(node) / "chunk.parquet", meta["files"]["chunk.parquet"]))
            chunks.append(passed(chunk, Observe.from_meta(meta)) if chunks else chunk)
            node = Node(node.trunk, *meta["parent"]) if meta["parent"] else None
        return pd.concat(chunks[::-1], ignore_index=True)

    def _partial(self, name: str) -> Path:
        folder = self.path / ".partial" / f"{name}.{threading.get_native_id()}"
        shutil.rmtree(folder, ignore_errors=True)
        while not folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another worker took the empty folder above away just now
                folder.mkdir(parents=True)
        return folder

    # -- upkeep ----------------------------------------------------------------------------------------------------

    def collect_garbage(self, states: bool = False, damaged: bool = False) -> list[str]:
        """Remove leftovers; with `states` all shared states, with `damaged` set damaged runs and states aside.

        Runs that a sweep began stay known and go on from their states, unless these are removed. StoreError while the store is in use.
        """
        if not self.path.is_dir():
            return []
        with self._alone():
            gone = [".partial", ".logs", *((".nodes", ".beside", ".unfinished") if states else self._ended())]
            gone = [name for name in gone if (self.path / name).exists()]
            for name in gone:
                shutil.rmtree(self.path / name) if (self.path / name).is_dir() else (self.path / name).unlink()
            done = [f"removed {name}" for name in gone]
            if damaged:
                for store in (self, *map(Store, self.path.glob(".beside/*/"))):
                    done += store._set_damaged_aside()
            return done

    def _ended(self) -> list[str]:
        """What is left of sweeps whose runs are all finished."""
        going_on = {path.stem for path in self.path.glob(".unfinished/*.json") if self._goes_on(path)}
        left = [*self.path.glob(".unfinished/*"), *self.path.glob(".beside/*")]
        return sorted(str(path.relative_to(self.path)) for path in left if path.stem not in going_on)

    def _goes_on(self, announced: Path) -> bool:
        with contextlib.suppress(Damaged):  # nobody misses it
            return not all(map(self.is_finished, read_json(announced)))
        return False

    def _set_damaged_aside(self) -> list[str]:
        aside = self.path / ".damaged"
        done = []
        for folder in [self.path / run_id for run_id in self.run_ids()] + sorted(self.nodes.glob("*/*/")):
            try:
                record = read_json(folder / ("meta.json" if folder.parent.parent == self.nodes else "summary.json"))
                for name, recorded in record["files"].items():
                    if name != STATE or (folder / name).exists():
                        read_whole(folder / name, recorded)
            except (Damaged, KeyError) as error:
                aside.mkdir(exist_ok=True)
                replace_folder(folder, aside / folder.name)
                done.append(f"set aside {folder.name}: {error}")
        return done


def _opened(lock: Path):
    try:
        lock.parent.mkdir(exist_ok=True)
        return open(lock, "a+")
    except OSError as error:
        raise StoreError(f"cannot write to the store: {lock}: {error.strerror}") from None


def again(look: Callable[[], Seen]) -> Seen:
    """What `look` sees; it looks twice where another process may have changed what it was looking at."""
    try:
        return look()
    except (Damaged, OSError):
        time.sleep(0.1)
        return look()
