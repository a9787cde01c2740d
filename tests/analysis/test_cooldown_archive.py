"""What the published runs of arXiv 2405.18392 say, recomputed; the same functions by hand on made-up runs.

Expected numbers on published runs were computed once from the repository's logs; those the paper prints are named as its own.
"""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.cooldown_archive import (
    RerunNoise,
    arm_names,
    averaged_after_cooldown,
    averaging_pairs,
    averaging_recovery,
    best_over_rates,
    clustered_mean,
    cosine_overshoot,
    fit_line,
    from_reruns,
    length_table,
    overshoot_bins,
    perplexity_line,
    rate_optima,
    rerun_noise,
    shape_table,
    sweep_pairs,
    vertex,
)
from etastar.archives import archive, evaluations

RUN = {"series": "sl", "dataset": "slimpajama", "model": "llama_norm", "params": 123_587_328, "batch_tokens": 102_400, "steps": 1000,
       "schedule": "cosine", "cooldown_fraction": np.nan, "shape": "cosine", "floor": 0.1, "peak_lr": 1e-3, "swa_loss": np.nan}
COOLDOWN = {"series": "ann0.2", "schedule": "wsd", "cooldown_fraction": 0.2, "shape": "linear", "floor": 0.0}
CONSTANT = {"schedule": "constant", "cooldown_fraction": 0.0, "shape": None, "floor": 1.0}


def made_up(*rows):
    frame = pd.DataFrame([RUN | row for row in rows])
    frame["tokens"], frame["run"] = frame["steps"] * frame["batch_tokens"], [f"run{i}" for i in range(len(frame))]
    frame["group"] = frame.drop(columns=["final_loss", "run", "swa_loss", "series"]).astype(str).agg(tuple, axis=1).map(hash)
    return frame


def test_pairs_are_of_one_size_length_dataset_and_of_the_sweep_alone():
    runs = made_up({"final_loss": 3.00}, {"final_loss": 2.99} | COOLDOWN, {"final_loss": 2.5, "series": "cos-10-124m"},
                   {"final_loss": 2.9, "steps": 2000}, {"final_loss": 2.8, "floor": 1e-4}, {"final_loss": 2.7, "dataset": "openwebtext2"},
                   {"final_loss": 2.6} | COOLDOWN | {"shape": "1-sqrt"})
    pairs = sweep_pairs(runs)
    assert pairs[["steps", "cosine", "cooldown"]].values.tolist() == [[1000, 3.00, 2.99]]
    assert pairs["difference"].item() == pytest.approx(-0.01)


def test_averages_are_read_where_the_trunk_passes_the_cosines_end():
    runs = made_up({"final_loss": 3.0, "swa_loss": 2.98}, {"final_loss": 3.05, "steps": 2000} | CONSTANT, {"final_loss": 2.99} | COOLDOWN)
    read = pd.DataFrame({"run": ["run1"] * 3, "step": [500, 1000, 2000], "loss": [3.3, 3.13, 3.05], "swa_loss": [3.2, 3.02, 2.96]})
    pair = averaging_pairs(runs, read).loc[0]
    assert pair[["steps", "cosine", "cosine_averaged", "constant", "averaged"]].tolist() == [1000, 3.0, 2.98, 3.13, 3.02]
    recovery = averaging_recovery(runs, read).loc[0]
    assert recovery[["drop", "recovered", "gap"]].tolist() == pytest.approx([0.14, 0.11 / 0.14, 0.03])


def test_a_lines_intervals_are_clustered():
    x, cluster = np.repeat([1.0, 2.0, 3.0, 4.0], 5), np.repeat([0, 1, 2, 3], 5)
    y = 2 * x + 1 + np.repeat([0.1, -0.1, -0.1, 0.1], 5)  # every cluster errs as one: twenty points are four
    line = fit_line(x, y, cluster)
    assert (line.slope, line.intercept, line.n, line.clusters) == (pytest.approx(2), pytest.approx(1), 20, 4)
    assert line.slope_high - line.slope_low > 3 * 2 * 1.96 * line.slope_se
    assert fit_line(np.log(x), np.log(x), cluster).slope == pytest.approx(perplexity_line(np.log(x), np.log(x), cluster).slope)
    with pytest.raises(ValueError, match="three sizes; got 2"):
        fit_line(x, y, cluster > 1)


