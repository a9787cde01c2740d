import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart
from marks import legend, notes, title, xy

from etastar.plots.mup_published import rates_and_rules, ratio_lines

LAWS = {"fitting": {"size": -0.22, "horizon": -0.35}, "steplaw": {"size": -0.71, "horizon": 0.31}}


def _cells(size=-0.5, horizon=-0.3):
    n, d = (a.ravel() for a in np.meshgrid((2e8, 4e8, 8e8), (4e9, 1.6e10, 6.4e10), indexing="ij"))
    return pd.DataFrame({"cell": range(9), "params": n, "horizon_tokens": d,
                         "peak_lr": 2**-10 * (n / 4e8) ** size * (d / 1.6e10) ** horizon})


def _pairs():
    rows = [(way, f"{target:g}, {d:g}", batch, ratio, miss * np.log2(ratio), loss * np.log2(ratio), flops)
            for way, miss, loss, flops in (("kept", 0.5, 0.004, 1e20), ("fitted", 0.1, -0.0002, 1e22), ("printed", 0.3, 0.001, 0))
            for target, ratios in ((4e8, (2,)), (8e8, (2, 4))) for ratio in ratios for d in (1e10, 4e10) for batch in (2**17, 2**18)]
    return pd.DataFrame(rows, columns="way cell batch_tokens ratio miss_octaves excess flops".split())


@pytest.fixture(scope="module")
def rates():
    return rates_and_rules({"131k tokens a step": _cells(), "best batch": _cells(-0.7, 0.2)}, LAWS)


@pytest.fixture(scope="module")
def ratios():
    return ratio_lines(_pairs())


def _line(ax, start):
    return next(line for line in ax.get_lines() if line.get_label().startswith(start))


def _marked(ax):
    return [xy(line) for line in ax.get_lines() if line.get_marker() not in ("None", "") and len(line.get_xdata())]


def test_no_text_is_cut_or_covered(rates, ratios):
    one = rates_and_rules({"one": _cells()}, {})
    for fig in (rates, ratios, one, ratio_lines(_pairs(), ["kept"])):
        assert_text_is_whole_and_apart(fig)


def test_lines_of_laws_have_their_slopes_and_pass_through_the_mean_of_the_logs(rates):
    for row, own in ((0, (-0.3, -0.5)), (1, (0.2, -0.7))):
        for ax, middle, which, slope in ((rates.axes[2 * row], 1.6e10, "horizon", own[0]), (rates.axes[2 * row + 1], 4e8, "size", own[1])):
            for name, told in {"least squares": slope, "Fitting": LAWS["fitting"][which], "Step Law": LAWS["steplaw"][which]}.items():
                (x0, x1), (y0, y1) = xy(_line(ax, name))
                assert np.log(y1 / y0) / np.log(x1 / x0) == pytest.approx(told)
                assert np.log2(y0) + told * np.log2(middle / x0) == pytest.approx(-10)


def test_rates_stand_over_tokens_as_they_are_and_over_size_at_one_horizon(rates):
    left, right = rates.axes[:2]
    lines = _marked(left)
    assert [len(x) for x, _ in lines] == [3, 3, 3] and lines[0][0].tolist() == [4e9, 1.6e10, 6.4e10]
    assert np.log2(lines[0][1]) == pytest.approx([-10 + 0.5 + 0.6, -9.5, -9.5 - 0.6])
    for (x, y), n in zip(_marked(right), (2e8, 4e8, 8e8), strict=True):
        assert set(x) == {n} and np.log2(y) == pytest.approx([-10 - 0.5 * np.log2(n / 4e8)] * 3)  # their horizons' part is gone
    assert [title(ax) for ax in rates.axes[::2]] == ["131k tokens a step", "best batch"]
    assert legend(rates)[:3] == ["least squares", "Fitting: $N^{-0.22} D^{-0.35}$", "Step Law: $N^{-0.71} D^{0.31}$"]
    assert legend(rates)[3:] == ["200M", "400M", "800M"] and "mean of the logs" in notes(rates)


def test_means_over_targets_join_the_ratios_and_ways_without_a_search_are_left_out(ratios):
    octaves, permil = ratios.axes
    assert legend(ratios) == ["kept", "fitted"] and "mean over targets" in notes(ratios)
    x, y = xy(_line(octaves, "kept"))
    assert np.log2(x) == pytest.approx([1, 2], abs=0.05) and y == pytest.approx([0.5, 1])
    assert xy(_line(permil, "kept"))[1] == pytest.approx([4, 8]) and xy(_line(permil, "fitted"))[1] == pytest.approx([-0.2, -0.4])
    faint = [xy(line) for line in octaves.get_lines() if line.get_alpha() == 0.18]
    assert [len(x) for x, _ in faint] == [12, 12]
    assert legend(ratio_lines(_pairs(), ["printed"])) == ["printed"]


def test_a_target_of_many_batches_counts_once_in_a_mean():
    more = pd.concat([_pairs(), _pairs().query("cell == '4e+08, 1e+10'").assign(batch_tokens=2**19, miss_octaves=9.5)])
    y = xy(_line(ratio_lines(more).axes[0], "kept"))[1]
    assert y[0] == pytest.approx((3 * 0.5 + (2 * 0.5 + 2 * 9.5) / 4) / 4)


def test_frames_without_their_columns_or_rows_are_refused():
    with pytest.raises(ValueError, match="no column 'peak_lr'"):
        rates_and_rules({"one": _cells().drop(columns="peak_lr")}, LAWS)
    with pytest.raises(ValueError, match="no frames of best rates"):
        rates_and_rules({}, LAWS)
    with pytest.raises(ValueError, match="no column 'ratio'"):
        ratio_lines(_pairs().drop(columns="ratio"))
    with pytest.raises(ValueError, match="no ways that searched"):
        ratio_lines(_pairs().query("way == 'printed'"))
