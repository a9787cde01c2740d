"""The best rate over size and horizon: planted exponents and bends come back, errors cover the truth, bad frames are refused."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.analysis.jackknife import jackknife
from etastar.analysis.paired import mean_estimate
from etastar.analysis.size_horizon import curvature, exponents_by_batch, fit_size_horizon, published_exponents

SIZES, HORIZONS = (2e8, 2.7e8, 4.3e8, 5.4e8, 1.1e9), (4e9, 1.2e10, 2.5e10, 1e11)


def cells(size=-0.5, horizon=-0.31, bends=(0, 0, 0), noise=None):
    """Best rates of five sizes at four horizons; `bends` are second derivatives over size, over tokens and by each."""
    n, d = (a.ravel() for a in np.meshgrid(SIZES, HORIZONS, indexing="ij"))
    x, z = np.log2(n / 4e8), np.log2(d / 2e10)
    octaves = -10 + size * x + horizon * z + bends[0] * x**2 / 2 + bends[1] * z**2 / 2 + bends[2] * x * z
    return pd.DataFrame({"cell": [f"{a:g}, {b:g}" for a, b in zip(n, d, strict=True)], "params": n, "horizon_tokens": d,
                         "peak_lr": 2.0 ** (octaves if noise is None else octaves + noise)})


@settings(max_examples=20, deadline=None)
@given(st.floats(-1, 1), st.floats(-1, 1))
def test_planted_exponents_and_level_come_back(size, horizon):
    fit = fit_size_horizon(cells(size, horizon))
    assert (fit.size.value, fit.horizon.value) == pytest.approx((size, horizon), abs=1e-9)
    assert fit.rate(4e8, 2e10) == pytest.approx(2**-10) and fit.rate(8e8, 2e10) == pytest.approx(2 ** (-10 + size))
    assert fit.rate(4e8, 8e10) == pytest.approx(2 ** (-10 + 2 * horizon)) and (fit.n, fit.unit) == (20, "cell")


@settings(max_examples=20, deadline=None)
@given(*(st.floats(-0.3, 0.3) for _ in range(3)))
def test_planted_bends_come_back(over_size, over_tokens, mixed):
    found = curvature(cells(bends=(over_size, over_tokens, mixed)))
    assert (found.size.value, found.horizon.value, found.mixed.value) == pytest.approx((over_size, over_tokens, mixed), abs=1e-8)
    assert found.size.unit == "octaves per octave²" and found.r2_bent == pytest.approx(1) and found.n == 20


def test_a_law_that_bends_upwards_is_underestimated_by_the_straight_one_at_the_largest_size():
    rates = cells(bends=(0.2, 0, 0))
    small = rates[rates["params"] < 1e9]
    largest = rates[rates["params"] > 1e9]
    assert (np.log2(fit_size_horizon(small).rate(largest["params"], largest["horizon_tokens"]) / largest["peak_lr"]) < -0.1).all()


@pytest.mark.parametrize("unit", ["cell", "params"])
def test_intervals_of_exponents_cover_the_truth(unit):
    draw = np.random.default_rng(11)
    scatter = (lambda: 0.1 * draw.normal(size=20)) if unit == "cell" else (lambda: np.repeat(0.1 * draw.normal(size=5), 4))
    found = [fit_size_horizon(cells(noise=scatter()), unit) for _ in range(200)]
    held = [low <= -0.5 <= high for low, high in (fit.size.interval() for fit in found)]
    assert np.mean(held) >= 0.92
    if unit == "cell":
        held = [low <= -0.31 <= high for low, high in (fit.horizon.interval() for fit in found)]
        assert 0.92 <= np.mean(held) <= 0.995
    # an error is that of the scatter of estimates, not many times it
    assert np.std([fit.size.value for fit in found]) == pytest.approx(np.sqrt(np.mean([fit.size.se**2 for fit in found])), rel=0.5)


def test_what_a_sizes_shape_adds_to_all_its_cells_widens_the_error_over_sizes_alone():
    shaped = cells(noise=np.repeat([0.1, -0.1, 0.15, -0.1, 0.05], 4))
    by_cell, by_size = (fit_size_horizon(shaped, unit) for unit in ("cell", "params"))
    assert by_size.size.se > 1.5 * by_cell.size.se and by_size.size.value == by_cell.size.value
    assert (by_size.size.df, by_cell.size.df) == (4, 17)


def test_the_wider_of_leaving_out_and_scatter_is_the_error():
    noise = 0.1 * np.random.default_rng(0).normal(size=20)
    rates = cells(noise=noise)
    design = np.column_stack([np.ones(20), np.log2(rates["params"]), np.log2(rates["horizon_tokens"])])
    found, residual, *_ = np.linalg.lstsq(design, np.log2(rates["peak_lr"]), rcond=None)
    scatter = np.sqrt(residual[0] / 17 * np.diag(np.linalg.inv(design.T @ design)))
    left_out = jackknife(rates["cell"], lambda kept: np.linalg.lstsq(design[kept], np.log2(rates["peak_lr"])[kept], rcond=None)[0][1:])
    fit = fit_size_horizon(rates)
    assert (fit.size.se, fit.horizon.se) == pytest.approx([max(a.se, b) for a, b in zip(left_out, scatter[1:], strict=True)])
    assert found[1] == pytest.approx(fit.size.value)


def test_the_test_against_a_straight_law_is_fair_where_it_is_straight_and_sees_a_bend():
    draw = np.random.default_rng(5)
    p = [curvature(cells(noise=0.1 * draw.normal(size=20))).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1
    bent = curvature(cells(bends=(0, -0.2, 0), noise=0.1 * draw.normal(size=20)))
    assert bent.p < 1e-3 and bent.horizon.interval()[1] < 0 and bent.r2_bent > bent.r2_straight


def test_exponents_by_batch_name_the_laws_that_hold_and_pass_over_thin_batches():
    told = published_exponents()
    assert told == {"fitting": {"size": -0.2219, "horizon": -0.3509}, "bjorck": {"size": -0.23, "horizon": -0.32},
                    "steplaw": {"size": -0.713, "horizon": 0.307}}
    noise = 0.02 * np.random.default_rng(3).normal(size=20)
    small, large, thin = (cells(of["size"], of["horizon"], noise=noise).assign(batch_tokens=batch)
                          for of, batch in ((told["fitting"], 2**17), (told["steplaw"], 2**21), (told["bjorck"], 2**22)))
    table = exponents_by_batch(pd.concat([small, large, thin[:9]]))
    assert table["batch_tokens"].tolist() == [2**17, 2**21] and table["n"].tolist() == [20, 20]
    assert "fitting" in table.loc[0, "horizon_holds"] and "steplaw" not in table.loc[0, "horizon_holds"]
    assert table.loc[1, ["size_holds", "horizon_holds"]].tolist() == ["steplaw", "steplaw"]
    fit = fit_size_horizon(large)
    assert table.loc[1, ["size", "size_low", "size_high"]].tolist() == pytest.approx([fit.size.value, *fit.size.interval()])
    with pytest.raises(ValueError, match="no batch has 21 cells; the most is 20"):
        exponents_by_batch(small, least_cells=21)


def test_leaving_out_gives_the_error_of_a_mean():
    values = np.array([1.0, 2, 4, 8, 16])
    (found,) = jackknife(list("abcde"), lambda kept: values[kept].mean(), "nats")
    known = mean_estimate(values)
    assert (found.value, found.se, found.df, found.n) == pytest.approx((known.value, known.se, 4, 5)) and found.unit == "nats"
    with pytest.raises(ValueError, match="needs at least 4 units; got 3: a, b, c"):
        jackknife(["a", "b", "c", "c"], lambda kept: 1)


def test_frames_that_do_not_tell_size_from_horizon_are_refused():
    rates = cells()
    with pytest.raises(ValueError, match="4 cells do not determine 3 coefficients"):
        fit_size_horizon(rates[rates["params"] == 2e8])
    with pytest.raises(ValueError, match="do not determine 6 coefficients"):
        curvature(rates[rates["params"] <= 2.7e8])
    with pytest.raises(ValueError, match="needs at least 4 units; got 3"):
        fit_size_horizon(rates[rates["params"] <= 4.3e8], "params")
    with pytest.raises(ValueError, match="no column 'peak_lr'"):
        fit_size_horizon(rates.drop(columns="peak_lr"))
    with pytest.raises(ValueError, match="unit must be one of cell, params; got 'row'"):
        fit_size_horizon(rates, "row")
    with pytest.raises(ValueError, match="1 of 20 best rates are not positive; leave out cells whose best rate is at an edge"):
        fit_size_horizon(rates.assign(peak_lr=[np.nan, *rates["peak_lr"][1:]]))
    with pytest.raises(ValueError, match="cell '2e[+]08, 4e[+]09' has several rows; give one batch"):
        fit_size_horizon(pd.concat([rates, rates[:1]]))