def test_a_clustered_mean_by_hand():
    mean = clustered_mean([1.0, 1.2, 2.0, 2.2, 3.0], [0, 0, 1, 1, 2])
    sums = np.array([2.2 - 2 * 1.88, 4.2 - 2 * 1.88, 3 - 1.88])
    assert (mean.value, mean.df, mean.n) == (pytest.approx(1.88), 2, 5) and mean.se == pytest.approx(np.sqrt((sums**2).sum() * 1.5) / 5)
    with pytest.raises(ValueError, match="three sizes"):
        clustered_mean([1.0, 2.0], [0, 1])


def test_rerun_noise_by_hand():
    noise = rerun_noise(made_up({"final_loss": 3.0}, {"final_loss": 3.004}, {"final_loss": 2.0, "peak_lr": 2e-3},
                                {"final_loss": 2.002, "peak_lr": 2e-3}, {"final_loss": 9.0, "peak_lr": 5e-3}))
    assert noise.sd == pytest.approx(np.sqrt((0.004**2 + 0.002**2) / 4)) and noise.pairs == 2 and noise.largest == pytest.approx(0.004)
    with pytest.raises(ValueError, match="run twice"):
        rerun_noise(made_up({"final_loss": 3.0}))


def test_tables_over_rates_average_reruns_leave_out_diverged_runs_and_refuse_edges():
    rates = (5e-4, 1e-3, 2e-3, 4e-3)
    runs = made_up(*({"peak_lr": lr, "final_loss": 3 + 0.1 * (np.log2(lr / 1.2e-3)) ** 2} for lr in rates),
                   {"peak_lr": 8e-3, "final_loss": 7.5}, {"peak_lr": 1e-3, "final_loss": 3.0},
                   *({"peak_lr": lr, "final_loss": 3 + lr} | COOLDOWN for lr in rates),
                   *({"peak_lr": lr, "final_loss": 2.99 + lr} | COOLDOWN | {"shape": "1-sqrt"} for lr in rates[:2]))
    best = best_over_rates(runs, 1000).set_index("arm")
    assert best.index.tolist() == ["20 % 1-sqrt", "20 % linear", "cosine to 10 %"] and best.loc["cosine to 10 %", "rates"] == 4
    assert best.loc["cosine to 10 %", "best_loss"] == pytest.approx((3 + 3 + 0.1 * np.log2(1 / 1.2) ** 2) / 2)
    optima = rate_optima(runs.drop(index=5), 1000).set_index("arm")["best_lr"]
    assert optima["cosine to 10 %"] == pytest.approx(1.2e-3) and np.isnan(optima["20 % linear"])
    assert length_table(runs, 1000).shape == (4, 1) and shape_table(runs)[1000].tolist() == pytest.approx([-0.01, -0.01])
    assert arm_names(made_up({"floor": 5e-5, "final_loss": 3.0})).tolist() == ["cosine to 0 %"]


def test_a_vertex_is_a_parabolas_or_a_cubics_and_refuses_edges():
    rates = 2.0 ** np.array([-13, -11, -10, -9, -8.5])
    parabola = pd.Series(3 + 0.02 * (np.log2(rates) + 9.8) ** 2, index=rates).sample(frac=1, random_state=0)
    for more in (0, -1, 1):
        assert vertex(parabola, more) == pytest.approx((-9.8, 3.0))
    x = np.log2(rates) + 10
    cubic = pd.Series(3 + 0.02 * x**2 - 0.002 * x**3, index=rates)  # least at x = 0; its other stationary point is a maximum
    assert vertex(cubic, -1) == pytest.approx((-10, 3.0)) and vertex(cubic, 1) == pytest.approx((-10, 3.0))
    assert vertex(cubic)[0] == pytest.approx(-10 + 0.001 / 0.02)  # −0.002·x³ is −0.002·x at x = ±1
    assert np.isnan(vertex(parabola.drop([rates[3], rates[4]]), 1)).all() and np.isnan(vertex(parabola[parabola.index < 2**-10])).all()


