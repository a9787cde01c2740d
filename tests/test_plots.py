import hashlib
import types
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

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


def _text_boxes(fig):
    """(text, box in pixels) of every piece of text that is really drawn; ticks out of view are not."""
    drawn, draw = {}, matplotlib.text.Text.draw

    def record(self, renderer, *args, **kwargs):
        draw(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            drawn[id(self)] = (self.get_text(), self.get_window_extent(renderer))

    with mock.patch.object(matplotlib.text.Text, "draw", record):
        FigureCanvasAgg(fig).draw()
    return list(drawn.values())


def _assert_text_is_whole_and_apart(fig):
    boxes = _text_boxes(fig)
    for i, (text, box) in enumerate(boxes):
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, f"{text!r} is cut at the side"
        assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, f"{text!r} is cut above or below"
        for other, place in boxes[:i]:
            assert not box.overlaps(place), f"{text!r} lies over {other!r}"


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
    words = {text for text, _ in _text_boxes(fig)}
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
    _assert_text_is_whole_and_apart(plots.verdict_forest(board))
    _assert_text_is_whole_and_apart(plots.lr_bowls(losses, {"cos10": _bowl(-7), "wsd20": _bowl(-8)}))
    _assert_text_is_whole_and_apart(plots.schedule_lines({f"schedule {i}": np.ones(9) for i in range(7)}, 10**6))
    frame = pd.DataFrame({"contrast": list("ab"), "seed": 1, "difference": [0.01, -0.02]})
    _assert_text_is_whole_and_apart(plots.paired_differences(frame, margin=0.005))


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
