"""Power before ambition: how many seeds an effect needs, and what a design could have seen."""

import math

import numpy as np
import pandas as pd
from scipy import stats


def achieved_power(sd: float, n: int, effect: float, level: float = 0.05, df_extra: float = 0) -> float:
    """Power of a two-sided paired t test over n seeds to find `effect` where a pair differs by `sd` (noncentral t).

    `df_extra`: degrees of freedom that other cells lend where the variance is pooled.
    """
    df = n - 1 + df_extra
    if n < 1 or df < 1:
        return 0.0
    critical, shift = stats.t.ppf(1 - level / 2, df), effect / sd * math.sqrt(n)
    return float(stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift))


def equivalence_power(sd: float, n: int, margin: float, true_difference: float = 0.0, level: float = 0.05) -> float:
    """Power of two one-sided paired t tests over n seeds to show a difference within ±`margin` (exact, over the sd's chi law)."""
    if n < 2:
        return 0.0
    critical, root = stats.t.ppf(1 - level, n - 1), math.sqrt(n) / sd
    widest = root * margin / critical  # a sample sd above this, in units of sd, shows nothing
    low, high = stats.chi2.ppf((1e-12, 1 - 1e-12), n - 1)
    at, width = np.polynomial.legendre.leggauss(400)
    first, last = math.sqrt(low / (n - 1)), min(widest, math.sqrt(high / (n - 1)))
    if last <= first:
        return 0.0
    ratio, weight = first + (last - first) * (at + 1) / 2, width * (last - first) / 2
    shown = (stats.norm.cdf(root * (margin - true_difference) - critical * ratio)
             - stats.norm.cdf(critical * ratio - root * (margin + true_difference)))
    return float((weight * shown * stats.chi.pdf(ratio * math.sqrt(n - 1), n - 1)).sum() * math.sqrt(n - 1))


def seeds_needed(sd: float, effect: float, power: float = 0.8, level: float = 0.05, most: int = 10_000, df_extra: float = 0) -> int:
    """Fewest seeds with which a paired t test finds `effect` with `power`; ValueError where `most` are not enough."""
    if not effect > 0 or not sd >= 0:
        raise ValueError(f"an effect to resolve must be positive and sd not negative; got effect={effect}, sd={sd}")
    return _fewest(lambda n: sd == 0 or achieved_power(sd, n, effect, level, df_extra) >= power, most,
                   f"resolve {effect:g} where pairs differ by {sd:g}")


def equivalence_seeds(sd: float, margin: float, true_difference: float = 0.0, power: float = 0.8, level: float = 0.05,
                      most: int = 10_000) -> int:
    """Fewest seeds that show a difference within ±`margin` with `power`; ValueError where `most` are not enough."""
    if not margin > abs(true_difference) or not sd >= 0:
        raise ValueError(f"the margin must exceed the true difference and sd not be negative; got margin={margin}, "
                         f"true_difference={true_difference}, sd={sd}")
    return _fewest(lambda n: sd == 0 or equivalence_power(sd, n, margin, true_difference, level) >= power, most,
                   f"show equivalence within {margin:g} where pairs differ by {sd:g}")


def detectable_effect(sd: float, n: int, power: float = 0.8, level: float = 0.05, df_extra: float = 0) -> float:
    """Smallest effect that n seeds find with `power`: seeds_needed turned round."""
    if n - 1 + df_extra < 1:
        return math.inf
    low, high = 0.0, sd
    while achieved_power(sd, n, high, level, df_extra) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if achieved_power(sd, n, middle, level, df_extra) >= power else (middle, high)
    return high


def _fewest(enough, most: int, what: str) -> int:
    """Smallest n ≥ 2 that is enough, by doubling and halving."""
    low, high = 2, 2
    while not enough(high):
        low, high = high, high * 2
        if high > most:
            raise ValueError(f"more than {most} seeds are needed to {what}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def power_table(contrasts: list[dict]) -> pd.DataFrame:
    """Planned power: rows of {contrast, runs, seeds, tokens, sd, slope} to the smallest detectable effect.

    `sd` is the pilot's deviation of a seed's difference in nats, `slope` |dL/d log D| in nats per e-fold.
    """
    rows = []
    for c in contrasts:
        effect = detectable_effect(c["sd"], c["seeds"])
        rows.append({"contrast": c["contrast"], "runs": c["runs"], "seeds": c["seeds"], "tokens": c["tokens"], "sd_nats": c["sd"],
                     "detectable_nats": effect, "detectable_tokens": effect / c["slope"]})
    return pd.DataFrame(rows).replace(np.inf, np.nan)
