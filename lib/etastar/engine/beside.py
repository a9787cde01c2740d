"""A place to train in beside a sweep: a store of its own within the store, from which finished runs move into it.

A sweep drops the snapshots it has passed, and may put any state of its own in its place again. So those beside it train in a
folder that nobody else writes to, from states linked into it, and give the store only what is not there yet.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from etastar.engine.checkpoint import read_json, read_whole, write_json, write_whole
from etastar.engine.folders import add_folder, link, replace_folder
from etastar.engine.plan import Node
from etastar.engine.run import read_run
from etastar.engine.store import STATE, Store, again, parquet
from etastar.observe import Observe
from etastar.recipe import Recipe


class Beside(Store):
    """The store of one sweep beside others, below `.beside`; the same sweep finds what it left there when it was killed."""

    def __init__(self, home: Store, sweep: str):
        super().__init__(home.beside(sweep))
        self._home = home

    @property
    def home(self) -> Store:
        return self._home

    @property
    def lock_file(self) -> Path:
        return self.path.with_suffix(".lock")  # outside, for the folder goes when all is done

    def _in_use(self, holder: str) -> str:
        return f"these very runs are being trained beside the store {self._home.path} by process {holder}; wait for it to finish"

    def take(self, nodes: Iterable[Node]) -> bool:
        """Link states of the store into this one, each with the whole curve up to it; False where the tensors of one are gone."""
        for node in nodes:
            if self.has_state(node):
                continue
            try:
                folder = again(lambda node=node: self._packed(self._home, node, "taken"))
            except FileNotFoundError:
                return False
            self.node_folder(node).parent.mkdir(parents=True, exist_ok=True)
            replace_folder(folder, self.node_folder(node))
        return True

    def hand_over(self, recipes: dict[str, Recipe], observe: Observe) -> None:
        """Put finished runs into the store, after states and windows; once all of `recipes` are there this folder goes."""
        for folder in sorted(self.nodes.glob("*/*/")):
            step, prefix = folder.name.split("-")
            node, kind = Node(folder.parent.name, int(step), prefix), read_json(folder / "meta.json")["kind"]
            passed = kind == "taken" or (kind == "snapshot" and not self.has_state(node))
            if not passed and self._home.node_meta(node) is None:
                self._home.node_folder(node).parent.mkdir(parents=True, exist_ok=True)
                add_folder(folder if kind == "window" else self._packed(self, node, kind), self._home.node_folder(node))
        for run_id in self.run_ids():
            if read_run(self._home, recipes[run_id], observe) is None:
                replace_folder(self.path / run_id, self._home.path / run_id)
        if all(read_run(self._home, recipe, observe) is not None for recipe in recipes.values()):
            shutil.rmtree(self.path)

    def _packed(self, source: Store, node: Node, kind: str) -> Path:
        """A folder, not yet in place, that holds a state of a store and needs no other: the curve in it is all up to there."""
        folder, meta, files = self._partial(f"{node.trunk}-{node.id}"), source.node_meta(node), {}
        if meta["diverged_at"] is None:
            link(source.node_folder(node) / STATE, folder / STATE)
            read_whole(folder / STATE, meta["files"][STATE])
            files[STATE] = meta["files"][STATE]
        files["chunk.parquet"] = write_whole(folder / "chunk.parquet", parquet(source.curve_to(node)))
        write_json(folder / "meta.json", meta | {"kind": kind, "parent": None, "files": files})
        return folder
