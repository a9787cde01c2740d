"""Which small runs tell most of the large one for the time there is: a power plan over widths, batches, horizons and seeds.

Of all designs that the budget pays for, the one with the narrowest expected interval of the answer is taken. Its width is that of a
power law fitted to vertices of which a seed's has the sd `VERTEX_SD`, and of an exponent that drifts by `LEAST_DRIFT` beyond the
runs: more seeds narrow the first, longer horizons (larger batches and widths) the second.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.optimize import nnls

from etastar.model.shapes import flops_per_token
from etastar.recipe import Recipe
from etastar.tune.question import LEAST_HORIZONS, Ladder, Question

VERTEX_SD = 0.24  # octaves; of a seed's vertex over five rates at width 32, in docs/tune.md (0.16 in study 01)
LEAST_DRIFT = 0.1  # a declared choice, not a measurement: 95 % of exponents beyond the runs lie within ±0.2 of the fitted one
SCOUT_LOG2 = range(-12, -2)  # rates of the scouts, an octave apart
SCOUT_SEED, FIRST_SEED = 0, 4000  # a pilot seed chooses the grid, others are judged
EXPECTED_SLOPE = -0.35  # of log2 rate over log2 tokens; centres a ladder's grid and decides nothing else
VALIDATION_TOKENS = 2**16  # at the end of every run, as text.batches.validation_batches takes them
MOST_HORIZONS, MOST_SEEDS = 6, 8
STUDENT = {seeds: float(stats.t.ppf(0.975, seeds - 1)) for seeds in range(2, MOST_SEEDS + 1)}  # of a 95 % interval over seeds
LEAST_HEADS, LEAST_SEQUENCES = 2, 4  # of small runs that are not the asked width or batch: one head, one sequence are another thing
NORMAL = float(stats.norm.ppf(0.975))
RESERVE = 0.8  # of the budget is planned for; the rest is for grids that have to be extended
ROUNDS = 5  # of choosing a design and timing it


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be trained: ladders (the first is the main one) and seeds, with the seconds it takes and the interval to expect.

    `expected_octaves` is half the 95 % interval of the answer's log2 rate, as planned for; `extrapolated` the part of it that stems
    from extrapolation.
    """

    question: Question
    ladders: tuple[Ladder, ...]
    seed_count: int
    budget_seconds: float
    seconds: float
    expected_octaves: float
    extrapolated: float

    @property
    def seeds(self) -> list[int]:
        """The seeds that are judged."""
        return [FIRST_SEED + i for i in range(self.seed_count)]

    def scouts(self) -> list[Recipe]:
        """One seed over a coarse grid at the shortest horizon of every ladder: where its own grid is to lie."""
        return [self.question.small(ladder, ladder.horizons[0], 2.0**k, SCOUT_SEED, self.base_width)
                for ladder in self.ladders for k in SCOUT_LOG2]

    def recipes(self, centres: dict[str, float]) -> list[Recipe]:
        """The runs that are judged; `centres` are log2 rates by the name of a ladder."""
        return [self.question.small(ladder, horizon, 2.0 ** (centres[ladder.name] + offset), seed, self.base_width)
                for ladder in self.ladders for horizon in ladder.horizons[::-1] for offset in ladder.offsets for seed in self.seeds]

    @property
    def unscouted(self) -> dict[str, float]:
        """Centres to count costs with, before the scouts have told any."""
        return {ladder.name: float(np.mean(SCOUT_LOG2)) for ladder in self.ladders}

    @property
    def base_width(self) -> int:
        """Width at which μP is SP, where the question names none."""
        return self.question.base_width or self.ladders[0].width

    def ladder_of(self, recipe: Recipe) -> str:
        """The name of the ladder a run belongs to."""
        return Ladder(recipe.model.width, recipe.batch_tokens, ()).name

    def as_dict(self) -> dict:
        """Field by field, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"question": self.question.as_dict(), "ladders": [dataclasses.asdict(ladder) for ladder in self.ladders]}

    def __str__(self):
        lines = [f"{ladder.name}: horizons {', '.join(f'{h / 1e6:.3g}M' for h in ladder.horizons)} tokens, "
                 f"{len(ladder.offsets)} rates, {self.seed_count} seeds" for ladder in self.ladders]
        runs = self.seed_count * sum(len(ladder.offsets) * len(ladder.horizons) for ladder in self.ladders)
        return "\n".join([*lines, f"{runs} runs, after {len(self.ladders) * len(SCOUT_LOG2)} scouts at the shortest horizon; about "
                          f"{self.seconds / 60:.1f} min of a budget of {self.budget_seconds / 60:.3g}",
                          f"expected 95 % interval of the answer: × or ÷ {2**self.expected_octaves:.2g}, of which extrapolation alone "
                          f"× or ÷ {2**self.extrapolated:.2g}"])


def make_plan(question: Question, budget_seconds: float, epoch_tokens: int, seconds_of: Callable[[list[Recipe]], float]) -> Plan:
    """The design with the narrowest expected interval that the budget pays for.

    `epoch_tokens` is what one epoch of the corpus holds, `seconds_of` the time recipes take (engine.speed.cost, in `tune`). Raises
    ValueError where one epoch is too short for the least design, or the budget, with the least minutes.
    """
    if not 0 < budget_seconds < math.inf:
        raise ValueError(f"the budget must be positive; got {budget_seconds:g} seconds")
    designs = list(_designs(question, epoch_tokens))
    if not designs:
        least = 2 ** (LEAST_HORIZONS - 1) * question.least_steps * min((*question.small_batch_tokens, question.batch_tokens))
        raise ValueError(f"one epoch of {question.corpus.source!r} has {epoch_tokens:,} tokens, too few for {LEAST_HORIZONS} horizons of "
                         f"{question.least_steps} steps and more without repetition ({least:,} at batches of the run itself, fewer at "
                         "smaller small_batch_tokens); give a larger corpus or smaller batches")
    budget, designs = RESERVE * budget_seconds, sorted(designs, key=lambda d: (d.expected, d.flops))
    timed = {d: _timed(question, d, budget_seconds, seconds_of)
             for d in (min(designs, key=lambda d: d.steps), min(designs, key=lambda d: d.flops))}
    for _ in range(ROUNDS):
        estimates = _estimates(designs, timed)
        within = np.flatnonzero(estimates <= budget)
        chosen = designs[within[0] if len(within) else int(np.argmin(estimates))]
        if chosen in timed:
            break
        timed[chosen] = _timed(question, chosen, budget_seconds, seconds_of)
    fit = [plan for plan in timed.values() if plan.seconds <= budget]
    if not fit:
        least = min(plan.seconds for plan in timed.values())
        raise ValueError(f"a budget of {budget_seconds / 60:.3g} min is too small: the least plan takes about {least / 60:.1f} min here; "
                         f"give --budget {math.ceil(least / RESERVE / 60)}m or more, a smaller model, or a faster machine")
    return min(fit, key=lambda plan: (plan.expected_octaves, plan.seconds))


def _estimates(designs: list["_Design"], timed: dict["_Design", Plan]) -> np.ndarray:
    """Seconds of designs from those that were timed: so much a step and so much a FLOP, neither negative."""
    known, seconds = np.array([(d.steps, d.flops) for d in timed]), np.array([plan.seconds for plan in timed.values()])
    scale = known.max(0)
    each, _ = nnls(known / scale / seconds[:, None], np.ones(len(seconds)))
    return np.array([(d.steps, d.flops) for d in designs]) / scale @ each


@dataclasses.dataclass(frozen=True, eq=False)
class _Design:
    """Ladders and seeds with what they take (optimizer steps, FLOPs) and give: halves of 95 % intervals of the answer, in octaves."""

    ladders: tuple[Ladder, ...]
    seed_count: int
    steps: float
    flops: float
    fit: float
    beyond: float

    @property
    def expected(self) -> float:
        """Half the 95 % interval, fit and extrapolation at right angles."""
        return math.hypot(self.fit, self.beyond)


def _with_seeds(question: Question, ladders: tuple[Ladder, ...], flops_of: dict[int, float]):
    """The designs of some ladders, by the number of seeds; `flops_of` a token, by width."""
    (steps, flops), (scout_steps, scout_flops) = _work(question, ladders, flops_of)
    leverage = _leverage(question, ladders)
    beyond = NORMAL * LEAST_DRIFT * math.hypot(*octaves_beyond(question, ladders).values())
    for seeds, critical in STUDENT.items():
        fit = critical * VERTEX_SD * leverage / math.sqrt(seeds)
        yield _Design(ladders, seeds, seeds * steps + scout_steps, seeds * flops + scout_flops, fit, beyond)


def _work(question: Question, ladders: tuple[Ladder, ...], flops_of: dict[int, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(steps, FLOPs) of all ladders with one seed, and of all scouts: training with shared trunks, and validation."""
    steps = flops = scout_steps = scout_flops = 0.0
    for ladder in ladders:
        token, share = flops_of[ladder.width], question.cooldown_fraction
        ends = VALIDATION_TOKENS / 3 * token  # a forward pass is a third of a training step
        rates, scouts = len(ladder.offsets), len(SCOUT_LOG2)
        tokens = rates * ((1 - share) * ladder.horizons[-1] + share * sum(ladder.horizons))
        steps, flops = steps + tokens / ladder.batch_tokens, flops + tokens * token + rates * len(ladder.horizons) * ends
        tokens = scouts * ladder.horizons[0]
        scout_steps, scout_flops = scout_steps + tokens / ladder.batch_tokens, scout_flops + tokens * token + scouts * ends
    return (steps, flops), (scout_steps, scout_flops)


