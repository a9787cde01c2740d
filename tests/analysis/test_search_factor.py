"""Cheap searches replayed on made-up grids of known truth, and on the published grid where it is here."""

import math

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar.analysis.search_factor import fit_horizon_law, fit_parabola, search_factor
from etastar.archives import NotFetched

PREFACTOR, PARAMS_EXPONENT, TOKENS_EXPONENT = 8.0, -0.22, -0.35
SIZES, HORIZONS = (2.0**24, 2.0**26), 2.0 ** np.arange(27, 32)


def surface(params, tokens, lr, bend=0.03, skew=0.0, wander=0.0):
    """Loss whose valley is a power law; `skew` bends it, `wander` makes the floor at high rates flatten later."""
    u = np.log2(lr) - math.log2(PREFACTOR * params**PARAMS_EXPONENT * tokens**TOKENS_EXPONENT)
    return 2 + 300 / params**0.4 + 60 / tokens**0.22 + bend / 2 * u**2 + skew * u**3 + wander * u


def grid(noise=0.0, seed=0, **shape):
    rng = np.random.default_rng(seed)
    rows = [{"params": n, "horizon_tokens": d, "lr": r, "compute": 6 * n * d, "loss": surface(n, d, r, **shape) + noise * rng.normal()}
            for n in SIZES for d in HORIZONS for r in 2.0 ** np.arange(-16, -7.9, 0.5)]
    return pd.DataFrame(rows)


def test_three_rates_of_a_parabola_tell_its_vertex():
    found = fit_parabola(np.exp([-7.0, -6.0, -5.0]), 3 + 0.05 * (np.array([-7.0, -6.0, -5.0]) + 5.8) ** 2)
    assert math.log(found.best_lr) == pytest.approx(-5.8) and found.best_loss == pytest.approx(3.0)
    assert found.curvature == pytest.approx(0.05) and found.r2 == pytest.approx(1) and found.n == 3


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.9])
def test_three_horizons_tell_the_law_they_lie_on(gamma):
    tokens = np.array([1e9, 3e9, 2e10])
    law = fit_horizon_law(tokens, 1.9 + 40 * tokens**-gamma)
    assert (law.L0, law.gamma) == (pytest.approx(1.9, abs=1e-3), pytest.approx(gamma, rel=1e-3))
    assert law.predict(1e12) == pytest.approx(1.9 + 40 * 1e12**-gamma, abs=1e-3)


def test_losses_that_only_rise_get_no_runaway_law():
    law = fit_horizon_law([1e9, 2e9, 4e9], [3.0, 3.01, 3.02])
    assert 0.02 <= law.gamma <= 2 and 3.0 < law.predict(8e9) < 3.1


def test_on_parabolas_along_a_power_law_a_search_loses_nothing():
    told = search_factor(grid(), n_lr=(3, 5), spacing_octaves=(0.5, 1.0, 2.0), n_horizons=(2, 4))
    ways = told[told["way"] == "rates"]
    too_wide = (ways["n_lr"] == 5) & (ways["spacing_octaves"] == 2)  # five rates over eight octaves fit the grid in one place of four
    assert len(ways) == 12 and (ways["refused"] == np.where(too_wide, 3, 0)).all() and ways["error_worst"].max() < 1e-6
    truth = PREFACTOR * SIZES[1] ** PARAMS_EXPONENT * HORIZONS[-1] ** TOKENS_EXPONENT
    assert ways["best_lr"].tolist() == pytest.approx([truth] * 12)
    assert ways["excess_worst"].abs().max() < 1e-3  # the grid's best point is beside the vertex, and interpolation is in straight lines


def test_cost_is_the_share_of_the_whole_grids_compute():
    told = search_factor(grid(), n_lr=(3,), spacing_octaves=(1.0,), n_horizons=(2,)).iloc[0]
    short = 3 * sum(6 * n * d for n in SIZES for d in HORIZONS[:2])
    whole = 17 * sum(6 * n * d for n in SIZES for d in HORIZONS)
    assert told["cost_share"] == pytest.approx(short / whole) and told["runs"] == 12
    losses = search_factor(grid(), n_lr=(5,), spacing_octaves=(1.0,), n_horizons=(4,)).set_index("way").loc["losses"]
    assert losses["cost_share"] == pytest.approx(5 * sum(6 * SIZES[1] * d for d in HORIZONS[:4]) / whole) and losses["runs"] == 20


def test_losses_extrapolated_at_each_rate_find_the_best_rate_of_the_long_horizon():
    told = search_factor(grid(), n_lr=(7,), spacing_octaves=(0.5,), n_horizons=(3, 4)).set_index(["way", "n_horizons"])
    assert told.loc[("losses", 4), "error_worst"] < 0.5 and told.loc[("losses", 4), "excess_worst"] < 2e-3


def test_skewed_bowls_put_wide_parabolas_low_and_narrow_ones_less():
    told = search_factor(grid(skew=0.0015), n_lr=(5,), spacing_octaves=(0.5, 1.0), n_horizons=(3,))
    wide, narrow = (told[(told["spacing_octaves"] == s) & (told["way"] == "rates")]["error_octaves"].item() for s in (1.0, 0.5))
    assert 0 < narrow < wide / 2


def test_noise_costs_accuracy_and_more_rates_buy_it_back():
    draws = [search_factor(grid(0.01, seed), n_lr=(3, 7), spacing_octaves=(1.0,), n_horizons=(2,)).set_index("n_lr")["error_octaves"]
             for seed in range(12)]
    error = pd.concat(draws, axis=1).mean(axis=1)
    assert 0.05 < error[7] < error[3]


