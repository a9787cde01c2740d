
import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart

from etastar import plots

HORIZONS = [2**18, 2**19, 2**20, 2**21, 2**22]
BEST = [-7.2, -7.4, -7.65, -7.9, -8.1]
TOKENS = {"Power": -0.51, "Bjorck": -0.32, "transfers": 0, "Step Law": 0.31}
BATCH = {"linear": 1, "square root": 0.5}
METHODS = ["power", "wsd, one LR", "wsd, the law's LR", "cosine, one LR"]


def _cells(along="horizon_tokens", values=HORIZONS, best=BEST, edges=None, half=0.12):
    best = np.array(best)
    frame = pd.DataFrame({along: values, "best_lr": 2.0**best, "low": 2.0 ** (best - half), "high": 2.0 ** (best + half)})
    return frame.assign(edge=edges or [""] * len(frame))


def _lines(published=TOKENS, exponent=-0.23, low=-0.31, high=-0.15):
    rows = [(name, value, True, False, np.nan, np.nan) for name, value in published.items()]
    return pd.DataFrame([*rows, ("fitted", exponent, False, True, low, high)], columns="name exponent published fitted low high".split())


@pytest.fixture(scope="module")
def cells():
    return _cells()


@pytest.fixture(scope="module")
def edged():
    return _cells("batch_tokens", [256, 512, 1024, 2048], [-9, -8.2, -7.5, -6], ["low", "", "", "wall"])


@pytest.fixture(scope="module")
def slopes():
    def of(along, values, slopes):
        frame = pd.DataFrame({"along": along, "from_value": values[:-1], "to_value": values[1:], "slope": slopes})
        return frame.assign(low=frame["slope"] - 0.2, high=frame["slope"] + 0.2)
    return pd.concat([of("horizon_tokens", HORIZONS, [-0.2, -0.25, -0.28, -0.19]), of("batch_tokens", [256, 512, 1024], [0.8, 0.6])])


@pytest.fixture(scope="module")
def bowls():
    """Five horizons, seeds a hundredth apart; at 2^-5 one seed of the longest two diverges, at 2^-4.5 all of them."""
    rows = [(horizon, 2.0**k, seed, 4.1 - 0.14 * i + 0.03 * (k - best) ** 2 + 0.01 * seed)
            for i, (horizon, best) in enumerate(zip(HORIZONS, BEST, strict=True)) for seed in (0, 1, 2) for k in np.arange(-10, -4.4, 0.5)]
    frame = pd.DataFrame(rows, columns=["horizon_tokens", "peak_lr", "seed", "loss"])
    long = frame["horizon_tokens"] >= 2**21
    frame.loc[long & ((frame["peak_lr"] > 2**-5) | ((frame["peak_lr"] == 2**-5) & (frame["seed"] == 1))), "loss"] = np.nan
    return frame


@pytest.fixture(scope="module")
def knobs():
    rows = [("η_p", x, s, 2.0 ** (x - 7), 3.72 + 0.02 * x**2 + 0.01 * s) for x in (-2, -1, 0, 1, 2) for s in (0, 2)]
    rows += [("b", -3 * (b + 0.51), s, b, 3.72 + 0.3 * (b + 0.51) ** 2 + 0.01 * s)
             for b in (-1, -0.75, -0.51, -0.49, -0.25, 0) for s in (0, 2)]
    return pd.DataFrame(rows, columns=["knob", "octaves", "seed", "value", "loss"])


@pytest.fixture(scope="module")
def lost_tokens():
    cells = ["2^18 tokens, batch 256, width 32", "2^22 tokens, batch 1024, width 32", "2^20 tokens, batch 512, width 64"]
    rows = [(method, cell, s, 0.03 * i + 0.02 * j + 0.01 * (s - 1))
            for i, method in enumerate(METHODS) for j, cell in enumerate(cells) for s in (0, 1, 2)]
    return pd.DataFrame(rows, columns=["method", "cell", "seed", "regret_tokens"])


