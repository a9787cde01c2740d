import hashlib
import types

import matplotlib
import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart, text_boxes

from etastar import plots


def _bowl(centre):
    best = 2.0**centre
    return types.SimpleNamespace(
        best_lr=best,
        best_lr_low=best / 1.1,
        best_lr_high=best * 1.1,
        best_loss=4.0,
        loss_at=lambda lr: 4 + 0.03 * (np.log2(lr) - centre) ** 2,
    )


@pytest.fixture
def losses():
    rows = [
        (arm, 2.0**k, 4 + 0.03 * (k - centre) ** 2, seed)
        for arm, centre in (("cos10", -7), ("wsd20", -8))
        for k in range(-10, -4)
        for seed in (1, 2)
    ]
    return pd.DataFrame(rows, columns=["arm", "peak_lr", "loss", "seed"])


@pytest.fixture
def board():
    rows = [
        ("a_long_claim_name_that_has_to_fit_somewhere", "ratio", 0.5, 0.9, 0.75, 1.1, "contradicted"),
        ("b", "nats", np.nan, 0.02, 0.01, 0.03, "reproduced"),
        ("c", "nats", 0.01, np.nan, np.nan, np.nan, "untested"),
    ]
    return pd.DataFrame(rows, columns=["claim", "unit", "published", "estimate", "low", "high", "verdict"])


def test_schedules_are_drawn_over_tokens():
    fig = plots.schedule_lines({"flat": np.full(4, 0.5), "down": np.array([0.4, 0.2])}, batch_tokens=100)
    ax = fig.axes[0]
    assert ax.get_lines()[0].get_xdata().tolist() == [100, 200, 300, 400]
    assert ax.get_lines()[1].get_ydata().tolist() == [0.4, 0.2]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens", "learning rate")
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["flat", "down"]


def test_bowls_show_every_seed_the_fit_and_the_diverged(losses):
    losses.loc[losses["peak_lr"] == 2**-5, "loss"] = np.nan
    fig = plots.lr_bowls(losses, {"cos10": _bowl(-7), "wsd20": _bowl(-8)})
    lines = fig.axes[0].get_lines()
    points = [line for line in lines if line.get_alpha() == 0.55]
    assert [len(line.get_xdata()) for line in points] == [10, 10]
    vertices = [line.get_xdata()[0] for line in lines if line.get_markerfacecolor() == "white"]
    assert vertices == [2**-7, 2**-8]
    assert sum(len(line.get_xdata()) for line in lines if line.get_marker() == "x") == 4
    assert "diverged" in fig.legends[0].get_title().get_text()
    assert "nats per token" in fig.axes[0].get_ylabel()


def test_bowls_without_fits_join_the_means(losses):
    fig = plots.lr_bowls(losses)
    joined = [line for line in fig.axes[0].get_lines() if len(line.get_xdata()) == 6]
    np.testing.assert_allclose(joined[0].get_ydata(), 4 + 0.03 * (np.arange(-10, -4) + 7) ** 2)
    assert "fitted" not in fig.legends[0].get_title().get_text()


def test_loss_curves_average_seeds_and_take_either_loss():
    frame = pd.DataFrame(
        {"arm": "a", "seed": [1, 1, 2, 2], "tokens": [10, 20, 10, 20], "val_loss": [4.0, 3.0, 6.0, 5.0]}
    )
    fig = plots.loss_curves(frame)
    assert fig.axes[0].get_lines()[0].get_ydata().tolist() == [5.0, 4.0]
    assert len(plots.loss_curves(frame.assign(train_loss=1.0)).axes) == 2
    with pytest.raises(ValueError, match="val_loss or train_loss"):
        plots.loss_curves(frame.drop(columns="val_loss"))


def test_the_forest_has_a_panel_a_unit_and_says_verdicts_in_words(board):
    fig = plots.verdict_forest(board)
    assert len(fig.axes) == 2
    words = {text for text, _ in text_boxes(fig)}
    assert {"contradicted", "reproduced"} <= words and "untested" not in words
    diamonds = [line.get_xdata()[0] for ax in fig.axes for line in ax.get_lines() if line.get_marker() == "d"]
    assert diamonds == [0.5]
    no_effect = [line.get_xdata()[0] for ax in fig.axes for line in ax.get_lines() if line.get_color() == "black"]
    assert no_effect == [1, 0]
    with pytest.raises(ValueError, match="no claims with an estimate"):
        plots.verdict_forest(board[board["verdict"] == "untested"])