def _leverage(question: Question, ladders: tuple[Ladder, ...]) -> float:
    """Norm of the weights that the fitted law at the asked run gives the vertices."""
    points, target = regressors(question, ladders)
    design = np.column_stack([np.ones(len(points["horizon_tokens"])), *(np.log2(v) for v in points.values())])
    at = np.array([1.0, *(math.log2(target[name]) for name in points)])
    return float(np.linalg.norm(at @ np.linalg.pinv(design)))


def regressors(question: Question, ladders) -> tuple[dict[str, list], dict[str, float]]:
    """What the rate is fitted over, one value a vertex, and the asked run's values: the horizon, and batch and width where they vary."""
    cells = [(ladder, horizon) for ladder in ladders for horizon in ladder.horizons]
    points = {"horizon_tokens": [h for _, h in cells], "batch_tokens": [c.batch_tokens for c, _ in cells],
              "width": [c.width for c, _ in cells]}
    target = {"horizon_tokens": question.horizon_tokens, "batch_tokens": question.batch_tokens, "width": question.model.width}
    points = {name: v for name, v in points.items() if name == "horizon_tokens" or len(set(v)) > 1}
    return points, {name: target[name] for name in points}


def octaves_beyond(question: Question, ladders) -> dict[str, float]:
    """Doublings from the largest horizon (of the main ladder), batch and width that are trained to those asked for."""
    largest = {"horizon_tokens": max(h for c in ladders for h in c.horizons), "batch_tokens": max(c.batch_tokens for c in ladders),
               "width": max(c.width for c in ladders)}
    asked = {"horizon_tokens": question.horizon_tokens, "batch_tokens": question.batch_tokens, "width": question.model.width}
    return {name: max(0.0, math.log2(asked[name] / largest[name])) for name in largest}


