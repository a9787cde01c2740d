"""The controls pass on honest rules and catch a planted regression: an interval too narrow, a margin ignored."""

import dataclasses
import types

import numpy as np
import pytest
from scipy import stats

from etastar.analysis.claims import judge, load_claims
from etastar.analysis.controls import TURNS, _turned, aa_control, planted_control, truth_control
from etastar.analysis.paired import compare

CLAIM = load_claims("01_cosine_vs_wsd")["cos0_beats_cos10"]


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


def cells(rng, seeds=8, shared=0.01, by_rate=0.0, own=0.005):
    """21 arms over the same seeds: a seed's shift common to all, another common to arms at one rate, and the arm's own noise."""
    rate = np.repeat(np.arange(5), [9, 3, 3, 3, 3])
    common = rng.normal(0, shared, seeds) + rng.normal(0, by_rate, (5, seeds))[rate]
    return {str(i): 3.5 + common[i] + rng.normal(0, own, seeds) for i in range(21)}


def student(narrow=1.0):
    """What compare says without a margin, its interval `narrow` times too narrow; some twenty times as fast."""
    quantile = {n: stats.t.ppf(0.975, n - 1) / narrow / np.sqrt(n) for n in (2, 3, 4, 5, 8)}

    def told(a, b):
        difference = a - b
        half = quantile[len(difference)] * difference.std(ddof=1)
        verdict = "inconclusive" if abs(difference.mean()) <= half else "higher" if difference.mean() > 0 else "lower"
        return types.SimpleNamespace(verdict=verdict)

    return told


def margin_ignored(a, b, margin=None):
    """A compare that calls everything equivalent when asked about a margin."""
    told = compare(a, b)
    return told if margin is None else dataclasses.replace(told, verdict="equivalent")


NOISE = [dict(seeds=4), dict(seeds=4, shared=0.02, own=0.002), dict(seeds=4, shared=0.02, by_rate=0.003, own=0.002), dict(seeds=8)]


@pytest.mark.parametrize("noise", NOISE)
def test_identical_arms_pass_whatever_their_cells_share(rng, noise):
    # under 1 % of honest boards fail: five of sixty do once in 100,000
    some = cells(rng, **noise)
    assert aa_control(some) == aa_control(some, judge_pair=student())
    assert sum(aa_control(cells(rng, **noise), judge_pair=student()).passed for _ in range(60)) >= 56


@pytest.mark.parametrize("narrow", [5, 3, 2])
@pytest.mark.parametrize("noise", NOISE)
def test_a_narrow_interval_is_caught(rng, noise, narrow):
    assert not any(aa_control(cells(rng, **noise), judge_pair=student(narrow)).passed for _ in range(30))


def test_cells_with_unlike_numbers_of_seeds_are_compared_too(rng):
    some = {str(i): 3.5 + rng.normal(0, 0.01, 4 + i % 2) for i in range(20)}
    assert "of 20 cells" in aa_control(some).detail and not aa_control(some, judge_pair=student(3)).passed


def test_a_control_reads_the_same_twice_and_its_turns_follow_the_losses(rng):
    some, other = cells(rng, seeds=4), cells(rng, seeds=4)
    assert aa_control(some) == aa_control(some)
    directions = [(a - b) / np.linalg.norm(a - b) for a, b in (_turned([c["0"]])[0] for c in (some, other))]
    assert not np.allclose(*directions)


def test_turned_noise_has_the_size_of_the_cells(rng):
    losses = 3.5 + rng.normal(0, 0.01, 4)
    sizes = [np.mean((a - b) ** 2) for a, b in _turned([losses])]
    assert len(sizes) == TURNS and sizes == pytest.approx([losses.var(ddof=1)] * TURNS)


def test_a_control_that_could_not_run_has_not_passed():
    for control in (aa_control({"a": np.array([1.0, 2.0, 3.0])}), aa_control({"a": np.full(4, np.nan)}), aa_control({}),
                    truth_control([3.0, np.nan], [np.nan, 3.0], margin=0.1), truth_control([], [], margin=0.1),
                    planted_control(CLAIM, sd=0.0, n=5, seed=1), planted_control(CLAIM, sd=np.nan, n=5, seed=1)):
        assert control.passed is None and control.detail.startswith("not run")


def test_half_the_tokens_are_found_worse_and_an_ignored_margin_is_caught(rng):
    long = 3.5 + rng.normal(0, 0.01, 5)
    short = long + 0.15 + rng.normal(0, 0.004, 5)
    assert truth_control(short, long, margin=0.03).passed
    assert not truth_control(short, long, margin=0.03, judge_pair=margin_ignored).passed
    assert not truth_control(long, short, margin=0.03).passed  # the sign turned round


def test_planted_truths_pass():
    control = planted_control(CLAIM, sd=0.01, n=5, seed=1)
    assert control.passed, control.detail
    assert planted_control(CLAIM, sd=0.01, n=5, seed=2, draws=100).passed  # so few suffice for the faults below


def spoilt(claim=lambda c: c, estimate=lambda e: e):
    """A judge that looks at another claim or another estimate than it was given."""
    return lambda c, e, **how: judge(claim(c), estimate(e), **how)


def wider(factor):
    return spoilt(claim=lambda c: dataclasses.replace(c, margin=c.margin * factor))


@pytest.mark.parametrize("fault, judge_one", [
    ("narrow", spoilt(estimate=lambda e: dataclasses.replace(e, se=e.se / 5))),
    ("deaf", spoilt(estimate=lambda e: dataclasses.replace(e, se=e.se * 50))),
    ("a margin without end", wider(1e6)), ("a margin a half too wide", wider(1.5)), ("no margin", wider(1e-6)),
    ("a target forgotten", spoilt(claim=lambda c: dataclasses.replace(c, published=0.0))),
    ("an equality that asks for no effect", spoilt(claim=lambda c: dataclasses.replace(c, kind="direction", side="higher"))),
])
def test_planted_truths_catch_a_judge_with(fault, judge_one):
    assert not planted_control(CLAIM, sd=0.01, n=5, seed=1, draws=100, judge_one=judge_one).passed


@pytest.mark.parametrize("judge_pair", [
    margin_ignored, lambda a, b, margin: compare(a, b), lambda a, b, margin: compare(a, b, 1.5 * margin),
    lambda a, b, margin: dataclasses.replace(compare(a, b), verdict="equivalent" if abs(np.mean(a - b)) < margin * 1.2 else "higher"),
])
def test_planted_truths_catch_a_compare_that_takes_margins_lightly(judge_pair):
    assert not planted_control(CLAIM, sd=0.01, n=5, seed=1, draws=100, judge_pair=judge_pair).passed
