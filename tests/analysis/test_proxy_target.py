"""Rates for large models from small ones: on grids whose rule is known, who finds it, at what cost, and who cannot."""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis import proxy_target as ways

pytestmark = pytest.mark.filterwarnings("ignore:steplaw. params=:UserWarning")  # sizes beyond the range of its fit

SIZES, HORIZONS, RATES = (2e8, 4e8, 8e8, 1.6e9), (4e9, 1.6e10, 6.4e10), 2.0 ** np.arange(-16, -5.9, 0.5)
BATCHES = (2**17, 2**18)


def best_rate(n, d, batch, size=-0.5, horizon=-0.3):
    return 2**-10 * (n / 4e8) ** size * (d / 1.6e10) ** horizon * (batch / 2**17) ** 0.5


def grid(size=-0.5, horizon=-0.3, bend=0.02):
    """(rates, runs) of four sizes at three horizons and two batches."""
    rates, runs = [], []
    for n in SIZES:
        for d in HORIZONS:
            for batch in BATCHES:
                best, key = best_rate(n, d, batch, size, horizon), {"cell": f"{n:g}, {d:g}", "params": n, "horizon_tokens": d,
                                                                    "batch_tokens": batch}
                rates.append(key | {"peak_lr": best})
                runs.append(pd.DataFrame({"peak_lr": RATES, "smooth_loss": 2.5 + bend * np.log2(RATES / best) ** 2}).assign(**key))
    return pd.DataFrame(rates), pd.concat(runs, ignore_index=True)


@pytest.fixture(scope="module")
def table():
    return ways.head_to_head(*grid())


def at(table, way, target="1.6e+09, 6.4e+10", ratio=4, batch=2**17):
    return table.query("way == @way and cell == @target and ratio == @ratio and batch_tokens == @batch").iloc[0]


def test_a_fitted_rule_finds_a_power_law_and_a_kept_rate_is_off_by_it(table):
    fitted, kept = at(table, ways.FITTED), at(table, ways.KEPT)
    assert fitted["error_octaves"] == pytest.approx(0, abs=1e-9) and fitted["excess"] == pytest.approx(0, abs=1e-12)
    assert kept["error_octaves"] == pytest.approx(1) and kept["miss_octaves"] == pytest.approx(1)  # −0.5 · log2 4, the horizon is the same
    loss, least = (np.interp(np.log2(r), np.log2(RATES), 2.5 + 0.02 * np.log2(RATES / best_rate(1.6e9, 6.4e10, 2**17)) ** 2)
                   for r in (kept["peak_lr"], best_rate(1.6e9, 6.4e10, 2**17)))
    assert kept["excess"] == pytest.approx(loss / least - 1) and kept["excess"] > 0.006


def test_printed_exponents_move_the_anchors_rate_by_their_own_powers(table):
    kept = at(table, ways.KEPT)["error_octaves"]
    for way, size in ((ways.BY_FITTING, -0.2219), ("Bjorck's exponents", -0.23), ("Step Law's exponents", -0.713)):
        assert at(table, way)["error_octaves"] == pytest.approx(kept + 2 * size), way
    shorter = at(ways.head_to_head(*without(*grid(), params=4e8, horizon_tokens=6.4e10)), ways.BY_FITTING)  # the anchor is at 16B
    assert shorter["error_octaves"] == pytest.approx(1 + 0.3 * 2 - 0.2219 * 2 - 0.3509 * 2)
    printed = 1.79 * 1.6e9**-0.713 * 6.4e10**0.307
    assert at(table, ways.PRINTED)["peak_lr"] == pytest.approx(printed)


def without(rates, runs, **key):
    def kept(frame):
        return frame[~np.logical_and.reduce([frame[name] == value for name, value in key.items()])]

    return kept(rates), kept(runs)


def test_no_rule_sees_the_target_or_a_size_above_the_proxy():
    rates, runs = grid()
    spoilt = rates.assign(peak_lr=rates["peak_lr"].where(rates["params"] < 8e8, rates["peak_lr"] * 4))
    before, after = (at(ways.head_to_head(r, runs), ways.FITTED) for r in (rates, spoilt))
    assert before["peak_lr"] == after["peak_lr"]


def test_the_anchor_is_the_longest_horizon_not_beyond_the_targets():
    found = ways.head_to_head(*grid())
    for target, horizon in (("1.6e+09, 4e+09", 4e9), ("1.6e+09, 1.6e+10", 1.6e10), ("1.6e+09, 6.4e+10", 6.4e10)):
        assert at(found, ways.KEPT, target)["peak_lr"] == pytest.approx(best_rate(4e8, horizon, 2**17))
    # and a target shorter than every horizon of a proxy has none there
    rates, runs = without(*grid(), params=2e8, horizon_tokens=4e9)
    short = ways.head_to_head(rates, runs).query("cell == '1.6e+09, 4e+09'")
    assert sorted(short["ratio"].unique()) == [2, 4]


