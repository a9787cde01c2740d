"""Does a dense model's rule of the rate hold for a mixture of experts, and with which count of its parameters?

arXiv 2503.04715 takes the total for N. `dense` is a law of dense models (`size_horizon.fit_size_horizon`), `rates` the best rates of
mixtures: cell, params (total), params_active, horizon_tokens, peak_lr, as `lr_grids.optima` makes them of `es.archive("steplaw_moe")`.
"""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.analysis.cooldown_archive import clustered_mean
from etastar.analysis.jackknife import jackknife
from etastar.analysis.paired import Estimate
from etastar.analysis.size_horizon import SizeHorizon, fit_size_horizon

COUNTS = {"total": "params", "active": "params_active"}


def rule_errors(dense: SizeHorizon, rates: pd.DataFrame) -> pd.DataFrame:
    """The dense rule at each mixture: its rows with total_octaves and active_octaves (log2 of the rule over the best rate, with either
    count as N), effective_params (the N at which the rule says the best rate) and share_of_total.

    share_of_total is where that N lies between the active (0) and the total (1), in logs. ValueError where a column is missing.
    """
    if lacking := [name for name in ("cell", *COUNTS.values(), "horizon_tokens", "peak_lr") if name not in rates]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, rates))}")
    errors = {f"{name}_octaves": np.log2(dense.rate(rates[count], rates["horizon_tokens"]) / rates["peak_lr"])
              for name, count in COUNTS.items()}
    effective = rates["params"] * 2 ** (-errors["total_octaves"] / dense.size.value)
    share = np.log(effective / rates["params_active"]) / np.log(rates["params"] / rates["params_active"])
    return rates.assign(**errors, effective_params=effective, share_of_total=share)


def rule_error(dense_rates: pd.DataFrame, rates: pd.DataFrame, count: str = "total") -> Estimate:
    """Mean octaves by which the rule fitted to dense best rates misses those of mixtures, with N their "total" or "active" parameters.

    Errors: over mixtures of one active size as clusters, and those of the dense law over its sizes. ValueError for another count,
    and for fewer than three active sizes.
    """
    if count not in COUNTS:
        raise ValueError(f"count must be one of {', '.join(COUNTS)}; got {count!r}")

    def mean_rate(kept):
        return np.log2(fit_size_horizon(dense_rates[kept]).rate(rates[COUNTS[count]], rates["horizon_tokens"])).mean()

    found = rule_errors(fit_size_horizon(dense_rates), rates)
    scatter = clustered_mean(found[f"{count}_octaves"], found["params_active"])
    (law,) = jackknife(dense_rates["params"], mean_rate)
    return dataclasses.replace(scatter, se=math.hypot(scatter.se, law.se), df=min(scatter.df, law.df), unit="octaves")


def total_share(dense_rates: pd.DataFrame, rates: pd.DataFrame) -> Estimate:
    """Where the N that makes the dense law hold lies between the active parameters (0) and the total (1), in logs, over all mixtures.

    Least squares of the law's misses on log2 of total over active, so that mixtures whose counts are alike weigh little. Errors: of
    leaving out an active size, and a size of the dense law. ValueError for fewer than four of either.
    """
    sparsity = np.log2(rates["params"] / rates["params_active"]).to_numpy(float)

    def share(dense, kept):
        law = fit_size_horizon(dense)
        missed = np.log2(law.rate(rates["params"], rates["horizon_tokens"]) / rates["peak_lr"]).to_numpy(float)
        return 1 - (missed * sparsity)[kept].sum() / (law.size.value * (sparsity**2)[kept].sum())

    (over_mixtures,) = jackknife(rates["params_active"], lambda kept: share(dense_rates, kept), "share")
    (law,) = jackknife(dense_rates["params"], lambda kept: share(dense_rates[kept], slice(None)))
    return dataclasses.replace(over_mixtures, se=math.hypot(over_mixtures.se, law.se), df=min(over_mixtures.df, law.df))


def horizon_exponent(rates: pd.DataFrame) -> Estimate:
    """The exponent in tokens of mixtures' best rates at one batch, beside one in their active parameters."""
    return fit_size_horizon(rates.assign(params=rates["params_active"])).horizon
