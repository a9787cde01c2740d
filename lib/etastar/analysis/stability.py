"""How stably runs trained, read off their curves: loss spikes, gradient norms, the rate from which they diverge, and a row a run."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

WINDOW = 64  # steps
THRESHOLD = 6.0  # robust sds: Gaussian noise passes it once in 10⁹ steps
TO_SD = 1.4826  # median absolute deviation to the sd of a Gaussian


@dataclasses.dataclass(frozen=True)
class Spikes:
    """Rises of a training loss: how many `count`, the `largest_sds` in robust sds and `largest_nats` of it, at row `largest_at`.

    `sd` is the robust sd in nats, `judged` the steps that had a whole window before them.
    """

    count: int
    largest_sds: float
    largest_nats: float
    largest_at: int
    sd: float
    judged: int


def spikes(loss, window: int = WINDOW, threshold: float = THRESHOLD) -> Spikes:
    """Spikes of a training loss (steps,) in nats: steps at which it lies more than `threshold` robust sds above what came just before.

    A step's rise is its loss minus the median of the `window` steps before it; the robust sd is 1.4826 times the median absolute
    deviation of all rises from their median. Consecutive steps above the threshold are one spike. Neither a slow trend nor the spikes
    themselves move these medians much, which a rolling mean and sd follow; a steep fall widens the sd, which hides spikes and makes
    up none. What is not finite, as after a divergence, is left out.
    Raises ValueError for a window below 2, a threshold ≤ 0, and a curve of no more than `window` finite losses.
    """
    loss_S = np.asarray(loss, dtype=np.float64)
    loss_S = np.where(np.isfinite(loss_S), loss_S, np.nan)
    if window < 2 or threshold <= 0:
        raise ValueError(f"spikes need a window of at least 2 steps and a threshold above 0; got {window} and {threshold}")
    if loss_S.ndim != 1 or np.isfinite(loss_S).sum() <= window:
        raise ValueError(f"spikes need one loss a step and more of them than the window of {window} steps; got shape {loss_S.shape} "
                         f"with {np.isfinite(loss_S).sum()} finite: take a smaller window")
    rows = np.flatnonzero(np.isfinite(loss_S))
    loss_N = loss_S[rows]
    before_N = pd.Series(loss_N).rolling(window).median().shift(1).to_numpy()
    rise_J = (loss_N - before_N)[window:]
    sd = TO_SD * float(np.median(np.abs(rise_J - np.median(rise_J))))
    above_J = rise_J > threshold * sd
    first = int(np.count_nonzero(above_J[1:] & ~above_J[:-1])) + int(above_J[0])
    at = int(rise_J.argmax())
    return Spikes(first, _over(float(rise_J[at]), sd), float(rise_J[at]), int(rows[window + at]), sd, len(rise_J))


def gradient_quantiles(grad_norm, levels: Sequence[float] = (0.5, 0.9, 0.99, 1.0), after: int = 0) -> pd.Series:
    """Quantiles of a run's gradient norms (steps,), before the clip, by level; the first `after` steps and what is not finite left out.

    Raises ValueError for levels outside [0, 1] and where no step is left.
    """
    norm_N = np.asarray(grad_norm, dtype=np.float64)[after:]
    norm_N = norm_N[np.isfinite(norm_N)]
    if not norm_N.size:
        raise ValueError(f"there is no finite gradient norm after the first {after} of {np.size(grad_norm)} steps")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels of quantiles lie in [0, 1]; got {tuple(levels)}")
    return pd.Series(np.quantile(norm_N, levels), index=pd.Index(levels, name="level"), name="grad_norm")


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The log2 of the smallest rate from which on runs fail lies in (`low`, `high`]: two neighbours of the grid.

    `low` −inf: all rates failed; `high` +inf: the largest did not. `monotone` False: a rate below `low` failed too.
    """

    low: float
    high: float
    rates: int
    monotone: bool

    @property
    def middle(self) -> float:
        """Midway, NaN where one end is open."""
        return (self.low + self.high) / 2 if math.isfinite(self.low + self.high) else math.nan


