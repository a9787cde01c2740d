"""The optimum output norm: by hand, on planted optima, and on the points of arXiv 2510.03871's own figures where these are at hand."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.analysis import norm_parabola as norms
from etastar.analysis.bowl import EdgeOptimum

START = 11.765
HORIZONS = 2.0 ** np.arange(31, 39, 2)
BATCHES = 2.0 ** np.arange(17, 23)


def cells(norm, loss, horizons=HORIZONS, batches=BATCHES, model="base"):
    """Optima as `norm_optima` gives them, of functions of log2 tokens and log2 batch."""
    rows = [{"model": model, "horizon_tokens": d, "batch_tokens": b, "log2_norm": norm(np.log2(d), np.log2(b)),
             "loss": loss(np.log2(d), np.log2(b))} for d in horizons for b in batches]
    return pd.DataFrame(rows)


# -- one parabola


@settings(max_examples=60, deadline=None)
@given(st.floats(5, 9), st.floats(3, 6), st.sampled_from([None, 3, 5, 7]))
def test_a_planted_parabola_through_the_start_is_recovered(vertex, least, nearest):
    x = np.linspace(vertex - 2, vertex + 2.3, 15)
    a = (START - least) / vertex**2
    fit = norms.fit_parabola(x, a * (x - vertex) ** 2 + least, nearest=nearest, fixed_loss=START, initial_loss=START)
    assert (fit.a, fit.b, fit.c) == pytest.approx((a, -2 * a * vertex, START))
    assert (fit.log2_norm, fit.loss) == pytest.approx((vertex, least)) and fit.inside


def test_a_free_level_and_a_log_loss_recover_what_a_fixed_level_cannot():
    x = np.linspace(5, 9, 9)
    fit = norms.fit_parabola(x, 0.3 * (x - 7) ** 2 + 4, fixed_loss=None)
    assert (fit.log2_norm, fit.loss, fit.c) == pytest.approx((7, 4, 0.3 * 49 + 4))
    assert norms.fit_parabola(x, 0.3 * (x - 7) ** 2 + 4, fixed_loss=START).loss != pytest.approx(4, abs=0.01)
    a = (np.log(START) - np.log(4)) / 49
    fit = norms.fit_parabola(x, np.exp(a * (x - 7) ** 2 + np.log(4)), fixed_loss=START, log_loss=True)
    assert (fit.log2_norm, fit.loss, fit.c) == pytest.approx((7, 4, np.log(START)))


def test_losses_that_reach_the_start_or_are_lost_are_dropped_before_the_nearest_are_chosen():
    x, y = np.array([1.0, 5, 6, 7, 8, 9, 9.5]), np.array([START, 5, 4.4, 4.2, 4.4, np.nan, 12])
    fit = norms.fit_parabola(x, y, initial_loss=START)
    assert fit.n == 4 and fit.log2_norm == pytest.approx(norms.fit_parabola(x[1:5], y[1:5]).log2_norm)


def test_the_nearest_points_bracket_the_least_loss_where_they_can():
    x, y = np.array([1, 2, 3, 4, 5, 6.0, 20]), np.array([9, 8, 7, 6, 5, 4.0, 4.1])
    assert norms.nearest_points(x, y, 3).tolist() == [5, 4, 6]  # 3 gave way to the only point on the right
    assert norms.nearest_points(-x, y, 3).tolist() == [5, 4, 6]
    assert norms.nearest_points(x, y, None).tolist() == norms.nearest_points(x, y, 9).tolist() == [5, 4, 3, 2, 1, 0, 6]
    assert norms.nearest_points(x[:6], y[:6], 3).tolist() == [5, 4, 3]  # nothing on the right
    assert norms.nearest_points(x, 10 - x, 5).tolist() == [6, 5, 4, 3, 2]  # the least loss at the end


def test_points_weigh_by_their_deviation_and_alike_without_one():
    x, y = np.array([5.0, 6, 7, 8, 9]), np.array([4.9, 4.3, 4.1, 4.35, 4.8])
    outlier = np.array([0, 0, 0, 0.3, 0])
    sure = norms.fit_parabola(x, y + outlier, np.array([1, 1, 1, 1e4, 1]))
    assert sure.log2_norm == pytest.approx(norms.fit_parabola(np.delete(x, 3), np.delete(y, 3)).log2_norm, abs=1e-6)
    assert norms.fit_parabola(x, y, np.zeros(5)).b == pytest.approx(norms.fit_parabola(x, y).b) == pytest.approx(np.polyfit(x, y, 2)[1])


def test_the_closest_point_is_near_in_norm_and_loss():
    x, y = np.array([5.0, 6, 7.2, 7.0, 8, 9]), np.array([4.8, 4.2, 4.05, 4.6, 4.2, 4.8])
    assert norms.fit_parabola(x, y, nearest=None).closest == 2


def test_errors_of_the_minimum_are_the_spread_over_draws_of_noise():
    draw, x = np.random.default_rng(3), np.linspace(5.5, 8.5, 9)
    fits = [norms.fit_parabola(x, 0.15 * (x - 7) ** 2 + 4 + 0.02 * draw.normal(size=9), nearest=None) for _ in range(400)]
    for name in ("log2_norm", "loss"):
        spread, told = np.std([getattr(f, name) for f in fits]), np.sqrt(np.mean([getattr(f, f"{name}_se") ** 2 for f in fits]))
        assert told == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("x, y, options, said", [
    ([5, 6, 7], [4, 3.9, 4], {"nearest": 2}, "nearest must be 3 or more"),
    ([5, 6, 7], [4, 12, 4], {"initial_loss": START}, "3 points with a loss below 11.765; got 2 of 3"),
    ([5, 6], [4, 3.9, 4], {}, "equally long; got 2, 3, 3"),
    ([5, 6, 7], [3.9, 4, 3.9], {}, "no minimum over log2 norm 5 … 7"),
])
def test_what_makes_no_parabola_is_refused(x, y, options, said):
    with pytest.raises(ValueError, match=said):
        norms.fit_parabola(x, y, **options)


# -- cells and points


def test_optima_carry_the_rate_of_their_closest_run_and_name_the_cells_left_out():
    x = np.arange(5.0, 10)
    full = pd.DataFrame({"model": "base", "horizon_tokens": 2**31, "batch_tokens": 2**19, "log2_norm": x, "peak_lr": 2.0 ** (x - 12),
                         "loss": 0.15 * (x - 7.2) ** 2 + 4})
    lost = full.assign(batch_tokens=2**20, loss=[12, 12, 12, 4, 5])
    optima = norms.norm_optima(pd.concat([full, lost]), fixed=False, initial_loss=START)
    assert optima[["batch_tokens", "log2_norm", "peak_lr", "n"]].values.tolist() == [[2**19, pytest.approx(7.2), 2.0**-5, 5]]
    assert optima.attrs["left_out"] == [("base", 2**31, 2**20)]
    best = norms.norm_optima(full, nearest=0).iloc[0]
    assert (best["log2_norm"], best["peak_lr"], best["n"]) == (7, 2.0**-5, 1) and np.isnan(best["a"])
    with pytest.raises(ValueError, match="initial_loss, which is not given"):
        norms.norm_optima(full)
    with pytest.raises(ValueError, match="has 3 runs with a loss below 11.765"):
        norms.norm_optima(lost, initial_loss=START)


def test_points_at_a_horizon_are_means_of_three_logged_rows_where_the_paper_smooths():
    rows = pd.DataFrame({"run": "a", "model": "base", "batch_sequences": 128, "batch_tokens": 128 * 4096, "peak_lr": 0.1,
                         "horizon_tokens": np.array([1, 2, 3, 4]) * 2**33, "log2_norm": [6.0, 7, 9, 9.5], "loss": [5.0, 4.4, 4.1, 4.0]})
    wide = rows.assign(run="b", batch_sequences=256, batch_tokens=256 * 4096)
    points = norms.points_at(pd.concat([wide, rows]), [2**34]).set_index("run")
    assert points.loc["a", ["log2_norm", "loss", "loss_sd"]].tolist() == pytest.approx([22 / 3, 4.5, np.std([5, 4.4, 4.1])])
    assert points.loc["b", ["log2_norm", "loss", "loss_sd"]].tolist() == [7, 4.4, 0]
    assert norms.points_at(rows, [2**35])["loss"].item() == pytest.approx(4.05)  # the last row has no next one
    assert norms.points_at(rows, [2**34], smoothed_from_tokens=2**35)["loss"].item() == 4.4
    with pytest.raises(ValueError, match="no run has a row at 1e"):
        norms.points_at(rows, [10**10])


def test_the_first_reach_is_the_first_row_within_the_band_of_each_run():
    rows = pd.DataFrame({"run": ["a"] * 4 + ["b"] * 2, "model": "base", "batch_tokens": 4096, "peak_lr": [0.1] * 4 + [0.2] * 2,
                         "horizon_tokens": [4, 1, 2, 3, 1, 2], "log2_norm": [7.1, 6, 6.9, 7.0, 6.0, 7.3]})
    found = norms.first_reach(rows, 6.8, 7.2)
    assert found[["run", "horizon_tokens"]].values.tolist() == [["a", 2]]


# -- the optimum over a continuous batch, and its constancy


def test_an_optimum_between_two_batches_of_the_grid_is_found_with_its_norm():
    optima = cells(lambda d, b: 7 - 0.4 * (b - 0.45 * d - 3.9), lambda d, b: 4 + 0.05 * (b - 0.45 * d - 3.9) ** 2)
    for around in (1, 2, 9):
        found = norms.batch_profiles(optima, around)
        assert np.log2(found["batch_tokens"]).tolist() == pytest.approx((0.45 * np.arange(31, 39, 2) + 3.9).tolist())
        assert found["log2_norm"].tolist() == pytest.approx([7] * 4) and found["loss"].tolist() == pytest.approx([4] * 4)
        assert found["curvature"].tolist() == pytest.approx([0.1] * 4)
    assert np.isnan(norms.batch_profiles(optima, 1)["log2_norm_se"]).all()  # three losses and a parabola leave no scatter
    assert norms.best_batches(optima)["log2_norm"].std() > 0.05  # the grid alone moves a norm that is constant


def test_a_profile_reads_the_rate_at_its_batch_where_rates_are_known():
    optima = cells(lambda d, b: 7.0, lambda d, b: 4 + 0.05 * (b - 0.45 * d - 3.9) ** 2)
    rates = 2.0 ** (0.6 * np.log2(optima["batch_tokens"]) - 0.5 * np.log2(optima["horizon_tokens"]))
    found = norms.batch_profiles(optima.assign(peak_lr=rates))
    expected = 0.6 * (0.45 * np.arange(31, 39, 2) + 3.9) - 0.5 * np.arange(31, 39, 2)
    assert np.log2(found["peak_lr"]).tolist() == pytest.approx(expected.tolist())
    assert norms.batch_profiles(optima)["peak_lr"].isna().all()


def test_errors_of_the_profile_are_the_spread_over_draws_of_noise():
    draw, found = np.random.default_rng(5), []
    for _ in range(150):
        found.append(norms.batch_profiles(cells(lambda d, b: 7 - 0.4 * (b - 19.1) + 0.02 * draw.normal(),
                                                lambda d, b: 4 + 0.06 * (b - 19.1) ** 2 + 0.01 * draw.normal())).iloc[0])
    found = pd.DataFrame(found)
    assert np.sqrt((found["log2_norm_se"] ** 2).mean()) == pytest.approx(found["log2_norm"].std(), rel=0.2)
    assert np.sqrt((found["log2_batch_se"] ** 2).mean()) == pytest.approx(np.log2(found["batch_tokens"]).std(), rel=0.2)


def test_a_best_batch_at_the_edge_of_the_grid_is_refused_by_name():
    optima = cells(lambda d, b: 7, lambda d, b: 4 + 0.05 * (b - 0.7 * d + 2) ** 2)
    with pytest.raises(EdgeOptimum, match=r"edge of the grid at 3.44e\+10 tokens of base \(batch 4.19e\+06\), 1.37e\+11 .*; add batches"):
        norms.batch_profiles(optima)


def test_constancy_by_hand():
    norm = {31: [7, 6, 5], 33: [8, 7, 6.5], 35: [9, 8, 7]}
    loss = {31: [4, 4.5, 5], 33: [4.2, 4, 4.3], 35: [4.5, 4.2, 4]}
    optima = cells(lambda d, b: norm[d][int(b) - 17], lambda d, b: loss[d][int(b) - 17], HORIZONS[:3], 2.0 ** np.arange(17, 20))
    found = norms.constancy(optima)
    assert (found.sd, found.slope, found.exact) == (0, 0, True) and found.random_share == pytest.approx(1 / 27)
    assert found.fixed["slope"].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert found.fixed["sd"].tolist() == pytest.approx([1, 1, 1.0408], abs=1e-4)
    moved = [np.std([a, b, c], ddof=1) for a in (7, 6) for b in (8, 7, 6.5) for c in (8, 7)]
    assert found.wander_sd == pytest.approx(np.quantile(moved, [0.05, 0.5, 0.95]))
    slopes = [(c - a) / 4 for a in (7, 6) for b in (8, 7, 6.5) for c in (8, 7)]
    assert found.wander_slope_sd == pytest.approx(np.std(slopes))


def test_more_choices_than_can_be_counted_are_drawn_and_say_so():
    optima = cells(lambda d, b: b - 0.45 * d, lambda d, b: abs(b - 0.45 * d - 4), 2.0 ** np.arange(30, 39), 2.0 ** np.arange(16, 23))
    first, again = norms.constancy(optima, seed=1), norms.constancy(optima, seed=1)
    assert not first.exact and first == again and first.random_share < 0.05


def test_constancy_refuses_what_it_cannot_compare():
    optima = cells(lambda d, b: 7.0, lambda d, b: 4.0)
    with pytest.raises(ValueError, match="2 models and 4 horizons"):
        norms.constancy(pd.concat([optima, optima.assign(model="x4-width")]))
    with pytest.raises(ValueError, match="1 of 24 horizons and batches have no optimum"):
        norms.constancy(optima.drop(index=3))
    with pytest.raises(ValueError, match="three horizons; got 2"):
        norms.norm_slope([1, 2], [7, 7])


def test_rules_recover_their_exponents_and_prefactor():
    b, d = (a.ravel() for a in np.meshgrid(2.0 ** np.arange(5, 12), HORIZONS))
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=len(b)))
    law = norms.rate_rule(b, d, 2**9.8 * b**0.62 * d**-0.56 * noise)
    for name, truth in (("batch", 0.62), ("horizon_tokens", -0.56), ("log2_prefactor", 9.8)):
        found = norms.exponent(law, name)
        assert abs(found.value - truth) < 3 * found.se and found.se > 0 and found.df == 25
    assert norms.exponent(norms.rate_rule(b, d, 2**9.8 * b**0.62 * d**-0.56), "log2_prefactor").value == pytest.approx(9.8)


# -- the paper's figures


def figure_points(name: str) -> pd.DataFrame:
    path = Path(os.environ.get("ETASTAR_MIRROR", "nowhere")) / "digitised" / "norm_transfer" / name
    if not path.exists():
        pytest.skip("the points of the figures of arXiv 2510.03871 are not here; ETASTAR_MIRROR names a folder that holds "
                    f"digitised/norm_transfer/{name}")
    return pd.read_csv(path)


@pytest.fixture(scope="module")
def scan():
    """The points of Fig. 12 in our columns; a model is one of a panel, since both panels hold the base model."""
    points = figure_points("scan_points.csv").rename(columns={"train_loss": "loss", "loss_std": "loss_sd"})
    return points.assign(model=points["figure"] + " " + points["model"], batch_tokens=4096 * points["batch_size"])


@pytest.fixture(scope="module")
def base(scan):
    return scan[scan["figure"] == "12a"]


@pytest.mark.archive
def test_56_of_the_58_printed_parabolas_and_all_their_losses_are_reproduced(scan):
    printed = figure_points("printed_fits.csv")
    printed = printed.assign(model=printed["figure"] + " " + printed["model"], batch_tokens=4096 * printed["batch_size"])
    both = norms.norm_optima(scan, initial_loss=START).merge(printed, on=norms.CELL, suffixes=("", "_printed"))
    same = (both["a"] - both["a_printed"]).abs().le(6e-4) & (both["b"] - both["b_printed"]).abs().le(6e-4)
    assert (len(both), same.sum()) == (58, 56) and (both["loss"] - both["min_loss"]).abs().max() <= 0.005
    assert sorted((both["log2_norm"] - both["min_log2_norm"]).abs())[55] < 0.015
    odd = both[~same].set_index(["horizon_tokens", "batch_size"])
    assert set(odd.index) == {(2**37, 64), (2**31, 2048)} and not odd["inside"].isna().any()


@pytest.mark.archive
@pytest.mark.parametrize("name, column, batch, tokens, prefactor, errors, r2, n", [
    ("fig3b_opt_lr.csv", "log2_lr_opt_mean", 0.619, -0.558, 9.76, (0.051, 0.045, 1.60), 0.923, 28),
    ("fig7a_opt_lr_9horizons.csv", "log2_lr_opt", 0.546, -0.526, 9.15, (0.029, 0.022, 0.77), 0.937, 62),
])
def test_the_rule_of_the_best_rate_is_reproduced(name, column, batch, tokens, prefactor, errors, r2, n):
    points = figure_points(name)
    law = norms.rate_rule(2.0 ** points["log2_batch"], 2.0 ** points["log2_horizon"], 2.0 ** points[column])
    found = [norms.exponent(law, k) for k in ("batch", "horizon_tokens", "log2_prefactor")]
    assert [round(f.value, 3) for f in found[:2]] == [batch, tokens] and found[2].value == pytest.approx(prefactor, abs=0.005)
    assert [f.se for f in found] == pytest.approx(errors, rel=0.02) and (round(law.r2, 3), law.n) == (r2, n)


@pytest.mark.archive
def test_the_exponents_of_best_batch_and_direct_rate_are_reproduced():
    best = figure_points("fig7a_opt_lr_9horizons.csv").query("is_best_batch == 1")
    for column, value, se, r2 in (("log2_batch", 0.450, 0.066, 0.868), ("log2_lr_opt", -0.250, 0.055, 0.750)):
        law = norms.tokens_rule(2.0 ** best["log2_horizon"], 2.0 ** best[column])
        found = norms.exponent(law, "horizon_tokens")
        assert (round(found.value, 3), round(found.se, 3), round(law.r2, 3), law.n) == (value, se, r2, 9)


@pytest.mark.archive
def test_the_rule_of_the_first_reach_is_reproduced_with_its_true_sign():
    points = figure_points("fig3a_first_reach.csv")
    law = norms.rate_rule(points["batch_size"], 2.0 ** points["log2_horizon_first_reach"], 2.0 ** points["log2_lr"])
    found = [norms.exponent(law, k) for k in ("batch", "horizon_tokens", "log2_prefactor")]
    assert [round(f.value, 2) for f in found] == [1.32, -0.96, 17.34] and (round(found[1].se, 3), law.n) == (0.025, 56)


@pytest.mark.archive
def test_the_profiled_optimum_is_more_constant_than_the_printed_one_whatever_the_fit(base):
    table = norms.choices(base, START).set_index(["fit", "batch"])
    assert len(table) == 24
    picked, profiled = (table.xs(b, level="batch") for b in ("picked on the grid", "profiled, 2 to a side"))
    assert picked.loc["as the paper", ["2^31", "2^33", "2^35", "2^37"]].tolist() == pytest.approx([6.92, 7.29, 6.89, 6.95], abs=0.01)
    assert picked["sd"].between(0.18, 0.25).all() and profiled["sd"].between(0.06, 0.12).all()
    assert profiled["slope"].between(0 - 0.005, 0.04).all() and (table["slope_low"] < table["slope"]).all()
    assert profiled.loc["as the paper", ["slope", "slope_low", "slope_high"]].tolist() == pytest.approx([0.006, -0.073, 0.084], abs=1e-3)


@pytest.mark.archive
def test_the_norm_at_a_fixed_batch_rises_with_tokens_at_every_batch(base):
    found = norms.constancy(norms.norm_optima(base, initial_loss=START))
    assert found.fixed["sd"].round(2).tolist() == [0.30, 0.30, 0.36, 0.42, 0.51, 0.45, 0.59]
    assert found.fixed["slope"].between(0.09, 0.22).all()
    assert (found.exact, round(found.sd, 2), round(found.random_share, 4)) == (True, 0.19, 0.0146)
    assert found.wander_sd == pytest.approx((0.097, 0.292, 0.515), abs=1e-3) and found.wander_slope_sd == pytest.approx(0.054, abs=1e-3)


@pytest.mark.archive
def test_other_batches_lose_at_the_optimum_norm(base):
    excess = norms.same_norm_excess(norms.norm_optima(base, initial_loss=START))
    assert len(excess) == 24 and (excess["excess"] > 0).all()
    by_step = excess.groupby(excess["octaves"].abs())["excess"].mean()
    assert by_step[1] == pytest.approx(0.079, abs=0.01) and by_step.is_monotonic_increasing
