"""The joint fit of the valley: recovery of known truths, optima at the edge, diverged runs, coverage, refusals."""

import math

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar.analysis.valley import _grid, _Problem, fit_valley, linex

HORIZONS = 2.0 ** np.arange(20, 30, 2)
RATES = np.arange(-10.0, -2.5)
EXPONENT = -0.4


def sweep(rng=None, *, seeds=3, noise=0.0, bend=0.04, shape="cubic", middle=-6.3, exponent=EXPONENT, diverge=0, rates=RATES, wander=0.0,
          bend_exponent=0.0):
    """Rows of horizon_tokens, lr, loss, seed: bowls about 2^middle at the middle horizon; `diverge` highest rates diverged."""
    rng = rng or np.random.default_rng(0)
    octaves = np.log2(HORIZONS) - np.log2(HORIZONS).mean()
    s, h, r = np.meshgrid(np.arange(seeds), np.arange(len(HORIZONS)), np.arange(len(rates)), indexing="ij")
    away = rates[r] - (middle + exponent * octaves[h] + rng.normal(0, wander, (seeds, 1, 1)))
    k = bend * 2 ** (bend_exponent * octaves[h])
    rise = k / 2 * away**2 * (1 + 0.1 * away) if shape == "cubic" else k * (np.exp(0.3 * away) - 0.3 * away - 1) / 0.09
    loss = 3 - 0.05 * octaves[h] + rng.normal(0, 0.05, (seeds, len(HORIZONS), 1)) + rise + rng.normal(0, noise, rise.shape)
    loss[r >= len(rates) - diverge] = np.nan
    return pd.DataFrame({"horizon_tokens": HORIZONS[h.ravel()], "lr": 2 ** rates[r.ravel()], "loss": loss.ravel(), "seed": s.ravel()})


def fit(rows, **options):
    return fit_valley(rows[["horizon_tokens"]], rows["lr"], rows["loss"], rows["seed"], **options)


def test_a_valley_of_bowls_is_recovered_exactly():
    valley = fit(sweep(shape="linex"), worst_excess=10.0)
    assert valley.exponents[0] == pytest.approx(EXPONENT, abs=1e-6) and valley.curvature == pytest.approx(0.04, rel=1e-5)
    assert valley.skew == pytest.approx(0.3, abs=1e-5) and valley.r2 == pytest.approx(1)
    middle = math.exp(np.log(HORIZONS).mean())
    assert math.log2(valley.predict([middle])[0]) == pytest.approx(-6.3, abs=1e-6)
    assert np.log2(valley.cells["best_lr"]).tolist() == pytest.approx([-4.7, -5.5, -6.3, -7.1, -7.9], abs=1e-6)
    assert valley.cells["on_valley"].tolist() == pytest.approx(valley.cells["best_lr"].tolist(), rel=1e-5)


def test_a_cubic_bowl_shifts_the_exponent_by_next_to_nothing():
    valley = fit(sweep(shape="cubic"))
    assert valley.exponents[0] == pytest.approx(EXPONENT, abs=2e-3) and valley.curvature == pytest.approx(0.04, rel=0.05)


def test_parabolas_and_shared_shapes_are_options():
    rows = sweep(shape="linex", bend_exponent=0.15)
    shared, free = fit(rows, worst_excess=10), fit(rows, curvature="log-linear", worst_excess=10)
    assert free.curvature_exponents == pytest.approx((0.15,), abs=1e-4) and free.exponents[0] == pytest.approx(EXPONENT, abs=1e-5)
    assert shared.curvature_exponents == (0.0,) and shared.r2 < free.r2
    flat = fit(rows[(rows["lr"] > 2**-9.5) & (rows["lr"] < 2**-3.5)], skew=False)
    assert flat.skew == flat.skew_low == flat.skew_high == 0.0


def test_two_regressors_are_told_apart():
    rows = pd.concat([sweep(shape="linex", middle=-6.3 + 0.8 * step).assign(batch_tokens=2.0 ** (13 + step)) for step in (0, 1, 2)])
    valley = fit_valley(rows[["horizon_tokens", "batch_tokens"]], rows["lr"], rows["loss"], rows["seed"], worst_excess=10)
    assert valley.names == ("horizon_tokens", "batch_tokens") and valley.exponents == pytest.approx((EXPONENT, 0.8), abs=1e-5)
    assert valley.interval({"batch_tokens": 2.0**13, "horizon_tokens": HORIZONS[2]})["predicted"][0] == pytest.approx(2**-6.3, rel=1e-4)