def divergence_boundary(lr, loss, status, start_loss: float | None = None, share: float = 0.5) -> Boundary:
    """Where a sweep over rates stops being trainable: rate, last loss in nats and status ("done" | "diverged") of each run, (runs,).

    A run fails that diverged or has no finite loss, or, with `start_loss`, ends above it (that of the untrained model, ln V where its
    logits are near 0). A rate fails where at least a `share` of its runs (seeds) do. The boundary is above the largest rate that does not.
    Raises ValueError for lengths that differ, no runs, rates ≤ 0, an unknown status, and a share outside (0, 1].
    """
    lr, loss, status = np.asarray(lr, dtype=np.float64), np.asarray(loss, dtype=np.float64), np.asarray(status, dtype=object)
    if not (lr.shape == loss.shape == status.shape and lr.ndim == 1 and lr.size):
        raise ValueError(f"a boundary needs as many rates as losses and statuses; got {lr.shape}, {loss.shape} and {status.shape}")
    if not ((lr > 0) & np.isfinite(lr)).all() or not 0 < share <= 1:
        raise ValueError(f"a boundary needs rates above 0 and a share in (0, 1]; got a smallest rate of {lr.min()} and {share}")
    if unknown := set(status) - {"done", "diverged"}:
        raise ValueError(f'a run\'s status is "done" or "diverged"; got {sorted(map(str, unknown))}')
    failed = (status == "diverged") | ~np.isfinite(loss) | (loss > (math.inf if start_loss is None else start_loss))
    log2_R, rate_of = np.unique(np.log2(lr), return_inverse=True)
    fails_R = np.bincount(rate_of, weights=failed) >= share * np.bincount(rate_of)
    last = int(np.flatnonzero(~fails_R)[-1]) if not fails_R.all() else -1
    low = float(log2_R[last]) if last >= 0 else -math.inf
    high = float(log2_R[last + 1]) if last + 1 < len(log2_R) else math.inf
    return Boundary(low, high, len(log2_R), not fails_R[: last + 1].any())


def summary(curve: pd.DataFrame, window: int = WINDOW, threshold: float = THRESHOLD) -> dict[str, float]:
    """One row of a run, from its curve: `pd.DataFrame([summary(run.curve) for run in runs])`.

    spikes and largest_spike_sds as `spikes`; grad_norm_over_median, the largest gradient norm over the median, after the first
    `window` steps; the largest attention_logit_max, log_z_max and load_imbalance; feature_rank and stream_delta where last logged; the
    median update_ratio, since the last is that of a rate near 0. A curve too short for the window has a quarter of it; what was not
    logged is NaN. Raises ValueError for a curve without train_loss and grad_norm, or of fewer than 8 steps that have a loss.
    """
    steps = int(np.isfinite(curve["train_loss"]).sum()) if {"train_loss", "grad_norm"} <= set(curve) else 0
    if steps < 8:
        raise ValueError(f"a summary needs train_loss and grad_norm of at least 8 steps; got {steps} in the columns {list(curve)}")
    window = min(window, steps // 4)
    found, norms = spikes(curve["train_loss"], window, threshold), gradient_quantiles(curve["grad_norm"], (0.5, 1.0), after=window)
    return {"spikes": found.count, "largest_spike_sds": found.largest_sds, "grad_norm_over_median": _over(norms[1.0], norms[0.5]),
            **{name: _of_logged(curve, name, np.max) for name in ("attention_logit_max", "log_z_max", "load_imbalance")},
            **{name: _of_logged(curve, name, lambda told: told[-1]) for name in ("feature_rank", "stream_delta")},
            "update_ratio": _of_logged(curve, "update_ratio", np.median)}


def _of_logged(curve: pd.DataFrame, column: str, of) -> float:
    told = curve[column].dropna().to_numpy(np.float64) if column in curve else np.empty(0)
    return float(of(told)) if told.size else math.nan


def _over(number: float, unit: float) -> float:
    """number / unit; where the unit is 0, as of a loss that never moves, ±inf or 0."""
    if unit == 0:
        return math.copysign(math.inf, number) if number else 0.0
    return float(number / unit)
