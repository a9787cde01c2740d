"""Power before ambition: how many seeds an effect needs, and what a design could have seen."""

import math

import numpy as np
import pandas as pd
from scipy import stats


def achieved_power(sd: float, n: int, effect: float, level: float = 0.05) -> float:
    """Power of a two-sided paired t test over n seeds to find `effect` where a pair differs by `sd` (noncentral t)."""
    if n < 2:
        return 0.0
    critical, shift = stats.t.ppf(1 - level / 2, n - 1), effect / sd * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def seeds_needed(sd: float, effect: float, power: float = 0.8, level: float = 0.05, most: int = 10_000) -> int:
    """Fewest seeds with which a paired t test finds `effect` with `power`; ValueError where `most` are not enough."""
    if not effect > 0 or not sd >= 0:
        raise ValueError(f"an effect to resolve must be positive and sd not negative; got effect={effect}, sd={sd}")
    if sd == 0:
        return 2
    low, high = 2, 2
    while achieved_power(sd, high, effect, level) < power:
        low, high = high, high * 2
        if high > most:
            raise ValueError(f"more than {most} seeds are needed to resolve {effect:g} where pairs differ by {sd:g}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if achieved_power(sd, middle, effect, level) >= power else (middle + 1, high)
    return high


def detectable_effect(sd: float, n: int, power: float = 0.8, level: float = 0.05) -> float:
    """Smallest effect that n seeds find with `power`: seeds_needed turned round."""
    if n < 2:
        return math.inf
    low, high = 0.0, sd
    while achieved_power(sd, n, high, level) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if achieved_power(sd, n, middle, level) >= power else (middle, high)
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
