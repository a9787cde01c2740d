import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart, text_boxes
from marks import bare, crosses, faint, joined, legend, notes, only, segments, xy
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from scipy import stats

from etastar import plots

BASE, TOKENS = 16, 2**15
CELL = ["scaling", "kind", "width", "depth", "horizon_tokens"]
RATES = [0.75 * k for k in range(-2, 3)]  # octaves about the valley
SEEDS = (0, 1, 2)
MIXTURE = "4 experts top 2"


def _arms():
    """What a preset trains: (scaling, kind, width, depth, tokens) → log2 best rate."""
    best = {("sp", "", w, 2, TOKENS): -6 - 0.8 * np.log2(w / BASE) for w in (8, 16, 32, 64, 128)}
    best |= {("mup", "", w, 2, TOKENS): -6 + 0.1 * np.log2(w / BASE) for w in (32, 64, 128)}
    best |= {("sp", "", BASE, 2, t): -6 - 0.3 * np.log2(t / TOKENS) for t in (2**16, 2**17, 2**18)} | {("sp", "", 8, 2, 2**16): -5.5}
    best |= {("sp", "", 64, 2, t): -7.6 - 0.3 * np.log2(t / TOKENS) for t in (2**17, 2**18)}
    best |= {("mup", "", 64, 2, t): -5.8 - 0.25 * np.log2(t / TOKENS) for t in (2**17, 2**18)}
    best |= {(rule, "", BASE, d, TOKENS): -6 + slope * np.log2(d / 2) for d in (2, 8, 32)
             for rule, slope in (("completep", 0.05), ("alpha 0.5", -0.2), ("alpha 0", -0.5), ("sp", -0.4)) if (rule, d) != ("sp", 2)}
    best |= {("sp", MIXTURE, BASE, 2, TOKENS): -5.7, ("sp", MIXTURE, 64, 2, TOKENS): -7.1, ("mup", MIXTURE, 64, 2, TOKENS): -5.5}
    best |= {("sp", "16 experts top 2", BASE, 2, TOKENS): -5.4, ("mup", "16 experts top 8", 32, 2, TOKENS): -5.1}
    return best | {("sp", "decay 0.3", BASE, 2, TOKENS): -5.9, ("mup", "decay 0.3, coupled", 64, 2, TOKENS): -6.9}


def _level(width, tokens):
    return 3.4 - 0.12 * np.log2(width / 8) - 0.1 * np.log2(tokens / TOKENS)


def _runs(arms=None, seeds=SEEDS):
    """Parabolas about each arm's valley; at the largest rate of SP's widest model one seed diverges."""
    rows = [(*arm, 2.0 ** (round(best / 0.75) * 0.75 + x), seed,
             _level(arm[2], arm[4]) + 0.05 * (round(best / 0.75) * 0.75 + x - best) ** 2 + 0.01 * (seed - 1))
            for arm, best in (arms or _arms()).items() for x in RATES for seed in seeds]
    frame = pd.DataFrame(rows, columns=[*CELL, "peak_lr", "seed", "loss"])
    widest = (frame["scaling"] == "sp") & (frame["width"] == 128)
    frame.loc[widest & (frame["seed"] == 1) & (frame["peak_lr"] == frame["peak_lr"][widest].max()), "loss"] = np.nan
    return frame.assign(arm=[f"{s}, {w}×{d}" for s, w, d in zip(frame["scaling"], frame["width"], frame["depth"], strict=True)])


def _cells(arms=None, half=0.2):
    """A cell's interval reaches a tenth of an octave farther up than down."""
    rows = [(*arm, 2.0**best, 2.0 ** (best - half), 2.0 ** (best + half + 0.1), _level(arm[2], arm[4]))
            for arm, best in (arms or _arms()).items()]
    return pd.DataFrame(rows, columns=[*CELL, "best_lr", "low", "high", "best_loss"])


def _drifts():
    rows = [("mup: drift over width", 0.12, -0.3, 0.54, 4), ("sp: drift over width", -2.4, -2.9, -1.9, 4),
            ("completep: drift over depth", 0.05, -0.2, 0.3, 3), ("alpha 0.5: drift over depth", -0.6, -1.4, 0.2, 3),
            ("sp − mup: drift over width", -2.52, -3.1, -1.94, 4), ("mixture, sp − mup: drift over width", -1.6, np.nan, np.nan, 1),
            ("mixture, mup: drift over experts", 0.3, -9.0, 9.6, 2)]
    return pd.DataFrame(rows, columns="drift octaves low high seeds".split())


