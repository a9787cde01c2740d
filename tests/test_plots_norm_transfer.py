import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart, text_boxes
from marks import bare, crosses, faint, joined, legend, marked_points, notes, only, segments, title, xy
from matplotlib.collections import LineCollection, PathCollection

from etastar import plots

HORIZONS = [2**18, 2**20, 2**22, 2**24, 2**26]
BATCHES = [2**9, 2**10, 2**11]
RATES = [2.0**k for k in range(-8, -1)]
CURVATURE = (0.05, -0.03, 0.05)  # nats per octave²: rate, both, batch


def _runs(horizons=HORIZONS, seeds=(0, 1), optimizer="Scion"):
    """Losses of a quadratic in log2 rate and batch whose optimum, at batch 2^10, is half an octave lower at each horizon; one seed of the
    highest rate at the longest horizon diverges, without a norm."""
    rows = [(optimizer, horizon, batch, rate, seed, np.log2(rate), np.log2(batch), i)
            for i, horizon in enumerate(horizons) for batch in BATCHES for rate in RATES for seed in seeds]
    frame = pd.DataFrame(rows, columns="optimizer horizon_tokens batch_tokens peak_lr seed r b i".split())
    r, b = frame["r"] + 3 + 0.5 * frame["i"], frame["b"] - 10
    a11, a12, a22 = CURVATURE
    frame["loss"] = 4 - 0.3 * frame["i"] + (a11 * r**2 + 2 * a12 * r * b + a22 * b**2) / 2 + 0.01 * frame["seed"]
    frame["log2_norm"] = 6 + 0.4 * r - 0.3 * b + 0.02 * frame["seed"]
    lost = (frame["horizon_tokens"] == 2**26) & (frame["peak_lr"] == RATES[-1]) & (frame["seed"] == 1)
    frame.loc[lost, ["loss", "log2_norm"]] = np.nan
    return frame.drop(columns=["r", "b", "i"])


def _optima(optimizer="Scion", level=6.0, edges=("", "", "", "", ""), horizons=HORIZONS):
    i = np.arange(len(horizons))
    frame = pd.DataFrame({"optimizer": optimizer, "horizon_tokens": horizons, "log2_norm": level + 0.05 * i, "best_loss": 4 - 0.3 * i,
                          "best_lr": 2.0 ** (-3 - 0.5 * i), "best_batch_tokens": 2.0**10, "edge": list(edges)[: len(horizons)]})
    return frame.assign(log2_norm_low=frame["log2_norm"] - 0.3, log2_norm_high=frame["log2_norm"] + 0.4)


def _fits(horizons=HORIZONS):
    a11, a12, a22 = CURVATURE
    return _optima(horizons=horizons)[["horizon_tokens", "best_lr", "best_batch_tokens"]].assign(a11=a11, a12=a12, a22=a22)


def _fixed(optimizer="Scion"):
    rows = [(optimizer, horizon, batch, 6.3 + 0.15 * i - 0.35 * j) for i, horizon in enumerate(HORIZONS) for j, batch in enumerate(BATCHES)]
    return pd.DataFrame(rows, columns="optimizer horizon_tokens batch_tokens log2_norm".split())


def _curves(seeds=(0, 1)):
    rows = [(2.0**k, batch, seed, x, np.log2(1 + 2**x) - 0.1 - 0.02 * seed)
            for k in (-8, -6, -4) for batch in BATCHES for seed in seeds for x in np.arange(k, k + 11.1, 0.5)]
    return pd.DataFrame(rows, columns="peak_lr batch_tokens seed log2_lr_steps log2_norm".split())


def _printed():
    return pd.DataFrame({"log2_lr_steps": [0, 2, 4, 9], "log2_norm": [0.9, 2.2, 3.9, 8.0]})


def _models():
    rows = [(kind, value, optimizer, 6 + 0.1 * i + shift) for kind, values in (("width", (32, 64, 128)), ("depth", (2, 4, 8, 16)))
            for i, value in enumerate(values) for optimizer, shift in (("Scion", 0), ("AdamW", -1))]
    frame = pd.DataFrame(rows, columns="kind value optimizer log2_norm".split())
    return frame.assign(log2_norm_low=frame["log2_norm"] - 0.3, log2_norm_high=frame["log2_norm"] + 0.4,
                        edge=np.where((frame["value"] == 128) & (frame["optimizer"] == "Scion"), "lr low", ""))


