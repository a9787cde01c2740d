"""Spikes, gradient norms and the divergence boundary on curves made for it: what was planted is found, and noise alone is not."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etastar.analysis.stability import Boundary, divergence_boundary, gradient_quantiles, spikes, summary

SD = 0.02


def falling(steps: int, rng, sd: float = SD) -> np.ndarray:
    """A loss as runs have it: a power law in the step, and noise of the batches."""
    return 2.5 + 4 * np.arange(1, steps + 1) ** -0.4 + rng.normal(0, sd, steps)


def test_planted_spikes_are_counted_and_the_largest_has_the_size_it_was_given():
    loss = falling(2000, np.random.default_rng(1))
    for at, length, size in ((500, 1, 0.4), (900, 20, 0.8), (1500, 3, 0.3)):
        loss[at : at + length] += size
    found = spikes(loss)
    assert found.count == 3 and 900 <= found.largest_at < 920 and found.judged == 2000 - 64
    assert SD <= found.sd <= 1.3 * SD  # the trend of the first steps widens it, never the spikes
    assert spikes(np.random.default_rng(4).normal(3, SD, 20_000)).sd == pytest.approx(SD * math.sqrt(1 + math.pi / 2 / 64), rel=0.03)
    assert found.largest_nats == pytest.approx(0.8, abs=4 * SD) and found.largest_sds == found.largest_nats / found.sd


def test_a_spike_of_a_noiseless_step_has_its_closed_form():
    loss = np.tile([1.0, 1.2], 50)  # every window's median is 1.1: rises of ±0.1, their median deviation 0.1
    loss[80] = 3.0
    found = spikes(loss, window=10)
    assert (found.count, found.largest_at, found.judged) == (1, 80, 90)
    assert found.largest_nats == pytest.approx(1.9) and found.largest_sds == pytest.approx(1.9 / 0.14826)


def test_steps_above_the_threshold_on_end_are_one_spike_and_apart_two():
    quiet = np.tile([1.0, 1.2], 50)
    for at, count in (([80, 81, 82], 1), ([80, 82], 2), ([10], 1), ([99], 1)):
        loss = quiet.copy()
        loss[at] = 5.0
        assert spikes(loss, window=10).count == count
    loss[5] = 9.0  # before the first whole window
    assert spikes(loss, window=10).count == 1


def test_noise_alone_seldom_passes_for_a_spike_and_a_spike_of_ten_sds_always_does():
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    false, missed = 0, 0
    for _ in range(1000):
        loss = rng.normal(3, SD, 400)
        false += spikes(loss).count > 0
        loss[rng.integers(64, 400)] = 3 + 10 * SD
        missed += spikes(loss).count != 1
    assert false <= 50 and missed <= 50, f"{false} false alarms and {missed} missed of 1000 (entropy {entropy})"


def test_noise_on_a_falling_curve_seldom_passes_for_a_spike():
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    assert sum(spikes(falling(400, rng)).count > 0 for _ in range(200)) <= 10, f"entropy {entropy}"


def test_a_diverged_tail_is_left_out_and_a_loss_that_never_moves_has_no_spike():
    loss = falling(300, np.random.default_rng(2))
    assert spikes(np.append(loss, [np.nan, np.inf])) == spikes(loss)
    still = spikes(np.ones(100))
    assert (still.count, still.largest_sds, still.sd) == (0, 0.0, 0.0)
    still = np.ones(100)
    still[90] = 1.5
    assert spikes(still).count == 1 and spikes(still).largest_sds == math.inf


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.floats(-5, 5))
def test_what_is_found_knows_no_unit_and_no_offset(seed, unit, offset):
    loss = falling(200, np.random.default_rng(seed))
    loss[150] += 1.0
    plain, other = spikes(loss), spikes(loss * unit + offset)
    assert other.count == plain.count == 1 and other.largest_at == 150
    assert other.largest_sds == pytest.approx(plain.largest_sds) and other.largest_nats == pytest.approx(unit * plain.largest_nats)


@pytest.mark.parametrize("given_, words", [
    (dict(loss=np.ones(64)), "more of them than the window of 64 steps"), (dict(loss=np.ones((9, 9))), r"shape \(9, 9\)"),
    (dict(loss=np.ones(9), window=1), "got 1 and 6.0"), (dict(loss=np.ones(99), threshold=0), "got 64 and 0")])
def test_curves_that_cannot_be_judged_are_refused(given_, words):
    with pytest.raises(ValueError, match=words):
        spikes(**given_)


def test_quantiles_of_gradient_norms_are_literal_and_leave_out_the_start_and_what_is_not_finite():
    norms = [50.0, *range(1, 102), np.nan, np.inf]
    found = gradient_quantiles(norms, (0.0, 0.5, 0.9, 1.0), after=1)
    assert found.index.name == "level" and found.tolist() == [1, 51, 91, 101]
    assert gradient_quantiles([3.0]).tolist() == [3.0] * 4
    with pytest.raises(ValueError, match="no finite gradient norm after the first 104 of 104 steps"):
        gradient_quantiles(norms, after=104)
    with pytest.raises(ValueError, match=r"\[0, 1\]; got \(1.5,\)"):
        gradient_quantiles(norms, (1.5,))


RATES = 2.0 ** np.arange(-8, -2)


def boundary_of(fails, **options) -> Boundary:
    status = ["diverged" if fail else "done" for fail in fails]
    return divergence_boundary(RATES, np.where(fails, np.nan, 3.0), status, **options)


def test_the_boundary_lies_between_the_last_rate_that_trains_and_the_next():
    found = boundary_of([0, 0, 0, 0, 1, 1])
    assert found == Boundary(-5.0, -4.0, 6, True) and found.middle == -4.5
    assert boundary_of([0, 1, 0, 0, 1, 1]) == Boundary(-5.0, -4.0, 6, False)  # one that failed among those that train
    assert boundary_of([0] * 6) == Boundary(-3.0, math.inf, 6, True) and math.isnan(boundary_of([0] * 6).middle)
    assert boundary_of([1] * 6) == Boundary(-math.inf, -8.0, 6, True)


def test_a_run_that_ends_worse_than_it_started_fails_where_the_start_is_told():
    loss, status = [4.0, 3.5, 5.0, 6.5, 7.1, np.nan], ["done"] * 5 + ["diverged"]
    assert divergence_boundary(RATES, loss, status) == Boundary(-4.0, -3.0, 6, True)
    assert divergence_boundary(RATES, loss, status, start_loss=math.log(1024)) == Boundary(-5.0, -4.0, 6, True)
    assert divergence_boundary(RATES, loss, status, start_loss=6.0) == Boundary(-6.0, -5.0, 6, True)


def test_a_rate_fails_by_the_share_of_its_seeds_that_do_in_any_order():
    lr = np.repeat(RATES[:3], 3)[::-1]
    status = np.array(["done"] * 4 + ["diverged"] * 1 + ["done"] + ["diverged"] * 3)[::-1]  # 0, 1 and 3 of 3 seeds
    loss = np.ones(9)
    assert divergence_boundary(lr, loss, status) == Boundary(-7.0, -6.0, 3, True)
    assert divergence_boundary(lr, loss, status, share=0.3) == Boundary(-8.0, -7.0, 3, True)
    assert divergence_boundary([0.5, 0.5, 0.25], np.ones(3), ["done", "diverged", "done"]) == Boundary(-2.0, -1.0, 2, True)  # a half


@given(st.floats(-7.99, -3.01))
def test_the_boundary_of_any_grid_encloses_the_rate_that_was_planted(truth):
    found = boundary_of(np.log2(RATES) >= truth)
    assert found.low < truth <= found.high and found.high - found.low == 1


@pytest.mark.parametrize("given_, words", [
    (([], [], []), "as many rates"), (([1.0], [1.0, 2.0], ["done"]), "as many rates"), (([0.0], [1.0], ["done"]), "smallest rate of 0.0"),
    (([1.0], [1.0], ["finished"]), "got .'finished'."), (([1.0], [1.0], ["done"], None, 0.0), r"share in \(0, 1\]")])
def test_sweeps_that_have_no_boundary_are_refused(given_, words):
    with pytest.raises(ValueError, match=words):
        divergence_boundary(*given_)


def curve(steps=400, **columns) -> pd.DataFrame:
    loss, norm = falling(steps, np.random.default_rng(3)), np.ones(steps)
    norm[0], norm[-5] = 30.0, 4.0
    return pd.DataFrame({"step": np.arange(1, steps + 1), "train_loss": loss, "grad_norm": norm} | columns)


def test_a_summary_is_a_row_of_what_its_columns_say():
    logged = np.full(400, np.nan)
    logged[[99, 199, 299, 399]] = [1.0, 9.0, 3.0, 2.0]
    columns = {name: logged for name in ("attention_logit_max", "feature_rank", "stream_delta", "update_ratio", "log_z_max")}
    given_ = curve(**columns)
    given_.loc[300, "train_loss"] += 2.0
    row = summary(given_)
    assert row["spikes"] == 1 and row["largest_spike_sds"] == spikes(given_.train_loss).largest_sds > 50
    assert row["grad_norm_over_median"] == 4.0  # the first steps of a run count for nothing
    assert (row["attention_logit_max"], row["log_z_max"], row["feature_rank"], row["stream_delta"]) == (9.0, 9.0, 2.0, 2.0)
    assert row["update_ratio"] == 2.5 and math.isnan(row["load_imbalance"])


def test_a_short_curve_is_summarized_by_a_quarter_of_it_and_one_without_steps_refused():
    short = curve(24)
    short.loc[20, "train_loss"] += 5
    assert summary(short)["spikes"] == 1 and summary(short)["grad_norm_over_median"] == 4.0
    with pytest.raises(ValueError, match="at least 8 steps; got 7"):
        summary(curve(7))
    with pytest.raises(ValueError, match="got 0 in the columns .'step'."):
        summary(short[["step"]])