METHODS = {"fitted": ("sp", 0.3), "fitted, at transfer's FLOPs": ("sp", 0.5), "fitted by losses (eq. 4)": ("sp", -0.6),
           "published exponents": ("sp", -0.9), "base's rate kept, SP": ("sp", 2.5), "transferred": ("mup", -0.2),
           "transferred, published horizon rule": ("mup", -0.4), "transferred, no horizon rule": ("mup", 0.75)}


def _target(methods=None, seeds=SEEDS):
    rows = []
    for method, (scaling, octaves) in (methods or METHODS).items():
        best = _arms()[scaling, "", 64, 2, 2**18]
        for seed in seeds:
            off = octaves + 0.05 * (seed - 1)
            rows.append((method, scaling, seed, best + off, off, _level(64, 2**18) + 0.05 * off**2 + 0.01 * (seed - 1), 0.05 * off**2))
    return pd.DataFrame(rows, columns="method parametrization seed log2_lr octaves loss regret".split())


def _ratios(ratios=(2.1, 4.6, 10.9), seeds=SEEDS):
    rows = []
    for i, ratio in enumerate(ratios):
        for method, (scaling, _) in METHODS.items():
            regret = {"fitted": 0.002, "transferred": 0.004, "base's rate kept, SP": 0.02}.get(method, 0.01) * (1 + i)
            rows += [(method, scaling, seed, ratio, regret + 0.001 * seed, 3 - 0.1 * i + regret + 0.001 * seed * (1 + (scaling == "sp")))
                     for seed in seeds]
    return pd.DataFrame(rows, columns="method parametrization seed ratio regret loss".split())


def _steady(widths=(32, 64, 128), kinds=("", "QK-norm", "z-loss"), seeds=SEEDS):
    """Other kinds at width 64 alone."""
    rows = []
    for scaling, width, kind in [(s, w, k) for s in ("sp", "mup") for w in widths for k in (kinds if w == 64 else ("",))]:
        for lr, seed in [(lr, seed) for lr in np.arange(-8, -3, 0.75) for seed in seeds]:
            up = 0.4 * (scaling == "sp") + 0.15 * kinds.index(kind) + 0.1 * seed
            rows.append((scaling, kind, width, lr, seed, 2 ** (lr + 6 + up - 2 * (kind == "QK-norm")), 2 ** (lr / 3 + up), 12 - lr - up,
                         2.0 ** (lr - 1 + up), round(max(0, 2 * (lr + 5 + up))), 2 + max(0, lr + 6 + up) ** 2))
    names = "attention_logit_max stream_delta feature_rank update_ratio spikes grad_norm_over_median".split()
    return pd.DataFrame(rows, columns=["scaling", "kind", "width", "log2_lr", "seed", *names])


ONE = {("sp", "", BASE, 2, TOKENS): -6.0}


@pytest.fixture(scope="module")
def figures():
    runs, cells = _runs(), _cells()
    return {
        "sp": plots.scaling_bowls(runs, cells, "sp"), "mup": plots.scaling_bowls(runs, cells, "mup"), "best": plots.best_rates(cells),
        "drifts": plots.drift_forest(_drifts()), "target": plots.head_to_head(runs, cells, _target()),
        "ratios": plots.regret_by_ratio(_ratios()), "steady": plots.steadiness(_steady()),
    }


@pytest.fixture(scope="module")
def scarce():
    """One cell, one seed, one scaling, no interval, nothing that ended."""
    runs, cells = _runs(ONE, seeds=(0,)), bare(_cells(ONE))
    mup = {("mup", "", 64, 2, TOKENS): -6.0}
    steady = only(_steady((32,), ("",), (0,)), scaling="sp")
    return {
        "sp": plots.scaling_bowls(runs, cells, "sp"), "sp without cells": plots.scaling_bowls(runs, None, "sp"),
        "mup at the base": plots.scaling_bowls(runs, cells, "mup"), "mup alone": plots.scaling_bowls(_runs(mup), _cells(mup), "mup"),
        "none ended": plots.scaling_bowls(runs.assign(loss=np.nan), cells, "sp"), "best": plots.best_rates(cells),
        "best of mup": plots.best_rates(bare(_cells(mup))), "drifts": plots.drift_forest(_drifts().iloc[[5]]),
        "target of sp": plots.head_to_head(runs, cells, only(_target(seeds=(0,)), parametrization="sp")),
        "target, none ended": plots.head_to_head(_runs().assign(loss=np.nan), None, _target().assign(loss=np.nan)),
        "ratios": plots.regret_by_ratio(_ratios((2.0,), (0,))),
        "ratios of sp": plots.regret_by_ratio(only(_ratios(), parametrization="sp")),
        "steady": plots.steadiness(steady[["scaling", "kind", "width", "log2_lr", "seed", "spikes"]]),
    }


