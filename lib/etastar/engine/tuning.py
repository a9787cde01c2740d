"""Which way of computing a shape is fastest here: batch whole or in parts, eager or compiled, one run a worker or a few.

Chosen by measurement, kept in the cache folder, and held by a store for its whole life: parts and compilation decide bits.
"""

import dataclasses

import pandas as pd

from etastar.engine.measure import measured_ways
from etastar.engine.plan import Segment, schedule_length
from etastar.engine.slots import stack_key
from etastar.recipe import Execution, Recipe
from etastar.values import decode, encode

WAY_SECONDS = 1.0
PART_TOKENS = (1024, 2048)  # a part of a batch whose activations a core's cache may hold
STACKS = (1, 4)
SMALL_STEP = 2**15  # floats of a residual stream: from there down, runs in step save a tenth to two thirds of the time (LOG.md)
FIXED_STEP = 2**13  # floats that take as long as what a step costs whatever is in it
MOST_IN_STEP, MOST_FLOATS = 8, 2**16  # of all runs in step: more leave the cache
LEAST_GAIN = 0.05  # another way than the plain one must save this share of the time
COMPILE_SECONDS = 300.0  # compiling costs up to a minute and saves up to a quarter: shorter sweeps need not ask


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way of computing a shape: what goes into the recipe, runs a worker trains in step, and all that was measured."""

    execution: Execution
    slots: int
    table: pd.DataFrame

    def as_dict(self) -> dict:
        """What a store holds."""
        return {"execution": encode(self.execution), "slots": self.slots}


def choose(recipe: Recipe, tokens: int, workers: int) -> Choice:
    """The fastest way to train `tokens` tokens of a recipe's shape with `workers` processes on this machine's CPU.

    Takes some ten seconds the first time, a minute where the sweep is long enough to ask the compiler.
    """
    ways = eager_ways(recipe)
    rows = _timed(ways, tokens, workers)
    if recipe.model.mixture is None and rows.seconds.iloc[0] > COMPILE_SECONDS:
        compiled = _with(recipe, recipe.execution.micro_batch_sequences, True)
        ways.append((compiled, 1))
        rows = pd.concat([rows, _timed(ways[-1:], tokens, workers)], ignore_index=True)
    best = int(rows.seconds.idxmin())
    best = best if rows.seconds[best] < (1 - LEAST_GAIN) * rows.seconds[0] else 0
    rows["chosen"] = rows.index == best
    return Choice(ways[best][0].execution, ways[best][1], rows)


def eager_ways(recipe: Recipe) -> list[tuple[Recipe, int]]:
    """(recipe, slots) to be timed, the plain one first: stacks of the whole batch, and the batch in parts.

    Not in parts where experts are balanced: the load of a part is not that of the batch, and another loss would be trained.
    """
    whole = recipe.model.mixture is not None and recipe.model.mixture.balance > 0
    sizes = [] if whole else [size for tokens in PART_TOKENS if (size := _part(recipe, tokens)) is not None]
    return [(recipe, slots) for slots in STACKS] + [(_with(recipe, size, False), 1) for size in sorted(set(sizes))]


def _part(recipe: Recipe, tokens: int) -> int | None:
    """Sequences of a part that divides the batch and holds about so many tokens; None where that is the whole batch."""
    most = max(1, tokens // recipe.model.context)
    size = max(n for n in range(1, most + 1) if recipe.batch_sequences % n == 0)
    return size if size < recipe.batch_sequences else None


def _with(recipe: Recipe, micro: int | None, compiled: bool) -> Recipe:
    return recipe.replace(execution=dataclasses.replace(recipe.execution, micro_batch_sequences=micro, compiled=compiled))


def _timed(ways, tokens: int, workers: int) -> pd.DataFrame:
    """One row a way: its options, tokens a second over all workers, seconds to the first step, seconds for it all."""
    rows = []
    for (recipe, slots), told in zip(ways, measured_ways(ways, workers, WAY_SECONDS), strict=True):
        rate = workers * slots * recipe.batch_tokens / told["step"]
        rows.append({"compiled": recipe.execution.compiled, "micro_batch_sequences": recipe.execution.micro_batch_sequences,
                     "slots": slots, "tokens_per_s": rate, "start_s": told["start"], "seconds": told["start"] + tokens / rate})
    return pd.DataFrame(rows)


def slots_chosen(segments: list[Segment], workers: int, chosen: dict[str, dict]) -> int:
    """Runs a worker trains in step: what was chosen for the shape of these segments, else as many as end them soonest.

    Steps that are not very small are best trained one run at a time. For small ones it is a matter of their fixed cost against
    workers that are left with a few runs at the end.
    """
    recipe = segments[0].recipe
    held = chosen.get(stack_key(recipe.replace(execution=Execution())))
    if held is not None:
        return max(1, min(held["slots"], len(segments) // workers))
    floats = recipe.model.width * recipe.batch_tokens

    def length(slots: int) -> float:
        seconds = {s.node.id: (s.stop - s.start) * (FIXED_STEP / floats + slots) for s in segments}
        return schedule_length(segments, seconds, workers, slots)

    most = 1 if floats > SMALL_STEP else min(MOST_IN_STEP, MOST_FLOATS // floats, -(-len(segments) // workers))
    return min(range(1, most + 1), key=length)


def tuned(recipes: list[Recipe], workers: int, held: dict[str, dict]) -> tuple[list[Recipe], dict[str, dict]]:
    """Recipes with the way chosen for their shape put in, and what is to be held by the store: {stack key: choice}.

    A recipe that says itself how to be computed (parts, compiled, another precision, a GPU) is left as it is, and what
    `held` names stays.
    """
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.execution == Execution():
            groups.setdefault(stack_key(recipe), []).append(recipe)
    chosen = dict(held)
    for key, members in groups.items():
        if key not in chosen:
            chosen[key] = choose(members[0], sum(r.horizon_tokens for r in members), workers).as_dict()
    ways = {key: decode(choice["execution"]) for key, choice in chosen.items()}
    return [r.replace(execution=ways.get(stack_key(r), r.execution)) if r.execution == Execution() else r for r in recipes], chosen
