"""Power laws: closed forms, printed fits, recovery of known truths, the seed as unit, refusals and unit warnings."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.analysis.power_law import METHODS, curvature, fit_power_law, local_slopes
from etastar.analysis.units import UnitWarning

X = 2.0 ** np.arange(18, 24)
NOISE = np.array([0.03, -0.05, 0.01, 0.04, -0.02, -0.01])  # octaves


def sigma_for(method, count=6):
    return np.full(count, 0.1) if method == "wls" else None


@settings(max_examples=30, deadline=None)
@given(prefactor=st.floats(1e-6, 1e6), exponents=st.tuples(st.floats(-2, 2), st.floats(-2, 2)), method=st.sampled_from(METHODS[:3]),
       unit=st.floats(1e-3, 1e3))
def test_an_exact_law_is_recovered_and_units_move_the_prefactor_alone(prefactor, exponents, method, unit):
    n, d = np.meshgrid(2.0 ** np.arange(20, 24), 2.0 ** np.arange(28, 32))
    x = {"n": n.ravel(), "d": d.ravel()}
    y = prefactor * x["n"] ** exponents[0] * x["d"] ** exponents[1]
    law = fit_power_law(x, y, method=method, sigma_log2=sigma_for(method, 16))
    assert law.prefactor == pytest.approx(prefactor, rel=1e-6) and law.exponents == pytest.approx(exponents, abs=1e-9)
    other = fit_power_law(pd.DataFrame(x).assign(d=x["d"] / unit), y, method=method, sigma_log2=sigma_for(method, 16))
    assert other.exponents == pytest.approx(law.exponents, abs=1e-7)
    assert other.prefactor == pytest.approx(prefactor * unit ** exponents[1], rel=1e-6)
    assert law.predict({"d": 2.0**40, "n": 2.0**25})[0] == pytest.approx(prefactor * 2 ** (25 * exponents[0] + 40 * exponents[1]), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_recovers_one_regressor(method):
    law = fit_power_law(X, 3 * X**-0.4, method=method, sigma_log2=sigma_for(method))
    assert law.prefactor == pytest.approx(3, rel=1e-9) and law.exponents == pytest.approx([-0.4]) and law.r2 == pytest.approx(1)


def test_the_power_papers_quoted_optima_are_linear_in_batch_and_fall_with_tokens():
    # arXiv 2408.13359 §3.1, best rates on a factor-2 grid: 128 sequences at 2B and 256B tokens; 16 and 512 sequences at 128B
    over_tokens = fit_power_law({"horizon_tokens": [2e9, 256e9]}, [0.0128, 0.0008])
    assert over_tokens.exponents[0] == pytest.approx(-4 / 7) and -0.6 < over_tokens.exponents[0] < -0.5
    assert fit_power_law({"batch_sequences": [16, 512]}, [0.0002, 0.0064]).exponents[0] == pytest.approx(1.0)


def test_the_interval_without_seeds_is_the_textbooks():
    y = 3 * X**-0.4 * 2**NOISE
    law = fit_power_law(X, y)
    u = np.log2(X) - np.log2(X).mean()
    slope = (u * np.log2(y)).sum() / (u**2).sum()
    residual = np.log2(y) - np.log2(y).mean() - slope * u
    spread = math.sqrt((residual**2).sum() / 4)
    half = 2.776445 * spread / math.sqrt((u**2).sum())
    assert law.exponents[0] == pytest.approx(slope) and law.df == 4 and law.scatter_log2 == pytest.approx(spread)
    assert (law.exponents_low[0], law.exponents_high[0]) == pytest.approx((slope - half, slope + half), rel=1e-5)
    told = law.interval([2.0**26])
    reach = 26 - np.log2(X).mean()
    mean_error = spread * math.sqrt(1 / 6 + reach**2 / (u**2).sum())
    assert math.log2(told["high"][0] / told["predicted"][0]) == pytest.approx(2.776445 * mean_error, rel=1e-5)
    assert math.log2(told["predicted"][0] / told["new_low"][0]) == pytest.approx(2.776445 * math.hypot(mean_error, spread), rel=1e-5)
    error = math.sqrt(law.covariance[0, 0]) * 2.776445
    assert (law.prefactor_low, law.prefactor_high) == pytest.approx((law.prefactor * math.exp(-error), law.prefactor * math.exp(error)))


def test_a_known_noise_is_the_error_and_weighs_the_points():
    law = fit_power_law(X, 3 * X**-0.4 * 2**NOISE, sigma_log2=0.2)
    half = 1.959964 * 0.2 / math.sqrt(17.5)  # Σu² of six octaves is 17.5
    assert law.exponents_high[0] - law.exponents[0] == pytest.approx(half, rel=1e-5) and law.df == math.inf
    off = 3 * X**-0.4 * np.where(X == X[-1], 4.0, 1.0)
    weighed = fit_power_law(X, off, method="wls", sigma_log2=np.where(X == X[-1], 1e3, 0.01))
    assert weighed.exponents[0] == pytest.approx(-0.4, abs=1e-6) and fit_power_law(X, off).exponents[0] > -0.2


@pytest.mark.parametrize("method", ["huber", "theil_sen"])
def test_one_wild_point_of_twelve_does_not_move_a_robust_fit(method):
    x = 2.0 ** np.arange(18, 30)
    y = 3 * x**-0.4 * 2 ** np.resize(NOISE, 12)
    y[-1] *= 8
    assert fit_power_law(x, y, method=method).exponents[0] == pytest.approx(-0.4, abs=0.03)
    assert abs(fit_power_law(x, y).exponents[0] + 0.4) > 0.1


def seeded(exponents=(-0.44, -0.40, -0.36), levels=(1.0, 1.3, 0.8)):
    parts = [pd.DataFrame({"horizon_tokens": X, "y": level * X**e, "seed": s}) for s, (e, level) in enumerate(zip(exponents, levels,
                                                                                                                strict=True))]
    return pd.concat(parts, ignore_index=True)


def test_with_seeds_the_interval_is_students_over_the_seeds_lines():
    rows = seeded()
    law = fit_power_law(rows[["horizon_tokens"]], rows["y"], seed=rows["seed"])
    half = 4.302653 * 0.04 / math.sqrt(3)
    assert law.exponents[0] == pytest.approx(-0.40) and law.exponents_high[0] - law.exponents[0] == pytest.approx(half, rel=1e-5)
    assert law.df == 2 and law.seeds == (0, 1, 2) and law.n == 18
    assert np.array(law.coefficients_per_seed)[:, 1] == pytest.approx([-0.44, -0.40, -0.36])
    assert law.prefactor == pytest.approx((1.0 * 1.3 * 0.8) ** (1 / 3))
    told = law.interval({"horizon_tokens": [1e8]})
    at = np.log(rows["y"].to_numpy().reshape(3, 6)[:, 0]) + np.array([-0.44, -0.40, -0.36]) * math.log(1e8 / X[0])
    assert math.log(told["high"][0]) == pytest.approx(at.mean() + 4.302653 * at.std(ddof=1) / math.sqrt(3), rel=1e-6)
    assert math.log(told["new_high"][0]) == pytest.approx(at.mean() + 4.302653 * at.std(ddof=1) * math.sqrt(4 / 3), rel=1e-6)


def test_rows_may_come_in_any_order():
    rows = seeded()
    mixed = rows.sample(frac=1, random_state=3)
    first, second = (fit_power_law(r[["horizon_tokens"]], r["y"], seed=r["seed"]) for r in (rows, mixed))
    assert second.exponents_low == pytest.approx(first.exponents_low)
    slopes = [local_slopes(r["horizon_tokens"], r["y"], r["seed"]) for r in (rows, mixed)]
    pd.testing.assert_frame_equal(*slopes)


def test_two_points_leave_the_interval_unbounded():
    law = fit_power_law(X[:2], X[:2] ** -0.4)
    assert law.exponents[0] == pytest.approx(-0.4)
    assert (law.exponents_low[0], law.exponents_high[0], law.prefactor_low) == (-math.inf, math.inf, 0.0)
    assert law.interval([1e9])[["low", "high"]].to_numpy().tolist() == [[0.0, math.inf]]


def test_leaving_one_out_predicts_a_cell_from_the_others():
    y = 3 * X**-0.4 * 2**NOISE
    told = fit_power_law(X, y).leave_one_out()
    kept = np.arange(6) != 5
    slope, level = np.polyfit(np.log2(X[kept]), np.log2(y[kept]), 1)
    assert told["error_log2"][5] == pytest.approx(level + slope * 23 - math.log2(y[5]))
    rows = seeded()
    told = fit_power_law(rows[["horizon_tokens"]], rows["y"], seed=rows["seed"]).leave_one_out()
    middle = told[(rows["seed"] == 1)]["error_log2"]
    assert middle.std() == pytest.approx(0, abs=1e-9) and middle.iloc[0] == pytest.approx(math.log2(1.04 ** (1 / 3) / 1.3))


def test_points_beyond_the_fit_are_told_in_octaves():
    law = fit_power_law(X, 3 * X**-0.4)
    assert law.extrapolation_error([2.0**30, 2.0**31], 3 * np.array([2.0**30, 2.0**31]) ** -0.4 * [0.5, 1.0]) == pytest.approx([1.0, 0.0])


def test_a_bootstrap_resamples_rows_or_whole_seeds():
    law = fit_power_law(X, 3 * X**-0.4 * 2**NOISE)
    drawn = law.bootstrap(400, seed=1)
    assert list(drawn) == ["prefactor", "x"] and len(drawn) == 400
    half = law.exponents_high[0] - law.exponents[0]
    assert 0.3 < drawn["x"].std() * 2.776 / half < 1.3
    pd.testing.assert_frame_equal(drawn, law.bootstrap(400, seed=1))
    rows = seeded()
    over_seeds = fit_power_law(rows[["horizon_tokens"]], rows["y"], seed=rows["seed"]).bootstrap(300)["horizon_tokens"]
    assert set(np.round(over_seeds * 75, 6)) <= {float(-k) for k in range(27, 34)}  # means of three of −0.44, −0.40, −0.36


def test_local_slopes_are_exponents_between_neighbours():
    y = np.array([8.0, 4.0, 3.0, 2.5])
    told = local_slopes(X[:4], y, sigma_log2=0.1)
    assert told["slope"].tolist() == pytest.approx([-1.0, math.log2(3 / 4), math.log2(2.5 / 3)])
    assert (told["high"] - told["slope"]).tolist() == pytest.approx([1.959964 * 0.1 * math.sqrt(2)] * 3, rel=1e-5)
    assert local_slopes(X[:4], y)["low"].isna().all()
    rows = seeded()
    seeds = local_slopes(rows["horizon_tokens"], rows["y"], rows["seed"])
    assert (seeds["high"] - seeds["slope"]).tolist() == pytest.approx([4.302653 * 0.04 / math.sqrt(3)] * 5, rel=1e-5)
    assert seeds["x_low"].tolist() == pytest.approx(X[:-1].tolist())


def test_a_bend_is_told_with_the_change_of_slope_an_octave():
    u = np.log(X) - np.log(X).mean()
    bent = np.exp(-0.4 * u + 0.03 * u**2)
    told = curvature(X, bent)
    assert told.quadratic == pytest.approx(0.03) and told.slope == pytest.approx(-0.4)
    slopes = local_slopes(X, bent)["slope"]
    assert np.diff(slopes) == pytest.approx([told.slope_per_octave] * 4)
    straight = curvature(X, X**-0.4 * 2**NOISE)
    assert straight.quadratic_low < 0 < straight.quadratic_high
    seeds = pd.concat([pd.DataFrame({"x": X, "y": np.exp(-0.4 * u + bend * u**2), "s": s}) for s, bend in enumerate((0.02, 0.03, 0.04))])
    over = curvature(seeds["x"], seeds["y"], seeds["s"])
    assert over.quadratic_high - over.quadratic == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert curvature(X[:3], bent[:3]).quadratic_high == math.inf


@pytest.mark.parametrize("call, said", [
    (lambda: fit_power_law(X, np.where(X == X[2], -1.0, 1.0)), r"y must be positive and finite: 1 of 6 are not, \[-1.0\]"),
    (lambda: fit_power_law(X, np.where(X == X[2], np.nan, 1.0)), r"1 of 6 are not, \[nan\]"),
    (lambda: fit_power_law({"peak_lr": -np.arange(6.0) - 1}, X), r"peak_lr must be positive.*2\*\*rate"),
    (lambda: fit_power_law(X[:1], X[:1]), "need at least 2 different x; got 1"),
    (lambda: fit_power_law([4.0, 4.0], [1.0, 2.0]), "need at least 2 different x; got 1"),
    (lambda: fit_power_law({"a": X, "b": np.full(6, 2.0)}, X), "b does not vary"),
    (lambda: fit_power_law({"params": X, "horizon_tokens": 20 * X}, X), r"params, horizon_tokens are collinear \(condition number"),
    (lambda: fit_power_law(X, X[:5]), "x: 6, y: 5"),
    (lambda: fit_power_law({"a": X, "b": X[:5]}, X), "a: 6, b: 5"),
    (lambda: fit_power_law(X, X, seed=[0] * 6), r"one seed \(0\) has no spread"),
    (lambda: fit_power_law(X, X, seed=[0, 0, 0, 1, 1, 1]), "every seed needs one y at every x; seed 0 has 0 at x = 2.097e"),
    (lambda: fit_power_law(np.tile(X, 2), np.tile(X, 2), seed=[0] * 7 + [1] * 5), "seed 0 has 2 at x = 2.621e"),
    (lambda: fit_power_law(X, X, method="least squares"), "known: ols, wls, huber, theil_sen"),
    (lambda: fit_power_law(X, X, method="wls"), "wls needs sigma_log2"),
    (lambda: fit_power_law(X, X, method="huber", sigma_log2=0.1), "huber does not use sigma_log2"),
    (lambda: fit_power_law(X, X, sigma_log2=X), "use wls"),
    (lambda: fit_power_law(X, X, method="wls", sigma_log2=[0.1, 0, 0.1, 0.1, 0.1, 0.1]), "sigma_log2 must be positive"),
    (lambda: fit_power_law(np.tile(X, 2), np.tile(X, 2), sigma_log2=0.1, seed=[0] * 6 + [1] * 6), "seed or sigma_log2"),
    (lambda: fit_power_law({"a": X, "b": X[::-1] ** 2 + X}, X, method="theil_sen"), "theil_sen takes one regressor, got a, b"),
    (lambda: fit_power_law({"params": X}, X).predict({"horizon_tokens": X}), "the law is in params; got horizon_tokens"),
    (lambda: fit_power_law({"params": X}, X).predict([-1.0]), "params must be positive"),
    (lambda: fit_power_law(X[:2], X[:2]).leave_one_out(), "need at least 2 different x; got 1"),
    (lambda: curvature(X[:2], X[:2]), "at least 3 different x"),
    (lambda: local_slopes(np.tile(X, 2), np.tile(X, 2)), "several at one need seed labels"),
    (lambda: local_slopes({"a": X, "b": X}, X), "one regressor is needed, got a, b"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("name, values, meant", [
    ("params", X / 2**20, "params = 0.25 is implausibly small; it is probably in millions or billions"),
    ("horizon_tokens", X / 1e6, "probably in millions or billions"),
    ("horizon_tokens", X * 1e12, "probably in FLOPs"),
    ("batch_tokens", X / 2**14, "batch_tokens = 16 is implausibly small; it is probably in sequences"),
    ("peak_lr", X / 2**18, "peak_lr = 32 is implausibly large; it is probably in multiples of 1e-3"),
])
def test_values_implausible_in_their_names_unit_warn_with_the_unit_probably_meant(name, values, meant):
    with pytest.warns(UnitWarning, match=meant) as caught:
        fit_power_law({name: values}, X)
    assert caught[0].filename == __file__
    with pytest.warns(UnitWarning, match=meant):
        fit_power_law(X, pd.Series(values, name=name))


@pytest.mark.parametrize("name, values", [("params", X), ("horizon_tokens", X), ("batch_tokens", X), ("peak_lr", X / 2**26),
                                          ("depth", X / 2**20)])
def test_plausible_values_do_not_warn(name, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_power_law({name: values}, X)