def _line(ax, label):
    """Ends and marks of the labelled line of a panel."""
    (found,) = [line for line in ax.get_lines() if line.get_label() == label and len(line.get_xdata())]
    return found


def _labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def _legends(fig):
    return [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]


def _uprights(ax):
    """Lines from the floor to the ceiling of a panel."""
    return [line for line in ax.get_lines() if xy(line)[1].tolist() == [0, 1]]


def _vertices(ax):
    return [xy(line) for line in ax.get_lines() if line.get_markersize() == 9]


def test_no_text_of_the_figures_is_cut_or_covered_and_legends_lie_above_the_data(figures, scarce):
    for name, fig in (figures | scarce).items():
        assert_text_is_whole_and_apart(fig)
        tops = [ax.get_window_extent().y1 for ax in fig.axes]
        assert all(legend.get_window_extent().y0 >= max(tops) - 1 for legend in _legends(fig)), name


def test_axes_carry_their_units(figures):
    nats = "nats per token)"
    for ax in (figures[name].axes[0] for name in ("sp", "mup", "target")):
        assert ax.get_ylabel() == f"validation loss ({nats}" and ax.get_xlabel() == "peak learning rate"
    assert [ax.get_xlabel() for ax in figures["best"].axes] == ["width (channels)", "depth (blocks)", "horizon (tokens)"]
    assert figures["best"].axes[0].get_ylabel() == "best peak learning rate (log2)"
    assert figures["drifts"].axes[0].get_xlabel().endswith("(octaves)")
    assert all(ax.get_ylabel().endswith(nats) and "parameters" in ax.get_xlabel() for ax in figures["ratios"].axes)
    assert [ax.get_xlabel() for ax in figures["steady"].axes] == [""] * 3 + ["peak learning rate (log2)"] * 3
    assert sum("(ratio" in ax.get_ylabel() for ax in figures["steady"].axes) == 3


def test_bowls_join_the_mean_of_the_seeds_at_every_rate_at_which_none_diverged(figures):
    runs = only(_runs(), scaling="sp", kind="", depth=2, horizon_tokens=TOKENS)
    lines = [line for line in joined(figures["sp"].axes[0]) if line.get_marker() != "|"]
    for width, line in zip((8, 16, 32, 64, 128), lines, strict=True):
        mean = only(runs, width=width).groupby("peak_lr")["loss"].agg(lambda loss: loss.mean(skipna=False)).dropna()
        assert xy(line)[0].tolist() == mean.index.tolist() and xy(line)[1] == pytest.approx(mean.to_numpy())
    assert [len(xy(line)[0]) for line in lines] == [5, 5, 5, 5, 4]
    assert sum(len(x) for x, _ in faint(figures["sp"].axes[0])) == 5 * 5 * 3 - 1
    lightness = [np.dot([0.2126, 0.7152, 0.0722], line.get_color()[:3]) for line in lines]
    assert all(np.diff(lightness) < 0) and len({line.get_marker() for line in lines}) == 5  # in order, and read without hue
    (x,), _ = crosses(figures["sp"].axes[0])[0]
    assert np.log2(x / runs.loc[runs["loss"].isna(), "peak_lr"].iloc[0]) == pytest.approx(0.24)
    assert ["diverged" in notes(figures[name]) for name in ("sp", "mup")] == [True, False]