def test_flops_are_those_of_the_runs_searched(table):
    run = 6 * 4e8 * 6.4e10
    kept, fitted = at(table, ways.KEPT), at(table, ways.FITTED)
    assert kept["flops"] == pytest.approx(len(RATES) * run) and kept["target_runs"] == pytest.approx(len(RATES) / 4)
    assert fitted["flops"] == pytest.approx(len(RATES) * 6 * (2e8 + 4e8) * sum(HORIZONS))
    assert at(table, ways.PRINTED)["flops"] == 0
    best = ways.head_to_head(*one_batch_a_cell())
    assert at(best, ways.KEPT)["flops"] == pytest.approx(2 * len(RATES) * run)  # its cell's batches were all needed to know the best


def one_batch_a_cell():
    rates, runs = grid()
    return rates[rates["batch_tokens"] == 2**17], runs


def test_at_equal_flops_the_rule_is_fitted_to_the_cheapest_cells_that_the_anchor_pays_for(table):
    equal = at(table, ways.FITTED_EQUAL)  # 25.6e18 (N · D) a rate pay for these five cells, not for the anchor too
    assert equal["flops"] == pytest.approx(len(RATES) * 6 * (0.8e18 + 1.6e18 + 3.2e18 + 6.4e18 + 12.8e18))
    assert equal["error_octaves"] == pytest.approx(0, abs=1e-9)
    both = table[table["way"].isin([ways.KEPT, ways.FITTED_EQUAL])].pivot(index=["cell", "batch_tokens", "ratio"], columns="way",
                                                                          values="flops").dropna()
    assert len(both) and (both[ways.FITTED_EQUAL] <= both[ways.KEPT]).all()
    assert "1.6e+09, 4e+09" not in set(table.loc[table["way"] == ways.FITTED_EQUAL, "cell"])  # its anchors buy too little
    assert not ((table["way"] == ways.FITTED) & (table["proxy_params"] == 2e8)).any()  # one size has no exponent in size


def test_the_difference_is_over_targets_at_the_proxy_nearest_to_half_their_size(table):
    found = ways.difference(table, ways.KEPT, ways.FITTED, "error_octaves")
    assert found.value == pytest.approx(0.5) and (found.n, found.df, found.unit) == (6, 5, "octaves")  # 0.8B and 1.6B, three horizons each
    loss = ways.difference(table, ways.FITTED, ways.KEPT)
    assert loss.unit == "loss_fraction" and loss.value < 0
    with pytest.raises(ValueError, match="0 targets have both"):
        ways.difference(table, ways.KEPT, ways.FITTED, least_ratio=8)


def test_the_slope_over_the_ratio_is_that_of_the_size_exponent(table):
    slopes = ways.ratio_slopes(table, "error_octaves").set_index("way")["slope"]
    assert slopes[ways.KEPT] == pytest.approx(0.5) and slopes[ways.BY_FITTING] == pytest.approx(0.5 - 0.2219)
    hard = table.assign(error_octaves=table["error_octaves"] + np.log2(table["params"]))  # targets that are all off by their size
    again = ways.ratio_slopes(hard, "error_octaves").set_index("way")
    assert again["slope"].to_dict() == pytest.approx(slopes.to_dict()) and again.loc[ways.KEPT, "targets"] == 6
    assert not {ways.PRINTED, ways.FITTED} & set(slopes.index)  # the fitted rule has two ratios at three targets alone


def test_means_by_ratio_count_targets_once_whatever_their_batches(table):
    means = ways.by_ratio(table).set_index(["way", "ratio"])
    assert means.loc[(ways.KEPT, 2.0), "targets"] == 9 and means.loc[(ways.KEPT, 8.0), "targets"] == 3
    assert means.loc[(ways.KEPT, 8.0), "miss_octaves"] == pytest.approx(1.5)


def test_a_rate_beyond_the_runs_is_read_at_their_edge_and_said_to_be():
    rates, runs = grid()
    narrow = runs[(runs["params"] < 1.6e9) | (runs["peak_lr"] < 2**-11)]
    found = ways.head_to_head(rates, narrow)
    assert at(found, ways.KEPT)["clipped"] and not at(found, ways.FITTED)["clipped"]


def test_frames_without_a_smaller_size_or_without_their_runs_are_refused():
    rates, runs = grid()
    with pytest.raises(ValueError, match="no target has a smaller size"):
        ways.head_to_head(rates[rates["params"] == 2e8], runs)
    with pytest.raises(ValueError, match=r"no runs of cell 2e\+08, 4e\+09"):
        ways.head_to_head(rates, runs[runs["cell"] != "2e+08, 4e+09"])