def test_a_cell_whose_optimum_is_beyond_the_grid_still_tells_by_its_slope():
    rows = sweep(shape="linex", middle=-4.2)  # vertices −2.6, −3.4, −4.2, … on rates up to −3
    valley = fit(rows, worst_excess=10)
    assert valley.cells["edge"].tolist() == ["high", "high", "", "", ""] and valley.exponents[0] == pytest.approx(EXPONENT, abs=1e-5)
    assert math.log2(valley.cells["best_lr"][0]) == pytest.approx(-2.6, abs=1e-4)
    later = rows.assign(lr=rows["lr"].where(rows["horizon_tokens"] > HORIZONS[0], rows["lr"] * 2**0.2))  # its vertex 0.2 octaves up
    assert fit(later, worst_excess=10).exponents[0] < EXPONENT - 0.01


def test_diverged_runs_are_walls_that_are_counted_and_never_dropped():
    valley = fit(sweep(shape="linex", diverge=3, middle=-7.3), worst_excess=10)
    assert valley.cells["edge"].tolist() == ["wall", "", "", "", ""] and valley.cells["censored"].tolist() == [9] * 5
    assert valley.exponents[0] == pytest.approx(EXPONENT, abs=1e-4) and valley.n == 120
    assert (valley.cells["rates"] == 8).all()


def test_a_diverged_rate_pulls_a_vertex_back_that_points_alone_would_put_beyond_it():
    rows = sweep(shape="linex", middle=-4.2)
    kept = rows["lr"] < 2**-3.5  # without its last rate the first cell's vertex, −2.6, is far beyond what was tried
    open_end = fit(rows[kept], worst_excess=10)
    walled = fit(rows.assign(loss=rows["loss"].where(kept)), worst_excess=10)
    assert open_end.cells["on_valley"][0] == pytest.approx(2**-2.6, rel=1e-3)
    assert walled.cells["on_valley"][0] < 0.9 * open_end.cells["on_valley"][0]


def test_far_losses_only_say_worse():
    rows = sweep(shape="linex")
    wild = rows.assign(loss=rows["loss"].where(rows["lr"] < 2**-3.5, 11.0))
    valley = fit(wild)
    assert valley.exponents[0] == pytest.approx(EXPONENT, abs=1e-4) and valley.cells["censored"].sum() >= 15


def test_the_interval_is_students_over_the_seeds_own_steps():
    valley = fit(sweep(np.random.default_rng(1), noise=0.01))
    own = np.array(valley.exponents_per_seed)[:, 0]
    half = 4.302653 * own.std(ddof=1) / math.sqrt(3)
    assert own.mean() == pytest.approx(valley.exponents[0], abs=1e-6) and valley.df == 2
    assert valley.exponents_high[0] - valley.exponents[0] == pytest.approx(half, rel=1e-4)
    # one seed's step is the joint fit's own move when only that seed's data pull
    rows = sweep(np.random.default_rng(1), noise=0.01)
    alone = fit_valley(rows[["horizon_tokens"]], rows["lr"], rows["loss"].where(rows["seed"] == 0, np.nan).groupby(
        [rows["horizon_tokens"], rows["lr"]]).transform("mean"), rows["seed"])
    assert alone.exponents[0] == pytest.approx(own[0], abs=3e-3)


def test_seeds_that_only_shift_the_loss_leave_no_error():
    valley = fit(sweep(shape="linex"), worst_excess=10)
    assert valley.exponents_high[0] - valley.exponents_low[0] < 1e-6


def test_without_seeds_the_scatter_is_the_error():
    rows = sweep(np.random.default_rng(2), noise=0.01, seeds=1)
    valley = fit_valley(rows[["horizon_tokens"]], rows["lr"], rows["loss"])
    assert valley.df == (valley.n - valley.cells["censored"].sum()) - 5 - 5 and valley.scatter == pytest.approx(0.01, rel=0.5)
    assert 0.001 < valley.exponents_high[0] - valley.exponents[0] < 0.05 and valley.exponents_per_seed == ()