def test_the_curves_of_mup_hold_the_base_and_no_smaller_proxy_in_the_colours_of_sp(figures):
    assert legend(figures["sp"]) == ["width 8", "width 16", "width 32", "width 64", "width 128", "best rates, joined"]
    assert legend(figures["mup"]) == ["width 16", "width 32", "width 64", "width 128", "best rates, joined"]
    assert notes(figures["mup"]).startswith("μP, $2^{15}$ tokens, depth 2")
    base, of_sp = joined(figures["mup"].axes[0])[0], joined(figures["sp"].axes[0])[1]
    assert xy(base)[1].tolist() == xy(of_sp)[1].tolist() and to_hex(base.get_color()) == to_hex(of_sp.get_color())


def test_bowls_are_of_the_horizon_that_most_widths_have_whatever_is_longest_or_shortest():
    arms = {("sp", "", w, 2, t): -6.0 for t, widths in ((2**13, (8, 16)), (2**14, (16, 32, 64)), (2**18, (16, 64))) for w in widths}
    fig = plots.scaling_bowls(_runs(arms), _cells(arms), "sp")
    assert notes(fig).startswith("SP, $2^{14}$ tokens") and legend(fig)[:3] == ["width 16", "width 32", "width 64"]


def test_vertices_stand_at_the_best_rate_and_loss_with_level_intervals(figures):
    ax = figures["mup"].axes[0]
    at = np.array(_vertices(ax))[:, :, 0]
    assert np.log2(at[:, 0]) == pytest.approx([-6, -5.9, -5.8, -5.7])
    assert at[:, 1] == pytest.approx([_level(width, TOKENS) for width in (16, 32, 64, 128)])
    intervals = [xy(line) for line in ax.get_lines() if line.get_markersize() == 11]
    assert [np.log2(x).round(6).tolist() for x, _ in intervals] == [[-6.2, -5.7], [-6.1, -5.6], [-6.0, -5.5], [-5.9, -5.4]]
    assert [y.tolist() for _, y in intervals] == [[loss] * 2 for loss in at[:, 1]]
    assert xy(_line(ax, "best rates, joined"))[0].tolist() == at[:, 0].tolist()


def test_a_rate_that_ruins_a_run_does_not_press_the_bowls_flat():
    runs = _runs()
    runs.loc[runs["peak_lr"] > 2**-5, "loss"] += 40
    low, high = plots.scaling_bowls(runs, _cells(), "sp").axes[0].get_ylim()
    assert high == pytest.approx(_level(8, TOKENS) - 0.01 + 0.5, abs=0.01)


def test_best_rates_stand_at_their_width_depth_and_tokens_with_upright_intervals(figures):
    width, depth, tokens = figures["best"].axes
    shown = {(width, "SP"): ([8, 16, 32, 64, 128], [-5.2, -6, -6.8, -7.6, -8.4]),
             (width, "μP"): ([16, 32, 64, 128], [-6, -5.9, -5.8, -5.7]),
             (width, f"SP, {MIXTURE}"): ([16, 64], [-5.7, -7.1]), (width, f"μP, {MIXTURE}"): ([16, 64], [-5.7, -5.5]),
             (depth, "CompleteP"): ([2, 8, 32], [-6, -5.9, -5.8]), (depth, "SP"): ([2, 8, 32], [-6, -6.8, -7.6]),
             (depth, "α = 0.5"): ([2, 8, 32], [-6, -6.4, -6.8]), (depth, "α = 0"): ([2, 8, 32], [-6, -7, -8]),
             (tokens, "SP, width 16"): (2.0 ** np.arange(15, 19), [-6, -6.3, -6.6, -6.9]),
             (tokens, "SP, width 64"): (2.0 ** np.array([15, 17, 18]), [-7.6, -8.2, -8.5]),
             (tokens, "μP, width 64"): (2.0 ** np.array([15, 17, 18]), [-5.8, -6.3, -6.55])}
    for (ax, name), (at, best) in shown.items():
        x, y = xy(_line(ax, name))
        assert np.log2(x) == pytest.approx(np.log2(at), abs=0.15) and y == pytest.approx(best)
    assert [len(_labels(ax)) for ax in (width, depth, tokens)] == [5, 5, 4]  # lines, and the base's best: a lone point is no line
    for ax in (width, depth, tokens):
        uprights = np.concatenate(segments(ax))
        ys = np.concatenate([xy(line)[1] for line in ax.get_lines() if line.get_marker() != "None"])
        np.testing.assert_allclose(uprights[:, :, 1], np.column_stack([ys - 0.2, ys + 0.3]))


