"""Eq. 2 and Eq. 4 of arXiv 2601.05049 on made-up grids whose bowls and loss laws are known."""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.lean_bowls import bowl_shapes, extrapolated_bowls, few_rates

RATES = 2.0 ** np.arange(-13, -6.9, 0.5)


def line(best=-10.1, bend=0.02, skew=0.0, **key):
    x = np.log2(RATES) - best
    frame = pd.DataFrame({"peak_lr": RATES, "smooth_loss": 2.5 + bend * x**2 + skew * x**3})
    return frame.assign(**({"cell": "a", "params": 2e8, "horizon_tokens": 1e10, "batch_tokens": 2**17} | key))


def test_a_parabola_is_told_from_a_skewed_bowl():
    shapes = bowl_shapes(pd.concat([line(), line(skew=0.002, cell="b")])).set_index("cell")
    assert shapes["cubic_r2"].tolist() == pytest.approx([1, 1])
    assert shapes.loc["a", ["parabola_r2", "shift_octaves"]].tolist() == pytest.approx([1, 0], abs=1e-9)
    # steeper on the right: the parabola's vertex lies too low
    assert 0.98 < shapes.loc["b", "parabola_r2"] < 0.995 and -0.5 < shapes.loc["b", "shift_octaves"] < -0.1
    assert shapes["rates"].tolist() == [9, 9]


def test_bowls_cut_off_at_an_edge_and_thin_ones_have_no_shape():
    with pytest.raises(ValueError, match="no line has five rates within 2 octaves of a best run inside its grid"):
        bowl_shapes(pd.concat([line(best=-14), line(cell="b")[::4]]))
    with pytest.raises(ValueError, match="no column 'params'"):
        bowl_shapes(line().drop(columns="params"))


def test_three_rates_find_the_vertex_of_a_parabola_wherever_they_begin():
    found = few_rates(line())
    # of the four beginnings all bracket the best one; a parabola's vertex is exact
    assert found["begin"].tolist() == [0, 1, 2, 3] and found.attrs["refused"] == 0
    assert np.log2(found["best_lr"]).tolist() == pytest.approx([-10.1] * 4) and found["excess"].tolist() == pytest.approx([0] * 4, abs=1e-9)
    assert found["error_octaves"].tolist() == pytest.approx([0] * 4, abs=1e-9)


def test_a_skewed_bowl_costs_a_sparse_search_and_its_error_is_signed():
    found = few_rates(line(skew=0.002))
    assert (found["error_octaves"] < 0).any() and found["excess"].max() > 1e-4
    whole = line(skew=0.002).set_index("peak_lr")["smooth_loss"]
    first = found.iloc[0]
    truth = 2.0 ** (np.log2(first["best_lr"]) - first["error_octaves"])
    there, least = np.interp(np.log2([first["best_lr"], truth]), np.log2(RATES), whole)
    assert first["excess"] == pytest.approx(there / least - 1)


def test_a_best_rate_at_the_end_of_the_sparse_rates_is_refused_and_counted():
    found = few_rates(line(best=-8.6))
    assert found["begin"].tolist() == [1, 2] and found.attrs["refused"] == 2  # the others end at 2^−8.5 and 2^−8
    with pytest.raises(ValueError, match="no line lets 3 rates 2 octaves apart bracket a best one"):
        few_rates(line(best=-13.5))
    with pytest.raises(ValueError, match="take a multiple of half an octave"):
        few_rates(line(), spacing_octaves=0.7)


def horizons(exponent, tokens=(4e9, 1e10, 2e10, 8e10), floor=2.0):
    """Losses that follow Eq. 4 at every rate in one size, floor and level in the rate so that the best rate moves with the horizon."""
    x = np.log2(RATES) + 10
    # bend·(x − exponent·log2 D)² is no power law in D; A(x)·D^−γ + L(x) is one, and its vertex moves from A's to L's as D grows
    parts = []
    for d in tokens:
        loss = floor + 0.02 * (x + 1) ** 2 + (2 + exponent * (x - 1) ** 2) * (d / 4e9) ** -0.5
        parts.append(pd.DataFrame({"peak_lr": RATES, "smooth_loss": loss, "cell": f"{d:g}", "params": 2e8, "horizon_tokens": d,
                                   "batch_tokens": 2**17}))
    return pd.concat(parts)


def test_losses_that_follow_the_law_give_the_longest_horizons_vertex_exactly():
    row = extrapolated_bowls(horizons(0.05)).iloc[0]
    assert row["error_octaves"] == pytest.approx(0, abs=1e-5) and row["loss_error"] == pytest.approx(0, abs=1e-7)
    # the vertex is that of 0.02 (x + 1)² + 0.05 (x − 1)² (20^−½)
    weight = 0.05 * 20**-0.5
    assert np.log2(row["best_lr"]) == pytest.approx(-10 + (weight - 0.02) / (weight + 0.02), abs=1e-6)
    weight = 0.05 * 5**-0.5
    last = (weight - 0.02) / (weight + 0.02)
    assert row["kept_octaves"] == pytest.approx(last - (np.log2(row["best_lr"]) + 10), abs=1e-6)
    assert (row["fold"], row["horizon_tokens"], row["rates"]) == (4, 8e10, 13)


def test_a_run_that_leaves_the_law_at_the_longest_horizon_is_missed():
    runs = horizons(0.05)
    longest = runs["horizon_tokens"] == 8e10
    runs.loc[longest, "smooth_loss"] = 2.6 + 0.02 * (np.log2(runs.loc[longest, "peak_lr"]) + 9) ** 2
    row = extrapolated_bowls(runs).iloc[0]
    own = np.log2(extrapolated_bowls(horizons(0.05)).iloc[0]["best_lr"])
    assert row["error_octaves"] == pytest.approx(own + 9, abs=1e-4)


def test_sizes_without_a_fourth_horizon_are_left_out():
    with pytest.raises(ValueError, match="no size has bowls at more than 3 horizons at one batch"):
        extrapolated_bowls(horizons(0.05, tokens=(4e9, 1e10, 2e10)))