@pytest.fixture(scope="module")
def figures():
    both = pd.concat([_optima(edges=("", "", "", "", "lr high, batch high")), _optima("AdamW", 5.2, ("lr low", "", "", "", ""))])
    return {
        "loss": plots.loss_by_norm(_runs(), _optima(edges=("lr low", "", "", "", "wall"))),
        "norm": plots.optimal_norm(both.assign(basin=0.5), pd.concat([_fixed(), _fixed("AdamW")])),
        "surfaces": plots.surfaces(_runs(), _optima(edges=("", "", "", "", "lr low, batch high")), _fits()),
        "growth": plots.norm_growth(_curves(), _printed(), margin=0.35),
        "models": plots.norm_locations(_models()),
    }


@pytest.fixture(scope="module")
def scarce():
    """One horizon, one seed, one optimizer, no companions."""
    first, runs = HORIZONS[:1], _runs(HORIZONS[:1], seeds=(0,))
    return {
        "loss": plots.loss_by_norm(runs, bare(_optima(horizons=first))), "loss alone": plots.loss_by_norm(runs),
        "norm": plots.optimal_norm(bare(_optima(horizons=first)).assign(basin=0.4)),
        "surfaces": plots.surfaces(runs, _optima(horizons=first)), "surfaces alone": plots.surfaces(runs),
        "growth": plots.norm_growth(_curves(seeds=(0,))),
        "models": plots.norm_locations(bare(only(_models(), optimizer="Scion", kind="width"))),
    }


def _stars(ax):
    return [line for line in ax.get_lines() if line.get_marker() == "*" and len(line.get_xdata())]


def _arrows(ax):
    """(point, way) of every arrow."""
    return [(note.xy, tuple(np.sign(note.xyann))) for note in ax.texts if note.arrow_patch is not None]


def test_no_text_of_a_norm_figure_is_cut_or_covered_and_legends_lie_above_the_data(figures, scarce):
    for fig in (*figures.values(), *scarce.values()):
        assert_text_is_whole_and_apart(fig)
        assert all(fig.legends[0].get_window_extent().y0 >= ax.get_window_extent().y1 - 1 for ax in fig.axes)


def test_norm_figures_carry_their_units(figures):
    norm = "output-layer norm ‖W‖ RMS→∞\n(log2)"
    nats = "(nats per token)"
    across = {"loss": "output-layer norm ‖W‖ RMS→∞ (log2)", "norm": "horizon (tokens)", "surfaces": "batch (tokens)",
              "growth": "rate · steps (log2)", "models": "depth (blocks)"}
    up = {"loss": "validation loss\n" + nats, "norm": norm, "surfaces": "peak learning rate", "growth": norm, "models": norm}
    for name, fig in figures.items():
        labels = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
        assert labels[-1].endswith(across[name]), name
        assert fig.axes[0].get_ylabel() == up[name]
    assert figures["models"].axes[0].get_xlabel() == "width (channels)"
    assert "measured less" in figures["growth"].axes[1].get_ylabel() and "octaves" in figures["growth"].axes[1].get_ylabel()
    assert nats in figures["surfaces"].axes[-1].get_ylabel()


def test_loss_over_the_norm_joins_the_means_of_the_seeds_in_the_order_of_the_rate(figures):
    fig = figures["loss"]
    assert [title(ax) for ax in fig.axes] == [f"$2^{{{k}}}$ tokens" for k in (18, 20, 22, 24, 26)]
    runs = _runs()
    for ax, horizon in zip(fig.axes, HORIZONS, strict=True):
        at = runs[(runs["horizon_tokens"] == horizon) & (runs["batch_tokens"] == BATCHES[0])]
        assert faint(ax)[0][1].tolist() == at["loss"].dropna().tolist()
        line = joined(ax)[0]
        means = at.groupby("peak_lr").filter(lambda g: g["loss"].notna().all()).groupby("peak_lr")[["log2_norm", "loss"]].mean()
        assert line.get_xdata().tolist() == means["log2_norm"].tolist() and line.get_ydata().tolist() == means["loss"].tolist()
    assert [len(joined(ax)[0].get_xdata()) for ax in fig.axes] == [7, 7, 7, 7, 6]
    assert len({line.get_color() for line in joined(fig.axes[0])}) == len({line.get_marker() for line in joined(fig.axes[0])}) == 3
    assert legend(fig) == ["batch of $2^{9}$ tokens", "batch of $2^{10}$ tokens", "batch of $2^{11}$ tokens", "optimum of the surface"]


