"""Controls of a board: arms known to be alike must not differ, arms known to differ must, by the very rules of the verdicts."""

import dataclasses

import numpy as np
from scipy import stats

from etastar.analysis.claims import LEVEL, Claim, judge
from etastar.analysis.paired import Estimate, compare, mean_estimate

FALSE_ALARM = 0.01  # chance that a control fails although all is well


@dataclasses.dataclass(frozen=True)
class Control:
    """One control: whether it passed, and the figures."""

    name: str
    passed: bool
    detail: str


def aa_control(cells: dict[str, np.ndarray], judge_pair=compare) -> Control:
    """A/A on real runs: in every cell two halves of the seeds of one and the same arm are compared as if they were two arms.

    `cells` maps names to losses over seeds (at least four each). Cells of one study share seeds, so their verdicts are not
    independent: the bound on how many may fire takes them as one draw in three, by which 3 % of honest boards still fail.
    """
    fired, count = 0, 0
    for losses in cells.values():
        losses = np.asarray(losses, dtype=float)
        half = len(losses) // 2
        if half < 2 or not np.isfinite(losses).all():
            continue
        count += 1
        fired += judge_pair(losses[:half], losses[half : 2 * half]).verdict in ("lower", "higher")
    if not count:
        return Control("A/A on real runs", True, "not run: no cell has four finite seeds")
    draws = max(1, count // 3)
    allowed = int(stats.binom.ppf(1 - FALSE_ALARM, draws, LEVEL)) * 3 + 2
    return Control("A/A on real runs", fired <= allowed, f"{fired} of {count} cells of identical arms differ, {allowed} allowed")


def truth_control(short, long, margin: float, judge_pair=compare) -> Control:
    """Known truth on real runs: losses of the same arm at a horizon and at half of it (paired over seeds).

    Half the tokens must be found higher, and must not pass as equivalent within `margin` nats, a quarter of the measured
    difference or less.
    """
    short, long = np.asarray(short, dtype=float), np.asarray(long, dtype=float)
    gap = float(np.nanmean(short - long))
    plain, with_margin = judge_pair(short, long), judge_pair(short, long, margin=min(margin, gap / 4) if gap > 0 else margin)
    passed = plain.verdict == "higher" and with_margin.verdict != "equivalent"
    return Control("known truth on real runs", passed, f"half the tokens cost {gap:+.4f} nats and are judged {plain.verdict}")


def planted_control(claim: Claim, sd: float, n: int, seed: int, draws: int = 400, judge_one=judge) -> Control:
    """Planted truths at a study's measured noise: no effect must seldom be called one, a large effect nearly always be found.

    Differences over `n` seeds are drawn with deviation `sd` (in the claim's unit) about 0 and about an effect three times
    what the design can detect; the claim's own kind is judged on each.
    """
    rng = np.random.default_rng(seed)
    direction = dataclasses.replace(claim, kind="direction", side="higher", smallest_effect=0.0)
    large = 3 * Estimate(0.0, sd / np.sqrt(n), n - 1, n).detectable()

    def share(effect):
        made = (mean_estimate(rng.normal(effect, sd, n), unit=claim.unit) for _ in range(draws))
        found = [judge_one(direction, e, evidence="live", scale={}, matching=True).verdict for e in made]
        return np.mean([v in ("reproduced", "contradicted", "differs at this scale") for v in found])

    false, true = share(0.0), share(large)
    most = stats.binom.ppf(1 - FALSE_ALARM, draws, LEVEL) / draws
    passed = bool(false <= most and true >= 0.8)
    return Control("planted truths at the measured noise", passed,
                   f"no effect called one in {false:.1%} of {draws} draws ({most:.1%} allowed), a large one found in {true:.1%}")