@pytest.fixture(scope="module")
def forecast():
    log2 = -7.2 - 0.23 * np.arange(5)
    spread = np.array([0.2, 0.15, 0.2, 0.3, 0.5])
    return pd.DataFrame({"horizon_tokens": HORIZONS, "predicted": 2**log2, "low": 2 ** (log2 - spread), "high": 2 ** (log2 + spread),
                         "used": [True, True, True, False, False]})


@pytest.fixture(scope="module")
def figures(cells, edged, slopes, bowls, knobs, lost_tokens, forecast):
    wide = lost_tokens.assign(regret_tokens=lost_tokens["regret_tokens"] ** 3 * 1e4)
    wide.loc[0, "regret_tokens"] = np.nan
    last_low = _cells(edges=["", "", "", "", "low"])
    return {
        "tokens": plots.valley_lines(cells, _lines(), "horizon_tokens"),
        "batch": plots.valley_lines(edged, _lines(BATCH, 0.72, 0.5, 0.94), "batch_tokens"),
        "width": plots.valley_lines(_cells("width", [16, 32, 64, 128], BEST[:4]), _lines({}), "width"),
        "slopes": plots.local_slopes(slopes[slopes["along"] == "horizon_tokens"], TOKENS),
        "both slopes": plots.local_slopes(slopes, {"horizon_tokens": TOKENS, "batch_tokens": BATCH}),
        "bowls": plots.valley_bowls(bowls, last_low, "horizon_tokens"),
        "knobs": plots.power_sensitivity(knobs), "bare knobs": plots.power_sensitivity(knobs.drop(columns="value")),
        "regrets": plots.regrets(lost_tokens), "wide regrets": plots.regrets(wide),
        "prediction": plots.prediction(cells, forecast), "missed": plots.prediction(last_low, forecast),
    }


def _legend(fig):
    holder = fig if fig.legends else fig.axes[0]
    return [text.get_text() for text in (holder.legends[0] if holder is fig else holder.get_legend()).get_texts()]


def _line(ax, label):
    (line,) = [line for line in ax.get_lines() if str(line.get_label()).startswith(label)]
    return line


def _xy(line):
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def _faint(ax):
    return [_xy(line) for line in ax.get_lines() if line.get_alpha() == 0.35]


def _crosses(ax):
    return [_xy(line) for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]


def _arrows(ax):
    """(point, reach) of every arrow."""
    return [(note.xy, tuple(note.xyann)) for note in ax.texts if note.arrow_patch is not None]


def _uprights(ax):
    (segments,) = [c.get_segments() for c in ax.collections if hasattr(c, "get_segments") and _is_upright(c)]
    return np.array([segment[:, 1] for segment in segments])


def _is_upright(collection):
    return all(np.ptp(segment[:, 0]) == 0 for segment in collection.get_segments())


def test_no_text_of_a_power_law_figure_is_cut_or_covered_and_legends_lie_above_the_data(figures):
    for name, fig in figures.items():
        assert_text_is_whole_and_apart(fig)
        for ax in fig.axes:
            legend = fig.legends[0] if fig.legends else ax.get_legend()
            assert legend.get_window_extent().y0 >= ax.get_window_extent().y1 - 1, name


def test_axes_carry_their_units(figures):
    across = {"tokens": "(tokens)", "batch": "(tokens)", "width": "(channels)", "slopes": "(tokens)", "both slopes": "(tokens)",
              "bowls": "learning rate", "knobs": "(octaves)", "bare knobs": "(octaves)", "regrets": "(% of the tokens)",
              "wide regrets": "(% of the tokens)", "prediction": "(tokens)", "missed": "(tokens)"}
    for name, fig in figures.items():
        assert all(ax.get_xlabel().endswith(across[name]) for ax in fig.axes), name
    for name, label in {"bowls": "nats per token", "knobs": "nats per token", "tokens": "peak learning rate", "slopes": "exponent",
                        "prediction": "peak learning rate"}.items():
        assert label in figures[name].axes[0].get_ylabel()