def test_rerun_noise_goes_through_a_contrast_by_its_coefficients_and_reruns():
    table = pd.DataFrame({"steps": 1, "arm": ["a", "a", "b"], "peak_lr": [1.0, 2.0, 1.0], "loss": [3.0, 2.5, 2.0], "runs": [2, 1, 1]})
    noise = RerunNoise(0.01, 18, 0.03)
    found = from_reruns(lambda losses: 3 * losses[1, "a", 1.0] - losses[1, "b", 1.0], table, noise)
    assert (found.value, found.df, found.n, found.unit) == (pytest.approx(7.0), 18, 1, "nats")
    assert found.se == pytest.approx(0.01 * np.sqrt(9 / 2 + 1))
    ratio = from_reruns(lambda losses: losses[1, "a", 1.0] / losses[1, "b", 1.0], table, noise, "token_fraction")
    assert ratio.se == pytest.approx(0.01 * np.sqrt(0.25 / 2 + 0.75**2)) and ratio.unit == "token_fraction"


def test_averages_after_a_cooldown_are_those_that_were_logged():
    runs = made_up({"final_loss": 3.0, "swa_loss": 3.1} | COOLDOWN, {"final_loss": 3.0} | COOLDOWN | {"steps": 2000},
                   {"final_loss": 3.0, "swa_loss": 2.9})
    assert averaged_after_cooldown(runs)[["steps", "difference"]].values.tolist() == [[1000, pytest.approx(0.1)]]


def test_overshoot_by_hand():
    runs = made_up({"final_loss": 3.0}, {"final_loss": 2.8, "steps": 2000}, {"final_loss": 2.9, "steps": 1200, "peak_lr": 2e-3})
    read = pd.DataFrame({"run": ["run0", "run1", "run1", "run2"], "step": [1000, 1000, 2000, 1000], "loss": [3.0, 3.07, 2.8, 3.1],
                         "swa_loss": [np.nan, 3.01, np.nan, np.nan]})
    table = cosine_overshoot(runs, read)
    assert table[["steps", "cycle_steps", "ratio"]].values.tolist() == [[1000, 2000, 2.0]]
    assert table[["penalty", "averaged_penalty"]].values.tolist()[0] == pytest.approx([0.07, 0.01])
    assert overshoot_bins(table)["n"].tolist() == [0, 0, 1, 0]


@pytest.fixture(scope="module")
def published(skip_if_not_fetched):
    with skip_if_not_fetched():
        runs = archive("haegele")
    lacking = [p for p in runs.attrs["missing"] if "_slimpajama_llama" in p]
    if lacking:
        pytest.skip(f"{len(lacking)} published runs on SlimPajama are missing here; run `etastar fetch archives haegele`")
    return runs, evaluations("haegele")


@pytest.mark.archive
def test_cosine_equals_cooldown_on_the_diagonal(published):
    pairs = sweep_pairs(published[0])
    line = perplexity_line(pairs["cooldown"], pairs["cosine"], pairs["params"])
    assert (line.n, line.clusters) == (16, 8)
    assert (round(line.slope, 3), round(line.slope_se, 3), round(line.intercept, 3), round(line.r2, 4)) == (0.991, 0.004, 0.226, 0.9998)
    assert round(line.slope, 2) == 0.99 and round(line.intercept, 2) == 0.23  # arXiv 2405.18392's own fit
    assert line.slope_low < 1 < line.slope_high  # clustered by size, a slope of 1 is not excluded


@pytest.mark.archive
def test_averaging_a_constant_run_lies_on_a_line_beside_the_cosine(published):
    pairs = averaging_pairs(*published)
    line = perplexity_line(pairs["averaged"], pairs["cosine"], pairs["params"])
    assert (line.n, round(line.slope, 3), round(line.intercept, 3)) == (24, 0.993, -0.321)  # arXiv 2405.18392: 0.99x − 0.30
    gap = pairs["averaged"] - pairs["cosine"]
    assert (round(gap.mean(), 4), round(gap.min(), 4), round(gap.max(), 4)) == (0.0221, 0.0122, 0.0369)
    assert round((pairs["cosine_averaged"] - pairs["cosine"]).mean(), 4) == -0.0144
    recovered = averaging_recovery(*published)["recovered"]
    assert (round(recovered.min(), 2), round(recovered.max(), 2)) == (0.72, 0.88)


