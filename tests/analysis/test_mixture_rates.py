"""Mixtures whose best rates follow a dense rule in their total or in their active parameters: the right count is told."""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.mixture_rates import horizon_exponent, rule_error, rule_errors, total_share
from etastar.analysis.size_horizon import fit_size_horizon

TOTAL, ACTIVE, TOKENS = 2.15e9, (1.9e8, 2.3e8, 5.9e8, 1.24e9), (2e9, 4e9, 8e9, 2e10)


def rate(n, d):
    return 15 * n**-0.713 * d**0.218


def dense(noise=0.0):
    n, d = (a.ravel() for a in np.meshgrid((2.1e8, 2.7e8, 4.3e8, 5.4e8, 1.07e9), (5e9, 2e10, 8e10)))
    scatter = 2.0 ** (noise * np.random.default_rng(4).normal(size=len(n)))
    return pd.DataFrame({"cell": range(len(n)), "params": n, "horizon_tokens": d, "peak_lr": rate(n, d) * scatter})


def mixtures(share=1.0):
    """Best rates of mixtures whose N lies `share` of the way, in logs, from the active to the total parameters."""
    rows = [{"cell": f"{a:g}, {d:g}", "params": TOTAL, "params_active": a, "horizon_tokens": d,
             "peak_lr": rate(a ** (1 - share) * TOTAL**share, d)} for a in ACTIVE for d in TOKENS]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_count_that_holds_is_told(share):
    found = rule_errors(fit_size_horizon(dense()), mixtures(share))
    assert found["share_of_total"].to_numpy() == pytest.approx([share] * 16)
    assert found["effective_params"].to_numpy() == pytest.approx((found["params_active"] ** (1 - share) * TOTAL**share).to_numpy())
    octaves = -0.713 * (1 - share) * np.log2(TOTAL / found["params_active"])
    assert found["total_octaves"].to_numpy() == pytest.approx(octaves.to_numpy())
    assert (found["active_octaves"] - found["total_octaves"]).to_numpy() == pytest.approx(
        (0.713 * np.log2(TOTAL / found["params_active"])).to_numpy())


def test_errors_are_over_mixtures_and_of_the_dense_law():
    exact, scattered = (rule_error(dense(noise), mixtures()) for noise in (0, 0.1))
    assert exact.value == pytest.approx(0, abs=1e-9) and exact.se == pytest.approx(0, abs=1e-9) and (exact.n, exact.unit) == (16, "octaves")
    assert scattered.se > 0.05 and scattered.df == 3
    wrong = rule_error(dense(), mixtures(), "active")
    assert wrong.value == pytest.approx(0.713 * np.mean(np.log2(TOTAL / np.array(ACTIVE)))) and wrong.interval()[0] > 0
    with pytest.raises(ValueError, match="count must be one of total, active; got 'all'"):
        rule_error(dense(), mixtures(), "all")
    with pytest.raises(ValueError, match="no column 'params_active'"):
        rule_error(dense(), mixtures().drop(columns="params_active"))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_over_all_mixtures_is_the_planted_one_with_an_error_of_law_and_mixtures(share):
    exact, scattered = (total_share(dense(noise), mixtures(share)) for noise in (0, 0.1))
    assert exact.value == pytest.approx(share) and exact.se == pytest.approx(0, abs=1e-9) and (exact.df, exact.unit) == (3, "share")
    assert scattered.value == pytest.approx(share, abs=3 * scattered.se) and scattered.se > 0.01


def test_a_mixture_that_leaves_the_law_widens_the_share(share=1.0):
    off = mixtures(share)
    off.loc[off["params_active"] == 1.9e8, "peak_lr"] *= 2**0.5
    found = total_share(dense(), off)
    assert found.value < 0.95 and found.se > 0.05  # its rate is nearer to that of its active parameters


def test_the_exponent_in_tokens_stands_beside_one_in_active_parameters():
    found = horizon_exponent(mixtures(0.0))
    assert found.value == pytest.approx(0.218) and found.n == 16