def test_norms_that_turn_back_are_joined_by_rate_not_by_norm():
    runs = _runs(HORIZONS[:1], seeds=(0,))
    runs = runs.assign(log2_norm=6 - (np.log2(runs["peak_lr"]) + 5) ** 2)
    line = joined(plots.loss_by_norm(runs.sample(frac=1, random_state=1)).axes[0])[0]
    assert line.get_xdata().tolist() == [-3, 2, 5, 6, 5, 2, -3]


def test_the_optimum_of_the_surface_stands_at_its_norm_and_loss_with_a_level_interval(figures):
    fig = figures["loss"]
    for i, ax in enumerate(fig.axes):
        (star,) = _stars(ax)
        assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((6 + 0.05 * i, 4 - 0.3 * i))
        assert (star.get_markerfacecolor() == "white") == (i in (0, 4))
        (interval,) = [xy(line) for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 2]
        assert interval[0] == pytest.approx([5.7 + 0.05 * i, 6.4 + 0.05 * i]) and interval[1] == pytest.approx([4 - 0.3 * i] * 2)
    assert [[way for _, way in _arrows(ax)] for ax in fig.axes] == [[(-1, 0)], [], [], [], [(1, 0)]]
    assert "open" in notes(fig) and "diverged" in notes(fig)


def test_diverged_runs_are_crosses_where_their_norm_is_known_and_wide_losses_do_not_press_the_basin():
    runs = _runs(HORIZONS[:2])
    lost = runs["peak_lr"] == RATES[-1]
    runs.loc[lost, "loss"] = np.nan
    runs.loc[runs["peak_lr"] == RATES[-2], "loss"] += 30
    fig = plots.loss_by_norm(runs, _optima(horizons=HORIZONS[:2]).assign(log2_norm_low=-50.0, log2_norm_high=60.0))
    assert sum(len(x) for ax in fig.axes for x, _ in crosses(ax)) == lost.sum()
    for ax, horizon in zip(fig.axes, HORIZONS, strict=False):
        assert ax.get_ylim()[1] == pytest.approx(only(runs, horizon_tokens=horizon)["loss"].min() + 2)
        low, high = ax.get_xlim()
        assert 2 < low < high < 8
    none = plots.loss_by_norm(runs.assign(loss=np.nan), _optima(edges=("saddle",) * 5).assign(log2_norm=np.nan))
    assert "not drawn: 5 without an optimum" in notes(none) and "open" not in notes(none)
    assert_text_is_whole_and_apart(none)


def test_an_optimum_far_outside_its_grid_is_brought_to_the_edge_of_the_view():
    far = _optima(edges=("lr high",) * 5).assign(log2_norm=40.0, log2_norm_high=50.0, best_lr=2.0**30, best_batch_tokens=2.0**40)
    norms = plots.loss_by_norm(_runs(HORIZONS[:1]), far).axes[0]
    assert _stars(norms)[0].get_xdata()[0] == norms.get_xlim()[1] < 10
    grid = plots.surfaces(_runs(HORIZONS[:1]), far).axes[0]
    assert np.log2([_stars(grid)[0].get_xdata()[0], _stars(grid)[0].get_ydata()[0]]) == pytest.approx([11.75, -1.25])


def test_two_optimizers_in_one_figure_of_losses_are_refused():
    both = pd.concat([_runs(), _runs(optimizer="AdamW")])
    for draw in (plots.loss_by_norm, plots.surfaces):
        with pytest.raises(ValueError, match="one optimizer a figure; the rows have Scion, AdamW"):
            draw(both)
    optima = pd.concat([_optima("AdamW", 5.0), _optima()])
    runs = _runs(HORIZONS[:2])
    assert [_stars(ax)[0].get_xdata()[0] for ax in plots.loss_by_norm(runs, optima).axes] == [6, 6.05]
    assert [len(_stars(ax)) for ax in plots.surfaces(runs, optima).axes[:2]] == [1, 1]