def test_the_valley_holds_every_best_rate_with_its_interval(figures, cells):
    ax = figures["tokens"].axes[0]
    x, y = _xy(_line(ax, "best rate"))
    assert x.tolist() == HORIZONS and y.tolist() == cells["best_lr"].tolist()
    assert _uprights(ax).tolist() == cells[["low", "high"]].to_numpy().tolist()
    assert ax.get_xscale() == ax.get_yscale() == "log" and not _arrows(ax)


def test_every_line_has_its_slope_and_passes_through_the_mean_of_the_logs(figures, cells):
    ax = figures["tokens"].axes[0]
    middle = np.log2(cells["best_lr"]).mean()
    for name, exponent in {"fitted": -0.23, **TOKENS}.items():
        line = _line(ax, name)
        (x0, x1), (y0, y1) = _xy(line)
        assert np.log2(y1 / y0) / np.log2(x1 / x0) == pytest.approx(exponent)
        assert np.log2(y0) + exponent * (20 - np.log2(x0)) == pytest.approx(middle)
        assert (line.get_linestyle() == "-") == (name == "fitted")
    told = _legend(figures["tokens"])[:5]
    assert told == ["fitted: −0.23 [−0.31, −0.15]", "Power: −0.51", "Bjorck: −0.32", "transfers: 0", "Step Law: 0.31"]


def test_fitted_lines_alone_are_solid_and_tell_their_intervals(cells):
    two = pd.concat([_lines(), _lines({}).assign(name="robust", exponent=-0.3)])
    ax = plots.valley_lines(cells, two, "horizon_tokens").axes[0]
    solid = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    assert [line.get_label() for line in solid] == ["fitted: −0.23 [−0.31, −0.15]", "robust: −0.30 [−0.31, −0.15]"]
    assert len({line.get_color() for line in solid}) == 2
    published = plots.valley_lines(cells, _lines()[:-1], "horizon_tokens").axes[0]
    assert {"-"} & {line.get_linestyle() for line in published.get_lines()} == set()


def test_an_optimum_at_the_edge_is_open_points_beyond_and_does_not_move_the_lines(figures):
    ax = figures["batch"].axes[0]
    filled, hollow = _line(ax, "best rate"), _line(ax, "at the edge")
    assert _xy(filled)[0].tolist() == [512, 1024] and filled.get_markerfacecolor() != "white"
    assert _xy(hollow)[0].tolist() == [256, 2048] and hollow.get_markerfacecolor() == "white"
    assert [(at, np.sign(reach[1])) for at, reach in _arrows(ax)] == [((256, 2**-9), -1), ((2048, 2**-6), 1)]
    (x0, x1), (y0, y1) = _xy(_line(ax, "linear"))
    assert (x0, x1) == (256, 2048) and np.log2(y0 * y1) / 2 == pytest.approx((-8.2 - 7.5) / 2)


def test_a_valley_of_edges_alone_and_an_interval_not_told_are_drawn(cells):
    fig = plots.valley_lines(cells.assign(edge="low", low=np.nan, high=np.nan), _lines(low=np.nan, high=np.nan), "horizon_tokens")
    assert _legend(fig)[0] == "fitted: −0.23" and len(_arrows(fig.axes[0])) == 5
    assert_text_is_whole_and_apart(fig)


def test_an_unbounded_interval_leaves_the_points_in_full_view(cells):
    cells = cells.copy()
    cells.loc[0, ["low", "high"]] = [2.0**-40, 2.0**20]
    low, high = plots.valley_lines(cells, _lines(), "horizon_tokens").axes[0].get_ylim()
    assert (np.log2(low), np.log2(high)) == pytest.approx((-10.1, -5.2))


