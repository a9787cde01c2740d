"""Schedules: hand-computed tables, published vectors, joints, prefixes, refusals."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etastar.cooldown_shapes import SHAPES
from etastar.schedules import (
    WSD,
    Branch,
    Constant,
    Cosine,
    InverseSqrt,
    LinearToZero,
    MultiStep,
    Power,
    Schedule,
    Table,
)
from etastar.values import canonical_json, decode, encode

R2, R3 = math.sqrt(2) / 2, math.sqrt(3) / 2
RAMP = [0.25, 0.5, 0.75, 1.0]
TABLES = [
    (Constant(), [1, 1, 1]),
    (Constant(warmup_steps=4), [*RAMP, 1, 1]),
    (Constant(warmup_tokens=20), [0.5, 1, 1]),
    (WSD(warmup_steps=4, cooldown_steps=4), [*RAMP, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    (WSD(cooldown_tokens=30, floor=0.2), [1, 1, 0.8, 0.6, 0.4]),
    (WSD(warmup_steps=4, cooldown_steps=0), [*RAMP, 1]),
    (WSD(cooldown_fraction=1, warmup_steps=1, shape="1-sqrt"), [1, 0.5, 1 - R2, 1 - R3]),
    (WSD(cooldown_steps=3, shape="cosine"), [1, 0.5 + R2 / 2, 0.5, 0.5 - R2 / 2]),
    (WSD(cooldown_steps=3, shape="mirror-cosine"), [1, 1 - R2 / 2, 0.5, R2 / 2]),
    (WSD(cooldown_steps=3, shape="square"), [1, 15 / 16, 12 / 16, 7 / 16]),
    (WSD(cooldown_steps=3, shape="1-x^p", shape_parameter=2), [1, 15 / 16, 12 / 16, 7 / 16]),
    (WSD(cooldown_steps=3, shape="lowered-linear"), [1, 0.525, 0.35, 0.175]),
    (WSD(cooldown_steps=3, shape="exponential"), [1, 0.6500680, 0.3775407, 0.1652962]),
    (WSD(cooldown_steps=3, shape="half-life", shape_parameter=4), [1, 0.5, 0.25, 0.125]),
    (LinearToZero(warmup_steps=1), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    (LinearToZero(floor=0.5), [0.875, 0.75, 0.625]),
    (Cosine(floor=0, warmup_steps=2), [0.5, 1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
    (Cosine(warmup_steps=1), [1, 0.1 + 0.9 * (0.5 + R2 / 2), 0.55, 0.1 + 0.9 * (0.5 - R2 / 2)]),
    (Cosine(floor=0, cycle_steps=4, warmup_steps=1), [1, 0.5 + R2 / 2, 0.5, 0.5 - R2 / 2, 0, 0, 0]),
    (
        Cosine(floor=0, cycle_tokens=30, after="loop"),
        [0.5 + R2 / 2, 0.5, 0.5 - R2 / 2, 0, 0.5 - R2 / 2, 0.5, 0.5 + R2 / 2, 1, 0.5 + R2 / 2],
    ),
    (Cosine(floor=0, cycle_fraction=1.5), [0.5 + R2 / 2, 0.5]),
    (Cosine(floor=0, cycle_fraction=0.7), [0.5 + R2 / 2, 0.5, 0.5 - R2 / 2, 0]),
    (MultiStep(), [1] * 16 + [0.31622777] * 2 + [0.1] * 2),
    (MultiStep(boundaries=(0.5,), factors=(0.25,), warmup_steps=2), [0.5, 1, 0.25, 0.25]),
    (InverseSqrt(warmup_steps=4), [*RAMP, math.sqrt(4 / 5), math.sqrt(4 / 6), math.sqrt(4 / 7), R2, 2 / 3]),
    (InverseSqrt(), [1, R2, 1 / math.sqrt(3), 0.5]),
    (Table(factors=(1, 0, 0.5)), [1, 0, 0.5]),
    (Branch(Constant(), 60, 20, LinearToZero()), [1, 1, 0.75, 0.5, 0.25]),
    (Branch(LinearToZero(), 30, 20, Constant(warmup_steps=2), then_peak_lr=4), [0.75, 0.5, 2, 4, 4]),
    (Branch(LinearToZero(), 30, 20, Constant(), trunk_peak_lr=4.0), [3, 2, 2, 2]),
]


@pytest.mark.parametrize("schedule, factors", TABLES, ids=lambda item: type(item).__name__)
def test_hand_computed_tables(schedule, factors):
    assert schedule.lr(len(factors), peak_lr=1.0, batch_tokens=10) == pytest.approx(factors, abs=1e-7)
    if not isinstance(schedule, Branch):
        scaled = schedule.lr(len(factors), peak_lr=0.02, batch_tokens=10)
        assert scaled == pytest.approx(np.array(factors) * 0.02, abs=1e-9)


def test_rates_are_float64_one_a_step():
    rates = WSD(cooldown_fraction=0.5).lr(7, peak_lr=1, batch_tokens=1)
    assert rates.dtype == np.float64 and rates.shape == (7,)


@pytest.mark.parametrize(
    "fraction, total, steps", [(0.2, 100, 20), (0.25, 10, 2), (0.35, 10, 4), (0.26, 10, 3), (0.999, 10, 10)]
)
def test_fraction_is_of_the_whole_run_rounded_to_the_nearest_step(fraction, total, steps):
    rates = WSD(cooldown_fraction=fraction).lr(total, peak_lr=1.0, batch_tokens=1)
    assert np.count_nonzero(rates < 1) == steps


def test_fraction_of_one_means_all_after_warm_up():
    long = WSD(cooldown_fraction=1, warmup_steps=5).lr(20, peak_lr=0.3, batch_tokens=1)
    assert np.array_equal(long, LinearToZero(warmup_steps=5).lr(20, peak_lr=0.3, batch_tokens=1))
    assert np.array_equal(long, WSD(cooldown_steps=15, warmup_steps=5).lr(20, peak_lr=0.3, batch_tokens=1))


# --- the Power scheduler's published numbers ---

@pytest.mark.parametrize(
    "sequences, tokens, rate",
    [
        (16, 1e9, 0.001645),
        (32, 1e9, 0.003290),
        (128, 1e9, 0.013160),
        (128, 2e9, 0.0092416),
        (128, 32e9, 0.0022472),
        (128, 128e9, 0.0011081),
        (512, 1e9, 0.02),
        (512, 128e9, 0.0044325),
        (1024, 0.9e12, 0.0032787),
        (1024, 1e12, 0.0031071),
        (1024, 2.5e12, 0.0019472),
        (1024, 1e13, 0.00096020),
    ],
)
def test_power_law_vectors(sequences, tokens, rate):
    got = Power().rate_at(tokens, batch_tokens=sequences * 4096, eta_max=0.02)
    assert got == pytest.approx(rate, rel=5e-4 if rate < 0.002 and sequences < 64 else 5e-5)


@pytest.mark.parametrize(
    "sequences, tokens",
    [(16, 7.5e6), (32, 29e6), (64, 113e6), (128, 440e6), (256, 1.71e9), (512, 6.67e9), (1024, 26.0e9), (2048, 101e9)],
)
def test_power_cap_holds_until_the_published_tokens(sequences, tokens):
    rates = Power().rate_at([0.98 * tokens, 1.02 * tokens], batch_tokens=sequences * 4096, eta_max=0.02)
    assert rates[0] == 0.02 and 0.019 < rates[1] < 0.02


def test_power_cap_of_1024_sequences_ends_after_6190_steps():
    rates = Power().lr(6300, peak_lr=0.02, batch_tokens=1024 * 4096)
    assert (rates[:6190] == 0.02).all() and (rates[6190:] < 0.02).all()


def test_power_counts_tokens_after_the_step_and_warms_up_to_the_law_not_to_the_cap():
    batch = 16 * 4096
    warm = 15_259  # steps of about 1e9 tokens
    rates = Power(warmup_tokens=warm * batch).lr(20_000, peak_lr=0.02, batch_tokens=batch)
    assert rates[warm - 1] == pytest.approx(0.001645, rel=3e-4)
    assert rates[0] == pytest.approx(rates[warm - 1] / warm, rel=1e-12)
    assert rates[19_999] == pytest.approx(16 * 4 * (20_000 * batch) ** -0.51, rel=1e-12)


def test_power_counts_the_batch_in_its_own_sequences():
    short = Power(sequence_tokens=512).rate_at(1e10, batch_tokens=64 * 512, eta_max=1.0)
    assert short == Power().rate_at(1e10, batch_tokens=64 * 4096, eta_max=1.0)


def test_power_cooldown_is_exponential_to_the_floor_from_where_the_law_stood():
    batch = 1024 * 4096
    rates = Power(cooldown_steps=3).lr(20_000, peak_lr=0.02, batch_tokens=batch)
    stood = 4096 * (19_997 * batch) ** -0.51
    assert rates[-3:] == pytest.approx(stood * np.array([0.6500680, 0.3775407, 0.1652962]), rel=1e-6)


def test_power_that_only_cools_down_falls_from_the_cap():
    assert Power().lr(40, peak_lr=0.02, batch_tokens=4096)[-1] < 0.01
    rates = Power(cooldown_fraction=1, shape="linear").lr(40, peak_lr=0.02, batch_tokens=4096)
    assert rates == pytest.approx(0.02 * np.arange(40, 0, -1) / 41)


# --- joints, branches, prefixes ---


def test_branch_into_a_cooldown_is_wsd_bit_for_bit():
    for shape in SHAPES:
        straight = WSD(warmup_steps=7, cooldown_fraction=0.2, shape=shape, floor=0.05)
        branch = Branch(
            trunk=Constant(warmup_steps=7),
            trunk_horizon_tokens=640 * 32,
            at_tokens=80 * 32,
            then=WSD(warmup_steps=0, cooldown_fraction=1, shape=shape, floor=0.05),
        )
        for peak in (0.1, 1 / 3, 2**-7):
            rates = straight.lr(100, peak_lr=peak, batch_tokens=32)
            assert np.array_equal(branch.lr(100, peak_lr=peak, batch_tokens=32), rates)


def test_branch_of_a_power_trunk_is_power_with_a_cooldown_bit_for_bit():
    batch = 64 * 4096
    straight = Power(warmup_steps=20, cooldown_steps=30).lr(400, peak_lr=0.02, batch_tokens=batch)
    then = WSD(cooldown_fraction=1, shape="exponential")
    branch = Branch(Power(warmup_steps=20), 1000 * batch, 370 * batch, then)
    assert np.array_equal(branch.lr(400, peak_lr=0.02, batch_tokens=batch), straight)


def test_branches_nest():
    inner = Branch(Constant(), 10, 4, LinearToZero(floor=0.5))
    outer = Branch(inner, 8, 6, Cosine(floor=0, warmup_steps=2), then_peak_lr=2.0)
    first = inner.lr(8, peak_lr=1.0, batch_tokens=1)[:6]
    last = Cosine(floor=0, warmup_steps=2).lr(5, peak_lr=2.0, batch_tokens=1)
    assert np.array_equal(outer.lr(11, peak_lr=1.0, batch_tokens=1), np.concatenate([first, last]))
    assert first == pytest.approx([1, 1, 1, 1, 0.9, 0.8])


def test_branch_at_the_end_of_its_trunk_goes_on_from_the_last_rate():
    branch = Branch(MultiStep(), 20, 20, Constant())
    assert branch.lr(22, peak_lr=1.0, batch_tokens=1)[-3:] == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "schedule",
    [WSD(cooldown_steps=500, shape=shape) for shape in SHAPES if shape != "lowered-linear"]
    + [Cosine(warmup_steps=1000), LinearToZero(warmup_steps=1000), InverseSqrt(warmup_steps=1000),
       WSD(cooldown_steps=500, floor=0.3), Power(cooldown_steps=500, warmup_steps=1000)],
    ids=canonical_json,
)
def test_no_jump_at_a_joint(schedule):
    rates = schedule.lr(2000, peak_lr=0.02, batch_tokens=2**20)
    steepest = 0.046 * 0.02  # the first step of 1-sqrt over 500 steps is the steepest of all: √(1/501)
    assert np.abs(np.diff(rates)).max() < steepest


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(warmup_steps=13),
        InverseSqrt(warmup_steps=13),
        Power(warmup_steps=13),
        Cosine(warmup_steps=13, cycle_steps=90),
        Cosine(warmup_steps=13, cycle_tokens=90 * 2**22, after="loop"),
        WSD(warmup_steps=13, cooldown_steps=11, shape="1-sqrt"),
        WSD(warmup_steps=13, cooldown_fraction=0.15, convention="torchtitan"),
        Power(warmup_steps=13, cooldown_steps=11),
    ],
    ids=canonical_json,
)
def test_prefixes_are_the_same_bits_whatever_the_horizon(schedule):
    batch, peak = 2**22, 0.0173
    cools = getattr(schedule, "cooldown_steps", None) or getattr(schedule, "cooldown_fraction", None)
    longest = schedule.lr(257, peak_lr=peak, batch_tokens=batch)
    for total in range(30, 217):
        trunk = total - math.ceil(0.15 * total) - 11 if cools else total
        assert np.array_equal(schedule.lr(total, peak_lr=peak, batch_tokens=batch)[:trunk], longest[:trunk]), total


def test_a_too_long_cosine_is_the_longer_one_cut_off():
    long = Cosine(warmup_steps=3).lr(150, peak_lr=0.1, batch_tokens=1)
    cut = Cosine(warmup_steps=3, cycle_fraction=1.5).lr(100, peak_lr=0.1, batch_tokens=1)
    assert np.array_equal(cut, long[:100])


# --- properties ---

lengths = st.integers(0, 12)


@st.composite
def schedules(draw):
    warm = draw(st.sampled_from([{}, {"warmup_steps": draw(lengths)}, {"warmup_tokens": 64 * draw(lengths)}]))
    floor = draw(st.floats(0, 1))
    cooling = draw(
        st.sampled_from(
            [{"cooldown_steps": 9}, {"cooldown_tokens": 64 * 5}, {"cooldown_fraction": 0.3}, {"cooldown_fraction": 1.0}]
        )
    )
    shape = draw(st.sampled_from(SHAPES))
    cycle = draw(st.sampled_from([{}, {"cycle_steps": 14}, {"cycle_tokens": 64 * 40}, {"cycle_fraction": 0.8}]))
    return draw(
        st.sampled_from(
            [
                Constant(**warm),
                InverseSqrt(**warm),
                MultiStep(**warm),
                LinearToZero(floor=floor, **warm),
                WSD(shape=shape, floor=floor, **cooling, **warm),
                Power(shape=shape, floor=floor, sequence_tokens=32, **cooling, **warm),
                Cosine(floor=floor, after=draw(st.sampled_from(["hold", "loop"])), **cycle, **warm),
            ]
        )
    )


@given(schedules(), st.integers(26, 60), st.floats(1e-6, 10))
def test_rates_lie_between_zero_and_the_peak(schedule, total, peak):
    rates = schedule.lr(total, peak_lr=peak, batch_tokens=64)
    assert rates.shape == (total,) and (rates >= 0).all() and (rates <= peak * (1 + 1e-15)).all()


@given(schedules(), st.integers(26, 60))
def test_after_warm_up_no_rate_rises(schedule, total):
    warmup = schedule.warmup_steps or (schedule.warmup_tokens or 0) // 64
    rates = schedule.lr(total, peak_lr=0.02, batch_tokens=64)
    if getattr(schedule, "after", None) != "loop":
        assert (np.diff(rates[max(warmup - 1, 0) :]) <= 1e-17).all()
    assert (np.diff(rates[:warmup]) > 0).all()


@given(schedules(), schedules(), st.none() | st.floats(1e-6, 1))
def test_codec_gives_back_the_same_schedule(trunk, then, peak):
    branch = Branch(trunk, 64 * 50, 64 * 20, then, then_peak_lr=peak)
    for schedule in (trunk, branch, Table(factors=(1, 0.5))):
        assert isinstance(schedule, Schedule)
        assert decode(encode(schedule)) == schedule
        assert canonical_json(decode(encode(schedule))) == canonical_json(schedule)


def test_defaults_do_not_show_in_the_json():
    assert canonical_json(Cosine()) == '{"kind":"Cosine"}'
    assert canonical_json(WSD(cooldown_fraction=1)) == '{"cooldown_fraction":1.0,"kind":"WSD"}'
    assert canonical_json(Table(factors=(1, 0.5))) == canonical_json(Table(factors=[1.0, 0.5]))


def test_schedules_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Constant().warmup_steps = 3


# --- refusals: each names the values and the mend ---

REFUSED = [
    (lambda: WSD(), "exactly one of cooldown_fraction, cooldown_steps, cooldown_tokens; got cooldown_fraction=None"),
    (lambda: WSD(cooldown_fraction=0.2, cooldown_steps=3), "exactly one .*cooldown_fraction=0.2, cooldown_steps=3"),
    (lambda: Power(cooldown_steps=1, cooldown_tokens=2), "at most one .*cooldown_steps=1, cooldown_tokens=2"),
    (lambda: Constant(warmup_steps=1, warmup_tokens=2), "at most one .*warmup_steps=1, warmup_tokens=2"),
    (lambda: Cosine(cycle_steps=1, cycle_fraction=0.5), "at most one .*cycle_fraction=0.5, cycle_steps=1"),
    (lambda: Cosine(cycle_steps=0), "cycle_steps must be at least 1; got 0"),
    (lambda: Cosine(cycle_fraction=0.0), "cycle_fraction must be positive and finite; got 0.0"),
    (lambda: Cosine(convention="epfml", after="loop"), "does not loop"),
    (lambda: Cosine(floor=1.01), r"share of the peak and must lie in \[0, 1\]; got 1.01"),
    (lambda: LinearToZero(floor=-0.1), r"\[0, 1\]; got -0.1"),
    (lambda: WSD(cooldown_steps=2, floor=math.nan), r"\[0, 1\]; got nan"),
    (lambda: WSD(cooldown_fraction=1.2), r"cooldown_fraction must lie in \[0, 1\]; got 1.2"),
    (lambda: Constant(warmup_steps=-1), "warmup_steps must be at least 0; got -1"),
    (lambda: WSD(cooldown_steps=-1), "cooldown_steps must be at least 0; got -1"),
    (lambda: WSD(cooldown_steps=2, shape="sqrt"), "unknown shape 'sqrt'; known: linear, 1-sqrt, cosine, mirror-cosine"),
    (lambda: WSD(cooldown_steps=2, convention="tian"), "'epfml' or 'torchtitan' or 'nanochat' or .*got 'tian'"),
    (lambda: WSD(cooldown_steps=2, convention="lingua"), "floor above 0"),
    (lambda: MultiStep(boundaries=(0.9, 0.8)), r"rising within \(0, 1\).*\(0.9, 0.8\)"),
    (lambda: MultiStep(factors=(0.5,)), r"for each a factor.*\(0.5,\)"),
    (lambda: MultiStep(factors=(0.5, 1.5)), r"factor in \[0, 1\]; .*\(0.5, 1.5\)"),
    (lambda: Power(a=-1), "a > 0, b < 0 .*a=-1.0"),
    (lambda: Power(b=0.51), "a > 0, b < 0 .*b=0.51"),
    (lambda: Table(factors=(1, math.inf)), "finite numbers"),
    (lambda: Branch(Constant(), 100, 101, Constant()), "at_tokens 101 lies outside the trunk's 1 … 100"),
    (lambda: Branch(Constant(), 100, 0, Constant()), "at_tokens 0 lies outside"),
    (lambda: Branch(Constant(), 9, 5, Constant(), then_peak_lr=0), "then_peak_lr must be positive and finite; got 0"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


UNFIT = [
    (Constant(), 0, "at least one step; got total_steps=0"),
    (Constant(warmup_steps=11), 10, "warm-up of 11 steps exceeds the run of 10; shorten it"),
    (WSD(warmup_steps=5, cooldown_steps=6), 10, "cooldown of 6 steps and a warm-up of 5 are longer than the run of 10"),
    (WSD(warmup_steps=5, cooldown_fraction=0.6), 10, "take cooldown_fraction=1 for all steps after warm-up"),
    (Power(warmup_steps=5, cooldown_steps=6), 10, "cooldown of 6 steps and a warm-up of 5"),
    (WSD(cooldown_fraction=0.04), 10, "0.04 of 10 steps is not even one step; take at least 0.1"),
    (WSD(cooldown_tokens=70), 10, "WSD.cooldown_tokens 70 is not a multiple of batch_tokens 64; take 64"),
    (Constant(warmup_tokens=100), 10, "Constant.warmup_tokens 100 is not a multiple of batch_tokens 64; take 128"),
    (Cosine(cycle_tokens=65), 10, "Cosine.cycle_tokens 65 is not a multiple"),
    (Cosine(cycle_steps=4, warmup_steps=4), 10, "cycle of 4 steps ends within a warm-up of 4"),
    (Cosine(cycle_steps=4, warmup_steps=4, convention="epfml"), 10, "cycle of 4 steps ends within a warm-up of 4"),
    (Power(eta_max=0.02), 10, "eta_max 0.02 and peak_lr 0.5 differ"),
    (Table(factors=(1.0, 1.0)), 10, "Table has 2 factors but the run 10 steps"),
    (Branch(Constant(), 64 * 20, 64 * 10, Constant()), 10, "640 is not before the end of the run at 640 tokens"),
    (Branch(Constant(), 100, 64, Constant()), 10, "trunk_horizon_tokens 100 is not a multiple .*take 128"),
    (Branch(Table(factors=(1, 0)), 128, 128, Constant()), 10, "rate is 0 at 128 tokens; give then_peak_lr"),
]


@pytest.mark.parametrize("schedule, total, message", UNFIT)
def test_schedules_that_do_not_fit_the_run_are_refused(schedule, total, message):
    with pytest.raises(ValueError, match=message):
        schedule.lr(total, peak_lr=0.5, batch_tokens=64)


@pytest.mark.parametrize("peak", [0.0, -1.0, math.nan, math.inf])
def test_peak_must_be_positive_and_finite(peak):
    with pytest.raises(ValueError, match="peak_lr must be positive and finite"):
        Constant().lr(3, peak_lr=peak, batch_tokens=1)


def test_power_takes_an_equal_cap():
    rates = Power(eta_max=0.02).lr(10, peak_lr=0.02, batch_tokens=64)
    assert np.array_equal(rates, Power().lr(10, peak_lr=0.02, batch_tokens=64))