def test_every_optimizer_has_a_panel_of_its_norms_with_intervals_and_open_edges(figures):
    fig = figures["norm"]
    for ax, level, edge, way in zip(fig.axes, (6.0, 5.2), (4, 0), (1, -1), strict=True):
        points = marked_points(ax)
        norms = [level + 0.05 * i for i in range(5)]
        assert [line.get_xdata()[0] for line in points] == HORIZONS and [line.get_ydata()[0] for line in points] == pytest.approx(norms)
        assert [line.get_markerfacecolor() == "white" for line in points] == [i == edge for i in range(5)]
        (uprights,) = segments(ax)
        np.testing.assert_allclose(uprights[:, :, 1], [[norm - 0.3, norm + 0.4] for norm in norms])
        ((at, told),) = _arrows(ax)
        assert at[0] == HORIZONS[edge] and told == (0, way)
        assert ax.get_xscale() == "log"
    assert legend(fig)[:2] == ["Scion: best rate and batch", "AdamW: best rate and batch"]


def test_norms_at_fixed_batches_are_thin_and_grey_and_named(figures):
    lines = [line for line in figures["norm"].axes[0].get_lines() if line.get_linewidth() == 1 and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in lines] == [_fixed().query(f"batch_tokens == {b}")["log2_norm"].tolist() for b in BATCHES]
    assert all(np.ptp(line.get_color()[:3]) < 0.01 for line in lines) and len({line.get_marker() for line in lines}) == 3
    assert legend(figures["norm"])[2:] == [f"best rate at $2^{{{k}}}$ tokens a batch" for k in (9, 10, 11)]


def test_the_basin_is_a_band_about_the_norms_and_is_seen_at_one_horizon(figures, scarce):
    (band,) = [c for c in figures["norm"].axes[0].collections if not isinstance(c, LineCollection)]
    corners = band.get_paths()[0].vertices
    first = corners[corners[:, 0] == 2**18][:, 1]
    assert (first.min(), first.max()) == pytest.approx((5.5, 6.5))
    (lone,) = [c for c in scarce["norm"].axes[0].collections if not isinstance(c, LineCollection)]
    assert lone.get_linewidth()[0] >= 5 and "basin" in notes(scarce["norm"])
    assert "basin" not in notes(plots.optimal_norm(_optima()))


def test_an_unbounded_interval_leaves_the_norms_in_full_view():
    low, high = plots.optimal_norm(_optima().assign(log2_norm_low=-90.0, log2_norm_high=90.0)).axes[0].get_ylim()
    assert (low, high) == pytest.approx((4, 8.2))


def test_horizons_without_an_optimum_are_told_and_a_figure_of_none_is_refused():
    optima = _optima(edges=("saddle", "", "", "", ""))
    optima.loc[0, "log2_norm"] = np.nan
    fig = plots.optimal_norm(optima)
    assert "not drawn: 1 without an optimum" in notes(fig)
    assert [line.get_xdata()[0] for line in marked_points(fig.axes[0])] == HORIZONS[1:]
    with pytest.raises(ValueError, match="no horizons with an optimum"):
        plots.optimal_norm(optima.assign(log2_norm=np.nan))
    with pytest.raises(ValueError, match="no models with an optimum"):
        plots.norm_locations(_models().assign(log2_norm=np.nan))
    with pytest.raises(ValueError, match="no edge 'left'; an edge is one of"):
        plots.optimal_norm(optima.assign(edge="lr low, left"))
    assert not _arrows(plots.optimal_norm(optima.assign(edge=None)).axes[0])