def test_verdicts_differ_in_shape_as_well_as_in_colour():
    assert len({colour for colour, _ in plots.VERDICT_MARKS.values()}) == 5
    assert len({shape for _, shape in plots.VERDICT_MARKS.values()}) == 5


def test_differences_show_seeds_their_mean_and_the_interval():
    frame = pd.DataFrame({"contrast": "a − b", "seed": [1, 2], "difference": [0.01, 0.03], "low": -0.1, "high": 0.14})
    lines = plots.paired_differences(frame, margin=0.05).axes[0].get_lines()
    assert [0.02, 0.02] in [np.round(line.get_xdata(), 12).tolist() for line in lines]
    assert [-0.1, 0.14] in [np.asarray(line.get_xdata()).tolist() for line in lines]


def test_missing_columns_are_named(losses):
    with pytest.raises(ValueError, match="no column 'seed'; the frame has arm, peak_lr, loss"):
        plots.lr_bowls(losses.drop(columns="seed"))
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.lr_bowls(losses[:0])


def test_no_text_is_cut_or_covered(board, losses):
    assert_text_is_whole_and_apart(plots.verdict_forest(board))
    assert_text_is_whole_and_apart(plots.lr_bowls(losses, {"cos10": _bowl(-7), "wsd20": _bowl(-8)}))
    assert_text_is_whole_and_apart(plots.schedule_lines({f"schedule {i}": np.ones(9) for i in range(7)}, 10**6))
    frame = pd.DataFrame({"contrast": list("ab"), "seed": 1, "difference": [0.01, -0.02]})
    assert_text_is_whole_and_apart(plots.paired_differences(frame, margin=0.005))


def test_saved_figures_are_the_same_bytes_each_time(board, tmp_path):
    sums = []
    for folder in ("one", "two"):
        fig = plots.verdict_forest(board)
        paths = plots.save(fig, tmp_path / folder, "forest")
        assert [path.name for path in paths] == ["forest.png", "forest.svg"]
        sums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert sums[0] == sums[1]


def test_the_callers_style_is_left_alone(losses):
    with matplotlib.rc_context({"grid.color": "#123456", "savefig.dpi": 17}):
        plots.lr_bowls(losses)
        assert (matplotlib.rcParams["grid.color"], matplotlib.rcParams["savefig.dpi"]) == ("#123456", 17)


def test_a_notebook_shows_a_figure_as_a_picture():
    figure = plots.schedule_lines({"a": np.ones(4)}, 1024)
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.fixture
def cooldown_figures(lengths, on_line, spans, pairs, grid, cut_off, predictions):
    shapes = pd.DataFrame({25_000: [0.004, -0.002, np.nan], 50_000: [0.002, -0.003, -0.01]}, index=[1e-4, 5e-4, 3e-3])
    return {
        "lengths": plots.length_lines(lengths), "on line": plots.loss_on_line(on_line),
        "spans": plots.averaging_spans(spans, {"constant": 4.0, "cooldown": 3.88}), "lines": plots.perplexity_lines({"cooldown": pairs}),
        "two lines": plots.perplexity_lines({"cooldown": pairs, "averaged": pairs}), "published lengths": plots.published_lengths(grid),
        "published shapes": plots.published_shapes(shapes), "overshoot": plots.overshoot(*cut_off),
        "laws": plots.law_predictions(predictions),
    }


@pytest.fixture
def lengths():
    rows = [(f, 2.0**k, 0.01 * (k + 8) - f / 50) for f in (0.05, 0.1, 0.2, 0.4) for k in (-9, -8)]
    return pd.DataFrame(rows, columns=["fraction", "peak_lr", "difference"]).assign(low=-0.02, high=0.02)


