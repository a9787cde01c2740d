"""Running a sweep: check everything that can be known, plan, have it trained where nobody is disturbed, collect runs."""

import dataclasses
import functools
import sys
import time

import torch
from tqdm.auto import tqdm

from etastar.cores import cores
from etastar.engine import run as runs
from etastar.engine.beside import Beside
from etastar.engine.dispatch import Dispatch, WorkerFailed, train_in_processes, train_inline
from etastar.engine.layout import gpu_slots
from etastar.engine.plan import Node, Segment, build_segments
from etastar.engine.slots import stack_key
from etastar.engine.store import Store
from etastar.engine.tuning import slots_chosen, tuned
from etastar.model.shapes import count_parameters
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.schedules import Branch
from etastar.text.batches import check_fits
from etastar.text.corpora import prepare
from etastar.values import digest

TRIES = 5  # at linking a state before the sweep that made it drops it; after these an earlier one has to do
STATES_A_SEGMENT = 4  # parameters, two moments and a run's own model: float32 copies written to disk


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Recipes resolved for a device, with what the store lacks of them: the whole of what `run` is about to do."""

    recipes: tuple[Recipe, ...]
    finished: dict[str, runs.Run]
    segments: list[Segment]
    diverged: frozenset[tuple[str, str]]
    store: Store
    observe: Observe
    chosen: dict[str, dict] = dataclasses.field(default_factory=dict)  # by the plain shape's stack key; "auto" fills it

    @functools.cached_property
    def missing(self) -> dict[str, Recipe]:
        """Recipes without a finished run, by id."""
        return {run_id: r for r in self.recipes if (run_id := r.run_id) not in self.finished}

    @functools.cached_property
    def roots(self) -> set[Node]:
        """Stored states that segments start from."""
        made = {segment.node for segment in self.segments if segment.start < segment.stop}
        return {segment.parent for segment in self.segments} - made - {None}

    @functools.cached_property
    def name(self) -> str:
        """The same for the same recipes, whatever of them is finished."""
        return digest(sorted({r.run_id for r in self.recipes}))


def prepare_sweep(recipes, store="runs", device=None, observe=None, execution=None, later=()) -> Sweep:
    """Resolve recipes for a device and compare them with a store; raises for whatever can be known to fail.

    Device None means what the recipes say. Execution None means the same; "auto" puts in the way of computing that is
    fastest on this machine's CPU by measurement, for recipes that say nothing else. `later` are recipes to come.
    """
    if execution not in (None, "auto"):
        raise ValueError(f'execution must be None (as the recipes say) or "auto" (by measurement); got {execution!r}')
    if not recipes:
        raise ValueError("no recipes to run; a study's recipes(preset) or a list of etastar.Recipe is needed")
    observe = observe or Observe()
    resolved = tuple(resolve(recipe, device) for recipe in [*recipes, *later])
    store, chosen = Store.at(store), {}
    store.check_corpora(resolved)
    for recipe in {stack_key(r) + str(r.horizon_tokens): r for r in resolved}.values():
        check_fits(prepare(recipe.corpus), recipe)
    if execution == "auto":
        resolved, chosen = tuned(resolved, cores(), store.held_execution())
    resolved, later = tuple(resolved[: len(recipes)]), resolved[len(recipes) :]
    finished, metas = {}, {}
    by_id = {r.run_id: r for r in resolved}
    for run_id, recipe in by_id.items():
        if (found := runs.read_run(store, recipe, observe)) is not None:
            finished[run_id] = found

    def stored(trunk):
        metas.setdefault(trunk, store.stored_nodes(trunk, observe))
        return {name: meta["step"] for name, meta in metas[trunk].items()}

    segments = build_segments([r for run_id, r in by_id.items() if run_id not in finished], stored, later)
    diverged = frozenset((trunk, name) for trunk, found in metas.items() for name, meta in found.items()
                         if meta["diverged_at"] is not None)
    return Sweep(resolved, finished, segments, diverged, store, observe, chosen)


def resolve(recipe: Recipe, device: str | None) -> Recipe:
    """The recipe as it is computed on a device; ValueError where the device is not there."""
    if device is not None and device != recipe.execution.device:
        recipe = recipe.replace(execution=dataclasses.replace(recipe.execution, device=device))
    if recipe.execution.device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device "cuda" was asked for but torch sees no GPU; use device="cpu" or install a CUDA build of torch')
    return recipe


def run(recipes, store="runs", backend="local", device=None, workers=None, observe=None, slots=None, progress=True,
        snapshot_seconds=60.0, execution=None, beside=False, later=()) -> list[runs.Run]:
    """Train what the store lacks of these recipes and return their runs in order.

    `backend` "local" uses `workers` one-thread processes (default: one a core; on a GPU one process with a stack),
    "inline" this process. `slots` is the stack a worker trains in step (default 1 on a CPU, 2 to 8 where steps are tiny). `observe`
    says what to look at on the way. `execution` "auto" computes recipes that leave it open in the way that is fastest here by
    measurement (parts of a batch, torch.compile); what was chosen first is held by the store, since it decides bits. Finished runs
    are not run again; an interrupted sweep goes on where it was. One sweep at a time trains in a store; `beside` trains next to it,
    from the states it has stored by now and without touching it, and puts the runs into the store when they are finished. `later`
    are recipes that are not trained now: states are kept where they will leave these runs, so that they need not train so far again.
    Raises ValueError (StoreError, Damaged) before training for what can be known, WorkerFailed where a worker died.
    """
    if backend not in ("local", "inline"):
        raise ValueError(f'unknown backend {backend!r}; known: "local" (worker processes), "inline" (this process)')
    _check_layout(workers, slots)
    plan = functools.partial(prepare_sweep, recipes, device=device, observe=observe, execution=execution, later=later)
    train = functools.partial(_train, backend=backend, workers=workers, slots=slots, progress=progress, snapshot_seconds=snapshot_seconds)
    sweep = (_run_beside if beside else _run_alone)(Store.at(store), plan, train)
    found = [sweep.finished.get(r.run_id) or runs.read_run(sweep.store, r, sweep.observe) for r in sweep.recipes]
    lost = [r.run_id for r, run_ in zip(sweep.recipes, found, strict=True) if run_ is None]
    if lost:
        raise WorkerFailed(f"{len(lost)} runs are not in the store {sweep.store.path} though their training ended, {lost[0]} first; "
                           "was the package changed while it ran? Run again: what is there is not trained again")
    return found


def _run_alone(store: Store, plan, train) -> Sweep:
    """Train in the store itself, as the only one who does."""
    sweep = plan(store)
    if sweep.segments:
        store.prepare(disk_bytes(sweep.segments))
        with store.locked():
            if not all(_stands(sweep, node) for node in sweep.roots):  # a sweep that has ended since took its snapshots with it
                sweep = plan(store)
            _note(sweep)
            with store.announced(sweep.name, sweep.missing):
                train(sweep)
    return sweep


def _run_beside(store: Store, plan, train) -> Sweep:
    """Train in a place of one's own within the store, from states linked into it, and hand over what is finished."""
    sweep = plan(store)
    if sweep.segments:
        store.prepare(disk_bytes(sweep.segments))
        name = f"{sweep.name}-beside"  # the same recipes may be trained in the store too
        aside = Beside(store, name)
        with aside.locked():
            aside.prepare()
            for _ in range(TRIES):
                if aside.take(sweep.roots):
                    break
                sweep = plan(store)  # the sweep that is running has gone on, and has dropped a snapshot for a later one
            _note(sweep)
            with store.announced(name, sweep.missing):
                try:
                    if sweep.missing:
                        train(_seen_from(aside, sweep))
                finally:
                    aside.hand_over(sweep.missing, sweep.observe)
    return sweep