def test_cells_carry_the_mean_loss_above_the_best_and_crosses_where_a_seed_diverged(figures):
    fig = figures["surfaces"]
    runs = _runs()
    for ax, horizon in zip(fig.axes, HORIZONS, strict=False):
        means = runs[runs["horizon_tokens"] == horizon].groupby(["batch_tokens", "peak_lr"])["loss"].agg(lambda x: x.mean(skipna=False))
        (squares,) = [c for c in ax.collections if isinstance(c, PathCollection)]
        drawn = pd.Series(np.asarray(squares.get_array()), index=pd.MultiIndex.from_arrays(squares.get_offsets().T))
        kept = (means - means.min()).dropna()
        assert dict(drawn) == pytest.approx(dict(kept)) and drawn.min() == 0
    assert [sum(len(x) for x, _ in crosses(ax)) for ax in fig.axes[:5]] == [0, 0, 0, 0, 3]
    assert crosses(fig.axes[4])[0][0].tolist() == BATCHES and "diverged" in notes(fig)
    ticks = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert ticks[:2] == ["$2^{-8}$", "$2^{-7}$"] and fig.axes[0].get_xscale() == fig.axes[0].get_yscale() == "log"


def test_contours_of_the_fit_pass_where_the_loss_is_a_step_above_the_best(figures):
    (fit,) = [c for c in figures["surfaces"].axes[1].collections if type(c).__name__ == "QuadContourSet"]
    assert fit.levels.tolist() == [0.01, 0.02, 0.05, 0.1, 0.2]
    a11, a12, a22 = CURVATURE
    for level, path in zip(fit.levels, fit.get_paths(), strict=True):
        b, r = np.log2(path.vertices[:, 0]) - 10, np.log2(path.vertices[:, 1]) + 3.5
        assert (a11 * r**2 + 2 * a12 * r * b + a22 * b**2) / 2 == pytest.approx(np.full(len(r), level), rel=0.06)
    none = plots.surfaces(_runs(HORIZONS[:2]), _optima(), _fits().assign(a22=np.nan))
    assert not [c for c in none.axes[1].collections if type(c).__name__ == "QuadContourSet"] and len(legend(none)) == 1


def test_the_star_of_a_surface_is_at_its_rate_and_batch_and_points_beyond_an_edge(figures):
    axes = figures["surfaces"].axes[:5]
    assert [(_stars(ax)[0].get_xdata()[0], _stars(ax)[0].get_ydata()[0]) for ax in axes] == [(2**10, 2.0 ** (-3 - i / 2)) for i in range(5)]
    assert [[way for _, way in _arrows(ax)] for ax in axes] == [[], [], [], [], [(1, -1)]]
    bounds = _optima().assign(best_lr_low=2.0**-6, best_lr_high=2.0**-2, best_batch_tokens_low=2.0**9, best_batch_tokens_high=2.0**11)
    ax = plots.surfaces(_runs(HORIZONS[:1]), bounds).axes[0]
    lines = [xy(line) for line in ax.get_lines() if line.get_marker() == "None" and len(line.get_xdata())]
    assert [(x.tolist(), y.tolist()) for x, y in lines] == [([2**10] * 2, [2**-6, 2**-2]), ([2**9, 2**11], [2**-3] * 2)]


def test_cells_a_third_of_an_octave_apart_do_not_touch():
    fine = _runs(HORIZONS[:1], seeds=(0,))
    fig = plots.surfaces(pd.concat([fine.assign(peak_lr=fine["peak_lr"] * 2 ** (third / 3)) for third in range(3)]))
    assert_text_is_whole_and_apart(fig)
    (squares,) = [c for c in fig.axes[0].collections if isinstance(c, PathCollection)]
    heights = np.unique(np.round(fig.axes[0].transData.transform(squares.get_offsets())[:, 1], 6)) * 72 / fig.dpi
    assert 0.5 * np.diff(heights).min() < squares.get_sizes()[0] ** 0.5 < np.diff(heights).min()


def test_a_horizon_at_which_all_diverged_is_crosses_alone():
    runs = _runs(HORIZONS[:2])
    runs.loc[runs["horizon_tokens"] == 2**20, "loss"] = np.nan
    fig = plots.surfaces(runs, _optima(horizons=HORIZONS[:1]), _fits())
    assert len(crosses(fig.axes[1])[0][0]) == len(BATCHES) * len(RATES) and not _stars(fig.axes[1])
    assert_text_is_whole_and_apart(fig)
    assert_text_is_whole_and_apart(plots.surfaces(only(runs, horizon_tokens=2**20)))