def test_mixtures_are_dashed_and_open_and_the_best_of_the_base_is_dotted_in_every_panel(figures):
    width, _, tokens = figures["best"].axes
    looks = {name: (_line(width, name).get_linestyle(), _line(width, name).get_markerfacecolor()) for name in _labels(width)}
    assert looks["SP"][0] == looks["μP"][0] == "-" and looks[f"SP, {MIXTURE}"] == looks[f"μP, {MIXTURE}"] == ("--", "white")
    assert _line(width, "μP").get_color() == _line(width, f"μP, {MIXTURE}").get_color() != _line(width, "SP").get_color()
    for ax in figures["best"].axes:
        reference = _line(ax, "best of the base")
        assert xy(reference)[1].tolist() == [-6, -6] and reference.get_linestyle() == ":"


def test_panels_without_two_points_of_a_line_are_left_out_but_for_the_last_one(scarce):
    cells = _cells()
    axes = plots.best_rates(cells[cells["depth"] == 2]).axes
    assert [ax.get_xlabel() for ax in axes] == ["width (channels)", "horizon (tokens)"]
    (alone,) = plots.best_rates(only(cells, scaling="completep")).axes
    assert alone.get_xlabel() == "depth (blocks)" and "best of the base" not in _labels(alone)
    (one,) = scarce["best"].axes
    assert xy(_line(one, "SP"))[1].tolist() == [-6] and one.get_xlabel() == "width (channels)"
    assert _labels(scarce["best of mup"].axes[0]) == ["μP"]


def test_a_wide_interval_leaves_the_best_rates_in_full_view():
    low, high = plots.best_rates(_cells().assign(low=2.0**-90, high=2.0**80)).axes[0].get_ylim()
    assert (low, high) == pytest.approx((-8.5 - 2, -5.2 + 2))