def _designs(question: Question, epoch_tokens: int):
    """Every design there may be: horizons double, the side ladders (another batch, another width) leave out the longest."""
    most = min(question.horizon_tokens, epoch_tokens)
    flops_of = {w: flops_per_token(question.narrowed(w), question.corpus.vocab)["exact"] for widths in _widths(question) for w in widths}
    for widths, batches in itertools.product(_widths(question), _batches(question)):
        least = question.least_steps * math.lcm(*batches)
        for doublings in itertools.takewhile(lambda k, least=least: least * 2**k <= most, itertools.count(LEAST_HORIZONS - 1)):
            for count in range(LEAST_HORIZONS, min(MOST_HORIZONS, doublings + 1) + 1):
                horizons = tuple(least * 2**k for k in range(doublings - count + 1, doublings + 1))
                ladders = [Ladder(widths[0], batches[0], horizons)]
                ladders += [Ladder(widths[0], batch, horizons[:-1]) for batch in batches[1:]]
                ladders += [Ladder(width, batches[0], horizons[:-1]) for width in widths[1:]]
                yield from _with_seeds(question, tuple(ladders), flops_of)


def _widths(question: Question) -> list[tuple[int, ...]]:
    """The asked width; narrower ones, alone where μP is trusted with the width, else with one of twice the width.

    Under μP a narrower one divides the asked width, and the base or is divided by it: other ratios no recipe has.
    """
    width, head = question.model.width, question.model.head_dim
    narrow = [w for k in range(width.bit_length()) if (w := LEAST_HEADS * head * 2**k) < width and _has_heads(question, w)]
    if question.parametrization == "mup":
        others = [width] + [question.base_width] * (question.base_width is not None)
        return [(width,), *((w,) for w in narrow if all(max(w, other) % min(w, other) == 0 for other in others))]
    return [(width,), *((w, 2 * w) for w in narrow if 2 * w == width or 2 * w in narrow)]


def _has_heads(question: Question, width: int) -> bool:
    try:
        return question.narrowed(width).width == width
    except ValueError:
        return False


def _batches(question: Question) -> list[tuple[int, ...]]:
    """The asked batch; pairs of smaller ones, the second two or four times the first, from which the batch's exponent is fitted."""
    if question.small_batch_tokens:
        return [tuple(sorted(question.small_batch_tokens))]
    asked, least = question.batch_tokens, LEAST_SEQUENCES * question.model.context
    small = [asked >> k for k in range(1, asked.bit_length()) if asked % (question.model.context << k) == 0 and asked >> k >= least]
    return [(asked,), *((b, times * b) for b in small for times in (2, 4) if times * b <= asked)]


def _timed(question: Question, design: _Design, budget_seconds: float, seconds_of) -> Plan:
    plan = Plan(question, design.ladders, design.seed_count, budget_seconds, 0.0, float(design.expected), float(design.beyond))
    return dataclasses.replace(plan, seconds=float(seconds_of([*plan.scouts(), *plan.recipes(plan.unscouted)])))
