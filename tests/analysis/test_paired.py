"""Intervals against scipy and statsmodels, verdicts by literal numbers, and what a diverged run counts for."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

import etastar as es
from etastar.analysis.paired import (
    Estimate,
    PooledVariance,
    mean_estimate,
    pool_variance,
    token_equivalent,
    token_slope,
)

D = np.array([0.012, 0.008, 0.015, 0.011, 0.004])


def test_interval_and_p_equal_scipys_paired_t_test():
    e = mean_estimate(D)
    told = stats.ttest_1samp(D, 0.0)
    assert e.interval() == pytest.approx(tuple(told.confidence_interval()))
    assert e.p_equals(0.0) == pytest.approx(told.pvalue)
    assert (e.value, e.n, e.df) == (pytest.approx(0.010), 5, 4)


def test_equivalence_equals_statsmodels_two_one_sided_tests():
    e = mean_estimate(D)
    for low, high in ((-0.02, 0.02), (-0.011, 0.011), (0.005, 0.02)):
        assert e.p_outside(low, high) == pytest.approx(DescrStatsW(D).ttost_mean(low, high)[0])


def test_detectable_effect_by_the_closed_form():
    e = Estimate(0.0, 0.002, 7, 8)
    assert e.detectable() == pytest.approx((stats.t.ppf(0.975, 7) + stats.t.ppf(0.8, 7)) * 0.002)
    assert e.provable_margin() == pytest.approx((stats.t.ppf(0.95, 7) + stats.t.ppf(0.9, 7)) * 0.002)


@pytest.mark.parametrize("shift, margin, verdict", [
    (0.010, None, "higher"), (-0.010, None, "lower"), (0.0, None, "inconclusive"),
    (0.0, 0.01, "equivalent"), (0.0, 0.002, "inconclusive"), (0.010, 0.005, "higher"), (0.010, 0.02, "equivalent"),
])
def test_verdict_of_a_comparison(shift, margin, verdict):
    noise = np.array([-0.003, 0.002, 0.001, -0.002, 0.002])
    b = np.array([3.1, 3.0, 3.2, 3.15, 3.05])
    assert es.compare(b + noise + shift, b, margin=margin).verdict == verdict


def test_what_all_seeds_share_does_not_matter():
    b = np.array([3.0, 9.0, 1.0, 4.0])
    one, other = es.compare(b + D[:4], b), es.compare(D[:4], np.zeros(4))
    assert one.difference == pytest.approx(other.difference) and one.difference_low == pytest.approx(other.difference_low)


def test_a_pooled_variance_narrows_the_interval_of_three_seeds():
    pooled = PooledVariance(0.004, 12.0, "")
    alone, together = es.compare(D[:3], np.zeros(3)), es.compare(D[:3], np.zeros(3), pooled=pooled)
    assert together.difference_high - together.difference_low == pytest.approx(2 * stats.t.ppf(0.975, 12) * 0.004 / math.sqrt(3))
    assert together.difference_high - together.difference_low < alone.difference_high - alone.difference_low


def test_pooling_weighs_by_degrees_of_freedom_and_discounts_what_cells_share():
    cells = [np.array([0.0, 0.002]), np.array([0.0, 0.004, 0.002])]
    pooled = pool_variance(cells, shared=0.0)
    assert pooled.sd == pytest.approx(math.sqrt((1 * 2e-6 + 2 * 4e-6) / 3)) and pooled.df == 3
    assert pool_variance(cells, shared=0.5).df == pytest.approx(3 / 1.25)
    assert pool_variance(cells * 4, shared=1.0).df == pytest.approx(12 / 8)


def test_unlike_cells_are_not_pooled_and_three_seeds_are_enough_to_say_so():
    quiet, loud = np.array([-1.0, 0.0, 1.0]) * 0.001, np.array([-1.0, 0.0, 1.0]) * 0.05
    pooled = pool_variance([quiet, quiet, quiet, loud])
    # Bartlett by hand: T = (8 ln(mean variance) − 2 Σ ln variance) / (1 + (4/2 − 1/8) / 9), three degrees of freedom
    variances = np.array([1e-6] * 3 + [2.5e-3])
    p = stats.chi2.sf((8 * np.log(variances.mean()) - 2 * np.log(variances).sum()) / (1 + (2 - 1 / 8) / 9), 3)
    assert p < 0.01 and pooled.sd is None and f"Bartlett p = {p:.2g}" in pooled.reason
    assert mean_estimate(D, pooled=pooled) == mean_estimate(D)
    assert pool_variance([quiet, quiet * 2, quiet * 3]).sd == pytest.approx(0.001 * math.sqrt(14 / 3))


def test_a_cell_without_variance_is_unlike_one_with_it():
    assert pool_variance([np.zeros(3), D[:3]]).sd is None
    assert pool_variance([np.zeros(3), np.zeros(3)]).sd == 0.0


def test_diverged_seeds_are_counted_where_variances_are_pooled():
    pooled = pool_variance([np.array([0.0, 0.002, np.nan]), np.array([0.0, 0.004, 0.002])], shared=0.0)
    assert pooled.df == 3 and "1 diverged seeds left out" in pooled.reason
    assert pool_variance([np.array([0.1, np.nan])]).reason == "no cell has two finite seeds; 1 diverged seeds left out"


def test_a_diverged_run_counts_against_its_side_and_forbids_equivalence():
    good = np.full(7, 3.0)
    bad = np.full(7, np.nan)
    told = es.compare(bad, good, margin=1.0)
    assert told.verdict == "higher" and told.n_censored == 7 and "sign test" in told.note
    one = es.compare(np.array([np.nan, 3.0, 3.0, 3.0]), np.full(4, 3.0), margin=1.0)
    assert one.verdict == "inconclusive" and one.n_censored == 1
    both = es.compare(np.array([np.nan, 1.0, 1.1]), np.array([np.nan, 2.0, 2.1]))
    assert both.verdict == "inconclusive" and both.difference == pytest.approx(-1.0)


@pytest.mark.parametrize("call, said", [
    (lambda: es.compare([1.0], [2.0]), "one seed has no spread"),
    (lambda: es.compare([1.0, 2.0], [2.0]), "same seeds"),
    (lambda: es.compare([1.0, 2.0], [2.0, 1.0], margin=0.0), "margin must be positive"),
    (lambda: mean_estimate([1.0, np.nan]), "1 of 2 seeds are not finite"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_token_equivalents_by_hand():
    slope = token_slope([3.2, 3.21, 3.19], [3.0, 3.01, 2.99], 2.0)
    assert slope == pytest.approx([-0.2 / math.log(2)] * 3)
    e = token_equivalent(Estimate(-0.01, 0.001, 4, 5), slope + np.array([0.0, 1e-9, -1e-9]))
    assert e.value == pytest.approx(-0.01 * math.log(2) / 0.2) and e.se == pytest.approx(0.001 * math.log(2) / 0.2)
    assert e.unit == "token_fraction"


def test_the_error_of_the_slope_is_carried_along():
    e = token_equivalent(Estimate(-0.1, 0.0, 4, 5), np.array([-0.2, -0.25, -0.3]))
    assert e.value == pytest.approx(-0.4) and e.se == pytest.approx(0.4 * (0.05 / math.sqrt(3)) / 0.25)


def test_no_token_equivalent_where_tokens_do_not_help():
    with pytest.raises(ValueError, match="does not fall with tokens"):
        token_equivalent(Estimate(0.01, 0.001, 4, 5), np.array([-0.2, 0.2, 0.05]))