def test_the_jacobian_is_that_of_the_residuals():
    rows = sweep(np.random.default_rng(4), noise=0.01, diverge=3)
    problem = _Problem(_grid(rows[["horizon_tokens"]], rows["lr"], rows["loss"], rows["seed"], 0.5), True, True)
    for level in (-6.3, -3.0):  # at −3 diverged rates lie below the best, so that their hinges push
        at = np.array([level, -0.4, math.log(0.04), 0.02, 0.3, 0.05])
        numeric = np.column_stack([(problem.residual(at + 1e-6 * e) - problem.residual(at - 1e-6 * e)) / 2e-6 for e in np.eye(6)])
        assert problem.jacobian(at) == pytest.approx(numeric, abs=1e-7)
    assert (problem.residual(at)[~problem.grid.finite] < 0).any()


@pytest.mark.parametrize("u", [-4.0, -0.01, 1e-6, 0.5, 6.0])
@pytest.mark.parametrize("s", [-0.5, 1e-5, 0.0, 0.3, 1.5])
def test_the_bowls_series_joins_its_closed_form(u, s):
    closed = u**2 / 2 if s == 0 else (math.expm1(s * u) - s * u) / s**2
    rise, slope, by_skew = (v.item() for v in linex(np.array([u]), s))
    assert rise == pytest.approx(closed, rel=1e-6, abs=1e-5 * (abs(s) < 1e-4))
    assert slope == pytest.approx(u if s == 0 else math.expm1(s * u) / s, rel=1e-6)
    up, down = (linex(np.array([u]), s + d)[0].item() for d in (1e-5, -1e-5))
    assert by_skew == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-9)


# -- calibration, quick: the long versions are in test_calibration.py --------------------------------------------------

DRAWS = 250
CASES = [{"noise": 0.01}, {"noise": 0.003, "bend": 0.06, "diverge": 3, "middle": -7.3}, {"noise": 0.01, "middle": -3.9, "shape": "linex"}]


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_and_the_exponents_bias_is_small_beside_its_spread(case):
    rng = np.random.default_rng(7)
    found = [fit(sweep(rng, **case)) for _ in range(DRAWS // 3)]
    own = np.array([v.exponents[0] for v in found])
    covered = np.mean([v.exponents_low[0] <= EXPONENT <= v.exponents_high[0] for v in found])
    assert 0.87 <= covered <= 1.0 and abs(own.mean() - EXPONENT) < 0.4 * own.std()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, said", [
    (lambda r: r[~((r["seed"] == 1) & (r["lr"] == 2.0**-5) & (r["horizon_tokens"] == HORIZONS[0]))],
     "seed 1 has 0 at lr 0.03125, horizon_tokens = 1.049e"),
    (lambda r: pd.concat([r, r.head(1)]), "seed 0 has 2 at lr 0.0009766"),
    (lambda r: r.assign(seed=0).drop_duplicates(["horizon_tokens", "lr"]), r"one seed \(0\) has no spread"),
    (lambda r: r.assign(lr=-r["lr"]), "lr must be positive and finite"),
    (lambda r: r[r["horizon_tokens"] == HORIZONS[0]], "at least 2 different x; got 1"),
    (lambda r: r.assign(loss=r["loss"].where((r["horizon_tokens"] > HORIZONS[0]) | (r["lr"] < 2**-9.5))),
     "1 of 5 cells have fewer than two rates within 0.5 nats of their best, horizon_tokens = 1.049e"),
])
def test_bad_input_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        fit(change(sweep(noise=0.01)))


def test_without_one_interior_optimum_nothing_is_fitted():
    low = sweep(shape="linex", middle=-13.0)
    with pytest.raises(es.EdgeOptimum, match="5 of 5 cells want lower rates, 0 higher ones"):
        fit(low)
    with pytest.raises(ValueError, match="curvature is 'shared' or 'log-linear'; got 'free'"):
        fit(low, curvature="free")
    with pytest.raises(ValueError, match="the valley is over horizon_tokens; got batch_tokens"):
        fit(sweep(shape="linex")).predict({"batch_tokens": 1e5})
    with pytest.raises(ValueError, match="lr: 120, loss: 119"):
        fit_valley(low["horizon_tokens"], low["lr"], low["loss"][:-1])