def test_a_search_that_sees_only_an_edge_is_counted_as_refused():
    rows = grid()
    low = rows[(rows["lr"] < 2.0**-9.9) | (rows["horizon_tokens"] == HORIZONS[-1])]
    low = low[~((low["params"] == SIZES[0]) & (low["horizon_tokens"] < HORIZONS[2]) & (low["lr"] > 2.0**-13.9))]
    told = search_factor(low, n_lr=(3,), spacing_octaves=(2.0,), n_horizons=(2,))
    assert told["refused"].item() > 0


def test_diverged_runs_are_never_the_best():
    rows = grid()
    rows.loc[rows["lr"] > 2.0**-8.6, "loss"] = np.nan
    told = search_factor(rows, n_lr=(3,), spacing_octaves=(1.0,), n_horizons=(2,)).iloc[0]
    assert told["error_worst"] < 1e-6


@pytest.mark.parametrize("call, said", [
    (lambda: search_factor(grid().drop(columns=["compute", "lr"])), "the grid lacks lr, compute"),
    (lambda: search_factor(pd.concat([grid(), grid().tail(1)])), "1 runs are of a size, horizon and rate"),
    (lambda: search_factor(grid(), spacing_octaves=(0.75,)), "0.5 octaves apart, so they have no spacing of 0.75"),
    (lambda: search_factor(grid(), n_horizons=(5,)), "has 4 shorter horizons, not 5"),
    (lambda: search_factor(grid().assign(compute=-1.0)), "compute must be positive"),
    (lambda: search_factor(grid().replace({"lr": {2.0**-10: 2.0**-10.2}})), "but 0.0008501 lies between"),
    (lambda: fit_parabola([0.1, 0.2], [1.0, 2.0]), "at least 3 rates"),
    (lambda: fit_parabola([0.1, 0.2, 0.4], [1.0, np.nan, 2.0]), "at least 3 rates with a finite loss; got 2"),
    (lambda: fit_parabola([0.1, 0.2, 0.4], [1.0, 2.0, 1.0]), "do not bend upwards"),
    (lambda: fit_horizon_law([1e9, 2e9], [3.0, 2.9]), "at least 3 different horizons; got 2"),
    (lambda: fit_horizon_law([1e9, 2e9, 3e9], [3.0, np.nan, 2.9]), "loss must be positive and finite"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -- the published grid ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    try:
        frame = es.archive("steplaw")
    except (NotFetched, ValueError) as error:
        pytest.skip(str(error))
    return frame.astype({"params": float, "horizon_tokens": float}).assign(
        lr=frame["peak_lr"], rate=(2 * np.log2(frame["peak_lr"])).round(), compute=lambda f: 6 * f["params"] * f["horizon_tokens"])


@pytest.mark.archive
@pytest.mark.parametrize("half_window, r2, low_by", [(2, 0.968, 0.09), (3, 0.961, 0.18), (4, 0.949, 0.31)])
def test_on_the_published_grid_wider_windows_put_the_parabola_low(published, half_window, r2, low_by):
    told = []
    for _, rows in published.groupby(["params", "horizon_tokens", "batch_tokens"]):
        rows, best = rows.sort_values("lr"), int(rows.sort_values("lr")["smooth_loss"].to_numpy().argmin())
        if half_window <= best < len(rows) - half_window:
            window = rows.iloc[best - half_window:best + half_window + 1]
            found = fit_parabola(window["lr"], window["smooth_loss"])
            told.append((found.r2, math.log2(found.best_lr / rows["lr"].iloc[best])))
    told = np.array(told)
    assert round(np.median(told[:, 0]), 3) == r2 and round(-told[:, 1].mean(), 2) == low_by


@pytest.mark.archive
def test_on_the_published_grid_extrapolated_losses_are_off_by_more_than_a_bowl_is_deep(published):
    errors = {}
    for params, reach in ((429260800, 1.25), (268304384, 3.2), (214663680, 5.0)):
        found = []
        for _, rows in published[published["params"] == params].groupby(["rate", "batch_tokens"]):
            rows = rows.sort_values("horizon_tokens")
            tokens, loss = rows["horizon_tokens"].to_numpy(), rows["smooth_loss"].to_numpy()
            if len(rows) == 4 and loss.max() < 4:
                assert tokens[3] / tokens[2] == pytest.approx(reach, rel=0.01)
                found.append(fit_horizon_law(tokens[:3], loss[:3]).predict(tokens[3]) / loss[3] - 1)
        errors[reach] = np.median(np.abs(found))
    assert errors[1.25] < 0.003 < errors[3.2] < errors[5.0] < 0.03


@pytest.mark.archive
def test_on_the_published_grid_a_search_on_short_horizons_is_told_with_cost_and_loss(published):
    rows = published[(published["params"] < 4e8) & (published["batch_tokens"] == 256 * 2048)].drop(columns="loss")
    told = search_factor(rows.rename(columns={"smooth_loss": "loss"}), n_lr=(3, 5), spacing_octaves=(1.0,), n_horizons=(3,))
    rates = told[told["way"] == "rates"]
    assert (rates["refused"] == 0).all() and rates["cost_share"].round(3).tolist() == [0.078, 0.130]
    assert (rates["error_octaves"] < 2).all() and (rates["excess_worst"] < 0.005).all()
