"""Exponents of arXiv 2503.04715 refitted: known laws recovered, units of resampling, and the released runs recomputed.

Expected numbers on released runs were computed once from the repository's files; those the paper prints are named as its own.
"""

import numpy as np
import pandas as pd
import pytest

from etastar import plots
from etastar.analysis.lr_grids import best_runs, near_best, optima
from etastar.analysis.steplaw_refit import (
    COEFFICIENTS,
    authors_fit,
    bootstrap,
    estimators,
    fit_rows,
    fixed_batch_exponents,
    fixed_batch_rates,
    mean_of_bootstraps,
    optimum_fit,
    sign_flip,
)
from etastar.archives import archive
from etastar.archives import bootstrap as published_bootstrap

SIZES, HORIZONS = (2e8, 4e8, 8e8), (4e9, 1.6e10, 6.4e10)


def made_up(lr=lambda n, d: 40 * n**-0.75 * d**0.22, batch=lambda n, d: 0.4 * d**0.58, turn=0.2):
    """Noiseless grids of three sizes at three horizons with known optima."""
    rates, batches = (a.ravel() for a in np.meshgrid(2.0 ** np.arange(-13, -4.9, 0.5), 2.0 ** np.arange(15, 23)))
    cells = []
    for n in SIZES:
        for d in HORIZONS:
            x, z = np.log2(rates / lr(n, d)), np.log2(batches / batch(n, d))
            cells.append(pd.DataFrame({"cell": f"{n:g}, {d:g}", "params": n, "horizon_tokens": d, "peak_lr": rates, "batch_tokens": batches,
                                       "smooth_loss": 2.5 + 0.02 * (x**2 - turn * x * z + 0.5 * z**2)}))
    return pd.concat(cells, ignore_index=True)


def rows_of(noise, seed=0, repeats=1):
    """Rows that lie on a known law, each cell off by its own error."""
    draw = np.random.default_rng(seed)
    rows = [{"cell": f"{n:g}, {d:g}", "params": n, "horizon_tokens": d, "peak_lr": 40 * n**-0.75 * d**0.22 * np.exp(error),
             "batch_tokens": 0.4 * d**0.58 * np.exp(error)}
            for n in SIZES for d in HORIZONS for error in [noise * draw.normal()] for _ in range(repeats)]
    return pd.DataFrame(rows)


def test_exact_rows_give_back_their_law():
    fit = fit_rows(rows_of(0))
    assert (fit.lr_prefactor, fit.lr_params_exponent, fit.lr_tokens_exponent) == pytest.approx((40, -0.75, 0.22))
    assert (fit.batch_prefactor, fit.batch_tokens_exponent, fit.lr_r2) == pytest.approx((0.4, 0.58, 1.0)) and (fit.n, fit.cells) == (9, 9)
    assert fit.law(1e9, 1e10) == pytest.approx((40 * 1e9**-0.75 * 1e10**0.22, 0.4 * 1e10**0.58))


def test_fitted_optima_of_known_basins_give_back_the_law():
    fit = optimum_fit(made_up())
    assert (fit.lr_params_exponent, fit.lr_tokens_exponent, fit.batch_tokens_exponent) == pytest.approx((-0.75, 0.22, 0.58), abs=1e-3)
    assert fit.lr_params_exponent_low < -0.75 < fit.lr_params_exponent_high
    with pytest.raises(ValueError, match="at least 5 cells; got 3"):
        fit_rows(optima(made_up().query("params == 2e8")))