def test_an_unknown_edge_and_cells_without_a_rate_are_refused(cells):
    with pytest.raises(ValueError, match="no edge 'left'; an edge is one of '', 'low', 'high', 'wall'"):
        plots.valley_lines(cells.assign(edge="left"), _lines(), "horizon_tokens")
    with pytest.raises(ValueError, match="no cells with a best rate"):
        plots.valley_lines(cells.assign(best_lr=np.nan), _lines(), "horizon_tokens")
    cells = cells.assign(best_lr=[*cells["best_lr"][:4], np.nan])
    assert len(_xy(_line(plots.valley_lines(cells, _lines(), "horizon_tokens").axes[0], "best rate"))[0]) == 4


def test_local_slopes_are_level_bars_between_their_neighbours(figures):
    ax = figures["slopes"].axes[0]
    bars = [c.get_segments() for c in ax.collections if not _is_upright(c)][0]
    assert [bar.tolist() for bar in bars[:2]] == [[[2**18, -0.2], [2**19, -0.2]], [[2**19, -0.25], [2**20, -0.25]]]
    np.testing.assert_allclose(_uprights(ax), [[-0.4, 0], [-0.45, -0.05], [-0.48, -0.08], [-0.39, 0.01]], atol=1e-12)
    assert {name: _xy(_line(ax, name))[1][0] for name in TOKENS} == TOKENS


def test_each_panel_of_slopes_has_its_own_published_exponents(figures):
    fig = figures["both slopes"]
    assert [ax.get_xlabel() for ax in fig.axes] == ["horizon (tokens)", "batch (tokens)"]
    middles = [_xy(next(line for line in ax.get_lines() if line.get_marker() == "o")) for ax in fig.axes]
    assert middles[0][1].tolist() == [-0.2, -0.25, -0.28, -0.19] and middles[1][1].tolist() == [0.8, 0.6]
    assert np.log2(middles[1][0]) == pytest.approx([8.5, 9.5])
    told = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes]
    assert told[0][:2] == ["Power: −0.51", "Bjorck: −0.32"] and told[1][:2] == ["linear: 1", "square root: 0.5"]


def test_slopes_of_one_seed_have_no_interval(slopes):
    fig = plots.local_slopes(slopes.assign(low=np.nan, high=np.nan), {})
    assert [len(fig.axes[i].get_legend().get_texts()) for i in (0, 1)] == [1, 1]
    assert_text_is_whole_and_apart(fig)


def test_bowls_show_every_seed_and_the_mean_of_rates_at_which_none_diverged(figures, bowls):
    ax = figures["bowls"].axes[0]
    points = _faint(ax)
    assert [len(x) for x, _ in points] == [36, 36, 36, 32, 32]
    assert points[0][1].tolist() == bowls[bowls["horizon_tokens"] == 2**18]["loss"].tolist()
    means = [_xy(line) for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) > 2]
    assert [len(x) for x, _ in means] == [12, 12, 12, 10, 10]
    np.testing.assert_allclose(means[0][1], 4.11 + 0.03 * (np.arange(-10, -4.4, 0.5) + 7.2) ** 2)
    assert [len(x) for x, _ in _crosses(ax)] == [4, 4] and "diverged" in figures["bowls"].legends[0].get_title().get_text()


def test_best_rates_lie_on_the_line_of_the_means_and_edges_are_open(figures, cells):
    ax = figures["bowls"].axes[0]
    marks = [line for line in ax.get_lines() if line.get_markersize() == 9]
    assert [_xy(line)[0][0] for line in marks] == cells["best_lr"].tolist()
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False] * 4 + [True]
    height = np.interp(-7.65, [-8, -7.5], 3.83 + 0.03 * np.array([-0.35, 0.15]) ** 2)
    assert _xy(marks[2])[1][0] == pytest.approx(height)
    spans = [_xy(line)[0].tolist() for line in ax.get_lines() if line.get_marker() == "|"]
    assert spans == cells[["low", "high"]].to_numpy().tolist()
    assert [np.sign(reach[0]) for _, reach in _arrows(ax)] == [-1]