@pytest.fixture
def on_line():
    return pd.DataFrame([(s, seed, 4 - s / 10 + seed / 100) for seed in (1, 3) for s in (0, 0.5, 1)], columns=["share", "seed", "loss"])


@pytest.fixture
def spans():
    rows = [(name, s, 3.9 + s / 10 + seed / 100, seed) for name in ("swa", "ema") for s in (0.1, 0.2) for seed in (0, 2)]
    return pd.DataFrame(rows, columns=["read_out", "span", "loss", "seed"])


@pytest.fixture
def pairs():
    loss = np.array([3.5, 3.4, 3.1, 3.0, 2.9])
    return pd.DataFrame({"params": [33e6, 33e6, 124e6, 124e6, 360e6], "other": loss, "cosine": np.log(0.9 * np.exp(loss) - 0.5)})


@pytest.fixture
def grid():
    return pd.DataFrame([(steps, f, lr, 3 + f * abs(np.log10(lr / 1e-3)) + (lr == 1e-4)) for steps in (15_000, 25_000, 50_000)
                         for f in (0.1, 0.2, 0.4) for lr in (1e-4, 5e-4, 1e-3)], columns=["steps", "cooldown_fraction", "peak_lr", "loss"])


@pytest.fixture
def cut_off():
    table = pd.DataFrame({"ratio": [1.2, 1.5, 1.55, 1.5, 2.5], "penalty": [0.01, 0.03, 0.04, 0.05, 0.09], "averaged_penalty": 0.0})
    bins = pd.DataFrame({"ratio_from": [1.1, 1.3, 1.6], "ratio_to": [1.3, 1.6, np.inf], "penalty": [0.01, 0.04, 0.09],
                         "low": [-1.0, 0.02, np.nan], "high": [1.0, 0.06, np.nan], "n": [2, 3, 1]})
    return table, bins


@pytest.fixture
def predictions():
    rows = [("annealing", m, lr, f, shape, 2.95 + f / 50, 2.96) for m in (0.999, 0.9995) for lr in (1e-3, 2e-3)
            for f, shape in ((0.2, "linear"), (0.2, "1-sqrt"), (0.1, "linear"))] + [("multi-power", np.nan, 1e-3, 0.2, "linear", 2.9, 2.96)]
    return pd.DataFrame(rows, columns=["law", "memory", "peak_lr", "cooldown_fraction", "shape", "predicted", "measured"])


def _legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def _drawn(ax):
    """Lines with more than a legend's sample in them, as (x, y) lists."""
    lines = [line for line in ax.get_lines() if len(line.get_xdata())]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def test_no_text_of_a_cooldown_figure_is_cut_or_covered(cooldown_figures):
    for fig in cooldown_figures.values():
        assert_text_is_whole_and_apart(fig)


def test_every_axis_of_a_cooldown_figure_is_named_and_losses_have_their_unit(cooldown_figures):
    for name, fig in cooldown_figures.items():
        for ax in fig.axes:
            assert ax.get_xlabel() and ax.get_ylabel(), name
            assert "nats per token" in ax.get_ylabel() or "perplexity" in ax.get_ylabel(), name


def test_lengths_are_a_line_a_rate_on_ticks_in_per_cent(cooldown_figures):
    fig = cooldown_figures["lengths"]
    assert [len(x) for x, _ in _drawn(fig.axes[0])] == [4, 4, 2] and _legend(fig) == ["peak rate $2^{-9}$", "peak rate $2^{-8}$"]
    ticks = [text for text, _ in text_boxes(fig) if "%" in text]
    assert ticks == ["5 %", "10 %", "20 %", "40 %"] and len(fig.axes[0].collections) == 2
    assert _drawn(fig.axes[0])[0][1] == pytest.approx([-0.011, -0.012, -0.014, -0.018])


def test_the_line_between_weights_shows_seeds_their_mean_and_both_ends(cooldown_figures):
    drawn = _drawn(cooldown_figures["on line"].axes[0])
    assert [y for _, y in drawn[:3]] == [pytest.approx(v) for v in ([4.01, 3.96, 3.91], [4.03, 3.98, 3.93], [4.02, 3.97, 3.92])]
    assert [x for x, _ in drawn[3:]] == [[0, 0], [1, 1]]