def test_growth_is_drawn_below_its_bound_and_less_the_printed_points(figures):
    top, bottom = figures["growth"].axes
    curves = [line for line in top.get_lines() if line.get_linewidth() == 1.3]
    assert len(curves) == 18 and len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == 3
    (bound,) = [xy(line) for line in top.get_lines() if line.get_label().startswith("bound")]
    assert bound[1] == pytest.approx(np.log2(1 + 2 ** bound[0])) and (bound[0].min(), bound[0].max()) == (-8, 7)
    (printed,) = [xy(line) for line in top.get_lines() if line.get_label() == "published"]
    assert printed[0].tolist() == [0, 2, 4, 9] and printed[1].tolist() == [0.9, 2.2, 3.9, 8.0]
    points = [xy(line) for line in bottom.get_lines() if line.get_marker() not in ("None", "")]
    assert [len(x) for x, _ in points] == [2] * 6 + [3] * 12  # within each curve's span alone
    assert points[0][1] == pytest.approx(np.log2([2, 5]) - 0.1 - [0.9, 2.2])
    assert np.abs(points[0][0] - [0, 2]).max() < 0.2
    (margin,) = [patch for patch in bottom.patches]
    assert (margin.get_y(), margin.get_height()) == (-0.35, 0.7)


def test_growth_without_printed_points_is_one_panel_and_starts_at_the_first_step(scarce):
    assert len(scarce["growth"].axes) == 1 and "published" not in legend(scarce["growth"])
    start = _curves((0,)).assign(log2_lr_steps=lambda f: f["log2_lr_steps"].mask(f["log2_lr_steps"] == f["log2_lr_steps"].min(), -np.inf))
    ax = plots.norm_growth(start).axes[0]
    (bound,) = [xy(line)[0] for line in ax.get_lines() if line.get_label().startswith("bound")]
    assert (bound.min(), bound.max()) == (-7.5, 7) and -9 < ax.get_xlim()[0]
    with pytest.raises(ValueError, match="no points with a norm"):
        plots.norm_growth(_curves().assign(log2_norm=np.nan))


def test_norms_over_width_and_depth_stand_at_their_models(figures, scarce):
    width, depth = figures["models"].axes
    for ax, values in ((width, (32, 64, 128)), (depth, (2, 4, 8, 16))):
        points = marked_points(ax)
        xs, ys = np.array([(line.get_xdata()[0], line.get_ydata()[0]) for line in points]).T
        assert np.log2(xs) == pytest.approx(np.log2([*values, *values]), abs=0.1)
        assert ys == pytest.approx([6 + 0.1 * i for i in range(len(values))] + [5 + 0.1 * i for i in range(len(values))])
        np.testing.assert_allclose(np.concatenate(segments(ax))[:, :, 1], np.column_stack([ys - 0.3, ys + 0.4]))
    assert [way for _, way in _arrows(width)] == [(0, -1)] and not _arrows(depth)
    assert {"32", "64", "128", "16"} <= {text for text, _ in text_boxes(figures["models"])}
    assert len(scarce["models"].axes) == 1
    with pytest.raises(ValueError, match="no kind 'heads'; a kind is one of width, depth"):
        plots.norm_locations(_models().assign(kind="heads"))


@pytest.mark.parametrize("draw, lacking", [
    (plots.loss_by_norm, "optimizer"), (lambda f: plots.loss_by_norm(_runs(), f), "optimizer"), (plots.optimal_norm, "optimizer"),
    (lambda f: plots.optimal_norm(_optima(), f), "optimizer"), (plots.surfaces, "optimizer"),
    (lambda f: plots.surfaces(_runs(), _optima(), f), "horizon_tokens"), (plots.norm_growth, "peak_lr"),
    (lambda f: plots.norm_growth(_curves(), f), "log2_lr_steps"), (plots.norm_locations, "kind"),
])
def test_a_norm_frame_without_its_columns_is_refused_by_name(draw, lacking):
    with pytest.raises(ValueError, match=f"no column '{lacking}'"):
        draw(pd.DataFrame({"x": [1]}))
