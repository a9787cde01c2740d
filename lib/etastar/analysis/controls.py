"""Controls of a board: arms known to be alike must not differ, arms known to differ must, by the very rules of the verdicts."""

import dataclasses

import numpy as np
from scipy import stats

from etastar.analysis.claims import LEVEL, Claim, judge
from etastar.analysis.paired import Estimate, compare, mean_estimate

FALSE_ALARM = 0.01  # chance that a control fails although all is well
FALSE_ALARM_TURNED = 0.001  # draws enough to be strict: the first part of A/A spends its own share
TURNS = 400  # pairs of arms from turned noise, over all cells of a board
AA, TRUTH, PLANTED = "A/A on real runs", "known truth on real runs", "planted truths at the measured noise"


@dataclasses.dataclass(frozen=True)
class Control:
    """One control: whether it passed (None: it did not run, which is no pass), and the figures."""

    name: str
    passed: bool | None
    detail: str


def not_run(name: str, why: str) -> Control:
    """A control that did not run, and why."""
    return Control(name, None, f"not run: {why}")


def aa_control(cells: dict[str, np.ndarray], judge_pair=compare) -> Control:
    """A/A on real runs: in every cell arms that are alike by making are compared as if they were two; few may differ.

    `cells` maps names to losses over seeds (at least four each). First, two halves of a cell's seeds are the arms, less
    what a seed does to all cells. Four seeds make a narrow interval hard to see there; therefore, second, a cell's losses
    are compared with themselves plus noise of the cell's own size, turned in random directions: each such verdict fires
    with exactly 5 % whatever the cells share, and the bound on how many may fire is a binomial one.
    Simulated, 21 cells over four shared seeds: 99.5 % or more of honest boards pass, none of 600 with an interval 2, 3 or 5 times narrower.
    """
    kept = [x for x in (np.asarray(losses, dtype=float) for losses in cells.values()) if len(x) >= 4 and np.isfinite(x).all()]
    if not kept:
        return not_run(AA, "no cell has four finite seeds")
    halves, allowed = _halves(kept)
    made = _turned(kept)
    fired, turned = _fired(halves, judge_pair), _fired(made, judge_pair)
    turned_allowed = int(stats.binom.ppf(1 - FALSE_ALARM_TURNED, len(made), LEVEL))
    return Control(AA, fired <= allowed and turned <= turned_allowed,
                   f"{fired} of {len(kept)} cells of identical arms differ, {allowed} allowed; with their noise turned at random "
                   f"{turned} of {len(made)}, {turned_allowed} allowed")


