"""Calibration on simulated draws, fresh every time: false alarms of the difference verdict, coverage of the intervals.

Each bound is set so that a procedure that is right at its nominal rate fails with a chance below 1e-4; the band 92–98 %
and the 6.5 % of the rules are met by enough draws to say so. The seed stands in every message.
"""

import numpy as np
import pytest
from scipy import stats

import etastar as es
from etastar.analysis import paired

TRUE_BEST, BEND, SKEW = -6.3, 0.06, 0.004
X = np.array([-8.0, -7.25, -6.5, -5.75, -5.0])


@pytest.fixture
def fresh():
    entropy = np.random.SeedSequence().entropy
    return np.random.default_rng(entropy), f"seed {entropy}"


def fires(rng, draws, seeds, judge=es.compare):
    """Share of identical-arm draws that a difference verdict fires on; arms share half of their noise, as paired arms do."""
    count = 0
    for _ in range(draws):
        shared = rng.normal(0, 0.01, seeds)
        a, b = shared + rng.normal(0, 0.004, seeds), shared + rng.normal(0, 0.004, seeds)
        count += judge(a, b).verdict in ("lower", "higher")
    return count / draws


@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
def test_identical_arms_seldom_differ(fresh, seeds):
    rng, said = fresh
    draws = 2_000
    bound = max(0.065, stats.binom.ppf(1 - 1e-4, draws, 0.05) / draws)
    assert fires(rng, draws, seeds) <= bound, said


def test_the_check_catches_an_interval_too_narrow(fresh):
    rng, said = fresh

    def normal_interval(a, b):  # 1.96 in place of Student's 4.30 at three seeds
        e = paired.mean_estimate(a - b)
        return paired.Comparison(e.value, 0, 0, e.n, "higher" if abs(e.value) > 1.96 * e.se else "inconclusive", 0)

    assert fires(rng, 2_000, 3, judge=normal_interval) > 0.1, said


def cells_of_a_study(rng, seeds, arms=6):
    reference = rng.normal(0, 0.004, seeds)
    return [rng.normal(0, 0.004, seeds) - reference for _ in range(arms)]


@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_pooled_variances_of_arms_that_share_a_reference_keep_the_rate(fresh, seeds):
    rng, said = fresh
    draws, fired = 2_000, 0
    for _ in range(draws):
        cells = cells_of_a_study(rng, seeds)
        fired += paired.mean_estimate(cells[0], pooled=paired.pool_variance(cells)).p_equals(0.0) < 0.05
    assert fired / draws <= max(0.065, stats.binom.ppf(1 - 1e-4, draws, 0.05) / draws), said


def test_the_interval_of_a_difference_covers_the_truth(fresh):
    rng, said = fresh
    draws = 4_000
    covered = 0
    for i in range(draws):
        seeds = 3 + i % 6
        told = es.compare(rng.normal(0.01, 0.004, seeds), np.zeros(seeds))
        covered += told.difference_low <= 0.01 <= told.difference_high
    assert 0.92 <= covered / draws <= 0.98, (covered / draws, said)


def bowl_covers(rng, draws, narrow=1.0):
    """Share of bowls whose interval holds the true best rate: skewed bowl, seeds with shifts and vertices of their own."""
    covered = tried = 0
    while tried < draws:
        seeds = int(rng.integers(3, 9))
        noise = rng.uniform(0.003, 0.01)
        best = TRUE_BEST + rng.normal(0, 0.1, seeds)
        y = BEND / 2 * (X - best[:, None]) ** 2 + SKEW * (X - best[:, None]) ** 3 + rng.normal(0, 0.03, seeds)[:, None]
        try:
            bowl = es.fit_bowl(np.tile(2.0**X, seeds), (y + rng.normal(0, noise, y.shape)).ravel(), np.repeat(np.arange(seeds), len(X)))
        except es.EdgeOptimum:
            continue
        tried += 1
        half = (np.log2(bowl.best_lr_high) - bowl.best_log2_lr) * narrow
        covered += abs(bowl.best_log2_lr - TRUE_BEST) <= half
    return covered / draws


@pytest.mark.slow
def test_the_interval_of_a_bowls_vertex_covers_the_truth(fresh):
    rng, said = fresh
    share = bowl_covers(rng, 3_000)
    assert 0.92 <= share <= 0.98, (share, said)


@pytest.mark.slow
def test_the_check_catches_a_bowl_interval_too_narrow(fresh):
    rng, said = fresh
    assert bowl_covers(rng, 400, narrow=0.4) < 0.9, said
