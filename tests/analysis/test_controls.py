"""The controls pass on honest rules and catch a planted regression: an interval too narrow, a margin ignored."""

import dataclasses

import numpy as np
import pytest

from etastar.analysis.claims import judge, load_claims
from etastar.analysis.controls import aa_control, planted_control, truth_control
from etastar.analysis.paired import compare

CLAIM = load_claims("01_cosine_vs_wsd")["cos0_beats_cos10"]


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


def cells(rng, seeds=8):
    shared = rng.normal(0, 0.01, seeds)
    return {str(i): 3.5 + shared + rng.normal(0, 0.005, seeds) for i in range(21)}


def too_narrow(a, b, margin=None):
    """A compare whose interval is a fifth of what it should be."""
    told = compare(a, b, margin)
    half = (told.difference_high - told.difference_low) / 10
    verdict = "inconclusive" if abs(told.difference) < half else "higher" if told.difference > 0 else "lower"
    return dataclasses.replace(told, verdict=verdict)


def margin_ignored(a, b, margin=None):
    """A compare that calls everything equivalent when asked about a margin."""
    told = compare(a, b)
    return told if margin is None else dataclasses.replace(told, verdict="equivalent")


def test_identical_arms_pass_and_a_narrow_interval_is_caught(rng):
    # cells share seeds, so a board catches a narrow interval two times in three (measured: 34 % pass, 97 % of honest ones);
    # the bounds lie five standard deviations of 120 boards away
    assert np.mean([aa_control(cells(rng)).passed for _ in range(120)]) >= 0.90
    assert np.mean([aa_control(cells(rng), judge_pair=too_narrow).passed for _ in range(120)]) <= 0.55
    control = aa_control({str(i): 3.5 + rng.normal(0, 0.01, 8) for i in range(60)}, judge_pair=too_narrow)
    assert not control.passed and "of 60 cells" in control.detail


def test_too_few_seeds_are_not_judged():
    assert aa_control({"a": np.array([1.0, 2.0, 3.0])}).detail.startswith("not run")


def test_half_the_tokens_are_found_worse_and_an_ignored_margin_is_caught(rng):
    long = 3.5 + rng.normal(0, 0.01, 5)
    short = long + 0.15 + rng.normal(0, 0.004, 5)
    assert truth_control(short, long, margin=0.03).passed
    assert not truth_control(short, long, margin=0.03, judge_pair=margin_ignored).passed
    assert not truth_control(long, short, margin=0.03).passed  # the sign turned round


def test_planted_truths_pass_and_a_narrow_interval_is_caught():
    control = planted_control(CLAIM, sd=0.01, n=5, seed=1)
    assert control.passed, control.detail

    def narrow(claim, estimate, **how):
        return judge(claim, dataclasses.replace(estimate, se=estimate.se / 5), **how)

    assert not planted_control(CLAIM, sd=0.01, n=5, seed=1, judge_one=narrow).passed

    def deaf(claim, estimate, **how):
        return judge(claim, dataclasses.replace(estimate, se=estimate.se * 50), **how)

    assert not planted_control(CLAIM, sd=0.01, n=5, seed=1, judge_one=deaf).passed