def _halves(cells: list[np.ndarray]) -> tuple[list[tuple], int]:
    """(first half of the seeds, second half) of every cell, and how many of them may differ.

    What a seed does to all cells would make them one draw; without it they are nearly as many as they are, and two more
    than a binomial bound are allowed for what cells at one rate share. It is the mean over the cells with as many seeds (a
    study trains the same first seeds in all of its cells); where fewer than three cells have a number, cells keep it and
    count as one draw in three.
    """
    count, alike = len(cells), {}
    for x in cells:
        alike.setdefault(len(x), []).append(x)
    allowed = int(stats.binom.ppf(1 - FALSE_ALARM, max(1, count // 3), LEVEL)) * 3 + 2
    if min(map(len, alike.values())) >= 3:
        cells = [x - np.mean(group, axis=0) for group in alike.values() for x in group]
        allowed = int(stats.binom.ppf(1 - FALSE_ALARM, count, LEVEL)) + 2
    return [(x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 * 2]) for x in cells], allowed


def _fired(pairs, judge_pair) -> int:
    return sum(judge_pair(a, b).verdict in ("lower", "higher") for a, b in pairs)


def _turned(cells: list[np.ndarray]) -> list[tuple]:
    """(losses plus turned noise, losses) of every cell, in turn.

    The t statistic depends on a direction alone, and here that is uniform by our own draw: neither seeds in common nor the
    shape of the noise moves its rate. The losses seed the draw, so that a board reads the same twice.
    """
    rng = np.random.default_rng(np.concatenate(cells).view(np.uint64))
    made = []
    for x in cells * -(-TURNS // len(cells)):
        direction = rng.normal(size=len(x))
        made.append((x + direction * x.std(ddof=1) * np.sqrt(len(x)) / np.linalg.norm(direction), x))
    return made


def truth_control(short, long, margin: float, judge_pair=compare, fewer: str = "half the tokens") -> Control:
    """Known truth on real runs: losses of the same arm at a horizon and at half of it, or what `fewer` says (paired over seeds).

    The shorter must be found higher, and must not pass as equivalent within `margin` nats, a quarter of the measured
    difference or less.
    """
    short, long = np.asarray(short, dtype=float), np.asarray(long, dtype=float)
    if np.isfinite(short - long).sum() < 2:
        return not_run(TRUTH, "fewer than two seeds are finite at both horizons")
    gap = float(np.nanmean(short - long))
    plain, with_margin = judge_pair(short, long), judge_pair(short, long, margin=min(margin, gap / 4) if gap > 0 else margin)
    passed = plain.verdict == "higher" and with_margin.verdict != "equivalent"
    return Control(TRUTH, passed, f"{fewer} cost {gap:+.4f} nats and are judged {plain.verdict}")


def planted_control(claim: Claim, sd: float, n: int, seed: int, draws: int = 400, judge_one=judge, judge_pair=compare) -> Control:
    """Planted truths at a study's measured noise: no effect must seldom be called one, a large effect nearly always be found.

    Differences over `n` seeds are drawn with deviation `sd` (in the claim's unit) about 0 and about an effect three times
    what the design can detect, and judged as a direction. Then margins of three times what the design can show are
    planted: a tenth beyond them differences must seldom be called equal, a quarter of the way out nearly always.
    """
    if not (np.isfinite(sd) and sd > 0 and n >= 2):
        return not_run(PLANTED, f"no noise was measured (deviation {sd} over {n} seeds)")
    rng = np.random.default_rng(seed)
    direction = dataclasses.replace(claim, kind="direction", side="higher", smallest_effect=0.0)
    large = 3 * Estimate(0.0, sd / np.sqrt(n), n - 1, n).detectable()

    def share(effect):
        made = (mean_estimate(rng.normal(effect, sd, n), unit=claim.unit) for _ in range(draws))
        found = [judge_one(direction, e, evidence="live", scale={}, matching=True).verdict for e in made]
        return np.mean([v in ("reproduced", "contradicted", "differs at this scale") for v in found])

    false, true = share(0.0), share(large)
    few = max(1, draws // 4)
    beyond, within = _margins(claim, sd, n, rng, few, judge_one, judge_pair)
    most, most_beyond = (stats.binom.ppf(1 - FALSE_ALARM, k, LEVEL) / k for k in (draws, few))
    passed = bool(false <= most and true >= 0.8 and beyond <= most_beyond and within >= 0.8)
    return Control(PLANTED, passed, f"no effect called one in {false:.1%} of {draws} draws ({most:.1%} allowed), a large one found in "
                                    f"{true:.1%}; called equal: beyond a margin at most {beyond:.1%} of {few} ({most_beyond:.1%} "
                                    f"allowed), well within it at least {within:.1%}")


def _margins(claim: Claim, sd: float, n: int, rng, draws: int, judge_one, judge_pair) -> tuple[float, float]:
    """Largest share called equal just beyond a margin and least share well within, over every rule that has a margin.

    The target of a number lies away from 0, lest a rule that lays its margin about 0 pass.
    """
    margin = 3 * Estimate(0.0, sd / np.sqrt(n), n - 1, n).provable_margin()

    def called_by_claim(kind, target):
        laid = dataclasses.replace(claim, kind=kind, published=target, margin=margin, rival=target - 20 * margin, rival_name="a far one")
        return lambda d: judge_one(laid, mean_estimate(target + d, unit=claim.unit), evidence="live", scale={},
                                   matching=True).verdict == "reproduced"

    def called_by_pair(d):
        other = rng.normal(0.0, 3 * sd, n)  # what a seed does to both arms is larger than their difference
        return judge_pair(other + d, other, margin=margin).verdict == "equivalent"

    both = (1, -1)
    rules = [(called_by_claim("equality", 0.0), both), (called_by_claim("number", 5 * margin), both),
             (called_by_claim("no_worse", 0.0), (1,)), (called_by_pair, both)]
    beyond, within = ([np.mean([called(rng.normal(side * far * margin, sd, n)) for _ in range(draws)])
                       for called, sides in rules for side in sides] for far in (1.1, 0.25))
    return max(beyond), min(within)
