"""Power against statsmodels' own paired t test."""

import math

import pytest
from statsmodels.stats.power import TTestPower

from etastar.analysis.power import achieved_power, detectable_effect, power_table, seeds_needed


@pytest.mark.parametrize("n, d", [(3, 1.0), (5, 0.8), (8, 1.5), (30, 0.3)])
def test_power_equals_statsmodels(n, d):
    assert achieved_power(2.0, n, 2.0 * d) == pytest.approx(TTestPower().power(d, n, 0.05), abs=1e-6)


@pytest.mark.parametrize("sd, effect", [(0.0045, 0.002), (0.0045, 0.01), (0.01, 0.05)])
def test_seeds_needed_is_the_fewest_that_suffice(sd, effect):
    n = seeds_needed(sd, effect)
    assert achieved_power(sd, n, effect) >= 0.8
    assert n == 2 or achieved_power(sd, n - 1, effect) < 0.8
    assert n == max(2, math.ceil(TTestPower().solve_power(effect / sd, power=0.8, alpha=0.05)))


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
