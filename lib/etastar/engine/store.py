"""A store of runs on disk: one folder a run, shared states below `.nodes`, nothing half-written.

    store/RUN_ID/      recipe.json metrics.parquet validation.safetensors model.safetensors provenance.json summary.json
    store/.nodes/TRUNK/STEP-PREFIX/   meta.json chunk.parquet state.safetensors
    store/corpora.json                what each corpus held when its first run was trained
    store/execution.json              how each shape is computed, where that was chosen by measurement
    store/sweeps.jsonl                one line a sweep: its wall seconds, and those its workers spent by part
    store/.compiled/                  what torch.compile made

A run is done if and only if its summary is there and agrees with the files beside it.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
from pathlib import Path

import pandas as pd

from etastar.engine.checkpoint import Damaged, check_size, read_json, read_whole, tensors_of, write_json, write_whole
from etastar.engine.plan import Node
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.values import canonical_json

CURVE_COLUMNS = ("step", "tokens", "lr", "train_loss", "val_loss", "grad_norm")


class StoreError(ValueError):
    """A store that cannot be used as asked: in use, read-only, full, or made with another corpus."""


class Store:
    """The folder of a store; opening it creates nothing, `prepare()` does."""

    def __init__(self, path):
        self.path = Path(path)

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(self, needed_bytes: int = 0) -> None:
        """Create the folder and make sure it can hold `needed_bytes`; raises StoreError naming the folder."""
        try:
            self.nodes.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
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
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise StoreError(
                    f"the store {self.path} is in use by process {file.read().strip() or 'unknown'}; "
                    "wait for it to finish or choose another store"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
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
        write_json(self.path / "corpora.json", self.check_corpora(recipes))

    def held_execution(self) -> dict[str, dict]:
        """The way of computing chosen for each shape when its first run was trained: {stack key: choice}."""
        path = self.path / "execution.json"
        return read_json(path) if path.exists() else {}

    def hold_execution(self, chosen: dict[str, dict]) -> None:
        """Keep what was chosen, so that a resumed sweep has the same bits."""
        if chosen:
            write_json(self.path / "execution.json", {**chosen, **self.held_execution()})

    def log_sweep(self, told: dict) -> None:
        """Add a line to sweeps.jsonl: how long a call of `run` took and what its workers spent their seconds on."""
        with open(self.path / "sweeps.jsonl", "a") as file:
            file.write(json.dumps(told) + "\n")

    # -- runs ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Path:
        """Folder of the shared states."""
        return self.path / ".nodes"

    def run_ids(self) -> list[str]:
        """Ids of all finished runs."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.path)
                      if not entry.name.startswith(".") and os.path.exists(os.path.join(entry.path, "summary.json")))

    def summary(self, run_id: str) -> dict | None:
        """The summary of a finished run, None where there is none; Damaged where its files are not as recorded."""
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
        return read_whole(self.path / run_id / name, self.summary(run_id)["files"][name])

    def write_run(self, recipe: Recipe, files: dict[str, bytes], summary: dict) -> None:
        """Put a finished run in its place: all files first, the summary last, one rename."""
        folder, final = self._partial(recipe.run_id), self.path / recipe.run_id
        files = {"recipe.json": json.dumps(json.loads(recipe.to_json()), indent=1).encode(), **files}
        recorded = {name: write_whole(folder / name, data) for name, data in files.items()}
        write_json(folder / "summary.json", {**summary, "run_id": recipe.run_id, "files": recorded})
        _replace_folder(folder, final)

    def table(self) -> pd.DataFrame:
        """One row a finished run, from the summaries alone."""
        return pd.DataFrame([{k: v for k, v in read_json(self.path / run_id / "summary.json").items() if k != "files"}
                             for run_id in self.run_ids()])

    # -- shared states ---------------------------------------------------------------------------------------------

    def stored_nodes(self, trunk: str, observe: Observe) -> dict[str, dict]:
        """Meta by id of the states of one trunk that a run can start from: observed as asked, tensors there or diverged."""
        folder = self.nodes / trunk
        found = {}
        for entry in os.scandir(folder) if folder.is_dir() else ():
            meta = read_json(Path(entry.path) / "meta.json")
            has_state = os.path.exists(os.path.join(entry.path, "state.safetensors"))
            seen = Observe.from_meta(meta)
            if (has_state or meta["diverged_at"] is not None) and seen.covers(observe):
                if has_state:
                    check_size(Path(entry.path) / "state.safetensors", meta["files"]["state.safetensors"])
                found[entry.name] = meta
        return found

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
            files["state.safetensors"] = write_whole(folder / "state.safetensors", state)
        write_json(folder / "meta.json", {**meta, "step": node.step, "files": files})
        self.node_folder(node).parent.mkdir(parents=True, exist_ok=True)
        _replace_folder(folder, self.node_folder(node))

    def node_state(self, node: Node) -> dict:
        """The tensors of a state."""
        meta = self.node_meta(node)
        return tensors_of(read_whole(self.node_folder(node) / "state.safetensors", meta["files"]["state.safetensors"]))

    def drop_state(self, node: Node) -> None:
        """Forget the tensors of a state but keep its curve."""
        (self.node_folder(node) / "state.safetensors").unlink(missing_ok=True)

    def curve_to(self, node: Node) -> pd.DataFrame:
        """The curve of all steps up to a state, gathered along its ancestors."""
        chunks = []
        while node is not None:
            meta = self.node_meta(node)
            if meta is None:
                raise Damaged(f"{self.node_folder(node)} is missing though later states stand on it; drop them with "
                              "`etastar runs gc --states`")
            chunks.append(read_parquet(read_whole(self.node_folder(node) / "chunk.parquet", meta["files"]["chunk.parquet"])))
            node = Node(node.trunk, *meta["parent"]) if meta["parent"] else None
        return pd.concat(chunks[::-1], ignore_index=True)

    def _partial(self, name: str) -> Path:
        folder = self.path / ".partial" / f"{name}.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    # -- upkeep ----------------------------------------------------------------------------------------------------

    def collect_garbage(self, states: bool = False, damaged: bool = False) -> list[str]:
        """Remove leftovers; with `states` all shared states, with `damaged` set damaged runs and states aside."""
        done = []
        for leftover in (".partial", ".logs", *([".nodes"] if states else [])):
            if (self.path / leftover).exists():
                shutil.rmtree(self.path / leftover)
                done.append(f"removed {leftover}")
        if damaged:
            done += self._set_damaged_aside()
        return done

    def _set_damaged_aside(self) -> list[str]:
        aside = self.path / ".damaged"
        done = []
        for folder in [self.path / run_id for run_id in self.run_ids()] + sorted(self.nodes.glob("*/*/")):
            try:
                record = read_json(folder / ("meta.json" if folder.parent.parent == self.nodes else "summary.json"))
                for name, recorded in record["files"].items():
                    if name != "state.safetensors" or (folder / name).exists():
                        read_whole(folder / name, recorded)
            except (Damaged, KeyError) as error:
                aside.mkdir(exist_ok=True)
                _replace_folder(folder, aside / folder.name)
                done.append(f"set aside {folder.name}: {error}")
        return done


def parquet(frame: pd.DataFrame) -> bytes:
    """A table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def read_parquet(data: bytes) -> pd.DataFrame:
    """The table in the bytes of a parquet file."""
    return pd.read_parquet(io.BytesIO(data))


def _replace_folder(partial: Path, final: Path) -> None:
    """Rename a folder into place; one that is already there holds the same bits and makes way."""
    _sync(partial)
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = partial.with_name(partial.name + ".old")
        os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()  # when nobody else is writing


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