def test_a_bowl_of_which_every_run_diverged_is_crosses_alone(bowls, cells):
    bowls, cells = bowls.copy(), cells.copy()
    bowls.loc[bowls["horizon_tokens"] == 2**22, "loss"] = np.nan
    cells.loc[[0, 4], ["best_lr", "low", "high"]] = np.nan
    cells.loc[0, "edge"] = "wall"
    fig = plots.valley_bowls(bowls, cells, "horizon_tokens")
    assert len(_crosses(fig.axes[0])[-1][0]) == 36 and len(_faint(fig.axes[0])[-1][0]) == 0
    assert len([line for line in fig.axes[0].get_lines() if line.get_markersize() == 9]) == 3 and not _arrows(fig.axes[0])
    assert_text_is_whole_and_apart(fig)
    none = plots.valley_bowls(bowls.assign(loss=np.nan), cells, "horizon_tokens")
    assert sum(len(x) for x, _ in _crosses(none.axes[0])) == len(bowls)


def test_bowls_of_one_seed_are_named_by_batch_or_width(bowls, cells):
    one = bowls[bowls["seed"] == 1]
    for by, last in (("batch_tokens", "batch of $2^{22}$ tokens"), ("width", "width $2^{22}$")):
        fig = plots.valley_bowls(one.rename(columns={"horizon_tokens": by}), cells.rename(columns={"horizon_tokens": by}), by)
        assert _legend(fig)[-1] == last
        assert_text_is_whole_and_apart(fig)


def test_both_knobs_share_an_axis_of_octaves(figures):
    ax = figures["knobs"].axes[0]
    means = [_xy(line) for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) > 2]
    assert means[0][0].tolist() == [-2, -1, 0, 1, 2] and means[0][1] == pytest.approx([3.81, 3.75, 3.73, 3.75, 3.81])
    assert means[1][0] == pytest.approx([-1.53, -0.78, -0.06, 0, 0.72, 1.47])
    assert [len(x) for x, _ in _faint(ax)] == [10, 12] and _legend(figures["knobs"]) == [r"$\eta_p$", "$b$"]


def test_values_of_b_stand_above_the_setting_first(figures):
    above = figures["knobs"].axes[0].child_axes[0]
    told = dict(zip([tick.get_text() for tick in above.get_xticklabels()], above.get_xticks(), strict=True))
    assert told == pytest.approx({"−1": 1.47, "−0.75": 0.72, "−0.51": 0, "−0.25": -0.78, "0": -1.53})  # −0.49 would lie over −0.51
    assert not figures["bare knobs"].axes[0].child_axes


def test_a_knob_that_diverges_is_a_cross_and_no_mean(knobs):
    knobs = knobs.copy()
    knobs.loc[(knobs["knob"] == "η_p") & (knobs["octaves"] == 2) & (knobs["seed"] == 2), "loss"] = np.nan
    ax = plots.power_sensitivity(knobs).axes[0]
    means = [_xy(line) for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) > 2]
    assert means[0][0].max() == 1 and [len(x) for x, _ in _crosses(ax)] == [1]


def test_regrets_are_a_row_a_cell_in_per_cent_of_the_tokens(figures):
    fig = figures["regrets"]
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["$2^{18}$ tokens, batch 256, width 32", "$2^{22}$ tokens, batch 1024, width 32",
                                                            "$2^{20}$ tokens, batch 512, width 64"]
    assert _legend(fig) == ["wsd tuned for the cell", *METHODS] and ax.get_xscale() == "linear"
    x, y = _xy(_line(ax, "wsd, one LR"))
    assert x == pytest.approx([3, 5, 7]) and [round(v) for v in y] == [0, 1, 2]
    assert sorted(_faint(ax)[1][0]) == pytest.approx([2, 3, 4, 4, 5, 6, 6, 7, 8])
    assert set(_line(ax, "wsd tuned").get_xdata()) == {0}


