"""The coordinate check as a figure: sizes of activations over widths or depths, one line a step."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from etastar.plots.style import LINES, MARKERS, Drawing, need, some, styled

UNITS = {"size": "mean |x|", "change": "mean |x − x at step 1|", "update": "RMS move / RMS weight"}
MOST_LINES = 5
LEAST_OCTAVES = 3  # of a vertical axis, so that a slope of a few hundredths looks flat


@styled
def coordinate_lines(measured: Mapping[str, pd.DataFrame], axis: str = "width", quantity: str = "size") -> Figure:
    """What `measure_coordinates` found, a row of panels a parametrization and a panel a kind of activation, of its last layer.

    Lines are steps (at most five of them, first and last among them), means of log2 over seeds; small points are seeds. A column's
    panels have one vertical axis, so that slopes can be held side by side: flat lines are what a right parametrization has.
    Raises ValueError where an axis or a quantity was not measured.
    """
    some(measured, "parametrizations")
    rows = {name: _rows(frame, axis, quantity) for name, frame in measured.items()}
    layers = _last_layers(next(iter(rows.values())))
    fig = Drawing(layout="constrained", figsize=(1.8 * len(layers) + 0.8, 2.2 * len(rows) + 0.9))
    panels = fig.subplots(len(rows), len(layers), sharex=True, sharey="col", squeeze=False)
    steps = _some_steps(next(iter(rows.values()))["step"].unique())
    for (name, frame), across in zip(rows.items(), panels, strict=True):
        for ax, (kind, layer) in zip(across, layers.items(), strict=True):
            _panel(ax, frame[frame["layer"] == layer], axis, steps)
            if ax in panels[0]:
                ax.set_title(kind.replace("_", "\n"), fontsize="medium")
        across[0].set_ylabel(f"{name}\n{UNITS[quantity]}")
    for ax in panels[-1]:
        ax.set_xlabel({"width": "width (units)", "depth": "depth (layers)"}[axis])
        _at_least(ax, LEAST_OCTAVES)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=MOST_LINES, alignment="left")
    return fig


def _rows(frame: pd.DataFrame, axis: str, quantity: str) -> pd.DataFrame:
    need(frame, "axis", "width", "depth", "seed", "step", "layer", "quantity", "value")
    found = frame[(frame["axis"] == axis) & (frame["quantity"] == quantity)]
    there = (frame["quantity"] + " over " + frame["axis"]).unique()
    some(found, f"{quantity} over {axis}; measured are {', '.join(there)}")
    return found


def _last_layers(frame: pd.DataFrame) -> dict[str, str]:
    """The last name of each kind of activation, in the order of computing."""
    return {layer.split(".")[-1]: layer for layer in frame["layer"].unique()}


def _some_steps(steps: np.ndarray) -> list[int]:
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MOST_LINES, len(steps))).round().astype(int))
    return [int(step) for step in np.sort(steps)[chosen]]


def _panel(ax, frame: pd.DataFrame, axis: str, steps: list[int]) -> None:
    """One kind of activation: a line a step, darker with every step."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.0, len(steps)))
    for step, shade, line, marker in zip(steps, shades, LINES, MARKERS, strict=False):
        rows = frame[frame["step"] == step]
        mean = np.exp2(np.log2(rows["value"]).groupby(rows[axis]).mean())
        label = f"step {step}" + " (initialization)" * (step == 1)
        ax.plot(rows[axis], rows["value"], ".", color=shade, ms=2.5, alpha=0.6)
        ax.plot(mean.index, mean, color=shade, linestyle=line, marker=marker, ms=4, label=label)
    sizes = sorted(frame[axis].unique())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())


def _at_least(ax, octaves: float) -> None:
    """Widen a vertical axis about its middle, in octaves; panels that share it follow."""
    low, high = np.log2(ax.get_ylim())
    more = max(0.0, octaves - (high - low)) / 2
    ax.set_ylim(2 ** (low - more), 2 ** (high + more))