def test_spans_show_means_seeds_and_named_references(cooldown_figures):
    fig = cooldown_figures["spans"]
    drawn = _drawn(fig.axes[0])
    assert drawn[1] == ([0.1, 0.2], pytest.approx([3.92, 3.93])) and [len(x) for x, _ in drawn[:4]] == [4, 2, 4, 2]
    assert [y for _, y in drawn[4:]] == [[4.0, 4.0], [3.88, 3.88]] and _legend(fig)[2:] == ["constant: 4.0000", "cooldown: 3.8800"]
    dashes = [line.get_linestyle() for line in fig.axes[0].get_lines()[4:]]
    assert len(set(dashes)) == 2


def test_perplexities_lie_on_the_line_that_the_title_tells(cooldown_figures, pairs):
    fig = cooldown_figures["lines"]
    assert fig.axes[0].get_title(loc="left").startswith("slope 0.900 ± 0.000, intercept −0.500")
    (x, y), = [d for d, line in zip(_drawn(fig.axes[0]), fig.axes[0].get_lines(), strict=False) if line.get_linestyle() == "-"]
    assert y == pytest.approx(0.9 * np.array(x) - 0.5)
    assert _legend(fig) == ["33M", "124M", "360M", "fitted", "equal"] and len(cooldown_figures["two lines"].axes) == 2
    with pytest.raises(ValueError, match="three sizes"):
        plots.perplexity_lines({"cooldown": pairs[:4]})


def test_published_lengths_have_a_panel_a_horizon_and_name_the_rates_left_out(cooldown_figures):
    fig = cooldown_figures["published lengths"]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["15,000 steps", "25,000 steps", "50,000 steps"]
    assert [len(_drawn(ax)) for ax in fig.axes] == [2, 2, 2] and _legend(fig) == ["peak rate 0.0005", "peak rate 0.001"]
    assert fig.legends[0].get_title().get_text().endswith("above the best: 0.0001")


def test_published_shapes_are_a_line_a_horizon_without_what_was_not_run(cooldown_figures):
    drawn = _drawn(cooldown_figures["published shapes"].axes[0])
    assert drawn[0] == ([1e-4, 5e-4], [0.004, -0.002]) and drawn[1][0] == [1e-4, 5e-4, 3e-3]


def test_two_pairs_get_a_mean_and_no_interval(cooldown_figures):
    ax = cooldown_figures["overshoot"].axes[0]
    heights = [np.ptp(path.vertices[:, 1]) for shaded in ax.collections for path in shaded.get_paths()]
    assert heights == [pytest.approx(0.04)] and ([1.6, 2.5], [0.09, 0.09]) in _drawn(ax)


def test_laws_have_a_panel_a_rate_and_are_named_with_their_memory(cooldown_figures):
    fig = cooldown_figures["laws"]
    assert _legend(fig) == ["annealing, memory 0.999", "annealing, memory 0.9995", "multi-power", "no error"]
    assert _drawn(fig.axes[0])[0] == ([2.96, 2.96], pytest.approx([2.952, 2.954]))  # linear alone, short to long
    diagonal = [line for line in fig.axes[1].get_lines() if line.get_linestyle() == ":"][-1]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [2.9, 2.96]


@pytest.mark.parametrize("draw, lacking", [
    (plots.length_lines, "fraction"), (plots.loss_on_line, "share"), (lambda frame: plots.averaging_spans(frame, {}), "read_out"),
    (lambda frame: plots.perplexity_lines({"a": frame}), "params"), (plots.published_lengths, "steps"),
    (lambda frame: plots.overshoot(frame, frame), "ratio"), (plots.law_predictions, "law"),
])
def test_a_frame_without_its_columns_is_refused_by_name(draw, lacking):
    with pytest.raises(ValueError, match=f"no column '{lacking}'"):
        draw(pd.DataFrame({"x": [1]}))


def test_nothing_to_draw_is_refused():
    for draw in (plots.published_shapes, lambda nothing: plots.perplexity_lines({})):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(pd.DataFrame())