def _seen_from(aside: Beside, sweep: Sweep) -> Sweep:
    """The same sweep, planned on the states in another place."""
    own = prepare_sweep(list(sweep.missing.values()), aside, observe=sweep.observe)
    return dataclasses.replace(own, recipes=sweep.recipes, finished=sweep.finished | own.finished, chosen=sweep.chosen)


def _stands(sweep: Sweep, node: Node) -> bool:
    return (node.trunk, node.id) in sweep.diverged or sweep.store.has_state(node)


def _note(sweep: Sweep) -> None:
    sweep.store.remember_corpora(sweep.recipes)
    sweep.store.hold_execution(sweep.chosen)


def _train(sweep: Sweep, backend, workers, slots, progress, snapshot_seconds) -> None:
    """Train all segments of a sweep into its store."""
    if not sweep.segments:
        return
    workers, slots = default_layout(sweep, workers, slots)
    if progress:
        _tell_again(sweep)
    dispatch = Dispatch(sweep, slots)
    with tqdm(total=dispatch.tokens, unit="tok", unit_scale=True, disable=not progress, smoothing=0.05,
              desc=f"{len(sweep.missing)} runs", mininterval=0.5) as bar:
        dispatch.bar = bar
        began = time.perf_counter()
        try:
            if backend == "inline":
                train_inline(dispatch, snapshot_seconds)
            else:
                train_in_processes(dispatch, workers, snapshot_seconds)
        finally:
            sweep.store.log_sweep({
                "runs": len(sweep.missing), "tokens": dispatch.trained, "workers": workers, "slots": sorted(set(slots.values())),
                "wall_s": round(time.perf_counter() - began, 2), **{k: round(v, 2) for k, v in sorted(dispatch.clock.items())}})


