"""The plan of a sweep: a trie over control prefixes, so that steps shared by several runs are trained once.

The state after t steps is a function of the trunk (everything in a recipe but its controls) and of the first t
entries of the control arrays, learning rate and beta2. The horizon is not in it: two recipes share every step up to the
first at which an array differs, whatever their schedules are called.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from etastar.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Node:
    """The state after `step` steps under one control prefix; `id` names it in a store."""

    trunk: str
    step: int
    prefix: str

    @property
    def id(self) -> str:
        """Folder of the node below its trunk's."""
        return f"{self.step:08d}-{self.prefix}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps `start` … `stop` − 1 of every run that passes through: the unit of work.

    `parent` is the state it starts from (None: the initial parameters), `recipe` any recipe that passes through, and
    `ends` the run ids that end at `stop`.
    """

    recipe: Recipe
    start: int
    stop: int
    parent: Node | None
    node: Node
    ends: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens trained in this segment."""
        return (self.stop - self.start) * self.recipe.batch_tokens


def controls(recipe: Recipe) -> np.ndarray:
    """The control arrays, float64 (total_steps, 2): at each step the rate, and −beta2 where it is not the optimizer's own, else −inf."""
    beta2_S = recipe.beta2()
    return np.stack([recipe.lr(), np.where(beta2_S == recipe.optimizer.beta2, _NOT_MOVED, -beta2_S)], axis=1)


def control_bytes(controls_Sx2: np.ndarray) -> bytes:
    """A stretch of the control arrays as nodes are named by it: float64, little-endian, step by step what was moved.

    A step at the optimizer's own beta2 is its rate alone, as before beta2 could move; the sign tells another one from a rate.
    """
    return np.ascontiguousarray(controls_Sx2[controls_Sx2 != _NOT_MOVED], dtype="<f8").tobytes()


def prefix_hash(controls_Sx2: np.ndarray) -> "hashlib._Hash":
    """Running sha256 over a control prefix; rates alone, (S,), do where beta2 does not move."""
    return hashlib.sha256(control_bytes(controls_Sx2))


_NOT_MOVED = -np.inf


def build_segments(recipes: list[Recipe], stored=lambda trunk: {}, later: Sequence[Recipe] = ()) -> list[Segment]:
    """Segments that have to be trained, parents before children, cut also where the recipes to come, `later`, will leave them.

    `stored(trunk)` maps node ids to steps of the states a store already has; a run starts from the deepest of them on
    its path. Every distinct (trunk, prefix) of the recipes that is not covered so is trained exactly once.
    """
    by_trunk: dict[str, dict[str, Recipe]] = defaultdict(dict)
    wanted = {recipe.run_id: recipe for recipe in recipes}
    for run_id, recipe in (wanted | {recipe.run_id: recipe for recipe in later}).items():
        by_trunk[recipe.trunk_id][run_id] = recipe
    segments = []
    for trunk, members in by_trunk.items():
        segments += _pending(_trie(trunk, members, stored(trunk), set(wanted)), set(stored(trunk)))
    return segments


def _trie(trunk: str, recipes: dict[str, Recipe], known: dict[str, int], wanted: set[str]) -> list[Segment]:
    """All segments of one trunk, parents first, cut where paths part, where runs end and at stored states."""
    arrays = {run_id: controls(recipe) for run_id, recipe in recipes.items()}
    cuts = sorted(set(known.values()))
    found = []
    open_groups = [(list(arrays), 0, None, hashlib.sha256())]
    while open_groups:
        members, start, parent, hasher = open_groups.pop()
        stop = _common_length([arrays[m] for m in members], start)
        ends = tuple(m for m in members if len(arrays[m]) == stop and m in wanted)
        follow = _split([m for m in members if len(arrays[m]) > stop], arrays, stop)
        recipe, moved = recipes[members[0]], arrays[members[0]]
        for cut in [c for c in cuts if start < c < stop] + [stop] * (stop > start):  # none where paths part at once
            hasher.update(control_bytes(moved[start:cut]))
            node = Node(trunk, cut, hasher.hexdigest()[:16])
            last = cut == stop
            if last or node.id in known:
                begin = parent.step if parent else 0
                found.append(Segment(recipe, begin, cut, parent, node, ends if last else ()))
                parent = node
            start = cut
        open_groups += [(group, stop, parent, hasher.copy()) for group in follow]
    return found


