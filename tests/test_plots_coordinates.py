"""The figure of the coordinate check: what is drawn is what was measured."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from etastar.plots.coordinates import coordinate_lines
from etastar.plots.style import Drawing

LAYERS = ("embedding", "layers.0.attention_logits", "layers.0.stream", "layers.1.attention_logits", "layers.1.stream", "logits")


def measured(power=0.0, axis="width", steps=10, quantity="size"):
    """Sizes that grow as a power of width in the last layer's stream, twice as large in the second seed."""
    rows = [{"axis": axis, "width": 64, "depth": 2, "seed": seed, "step": step, "layer": layer, "role": "hidden", "quantity": quantity,
             "value": step * (1 + 3 * seed) * (size**power if layer == "layers.1.stream" else 1.0), axis: size}
            for size in (64, 128, 256) for seed in (0, 1) for step in range(1, steps + 1) for layer in LAYERS]
    return pd.DataFrame(rows)


def test_a_row_a_parametrization_and_a_panel_an_activation_of_the_last_layer():
    fig = coordinate_lines({"μP": measured(), "SP": measured(power=0.5)})
    assert isinstance(fig, Drawing) and len(fig.axes) == 8
    assert [ax.get_title(loc="left") for ax in fig.axes[:4]] == ["embedding", "attention\nlogits", "stream", "logits"]
    assert [fig.axes[i].get_ylabel() for i in (0, 4)] == ["μP\nmean |x|", "SP\nmean |x|"]
    assert {ax.get_xlabel() for ax in fig.axes[4:]} == {"width (units)"}
    lines = [line for line in fig.axes[6].lines if str(line.get_label()).startswith("step")]
    assert [line.get_label() for line in lines] == ["step 1 (initialization)", "step 3", "step 5", "step 8", "step 10"]
    assert lines[-1].get_xdata().tolist() == [64, 128, 256]
    # The mean of logs over seeds 1 and 4 times as large is twice the first
    np.testing.assert_allclose(lines[-1].get_ydata(), 10 * 2 * np.sqrt([64, 128, 256]))
    np.testing.assert_allclose([line.get_ydata()[0] for line in fig.axes[2].lines if len(line.get_xdata()) == 3], [2, 6, 10, 16, 20])


def test_both_axes_are_octaves_and_a_column_has_one_scale():
    fig = coordinate_lines({"μP": measured(), "SP": measured(power=0.5)})
    assert all(ax.get_xscale() == ax.get_yscale() == "log" and ax.xaxis.get_transform().base == 2 for ax in fig.axes)
    assert all(fig.axes[i].get_ylim() == fig.axes[i + 4].get_ylim() for i in range(4))
    assert all(np.ptp(np.log2(ax.get_ylim())) > 2.999 for ax in coordinate_lines({"μP": measured(steps=2)}).axes)
    assert [label.get_text() for label in fig.axes[7].get_xticklabels()] == ["64", "128", "256"]


def test_lines_are_told_apart_by_more_than_hue():
    lines = [line for line in coordinate_lines({"μP": measured()}).axes[0].lines if str(line.get_label()).startswith("step")]
    lightness = [float(matplotlib.colors.to_rgba_array(line.get_color())[0, :3] @ [0.2126, 0.7152, 0.0722]) for line in lines]
    assert lightness == sorted(lightness, reverse=True) and min(-np.diff(lightness)) > 0.05
    assert len({line.get_marker() for line in lines}) == 5


def test_depth_and_other_quantities():
    fig = coordinate_lines({"CompleteP": measured(axis="depth", steps=3, quantity="change")}, "depth", "change")
    assert fig.axes[0].get_xlabel() == "depth (layers)" and "step 1|" in fig.axes[0].get_ylabel()
    assert sum(str(line.get_label()).startswith("step") for line in fig.axes[0].lines) == 3


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="nothing to draw: no size over depth; measured are size over width"):
        coordinate_lines({"μP": measured()}, "depth")
    with pytest.raises(ValueError, match="no parametrizations"):
        coordinate_lines({})
    with pytest.raises(ValueError, match="no column 'value'"):
        coordinate_lines({"μP": measured().drop(columns="value")})