def _tell_again(sweep: Sweep) -> None:
    """Say how much of what branches leave is trained here, because the state at the branch point is not stored."""
    for segment in sweep.segments:
        if isinstance(segment.recipe.schedule, Branch) and (segment.parent is None or segment.parent in sweep.roots):
            start, at = segment.start * segment.recipe.batch_tokens, segment.recipe.schedule.at_tokens
            if start < at:
                begin = f"from the state after {start:,}" if start else "from the first step"
                print(f"no state is stored after the {at:,} tokens at which a branch leaves its run: the {at - start:,} before it are "
                      f"trained here, {begin}, with the same bits", file=sys.stderr)


def default_layout(sweep: Sweep, workers: int | None, slots: int | None) -> tuple[int, dict[str, int]]:
    """Workers, and by stack key how many runs of a shape one of them trains in step; never more than there is work.

    On a CPU workers are one-thread processes, on a GPU one process with a stack.
    """
    _check_layout(workers, slots)
    shapes: dict[str, list[Segment]] = {}
    for segment in sweep.segments:
        shapes.setdefault(stack_key(segment.recipe), []).append(segment)
    if sweep.segments[0].recipe.execution.device == "cuda":
        return workers or 1, {key: slots or gpu_slots([s.recipe for s in members]) for key, members in shapes.items()}
    workers = min(workers or cores(), len(sweep.segments))
    return workers, {key: slots or slots_chosen(members, workers, sweep.chosen) for key, members in shapes.items()}


def _check_layout(workers: int | None, slots: int | None) -> None:
    if (workers is not None and workers < 1) or (slots is not None and slots < 1):
        raise ValueError(f"workers and slots must be at least 1; got workers={workers}, slots={slots}")


def disk_bytes(segments: list[Segment]) -> int:
    """Bytes the states, models and curves of these segments will take."""
    total = 0
    for segment in segments:
        params = count_parameters(segment.recipe.model, segment.recipe.corpus.vocab)["total"]
        total += params * 4 * STATES_A_SEGMENT + (segment.stop - segment.start) * 40 + 20_000
    return total