@pytest.mark.archive
def test_the_mean_difference_is_nought_within_its_error(published):
    pairs = sweep_pairs(published[0])
    mean = clustered_mean(pairs["difference"], pairs["params"])
    assert round(mean.value, 4) == -0.0009 and round(pairs["difference"].abs().max(), 4) == 0.0082
    assert mean.interval()[0] < 0 < mean.interval()[1] and mean.p_outside(-0.011, 0.011) < 0.001


@pytest.mark.archive
def test_best_over_rates_at_124m_depends_on_the_cosines_floor(published):
    best = best_over_rates(published[0], 50_000).set_index("arm")["best_loss"]
    for arm, loss in {"cosine to 10 %": 2.9819, "20 % linear": 2.9668, "20 % 1-sqrt": 2.9607, "cosine to 0 %": 2.9543,
                      "99.4 % linear": 2.9535, "60 % linear": 2.9513}.items():
        assert best[arm] == pytest.approx(loss, abs=1e-4), arm
    assert best.index[0] == "60 % linear"


@pytest.mark.archive
def test_best_rates_by_schedule(published):
    at_50k, at_25k = (rate_optima(published[0], steps).set_index("arm")["best_lr"] for steps in (50_000, 25_000))
    for arm, rate in {"cosine to 10 %": 0.99e-3, "10 % linear": 0.79e-3, "20 % linear": 0.97e-3, "20 % 1-sqrt": 1.17e-3,
                      "60 % linear": 1.46e-3, "cosine to 0 %": 1.62e-3, "constant": 0.29e-3}.items():
        assert at_50k[arm] == pytest.approx(rate, abs=0.006e-3), arm
    assert at_25k["cosine to 10 %"] / at_25k["20 % linear"] == pytest.approx(1.31, abs=0.01)
    assert np.isnan(at_25k["cosine to 0 %"])  # beyond the grid, not extrapolated


@pytest.mark.archive
def test_lengths_and_shapes(published):
    lengths = length_table(published[0], 25_000).loc[1e-3]
    assert lengths.round(4).to_dict() == {0.1: 3.0541, 0.2: 3.0378, 0.4: 3.0274, 0.6: 3.0275, 0.8: 3.0318, 0.9: 3.0358}
    assert length_table(published[0], 50_000).idxmin(axis=1).loc[[5e-4, 1e-3, 2e-3]].tolist() == [0.4, 0.6, 0.6]
    shapes = shape_table(published[0])
    assert shapes[50_000].round(4).tolist() == [0.0022, -0.0034, -0.0062, -0.0097, -0.0122]
    assert shapes.loc[1e-4].min() > 0 > shapes.loc[5e-4:].max().max()  # the order turns round at a very low rate


@pytest.mark.archive
def test_reruns_differ_by_a_thousandth(published):
    runs = published[0]
    noise = rerun_noise(runs[runs["series"] != "ann0.2"])
    assert (noise.pairs, round(noise.sd, 4), round(noise.largest, 4)) == (18, 0.0012, 0.0038)
    every = rerun_noise(runs)  # with the two cooldowns that the sweep and the grid have both
    assert (every.pairs, round(every.sd, 4)) == (20, 0.0011)
    assert runs["seed"].nunique() == runs["data_seed"].nunique() == 1


@pytest.mark.archive
def test_a_cosine_cut_off_early_pays_and_averaging_pays_it_back(published):
    table = cosine_overshoot(*published).query("dataset == 'slimpajama'")
    assert len(table) == 24 and (table["penalty"] > 0).all()
    bins = overshoot_bins(table)
    assert bins["n"].tolist() == [2, 9, 8, 5] and bins["penalty"].round(3).tolist() == [0.016, 0.034, 0.065, 0.084]
    assert table["averaged_penalty"].between(-0.017, 0.009).all()


@pytest.mark.archive
def test_averaging_after_a_cooldown_makes_it_worse(published):
    assert averaged_after_cooldown(published[0])["difference"].round(4).tolist() == [0.0072, 0.0061, 0.0054]
