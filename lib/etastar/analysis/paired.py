"""Differences over seeds: the seed is the unit, intervals are Student's, and equivalence is shown, never assumed."""

import dataclasses
import math

import numpy as np
from scipy import stats

HOMOGENEITY_LEVEL = 0.01
SHARED_REFERENCE = 0.5  # correlation of two differences from one and the same reference arm


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its standard error: `df` degrees of freedom, `n` seeds, `unit` as printed."""

    value: float
    se: float
    df: float
    n: int
    unit: str = "nats"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided t interval."""
        half = stats.t.ppf(0.5 + level / 2, self.df) * self.se
        return self.value - half, self.value + half

    def p_equals(self, value: float) -> float:
        """Two-sided p that the truth is `value`."""
        return float(2 * stats.t.sf(abs(self._t(value)), self.df))

    def p_above(self, value: float) -> float:
        """One-sided p against "the truth is `value` or more": small when it lies below."""
        return float(stats.t.cdf(self._t(value), self.df))

    def p_below(self, value: float) -> float:
        """One-sided p against "the truth is `value` or less": small when it lies above."""
        return float(stats.t.sf(self._t(value), self.df))

    def p_outside(self, low: float, high: float) -> float:
        """Two one-sided tests: p against "the truth is not within (low, high)"."""
        return max(self.p_below(low), self.p_above(high))

    def detectable(self, power: float = 0.8, level: float = 0.05) -> float:
        """Smallest true effect that a two-sided test at `level` would have found with `power`."""
        return float((stats.t.ppf(1 - level / 2, self.df) + stats.t.ppf(power, self.df)) * self.se)

    def provable_margin(self, power: float = 0.8, level: float = 0.05) -> float:
        """Smallest margin within which two equal arms would have been shown equivalent with `power`."""
        return float((stats.t.ppf(1 - level, self.df) + stats.t.ppf((1 + power) / 2, self.df)) * self.se)

    def scaled(self, factor: float, unit: str) -> "Estimate":
        """The same estimate in another unit."""
        return dataclasses.replace(self, value=self.value * factor, se=self.se * abs(factor), unit=unit)

    def _t(self, value: float) -> float:
        if self.se == 0:
            return math.copysign(math.inf, self.value - value) if self.value != value else 0.0
        return (self.value - value) / self.se


@dataclasses.dataclass(frozen=True)
class PooledVariance:
    """One standard deviation of a seed for all cells of a study, with its degrees of freedom; why not, where not."""

    sd: float | None
    df: float
    reason: str


def pool_variance(cells, shared: float = SHARED_REFERENCE) -> PooledVariance:
    """Pool the variance of cells (arrays over seeds) unless Bartlett's test finds them unlike at 1 %.

    Brown–Forsythe's test never refuses three seeds: one of three deviations from the median is nothing. Where Bartlett's
    errs, on heavy tails, it refuses and cells keep their own variance: that costs power, not validity. Diverged seeds are
    left out and counted in the reason. Cells that share a reference arm have correlated variance estimates (`shared`
    squared), so k cells of ν degrees of freedom count as k·ν / (1 + (k − 1)·shared²), not as k·ν.
    """
    cells = [np.asarray(c, dtype=float) for c in cells]
    diverged = sum(int((~np.isfinite(c)).sum()) for c in cells)
    left_out = f"; {diverged} diverged seeds left out" if diverged else ""
    cells = [kept for c in cells if len(kept := c[np.isfinite(c)]) >= 2]
    if not cells:
        return PooledVariance(None, 0.0, f"no cell has two finite seeds{left_out}")
    nu = np.array([len(c) - 1 for c in cells])
    variances = np.array([c.var(ddof=1) for c in cells])
    if len(cells) > 1 and variances.any():
        p = float(stats.bartlett(*cells).pvalue) if variances.all() else 0.0
        if p < HOMOGENEITY_LEVEL:
            return PooledVariance(None, 0.0, f"cells differ in variance (Bartlett p = {p:.2g}); each keeps its own{left_out}")
    variance = float((nu * variances).sum() / nu.sum())
    df = float(nu.sum() / (1 + (len(cells) - 1) * shared**2))
    return PooledVariance(math.sqrt(variance), df, f"{len(cells)} cells, {df:.1f} effective degrees of freedom{left_out}")


