"""Power against statsmodels' own paired t test."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from etastar.analysis.power import (
    achieved_power,
    detectable_effect,
    equivalence_power,
    equivalence_seeds,
    power_table,
    seeds_needed,
)


@pytest.mark.parametrize("n, d", [(3, 1.0), (5, 0.8), (8, 1.5), (30, 0.3)])
def test_power_equals_statsmodels(n, d):
    assert achieved_power(2.0, n, 2.0 * d) == pytest.approx(TTestPower().power(d, n, 0.05), abs=1e-6)


@pytest.mark.parametrize("sd, effect", [(0.0045, 0.002), (0.0045, 0.01), (0.01, 0.05)])
def test_seeds_needed_is_the_fewest_that_suffice(sd, effect):
    n = seeds_needed(sd, effect)
    assert achieved_power(sd, n, effect) >= 0.8
    assert n == 2 or achieved_power(sd, n - 1, effect) < 0.8
    assert n == max(2, math.ceil(TTestPower().solve_power(effect / sd, power=0.8, alpha=0.05)))


def test_borrowed_degrees_of_freedom_take_the_place_of_seeds():
    by_hand = stats.nct.sf(stats.t.ppf(0.975, 12), 12, math.sqrt(3)) + stats.nct.cdf(-stats.t.ppf(0.975, 12), 12, math.sqrt(3))
    assert achieved_power(2.0, 3, 2.0, df_extra=10) == pytest.approx(by_hand)
    assert seeds_needed(0.0045, 0.01, df_extra=10) < seeds_needed(0.0045, 0.01)
    assert detectable_effect(0.0045, 3, df_extra=10) < detectable_effect(0.0045, 3)


@pytest.mark.parametrize("n, margin, truth", [(3, 2.5, 0.0), (6, 1.25, 0.25), (30, 0.5, 0.0)])
def test_power_of_equivalence_is_what_simulated_draws_find(n, margin, truth):
    entropy, draws = np.random.SeedSequence().entropy, 100_000
    x = np.random.default_rng(entropy).normal(truth, 1.0, (draws, n))
    half = stats.t.ppf(0.95, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
    found = ((x.mean(1) - half > -margin) & (x.mean(1) + half < margin)).mean()
    told = equivalence_power(1.0, n, margin, truth)
    assert abs(found - told) < 4.5 * math.sqrt(told * (1 - told) / draws), f"seed {entropy}"  # chance below 1e-5


def test_power_of_equivalence_with_many_seeds_is_the_normal_one():
    n, margin = 400, 0.15
    told = 2 * stats.norm.cdf(math.sqrt(n) * margin - stats.norm.ppf(0.95)) - 1
    assert equivalence_power(1.0, n, margin) == pytest.approx(told, abs=0.003)


def test_equivalence_seeds_are_the_fewest_that_suffice():
    n = equivalence_seeds(0.0045, 0.005, true_difference=0.001)
    assert equivalence_power(0.0045, n, 0.005, 0.001) >= 0.8 > equivalence_power(0.0045, n - 1, 0.005, 0.001)
    assert equivalence_seeds(0.0045, 0.005) < n and equivalence_seeds(0.0, 0.005) == 2
    with pytest.raises(ValueError, match="margin must exceed the true difference"):
        equivalence_seeds(0.0045, 0.005, true_difference=-0.005)


def test_detectable_effect_turns_it_round():
    effect = detectable_effect(0.0045, 4)
    assert achieved_power(0.0045, 4, effect) == pytest.approx(0.8, abs=1e-6)
    assert detectable_effect(0.0045, 1) == math.inf


def test_table_and_bad_input():
    row = power_table([{"contrast": "a − b", "runs": 10, "seeds": 5, "tokens": 10**6, "sd": 0.004, "slope": 0.2}]).iloc[0]
    assert row.detectable_tokens == pytest.approx(row.detectable_nats / 0.2) and row.detectable_nats == detectable_effect(0.004, 5)
    with pytest.raises(ValueError, match="must be positive"):
        seeds_needed(0.004, 0.0)
    with pytest.raises(ValueError, match="more than 10000 seeds"):
        seeds_needed(1.0, 1e-6)