def test_student_intervals_by_hand():
    rows = rows_of(0.1, seed=3)
    fit = fit_rows(rows)
    x, y = np.log(rows["horizon_tokens"]), np.log(rows["batch_tokens"])
    left = ((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2).sum() / 7
    half = 2.3646243 * np.sqrt(left / ((x - x.mean()) ** 2).sum())  # Student's 97.5 % point at 7 degrees of freedom
    assert fit.batch_tokens_exponent_high - fit.batch_tokens_exponent == pytest.approx(half, rel=1e-6)
    wider = fit_rows(rows, window_spread=[0, 0, 0.05, 0, 0])
    assert wider.lr_tokens_exponent_high - wider.lr_tokens_exponent == pytest.approx(
        np.hypot(fit.lr_tokens_exponent_high - fit.lr_tokens_exponent, 1.959964 * 0.05), rel=1e-5)
    assert wider.lr_params_exponent_high == pytest.approx(fit.lr_params_exponent_high)


def test_rows_that_share_an_error_count_once_by_cell_and_many_times_by_row():
    rows = rows_of(0.2, repeats=12)
    width = {by: np.ptp(np.quantile(bootstrap(rows, 300, by)["batch_tokens_exponent"], [0.025, 0.975])) for by in ("row", "cell")}
    assert width["cell"] > 2 * width["row"]
    with pytest.raises(ValueError, match="by must be 'row' or 'cell'; got 'run'"):
        bootstrap(rows, 10, "run")


def test_the_mean_of_bootstraps_is_a_mean_of_logs():
    coefficients = pd.DataFrame([[0.0, -0.7, 0.3, 1.0, 0.5], [2.0, -0.9, 0.1, 3.0, 0.7]], columns=COEFFICIENTS)
    fit = mean_of_bootstraps(coefficients)
    assert (fit.lr_prefactor, fit.lr_params_exponent, fit.batch_prefactor) == pytest.approx((np.e, -0.8, np.e**2))
    assert fit.lr_tokens_exponent_low == pytest.approx(0.105) and fit.lr_tokens_exponent_high == pytest.approx(0.295)


def test_the_table_of_estimators_says_where_the_published_exponents_lie():
    table = estimators(made_up(), pd.DataFrame([[0.5, -0.713, 0.307, -0.5, 0.571]] * 3, columns=COEFFICIENTS), count=20)
    ours = table[table["estimator"].str.startswith("cubic")].set_index("quantity")
    assert ours["published"].tolist() == [-0.713, 0.307, 0.571] and not ours["published_inside"].any()  # the made-up law is another
    printed = table[table["estimator"] == "authors' bootstraps"]
    assert printed["published_inside"].all() and set(table["unit"]) == {"row", "cell"}


def test_exponents_at_fixed_batch_follow_from_the_basins_and_flip_where_they_must():
    """log η*(B) = log η* + turn/2 · log(B/B*), so a fixed batch has D-exponent 0.22 − 0.1·0.58 whatever the batch."""
    rates = fixed_batch_rates(made_up(), least_cells=9)
    table = fixed_batch_exponents(rates)
    assert np.allclose(table["tokens_exponent"], 0.22 - 0.1 * 0.58, atol=1e-6) and np.allclose(table["params_exponent"], -0.75, atol=1e-6)
    n, d, b = (rates[name].to_numpy() for name in ("params", "horizon_tokens", "batch_tokens"))
    bent = rates.assign(peak_lr=n**-0.5 * d ** (0.07 * np.log2(b / 5e5)))
    flip = sign_flip(bent, count=50)
    assert flip.batch_tokens == pytest.approx(5e5, rel=1e-6) and flip.slope_per_octave == pytest.approx(0.07)
    assert flip.batch_tokens_low == pytest.approx(5e5, rel=1e-3) and flip.n == 9


def test_the_figures_of_exponents_show_what_the_tables_hold():
    table = estimators(made_up(), count=20)
    fig = plots.exponent_estimates(table)
    assert len(fig.axes) == 3 and fig.axes[0].get_xlabel() == "rate: exponent of\nparameters"
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == list(table["estimator"].unique())
    drawn = np.sort(np.concatenate([line.get_xdata() for line in fig.axes[1].get_lines()[1:]]))
    assert np.allclose(drawn, np.sort(table.loc[table["quantity"] == "lr_tokens_exponent", "estimate"]))
    assert set(fig.axes[1].get_lines()[0].get_xdata()) == {0.307}
    rates = fixed_batch_rates(made_up(), least_cells=9)
    ax = plots.batch_exponents(fixed_batch_exponents(rates), published={"a law": -0.32}).axes[0]
    assert any(np.allclose(line.get_ydata(), -0.32) for line in ax.get_lines()) and ax.get_xlabel() == "batch held fixed (tokens)"
    with pytest.raises(ValueError, match="no column 'unit'"):
        plots.exponent_estimates(table.drop(columns="unit"))


def exponents(fit) -> list:
    return [round(e, 3) for e in (fit.lr_params_exponent, fit.lr_tokens_exponent, fit.batch_tokens_exponent)]


@pytest.fixture(scope="module")
def runs(skip_if_not_fetched):
    with skip_if_not_fetched():
        return archive("steplaw")


@pytest.mark.archive
def test_the_repositorys_own_procedure_on_released_runs_does_not_give_the_published_tokens_exponent(runs):
    rows = near_best(runs)
    fit = fit_rows(rows)
    assert (fit.n, fit.cells, round(fit.lr_prefactor, 1), round(fit.batch_prefactor, 3)) == (129, 17, 77.7, 0.209)
    assert exponents(fit) == [-0.766, 0.197, 0.613]
    authors = authors_fit(runs, count=400)
    for quantity, low, high in (("lr_params_exponent", -0.877, -0.662), ("lr_tokens_exponent", 0.131, 0.267),
                                ("batch_tokens_exponent", 0.537, 0.689)):
        # ends of a bootstrap interval have an error of their own, of about 0.01 at 400 resamples
        assert getattr(authors, f"{quantity}_low") == pytest.approx(low, abs=0.03), quantity
        assert getattr(authors, f"{quantity}_high") == pytest.approx(high, abs=0.03), quantity
    assert authors.lr_tokens_exponent_high < 0.307 and authors.lr_params_exponent_low < -0.713 < authors.lr_params_exponent_high


@pytest.mark.archive
def test_other_estimators_on_released_runs(runs):
    for within, n, found in ((0.0005, 32, [-0.797, 0.252, 0.602]), (0.001, 47, [-0.755, 0.205, 0.668]),
                             (0.005, 260, [-0.712, 0.173, 0.496])):
        fit = fit_rows(near_best(runs, within))
        assert fit.n == n and exponents(fit) == pytest.approx(found, abs=1.1e-3), within
    best = fit_rows(best_runs(runs))
    assert (round(best.lr_prefactor, 1), round(best.lr_params_exponent, 3), round(best.lr_r2, 3)) == (30.1, -0.823, 0.817)
    assert (round(best.lr_tokens_exponent, 3), round(best.batch_prefactor, 2), round(best.batch_tokens_exponent, 3)) == (0.288, 3.42, 0.498)
    many = runs[runs["cell"] != "1.07B, 56.9B"]  # 47 runs at five rates alone
    for within, lr, batch in ((0.02, (21.7, -0.725, 0.203, 0.968), (0.405, 0.582)), (0.03, (3.20, -0.643, 0.211, 0.972), (0.288, 0.595))):
        fit = fit_rows(optima(many, within, degree=2))
        assert (fit.lr_prefactor, fit.lr_params_exponent, fit.lr_tokens_exponent, fit.lr_r2) == pytest.approx(lr, rel=3e-3), within
        assert (fit.batch_prefactor, fit.batch_tokens_exponent) == pytest.approx(batch, rel=3e-3), within


@pytest.mark.archive
def test_a_fitted_optimum_a_cell_holds_two_published_exponents_and_not_the_third(runs):
    fit = optimum_fit(runs)
    assert exponents(fit) == [-0.713, 0.218, 0.587]
    assert (round(fit.lr_tokens_exponent_low, 2), round(fit.lr_tokens_exponent_high, 2)) == (0.16, 0.28)
    assert fit.lr_params_exponent_low < -0.713 < fit.lr_params_exponent_high and fit.cells == 17
    assert fit.batch_tokens_exponent_low < 0.571 < fit.batch_tokens_exponent_high


@pytest.mark.archive
def test_the_published_bootstrap_is_the_printed_law(skip_if_not_fetched):
    with skip_if_not_fetched():
        fit = mean_of_bootstraps(published_bootstrap("steplaw"))
    assert (round(fit.lr_prefactor, 3), round(fit.batch_prefactor, 3)) == (1.797, 0.581)
    ends = [fit.lr_params_exponent_low, fit.lr_params_exponent_high, fit.lr_tokens_exponent_low, fit.lr_tokens_exponent_high]
    assert np.round(ends, 3).tolist() == [-0.774, -0.655, 0.271, 0.345]


@pytest.mark.archive
def test_the_sign_of_the_tokens_exponent_depends_on_the_batch(runs):
    rates = fixed_batch_rates(runs)
    table = fixed_batch_exponents(rates).set_index("batch_tokens")
    assert table.loc[131_072, "n"] == 15 and table.loc[131_072, "r2"] > 0.95
    for batch, exponent in {131_072: -0.31, 262_144: -0.16, 393_216: -0.04, 524_288: 0.05, 720_896: 0.17, 1_048_576: 0.18, 1_507_328: 0.24,
                            2_097_152: 0.25}.items():
        assert table.loc[batch, "tokens_exponent"] == pytest.approx(exponent, abs=0.006), batch
    assert table.loc[262_144, "tokens_exponent_high"] < 0 < table.loc[720_896, "tokens_exponent_low"]
    flip = sign_flip(rates, count=300)
    assert 262_144 < flip.batch_tokens_low < flip.batch_tokens < flip.batch_tokens_high < 720_896 and flip.slope_per_octave_low > 0