def _common_length(arrays: list[np.ndarray], start: int) -> int:
    """First step at which the arrays differ or one of them ends, from `start` on."""
    first, stop = arrays[0], min(len(a) for a in arrays)
    for other in arrays[1:]:
        differs = np.flatnonzero(first[start:stop] != other[start:stop])
        if differs.size:
            stop = start + int(differs[0]) // 2
    return stop


def _split(members: list[str], arrays: dict[str, np.ndarray], step: int) -> list[list[str]]:
    groups: dict[bytes, list[str]] = defaultdict(list)
    for member in members:
        groups[arrays[member][step].tobytes()].append(member)
    return list(groups.values())


def _pending(segments: list[Segment], known: set[str]) -> list[Segment]:
    """The segments that lead from a stored state (or the start) to an end of a run, parents first.

    A run that ends at a stored state but was not put in its folder keeps a segment without steps, to do just that.
    """
    needed: set[str] = set()
    pending = []
    for segment in reversed(segments):
        if segment.node.id in known:
            if segment.ends:
                pending.append(dataclasses.replace(segment, start=segment.stop, parent=segment.node))
        elif segment.ends or segment.node.id in needed:
            pending.append(segment)
            if segment.parent is not None:
                needed.add(segment.parent.id)
    return pending[::-1]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a plan asks for: counts, tokens with and without sharing, training FLOPs, bytes on disk and seconds."""

    runs: int
    done: int
    segments: int
    steps: int
    tokens: int
    tokens_without_sharing: int
    flops: float
    disk_bytes: int
    seconds: float | None
    workers: int

    def as_dict(self) -> dict:
        """Field by field, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self):
        share = self.tokens_without_sharing / self.tokens if self.tokens else 1.0
        time = "unknown" if self.seconds is None else f"{self.seconds / 60:.1f} min on {self.workers} worker(s)"
        return "\n".join([
            f"runs            {self.runs} ({self.done} done already)",
            f"segments        {self.segments} ({self.steps:,} steps)",
            f"tokens          {self.tokens / 1e6:.2f}M ({self.tokens_without_sharing / 1e6:.2f}M without sharing, "
            f"{share:.2f}×)",
            f"training FLOPs  {self.flops:.3g}",
            f"disk            {self.disk_bytes / 2**20:.0f} MiB",
            f"expected time   {time}",
        ])


def schedule_length(segments: list[Segment], seconds: dict[str, float], workers: int, slots: int = 1) -> float:
    """Seconds until the last segment ends when `workers` greedy workers take ready segments longest path first.

    `seconds` maps node ids to the time of the segment that ends there; a stack of `slots` counts as that many workers.
    """
    lanes = [0.0] * max(1, workers * slots)
    ready_at = {None: 0.0}
    for segment in critical_order(segments, seconds):
        lane = min(range(len(lanes)), key=lanes.__getitem__)
        begin = max(lanes[lane], ready_at.get(segment.parent.id if segment.parent else None, 0.0))
        lanes[lane] = ready_at[segment.node.id] = begin + seconds[segment.node.id]
    return max(lanes)


def critical_order(segments: list[Segment], seconds: dict[str, float]) -> list[Segment]:
    """Segments by the length of the longest path that starts with them, longest first: parents before children."""
    tail: dict[str, float] = defaultdict(float)
    for segment in reversed(segments):
        tail[segment.node.id] += seconds[segment.node.id]
        if segment.parent is not None and segment.parent != segment.node:
            tail[segment.parent.id] = max(tail[segment.parent.id], tail[segment.node.id])
    return sorted(segments, key=lambda s: -tail[s.node.id])
