"""Deviations with chi-square intervals, by what varies; pairing; pooling of near cells. Known noise is drawn and must come back."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from etastar.analysis.noise_atlas import by_source, deviation, deviation_near, noise_table, pair_table, with_relative_rates

SDS = {"seed": 0.01, "order": 0.02}  # of the losses that `drawn` makes
BASE = {"setting": "s", "arm": "a", "width": 32, "horizon_tokens": 2**17, "peak_lr": 0.01, "execution": "whole"}


def drawn(rng, seeds=40, best=-6.0, rates=(-7, -6, -5), rerun=0.001, shared=True):
    """Crossed as the study does it: about a base the parameters' seed, the order's, and both, at three rates."""
    by_seed, by_order = rng.normal(0, SDS["seed"], seeds), rng.normal(0, SDS["order"], seeds)
    rows = []
    for x in rates:
        if not shared:
            by_seed, by_order = rng.normal(0, SDS["seed"], seeds), rng.normal(0, SDS["order"], seeds)
        pairs = [(0, 0), *((i, 0) for i in range(1, seeds)), *((0, i) for i in range(1, seeds)), *((i, i) for i in range(1, seeds))]
        rows += [BASE | {"setting": f"s{x}", "peak_lr": 2.0**x, "seed": i, "data_seed": j,
                         "loss": 4 + 0.05 * (x - best) ** 2 + by_seed[i] + by_order[j]} for i, j in pairs]
    again = [BASE | {"setting": "s-6", "peak_lr": 2.0**-6, "seed": 0, "data_seed": 0, "execution": f"parts {i}",
                     "loss": 4 + by_seed[0] + by_order[0] + rng.normal(0, rerun)} for i in range(30)]
    return pd.DataFrame(rows + again)


def test_a_deviations_interval_is_the_chi_squares():
    told = deviation(0.01, 3)
    assert (told.sd_low, told.sd_high) == pytest.approx((0.01 * math.sqrt(3 / 9.348404), 0.01 * math.sqrt(3 / 0.2157953)), rel=1e-6)
    assert deviation(0.01, 3, level=0.5).sd_high < told.sd_high and deviation(0.0, 5).sd_high == 0
    assert deviation(0.01, 0).sd_high == math.inf


def test_the_interval_covers_the_truth_as_often_as_it_says():
    entropy = np.random.SeedSequence().entropy
    sample = np.random.default_rng(entropy).normal(0, 0.02, (4000, 4)).std(axis=1, ddof=1)
    covered = np.mean([d.sd_low <= 0.02 <= d.sd_high for d in (deviation(s, 3) for s in sample)])
    assert covered == pytest.approx(0.95, abs=4.5 * math.sqrt(0.95 * 0.05 / 4000)), f"seed {entropy}"


def test_known_noise_comes_back_by_source():
    entropy = np.random.SeedSequence().entropy
    table = noise_table(drawn(np.random.default_rng(entropy)))
    assert list(table["source"].unique()) == ["both", "order", "rerun", "seed"] and len(table) == 3 * 3 + 1
    truth = SDS | {"both": math.hypot(*SDS.values()), "rerun": 0.001}
    for row in table.itertuples():
        wide = truth[row.source] * np.sqrt(stats.chi2.ppf([1e-6, 1 - 1e-6], row.df) / row.df)
        assert wide[0] < row.sd < wide[1] and row.sd_low < row.sd < row.sd_high, f"seed {entropy}: {row}"
    assert table.set_index("source").loc["rerun", "df"] == 30 and (table.loc[table.source == "order", "df"] == 39).all()


def test_sources_are_read_off_the_seeds_that_vary():
    rows = [BASE | {"seed": s, "data_seed": d, "loss": 4.0 + i} for i, (s, d) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (5, 7)])]
    found = by_source(pd.DataFrame(rows)).groupby("source")["loss"].apply(sorted).to_dict()
    # data_seed 1 shows the same two seeds as data_seed 0 again; the run with both its own is in no group
    assert found == {"seed": [4, 5], "order": [4, 6], "both": [4, 7]}
    with pytest.raises(ValueError, match="no two runs differ"):
        by_source(pd.DataFrame(rows[4:]))


def test_a_groups_own_mean_is_taken_off_before_groups_are_pooled():
    rows = [BASE | {"seed": s, "data_seed": s, "execution": way, "loss": 4 + s + way / 100} for s in (0, 1) for way in (0, 1, 2)]
    table = noise_table(pd.DataFrame(rows)).set_index("source")
    assert table.loc["rerun", ["sd", "df"]].tolist() == pytest.approx([0.01, 4])  # not the nat between the two seeds
    assert table.loc["both", ["sd", "df"]].tolist() == pytest.approx([math.sqrt(0.5), 1])


def test_diverged_runs_are_counted_and_left_out():
    rows = [BASE | {"seed": s, "data_seed": s, "loss": loss} for s, loss in enumerate([4.0, 4.2, np.nan])]
    row = noise_table(pd.DataFrame(rows)).iloc[0]
    assert (row.n, row.diverged, row.df) == (2, 1, 1) and row.sd == pytest.approx(0.2 / math.sqrt(2))


def test_rates_are_told_in_units_of_the_bowls_vertex_or_of_the_nearest():
    runs = drawn(np.random.default_rng(1), seeds=6, best=-6.25)
    lone = pd.DataFrame([BASE | {"setting": "long", "horizon_tokens": 2**18, "peak_lr": 2.0**-6, "seed": i, "data_seed": i, "loss": 3.9 + i}
                         for i in range(2)])
    told = with_relative_rates(pd.concat([runs, lone], ignore_index=True))
    own, other = told[told.setting == "s-6"].iloc[0], told[told.setting == "long"].iloc[0]
    assert own.relative_lr == pytest.approx(2**0.25, rel=1e-6) and (own.reference, other.reference) == ("own bowl", "nearest bowl")
    assert other.relative_lr == own.relative_lr
    alone = with_relative_rates(lone).iloc[0]
    assert alone.reference == "middle of the rates" and alone.relative_lr == pytest.approx(1)


def test_pairing_gains_what_seeds_share():
    rng = np.random.default_rng(4)
    shared, apart = (pair_table(drawn(rng, seeds=60, shared=s)) for s in (True, False))
    assert len(shared) == 3 and shared["correlation"].min() > 0.999 and shared["sd"].max() < 1e-9
    assert apart["correlation"].abs().max() < 0.5 and (apart["sd"] > 0.6 * apart["independent_sd"]).all()
    assert (apart["correlation_low"] < 0).all() and (apart["correlation_high"] > 0).all()
    assert sorted(apart["octaves_apart"]) == pytest.approx([1, 1, 2]) and (apart["n"] == 60).all()


def test_near_cells_are_pooled_and_the_nearest_counts_most():
    table = pd.DataFrame({"source": "both", "width": 32, "horizon_tokens": [2**17, 2**19], "relative_lr": 1.0, "sd": [0.01, 0.03],
                          "df": 3.0})
    at_short = deviation_near(table, 32, 2**17, 1.0)
    assert at_short.sd == pytest.approx(math.sqrt((0.01**2 + 0.25 * 0.03**2) / 1.25))
    cells = 1.25**2 / (1 + 0.25**2)
    assert at_short.df == pytest.approx(3 * cells / (1 + (cells - 1) * 0.25))
    assert deviation_near(table, 32, 2**18, 1.0).sd == pytest.approx(math.sqrt((0.01**2 + 0.03**2) / 2))
    assert deviation_near(table, 32, 2**17, 2.0).sd == pytest.approx(at_short.sd)  # as far from both in rate
    lone = deviation_near(table[:1], 64, 2**18, 1.0)
    assert (lone.sd, lone.df) == pytest.approx((0.01, 3))


@pytest.mark.parametrize("call, said", [
    (lambda t: deviation_near(t, 32, 2**22, 1.0), "of width 32, 4,194,304 tokens.*nearest: width 32, horizon_tokens 131072"),
    (lambda t: deviation_near(t, 32, 2**17, 0.0), "relative_lr=0.0"), (lambda t: deviation_near(t[:0], 32, 2**17, 1.0), "there is none"),
    (lambda t: deviation_near(pd.concat([t, t.assign(source="seed")]), 32, 2**17, 1.0), "variances of both, seed are not pooled"),
    (lambda t: with_relative_rates(t), "no column 'setting', 'arm'"),
    (lambda t: with_relative_rates(drawn(np.random.default_rng(0), seeds=2).assign(peak_lr=-0.1)), "must be positive"),
])
def test_what_is_too_far_or_makes_no_sense_is_refused(call, said):
    table = pd.DataFrame({"source": "both", "width": 32, "horizon_tokens": [2**17], "relative_lr": 1.0, "sd": [0.01], "df": 3.0})
    with pytest.raises(ValueError, match=said):
        call(table)