def test_drifts_stand_at_their_octaves_with_intervals_names_and_numbers(figures):
    ax = figures["drifts"].axes[0]
    drawn = {y: (x, line.get_markerfacecolor() == "white") for line in ax.get_lines() if line.get_marker() == "o"
             for x, y in zip(*xy(line), strict=True)}
    octaves, differs = zip(*(drawn[y] for y in range(7)), strict=True)
    assert octaves == (0.12, -2.4, 0.05, -0.6, -2.52, -1.6, 0.3) and differs == (False, False, False, False, True, True, False)
    (levels,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    levels = {level[0, 1]: level[:, 0].tolist() for level in levels.get_segments() if len(level)}
    assert levels[0] == [-0.3, 0.54] and levels[1] == [-2.9, -1.9] and 5 not in levels  # one seed has no interval
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == (-0.5, 1.0)
    assert ax.get_xlim() == pytest.approx((-2.52 - 2, 0.5 + 2))  # nine octaves of an interval do not press the others together
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["μP: over width", "SP: over width", "CompleteP: over depth", "α = 0.5: over depth", "SP − μP: over width",
                     "mixture, SP − μP: over width", "mixture, μP: over experts"]
    told = {text for text, _ in text_boxes(figures["drifts"])}
    assert {"+0.12 [−0.30, +0.54], 4 seeds", "−1.60, 1 seed", "+0.30 [−9.00, +9.60], 2 seeds"} <= told


def test_the_target_has_its_bowl_and_every_method_upright_at_the_rate_it_gave(figures):
    sp, mup = figures["target"].axes
    runs = only(_runs(), kind="", width=64, depth=2, horizon_tokens=2**18)
    for ax, scaling, best in ((sp, "sp", -8.5), (mup, "mup", -6.55)):
        mean = only(runs, scaling=scaling).groupby("peak_lr")["loss"].mean()
        own = _line(ax, "the target's own runs")
        assert xy(own)[0].tolist() == mean.index.tolist() and xy(own)[1] == pytest.approx(mean.to_numpy())
        (vertex,) = _vertices(ax)
        assert np.log2(vertex[0][0]) == pytest.approx(best) and vertex[1][0] == _level(64, 2**18)
        methods = {method: octaves for method, (of, octaves) in METHODS.items() if of == scaling}
        for method, octaves in methods.items():
            regret = np.mean([0.05 * (octaves + x) ** 2 for x in (-0.05, 0, 0.05)])
            told = f"{method}: {octaves:+.2f}; {regret:.4f}".replace("-", "−")
            x, y = xy(_line(ax, told))
            assert np.log2(x) == pytest.approx([best + octaves]) and y == pytest.approx([_level(64, 2**18) + regret])
            (upright,) = [line for line in _uprights(ax) if line.get_color() == _line(ax, told).get_color()]
            assert np.log2(xy(upright)[0]) == pytest.approx([best + octaves] * 2)
        assert len(_labels(ax)) == 1 + len(methods)
        assert len({(line.get_color(), line.get_marker()) for line in ax.get_lines() if line.get_markersize() == 8}) == len(methods)
    assert sp.get_ylim() == mup.get_ylim()  # so that losses compare
    assert any("width 64, $2^{18}$ tokens" in text for text, _ in text_boxes(figures["target"]))


def test_a_guess_far_from_the_rates_tried_stands_open_at_the_side_and_leaves_the_bowl_in_view():
    far = _target()
    lost = far["method"] == "published exponents"
    far.loc[lost, ["log2_lr", "octaves", "loss"]] += [20, 20, 30]
    ax = plots.head_to_head(_runs(), _cells(), far).axes[0]
    (open_one,) = [line for line in ax.get_lines() if line.get_markersize() == 8 and line.get_markerfacecolor() == "white"]
    assert xy(open_one) == (ax.get_xlim()[1], ax.get_ylim()[1]) and open_one.get_label().startswith("published exponents: +19.10")
    assert np.log2(ax.get_xlim()[1]) == pytest.approx(-6.75 + 3 + 0.4) and ax.get_ylim()[1] < _level(64, 2**18) + 0.6
    assert len(_uprights(ax)) == 4  # none at a rate that it did not give


def test_the_target_is_the_widest_of_the_longest_mup_models_or_of_sp_where_there_is_no_mup(scarce):
    arms = {("sp", "", 16, 2, 2**13): -6.0, ("mup", "", 32, 2, 2**14): -6.0, ("mup", "", 64, 2, 2**14): -6.0,
            ("mup", "", 128, 2, 2**13): -6.0, ("sp", "", 256, 2, 2**20): -6.0, ("mup", MIXTURE, 512, 2, 2**20): -6.0}
    fig = plots.head_to_head(_runs(arms), None, _target())
    assert any("width 64, $2^{14}$ tokens" in text for text, _ in text_boxes(fig))
    assert [ax.get_legend().get_title().get_text()[:2] for ax in fig.axes] == ["μP"]
    assert any("width 16, $2^{15}$ tokens" in text for text, _ in text_boxes(scarce["target of sp"]))


def test_regret_over_the_ratio_has_students_intervals_over_seeds_and_the_gain_of_mup_beside_it(figures, scarce):
    left, right = figures["ratios"].axes
    assert _labels(left) == ["fitted, SP", "transferred, μP", "base's rate kept, SP"]
    half = stats.t.ppf(0.975, 2) * 0.001 / 3**0.5
    for name, each, uprights in zip(_labels(left), (0.002, 0.004, 0.02), np.split(np.concatenate(segments(left)), 3), strict=True):
        x, y = xy(_line(left, name))
        assert np.log2(x) == pytest.approx(np.log2([2.1, 4.6, 10.9]), abs=0.1) and y == pytest.approx([each * k + 0.001 for k in (1, 2, 3)])
        np.testing.assert_allclose(uprights[:, :, 1], np.column_stack([y - half, y + half]))
    x, y = xy(_line(right, "SP fitted less μP transferred"))
    assert x.tolist() == [2.1, 4.6, 10.9] and y == pytest.approx([-0.001, -0.003, -0.005])
    np.testing.assert_allclose(np.concatenate(segments(right))[:, :, 1], np.column_stack([y - half, y + half]))
    assert {"2.1", "4.6", "10.9"} <= {text for text, _ in text_boxes(figures["ratios"])}
    assert len(scarce["ratios of sp"].axes) == 1 and not segments(scarce["ratios"].axes[0])


def test_a_seed_that_diverged_is_left_out_of_the_regret():
    ratios = _ratios()
    ratios.loc[(ratios["method"] == "fitted") & (ratios["seed"] == 2), ["regret", "loss"]] = np.nan
    left, right = plots.regret_by_ratio(ratios).axes
    assert xy(_line(left, "fitted, SP"))[1] == pytest.approx([0.0025, 0.0045, 0.0065])
    assert xy(_line(right, "SP fitted less μP transferred"))[1] == pytest.approx([-0.0015, -0.0035, -0.0055])


def test_steadiness_is_of_the_width_with_most_kinds_sp_solid_mup_dashed(figures):
    fig, table = figures["steady"], only(_steady(), width=64)
    names = "attention_logit_max stream_delta feature_rank update_ratio spikes grad_norm_over_median".split()
    looks = dict(zip(legend(fig), fig.legends[0].get_lines(), strict=True))
    assert list(looks) == ["SP", "μP", "SP, QK-norm", "μP, QK-norm", "SP, z-loss", "μP, z-loss"] and "width 64" in notes(fig)
    assert [line.get_linestyle() for line in looks.values()] == ["-", "--"] * 3
    for ax, measure in zip(fig.axes, names, strict=True):
        for line, name in zip(joined(ax), looks, strict=True):
            scaling, _, kind = name.partition(", ")
            mean = only(table, scaling={"SP": "sp", "μP": "mup"}[scaling], kind=kind).groupby("log2_lr")[measure].mean()
            assert xy(line)[0].tolist() == mean.index.tolist() and xy(line)[1] == pytest.approx(mean.to_numpy())
            assert (line.get_linestyle(), line.get_color()) == (looks[name].get_linestyle(), looks[name].get_color())
    assert [ax.get_yscale() for ax in fig.axes] == ["log", "linear", "linear", "log", "linear", "linear"]
    alone = plots.steadiness(_steady(kinds=("",)))
    assert "width 128" in notes(alone) and legend(alone) == ["SP", "μP"]


def test_measures_that_were_not_logged_have_no_panel_and_unlogged_runs_are_no_crosses(scarce):
    assert [ax.get_ylabel() for ax in scarce["steady"].axes] == ["loss spikes (count)"] and legend(scarce["steady"]) == ["SP"]
    table = _steady((64,)).assign(feature_rank=np.nan, stream_delta=np.inf)
    table.loc[table["kind"] == "z-loss", "update_ratio"] = np.nan
    fig = plots.steadiness(table)
    assert [ax.get_ylabel().split()[0] for ax in fig.axes] == ["largest", "update", "loss", "largest"]
    assert [len(joined(ax)) for ax in fig.axes] == [6, 4, 6, 6] and not any(crosses(ax) for ax in fig.axes)


@pytest.mark.parametrize("draw, said", [
    (lambda: plots.scaling_bowls(_runs(), _cells(), "completep"), "no scaling 'completep' over width; it is one of sp, mup"),
    (lambda: plots.scaling_bowls(only(_runs(), scaling="mup"), None, "sp"), "no runs under SP"),
    (lambda: plots.best_rates(_cells().assign(best_lr=np.nan)), "no cells with a best rate"),
    (lambda: plots.best_rates(only(_cells(), kind="decay 0.3")), "no cells that differ in width, depth or tokens"),
    (lambda: plots.drift_forest(_drifts().assign(octaves=np.nan)), "no drifts in octaves"),
    (lambda: plots.head_to_head(only(_runs(), scaling="completep"), None, _target()), "no runs under SP or μP"),
    (lambda: plots.regret_by_ratio(_ratios().assign(method="other")), "no regret of fitted, transferred or"),
    (lambda: plots.steadiness(_steady().drop(columns=list(_steady())[5:])), "no measure of stability or features"),
])
def test_what_cannot_be_drawn_is_refused_in_one_sentence(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()


@pytest.mark.parametrize("draw, lacking", [
    (lambda f: plots.scaling_bowls(f, None, "sp"), "scaling"), (lambda f: plots.scaling_bowls(_runs(), f, "sp"), "scaling"),
    (plots.best_rates, "scaling"), (plots.drift_forest, "drift"), (lambda f: plots.head_to_head(f, None, _target()), "scaling"),
    (lambda f: plots.head_to_head(_runs(), _cells(), f), "method"), (plots.regret_by_ratio, "method"), (plots.steadiness, "scaling"),
])
def test_a_frame_without_its_columns_is_refused_by_name(draw, lacking):
    with pytest.raises(ValueError, match=f"no column '{lacking}'"):
        draw(pd.DataFrame({"x": [1]}))