def mean_estimate(per_seed, unit: str = "nats", pooled: PooledVariance | None = None) -> Estimate:
    """Mean over seeds with a t standard error, from the pooled variance where there is one.

    Raises ValueError for values that are not finite, and for one seed without a pooled variance.
    """
    values = np.asarray(per_seed, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} seeds are not finite; judge diverged runs as censored "
                         "(compare does)")
    if pooled is not None and pooled.sd is not None and len(values):
        return Estimate(float(values.mean()), pooled.sd / math.sqrt(len(values)), pooled.df, len(values), unit)
    if len(values) < 2:
        raise ValueError(f"one seed has no spread: got {len(values)}; run more seeds or give a pooled variance")
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values) - 1, len(values), unit)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """a − b over paired seeds: verdict "lower", "higher", "equivalent" or "inconclusive" speaks of a."""

    difference: float
    difference_low: float
    difference_high: float
    n: int
    verdict: str
    detectable: float
    n_censored: int = 0
    note: str = ""


def compare(a, b, margin: float | None = None, level: float = 0.95, pooled: PooledVariance | None = None) -> Comparison:
    """Compare paired arrays (seeds,): a is "lower" or "higher" than b where the interval excludes zero.

    With `margin` (in the arrays' unit) a is "equivalent" to b where the interval of two one-sided tests lies within ±margin.
    NaN means diverged: such a pair counts against the diverged side, all pairs then by an exact sign test, and no
    equivalence is claimed. Raises ValueError for arrays of unlike length or fewer than two pairs without a pooled variance.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"compare needs two arrays over the same seeds; got shapes {a.shape} and {b.shape}")
    if margin is not None and not margin > 0:
        raise ValueError(f"margin must be positive; got {margin}")
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return _compare_censored(a, b, level)
    estimate = mean_estimate(a - b, pooled=pooled)
    low, high = estimate.interval(level)
    verdict = "inconclusive"
    if margin is not None and estimate.p_outside(-margin, margin) < 1 - level:
        verdict = "equivalent"
    elif low > 0 or high < 0:
        verdict = "higher" if low > 0 else "lower"
    return Comparison(estimate.value, low, high, len(a), verdict, estimate.detectable(level=1 - level))


def _compare_censored(a: np.ndarray, b: np.ndarray, level: float) -> Comparison:
    neither = ~np.isfinite(a) & ~np.isfinite(b)
    difference = np.where(np.isfinite(a), a, np.inf)[~neither] - np.where(np.isfinite(b), b, np.inf)[~neither]
    higher, lower = int((difference > 0).sum()), int((difference < 0).sum())
    p = stats.binomtest(higher, higher + lower).pvalue if higher + lower else 1.0
    verdict = "inconclusive" if p >= 1 - level else "higher" if higher > lower else "lower"
    finite = difference[np.isfinite(difference)]
    censored = len(a) - len(finite)
    return Comparison(float(finite.mean()) if len(finite) else math.nan, -math.inf, math.inf, len(a), verdict, math.nan, censored,
                      f"{censored} of {len(a)} pairs have a diverged run; exact sign test, p = {p:.3g}")


def token_slope(loss_short, loss_long, tokens_ratio: float) -> np.ndarray:
    """dL/d log D of each seed from its losses at two horizons: nats per e-fold of tokens, negative where more tokens help."""
    return (np.asarray(loss_long, dtype=float) - np.asarray(loss_short, dtype=float)) / math.log(tokens_ratio)


def token_equivalent(difference: Estimate, slope_per_seed) -> Estimate:
    """A difference in nats as a share of tokens: difference / |dL/d log D|, +0.1 being worth 10 % more tokens.

    The slope's own error over seeds is carried along (delta method). Raises ValueError where more tokens do not help.
    """
    slope = mean_estimate(slope_per_seed)
    if not slope.interval()[1] < 0:
        raise ValueError(f"the loss does not fall with tokens here (dL/d log D = {slope.value:.4f} ± {slope.se:.4f}); "
                         "token equivalents need a longer horizon or more seeds")
    value = difference.value / abs(slope.value)
    se = math.hypot(difference.se / abs(slope.value), value * slope.se / slope.value)
    return dataclasses.replace(difference, value=value, se=se, unit="token_fraction")