def test_wide_regrets_get_a_logarithmic_axis_and_diverged_runs_a_cross(figures):
    ax = figures["wide regrets"].axes[0]
    assert ax.get_xscale() == "symlog" and {0, 10, 100, 1000} <= set(ax.get_xticks())
    ends = [ax.transData.transform((x, 0))[0] for x in (max(x.max() for x, _ in _faint(ax)), ax.get_xlim()[1])]
    assert ends[1] - ends[0] > 10  # room for the last point, in pixels
    assert [len(x) for x, _ in _crosses(ax)] == [1] and "diverged" in figures["wide regrets"].legends[0].get_title().get_text()
    assert [len(x) for x, _ in _faint(ax)] == [8, 9, 9, 9]


def test_a_method_that_always_diverged_in_a_cell_has_no_mean_there(lost_tokens):
    lost_tokens = lost_tokens.copy()
    lost_tokens.loc[(lost_tokens["method"] == "power") & lost_tokens["cell"].str.startswith("2^22"), "regret_tokens"] = np.nan
    fig = plots.regrets(lost_tokens)
    assert _xy(_line(fig.axes[0], "power"))[0] == pytest.approx([0, 4])
    one = plots.regrets(lost_tokens[lost_tokens["seed"] == 0])
    assert [len(x) for x, _ in _faint(one.axes[0])] == [2, 3, 3, 3]
    assert_text_is_whole_and_apart(one)


def test_held_out_horizons_are_open_and_the_band_begins_at_the_last_used(figures, cells, forecast):
    ax = figures["prediction"].axes[0]
    used, held = _line(ax, "used"), _line(ax, "held out")
    assert _xy(used)[0].tolist() == HORIZONS[:3] and _xy(held)[0].tolist() == HORIZONS[3:]
    assert held.get_markerfacecolor() == "white" and _xy(held)[1].tolist() == cells["best_lr"].tolist()[3:]
    inside, beyond = _line(ax, "fitted law"), _line(ax, "its forecast")
    assert (inside.get_linestyle(), beyond.get_linestyle()) == ("-", "--") and _xy(beyond)[0].tolist() == HORIZONS[2:]
    assert np.concatenate([_xy(inside)[1][:2], _xy(beyond)[1]]).tolist() == forecast["predicted"].tolist()
    (band,) = [c for c in ax.collections if not hasattr(c, "get_segments")]
    corners = band.get_paths()[0].vertices
    assert corners[:, 0].min() == 2**20 and corners[corners[:, 0] == 2**22][:, 1].min() == forecast["low"].iloc[-1]
    assert "arrow" not in figures["prediction"].legends[0].get_title().get_text()


def test_a_held_out_optimum_at_the_edge_points_beyond(figures, forecast, cells):
    ax = figures["missed"].axes[0]
    assert [(at[0], np.sign(reach[1])) for at, reach in _arrows(ax)] == [(2**22, -1)]
    with pytest.raises(ValueError, match="no horizons used in the fit"):
        plots.prediction(cells, forecast.assign(used=False))
    assert_text_is_whole_and_apart(plots.prediction(cells.drop(columns="edge"), forecast.assign(used=True, low=np.nan)))


@pytest.mark.parametrize("draw, lacking", [
    (lambda f: plots.valley_lines(f, _lines(), "width"), "width"), (lambda f: plots.valley_lines(_cells(), f, "horizon_tokens"), "name"),
    (lambda f: plots.local_slopes(f, {}), "along"), (lambda f: plots.valley_bowls(f, _cells(), "width"), "width"),
    (plots.power_sensitivity, "knob"), (plots.regrets, "method"), (lambda f: plots.prediction(_cells(), f), "horizon_tokens"),
])
def test_a_frame_without_its_columns_is_refused_by_name(draw, lacking):
    with pytest.raises(ValueError, match=f"no column '{lacking}'"):
        draw(pd.DataFrame({"x": [1]}))
