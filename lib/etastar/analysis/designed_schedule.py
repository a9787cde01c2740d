"""The schedule that a multi-power law calls best: rates that never rise after warm-up, found by descent on the law's own prediction.

The law's last loss is a sum over rates r_1 … r_n after warm-up, warm-up itself being given:

    L0 + A·S^−α + B·Σ_k (r_k − r_{k−1})·(1 − (1 + C r_k^−γ S_k)^−β),   S the sum of all rates, S_k that from k to the end,

so that its gradient is as cheap as itself. Rates run straight between knots and are written as what is still to fall, r = Σ d_i over
the knots to come with d_i ≥ 0 and Σ d_i the peak: any such d is a schedule, and bounds keep zeros (no fall for most of a run).
The knots are few on purpose. The law credits a fall by the rate it falls to, so that one stair is worth more to it than the same fall
in small steps; with a knot a step it calls stairs best, by some 0.002 nats, and where they stand depends on the start. That several
starts lead to one schedule here is tested, not proved. A law is no measurement: it was fitted to schedules less extreme than
what it then calls best, and its prediction there is for a run to check, as arXiv 2503.12811 does.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import optimize

from etastar.analysis.schedule_laws import MultiPowerLaw, fit_multi_power_law
from etastar.schedules import WSD, Cosine, Schedule, Table

NO_FALL = 1e-12  # share of the peak; falls that are all 0 would say nothing of their shares
LEAST_SHARE = 1e-5  # of the peak: the law divides by a power of the rate, and has no derivative at 0
KNOTS = (8, 16, 32)  # for one descent after another
COOLDOWNS = (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8, 1.0)
SHAPES = ("linear", "1-sqrt", "cosine", "square")
FLOORS = (0.0, 0.01, 0.05, 0.1)


@dataclasses.dataclass(frozen=True)
class DesignedSchedule:
    """Rates (total_steps,) that `law` calls best under `peak_lr` after `warmup_steps`, and the last loss it predicts (nats)."""

    law: MultiPowerLaw
    peak_lr: float
    warmup_steps: int
    rates: np.ndarray = dataclasses.field(compare=False)
    predicted_loss: float

    @property
    def schedule(self) -> Table:
        """The rates as a schedule of a recipe: its `peak_lr` and number of steps are to be the design's."""
        return Table(tuple((self.rates / self.peak_lr).tolist()))

    @property
    def decay_start(self) -> int:
        """The first step whose rate is below 99 % of the peak; total_steps where none is."""
        low = self.rates[self.warmup_steps :] < 0.99 * self.peak_lr
        return self.warmup_steps + int(low.argmax() if low.any() else len(low))

    @property
    def decay_power(self) -> float:
        """Power p of the decay's shape (1 − x)^p, x its share of the way: least squares in logs over the middle 80 % of it."""
        decay = self.rates[self.decay_start :]
        left = 1 - (np.arange(len(decay)) + 0.5) / max(1, len(decay))
        middle = (left > 0.1) & (left < 0.9) & (decay > 10 * LEAST_SHARE * self.peak_lr)
        if middle.sum() < 3:
            raise ValueError(f"a decay of {len(decay)} steps has no shape to tell; design a longer run")
        return float(np.polyfit(np.log(left[middle]), np.log(decay[middle]), 1)[0])


def design_schedule(law: MultiPowerLaw, total_steps: int, peak_lr: float, warmup_steps: int = 0, start=None) -> DesignedSchedule:
    """The schedule of least predicted last loss among those that rise linearly to `peak_lr` and never rise again.

    `start` (total_steps − warmup_steps,) are rates the descent begins at (a straight line by default). Deterministic. Raises
    ValueError for a run without steps after warm-up, a peak that is not positive, or a start that rises.
    """
    if not 0 <= warmup_steps <= total_steps - 2:
        raise ValueError(f"a run of {total_steps} steps with {warmup_steps} of warm-up leaves fewer than two to design; "
                         "lengthen the run or shorten the warm-up")
    if not 0 < peak_lr < np.inf:
        raise ValueError(f"peak_lr must be positive and finite; got {peak_lr}")
    steps = total_steps - warmup_steps
    rates = np.linspace(peak_lr, 0.1 * peak_lr, steps) if start is None else _checked(start, steps, peak_lr)
    warmup = peak_lr * (np.arange(warmup_steps) + 1.0) / max(1, warmup_steps)
    for knots in KNOTS:
        rates = _descend(law, warmup, peak_lr, steps, knots, rates)
    whole = np.concatenate([warmup, rates])
    return DesignedSchedule(law, peak_lr, warmup_steps, whole, float(law.predict(whole, [total_steps - 1])[0]))


def design_from_curves(curves, total_steps: int, peak_lr: float, warmup_steps: int = 0) -> DesignedSchedule:
    """The design of a law fitted to `curves`, (rates, steps, losses) triples of two schedules or more: one alone cannot tell a fall
    of the rate from time going by. Raises ValueError for fewer, or where no rate falls after its peak.
    """
    schedules = {tuple(np.asarray(lr, dtype=float).tolist()) for lr, *_ in curves}
    if len(schedules) < 2 or not any(min(lr[int(np.argmax(lr)):]) < 0.9 * max(lr) for lr in schedules):
        raise ValueError(f"a law needs curves of two schedules, of which one decays; got {len(schedules)}: add a constant rate's, "
                         "or a cosine's")
    return design_schedule(fit_multi_power_law(curves), total_steps, peak_lr, warmup_steps)


