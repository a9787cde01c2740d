"""Grids of learning rate by batch: interpolation, near-best runs and fitted optima by hand and on known surfaces."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.analysis.bowl import EdgeOptimum
from etastar.analysis.lr_grids import LossGrid, best_rate, best_runs, fit_optimum, near_best, optima

RATES = 2.0 ** np.arange(-12, -5, 0.5)
BATCHES = 2.0 ** np.arange(16, 22)


def basin(best_lr=2**-9.2, best_batch=2**18.7, skew=0.0, tilt=0.3, noise=0.0, seed=0, cell="a"):
    """A cell whose loss is 2.5 at its optimum; `skew` steepens the right side, at large batches more, `tilt` turns the basin."""
    lr, batch = (a.ravel() for a in np.meshgrid(RATES, BATCHES))
    x, z = np.log2(lr / best_lr), np.log2(batch / best_batch)
    loss = 2.5 + 0.02 * (x**2 - tilt * x * z + 0.5 * z**2) + skew * (x**3 + x**2 * z)
    loss += noise * np.random.default_rng(seed).normal(size=len(x))
    return pd.DataFrame({"cell": cell, "params": 1e8, "horizon_tokens": 1e10, "peak_lr": lr, "batch_tokens": batch, "smooth_loss": loss})


def test_near_best_is_relative_to_each_cell_and_strict():
    runs = pd.DataFrame({"cell": ["a", "a", "a", "b", "b"], "smooth_loss": [2.0, 2.015625, 2.0078125, 4.0, 4.0234375]})
    assert near_best(runs, 2**-7)["smooth_loss"].tolist() == [2.0, 2.0078125, 4.0, 4.0234375]
    assert near_best(runs, 2**-8)["smooth_loss"].tolist() == [2.0, 4.0]  # 2.0078125 is 2^-8 above, not less
    assert best_runs(runs)["smooth_loss"].tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match="within is a share .* got 0"):
        near_best(runs, 0)


def test_the_loss_between_runs_is_straight_in_both_logs():
    lr, batch = (a.ravel() for a in np.meshgrid([1e-3, 4e-3, 3e-2], [1e5, 3e5, 1e6]))
    rows = pd.DataFrame({"peak_lr": lr, "batch_tokens": batch, "smooth_loss": 3 + 0.1 * np.log(lr) - 0.2 * np.log(batch)})
    grid = LossGrid.of(rows)
    for at in ((2e-3, 2e5), (1e-3, 1e6), (0.02, 1e5), (4e-3, 3e5)):
        assert grid.loss_at(*at) == (pytest.approx(3 + 0.1 * np.log(at[0]) - 0.2 * np.log(at[1])), False)
    assert grid.least == rows["smooth_loss"].min()


def test_a_point_beyond_the_runs_is_read_at_their_edge_and_said_to_be():
    grid = LossGrid.of(pd.DataFrame({"peak_lr": [1e-3, 2e-3, 1e-3], "batch_tokens": [1e5, 1e5, 2e5], "smooth_loss": [3.0, 2.0, 2.8]}))
    assert grid.loss_at(4e-3, 1e5) == (2.0, True) and grid.loss_at(1e-3, 9e5) == (2.8, True) and grid.loss_at(-1.0, 1e5) == (3.0, True)
    assert grid.loss_at(2e-3, np.sqrt(2) * 1e5) == (pytest.approx((2.0 + 2.8) / 2), True)  # 2e-3 was not run at the larger batch
    assert grid.loss_at(1e-3, 1e5) == (3.0, False)


def test_the_best_batch_of_a_rate_may_move_with_the_batch():
    grid = LossGrid.of(pd.DataFrame({"peak_lr": [1e-3, 2e-3] * 2, "batch_tokens": [1e5, 1e5, 2e5, 2e5],
                                     "smooth_loss": [3.0, 2.0, 2.5, 2.9]}))
    assert grid.at_best_batch(1e-3) == (2e5, 2.5, False) and grid.at_best_batch(2e-3) == (1e5, 2.0, False)
    assert grid.at_best_batch(lambda batch: 1e-3 * batch / 1e5) == (2e5, 2.9, False)  # 3.0 at the smaller, 2e-3's 2.9 at the larger


def test_losses_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 2 losses are not finite"):
        LossGrid.of(pd.DataFrame({"peak_lr": [1e-3, 2e-3], "batch_tokens": [1e5, 1e5], "smooth_loss": [3.0, np.nan]}))


@settings(max_examples=15, deadline=None)
@given(st.floats(-10.5, -7.5), st.floats(17.2, 19.8), st.floats(-0.8, 0.8), st.sampled_from([2, 3]))
def test_a_quadratic_basin_is_found_exactly_wherever_it_lies(log_lr, log_batch, tilt, degree):
    best = fit_optimum(basin(2**log_lr, 2**log_batch, tilt=tilt), within=0.05, degree=degree)
    assert np.log2([best.best_lr, best.best_batch_tokens]).tolist() == pytest.approx([log_lr, log_batch], abs=2e-3)
    assert best.best_loss == pytest.approx(2.5, abs=1e-6) and best.noise_sd < 1e-9


def test_a_skewed_basin_needs_the_cubic():
    skewed = basin(skew=0.002)
    quadratic, cubic = fit_optimum(skewed, 0.03, 2), fit_optimum(skewed, 0.03, 3)
    assert np.log2(cubic.best_lr) == pytest.approx(-9.2, abs=1e-3)
    assert np.log2(quadratic.best_lr) < -9.3  # steeper on its right: pulled down


def test_intervals_hold_the_optimum_about_as_often_as_they_say():
    inside = []
    for seed in range(150):
        best = fit_optimum(basin(noise=0.002, seed=seed), within=0.03)
        inside.append([best.best_lr_low < 2**-9.2 < best.best_lr_high, best.best_batch_tokens_low < 2**18.7 < best.best_batch_tokens_high])
    # runs within a share of the least noisy one are picked on their noise, which costs a little of the 95 %
    assert (np.mean(inside, axis=0) > 0.86).all() and np.mean(inside, axis=0).min() < 1
    assert best.noise_sd == pytest.approx(0.002, rel=0.3)


def test_an_optimum_at_the_edge_is_refused_and_its_cell_told():
    runs = pd.concat([basin(), basin(best_lr=2**-5.0, cell="b")])
    with pytest.raises(EdgeOptimum, match="least at the edge"):
        fit_optimum(runs[runs["cell"] == "b"], within=0.05)
    table = optima(runs, within=0.05, degree=2)
    assert table["cell"].tolist() == ["a"] and table.attrs["at_edge"] == ("b",)
    assert table.loc[0, ["params", "horizon_tokens"]].tolist() == [1e8, 1e10] and "smooth_loss" not in table
    assert table["peak_lr"].item() == pytest.approx(2**-9.2) and table["best_lr_low"].item() <= table["peak_lr"].item()


def test_too_few_runs_and_other_degrees_are_refused():
    with pytest.raises(ValueError, match="runs within 0.001 of the best do not determine"):
        fit_optimum(basin(), within=0.001)
    with pytest.raises(ValueError, match="degree must be 2 or 3; got 4"):
        fit_optimum(basin(), degree=4)


def test_the_best_rate_at_one_batch_is_a_local_vertex_and_refuses_edges():
    line = pd.DataFrame({"peak_lr": RATES, "smooth_loss": 2.5 + 0.02 * (np.log2(RATES) + 9.1) ** 2})
    assert best_rate(line) == pytest.approx(2**-9.1)
    far = line.assign(smooth_loss=line["smooth_loss"] + 0.5 * (np.log2(RATES) > -7.5))  # a wall two octaves off is not seen
    assert best_rate(far) == pytest.approx(2**-9.1)
    assert np.isnan(best_rate(line[line["peak_lr"] < 2**-9.4])) and np.isnan(best_rate(line[line["peak_lr"] > 2**-9.2]))