def curve_of(curve: pd.DataFrame, loss: str = "val_loss") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rates, steps, losses) of a run's curve (columns step, counted from 1, lr and `loss` in nats), for a law to be fitted to.

    A validation loss of step n follows that step, a training loss comes before its update.
    """
    known = curve.dropna(subset=[loss])
    steps = known["step"].to_numpy(dtype=int) - (2 if loss == "train_loss" else 1)
    return curve["lr"].to_numpy(dtype=float), steps[steps >= 0], known[loss].to_numpy(dtype=float)[steps >= 0]


def rival_schedules(law: MultiPowerLaw, total_steps: int, peak_lr: float, warmup_steps: int = 0) -> pd.DataFrame:
    """What the law predicts for a grid of cosines and cooldowns under the same peak: schedule, predicted_loss; best first."""
    offered: list[Schedule] = [Cosine(floor=f, warmup_steps=warmup_steps) for f in FLOORS]
    offered += [WSD(cooldown_fraction=c, shape=shape, floor=f, warmup_steps=warmup_steps) for c in COOLDOWNS for shape in SHAPES
                for f in FLOORS if c == 1 or c * total_steps + warmup_steps <= total_steps]
    rows = [(s, float(law.predict(s.lr(total_steps, peak_lr=peak_lr, batch_tokens=1), [total_steps - 1])[0])) for s in offered]
    return pd.DataFrame(rows, columns=["schedule", "predicted_loss"]).sort_values("predicted_loss", ignore_index=True)


def last_loss(law: MultiPowerLaw, rates, warmup, peak_lr: float) -> tuple[float, np.ndarray]:
    """The predicted last loss (nats) of `rates` (steps,) after `warmup` to the peak, and its gradient in the rates."""
    before = np.concatenate([[peak_lr], rates[:-1]])
    after = np.cumsum(rates[::-1])[::-1]  # S_k
    gone, slope_rate, slope_area = _gain(law, rates, after)
    jump = rates - before
    # Warm-up's own rises look back on all that follows them, as knots of the same sum; the first step's rate counts as no change.
    rise, since = np.diff(warmup), after[0] + np.cumsum(warmup[::-1])[::-1][1:]
    gone_warm, _, slope_warm = _gain(law, warmup[1:], since)
    total = after[0] + warmup.sum()
    loss = law.L0 + law.A * total**-law.alpha + law.B * (jump @ gone + rise @ gone_warm)
    by_area = jump * slope_area
    gradient = law.B * (gone - np.append(gone[1:], 0.0) + jump * slope_rate + np.cumsum(by_area) + rise @ slope_warm)
    return float(loss), gradient - law.A * law.alpha * total ** (-law.alpha - 1)


def _gain(law: MultiPowerLaw, rate, area):
    """G = 1 − (1 + C r^−γ S)^−β with its derivatives in the rate r and in the area S."""
    left = law.C * rate**-law.gamma * area
    power = (1 + left) ** -law.beta
    slope = law.beta * power / (1 + left) * left
    return 1 - power, -law.gamma * slope / rate, slope / area


def _descend(law, warmup, peak_lr, steps: int, knots: int, start) -> np.ndarray:
    """Rates of single steps (steps,), straight between about `knots` of them, after L-BFGS on the falls between knots."""
    least, at = LEAST_SHARE * peak_lr, _knots(steps, knots)
    step = np.arange(steps)
    right = np.clip(np.searchsorted(at, step), 1, len(at) - 1)
    share = (step - at[right - 1]) / (at[right] - at[right - 1])  # of the way from the knot on the left to that on the right

    def straight(values):
        return values[right - 1] * (1 - share) + values[right] * share

    def loss(falls):
        total = falls.sum()
        left = np.cumsum(falls[::-1])[::-1][1:] / total  # what is still to fall from each knot on
        value, by_rate = last_loss(law, straight(least + (peak_lr - least) * left), warmup, peak_lr)
        by_knot = np.bincount(right - 1, by_rate * (1 - share), len(at)) + np.bincount(right, by_rate * share, len(at))
        return value, (np.concatenate([[0.0], np.cumsum(by_knot)]) - by_knot @ left) * (peak_lr - least) / total

    values = np.maximum(start[at], least)
    falls = -np.diff(values, prepend=peak_lr, append=least) / (peak_lr - least) + 1e-6
    found = optimize.minimize(loss, falls / falls.sum(), jac=True, method="L-BFGS-B", bounds=[(NO_FALL, None)] * len(falls),
                              options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 30})
    return straight(least + (peak_lr - least) * np.cumsum(found.x[::-1])[::-1][1:] / found.x.sum())


def _knots(steps: int, count: int) -> np.ndarray:
    """Steps at distances from the end that grow by one factor: the end is where rates fall."""
    return np.unique(steps - np.rint(np.geomspace(1, steps, count)).astype(int))


def _checked(start, steps: int, peak_lr: float) -> np.ndarray:
    start = np.asarray(start, dtype=float)
    if start.shape != (steps,) or not np.isfinite(start).all() or (np.diff(start) > 0).any() or start.min() < 0 or start[0] > peak_lr:
        raise ValueError(f"a start needs {steps} rates within 0 … {peak_lr:g} that never rise, one a step after warm-up; got shape "
                         f"{start.shape}, {start.min(initial=np.inf):g} … {start.max(initial=-np.inf):g}")
    return start
