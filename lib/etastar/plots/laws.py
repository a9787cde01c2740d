"""Figures of the published laws: what each says over the horizon, and how far they are apart for one run."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from etastar.plots.style import Drawing, house_colours, legend_above, marks, need, some, styled

PANELS = {"sp": "standard parametrization: the peak rate", "mup": "μP: the base rate", "norm": "norm-transfer scaling: the rate"}
WHERE = {"in the range fitted on": "-", "beyond it": "--", "range not told": ":"}
QUANTITIES = {"peak_lr": "peak learning rate", "batch_tokens": "batch (tokens)"}


@styled
def law_lines(frame: pd.DataFrame) -> Figure:
    """What each law says over the horizon, a panel a parametrization: the columns of `analysis.laws.over_horizon`.

    Solid where the law was fitted, dashed beyond that, dotted where no range is told.
    """
    need(frame, "law", "horizon_tokens", "peak_lr", "parametrization", "extrapolation")
    kinds = [kind for kind in PANELS if kind in set(frame["parametrization"])]
    some(kinds, f"rows of parametrization {', '.join(PANELS)}")
    fig = Drawing(layout="constrained", figsize=(4.6 * len(kinds) + 1, 4.4))
    panels = fig.subplots(1, len(kinds), squeeze=False)[0]
    drawn = dict(zip(names := list(dict.fromkeys(frame["law"])), marks(names), strict=True))
    for ax, kind in zip(panels, kinds, strict=True):
        for name, rows in frame[frame["parametrization"] == kind].groupby("law", sort=False):
            _line(ax, rows.sort_values("horizon_tokens"), drawn[name])
        ax.set(xscale="log", yscale="log", xlabel="horizon (tokens)", ylabel="learning rate", title=PANELS[kind])
        _few_ticks(ax.yaxis, *ax.get_ylim())
    for name, mark in drawn.items():
        panels[0].plot([], [], color=mark["color"], marker=mark["marker"], ls="", label=name)
    for what, line in WHERE.items():
        panels[0].plot([], [], color="black", ls=line, label=what)
    legend_above(fig, panels[0], columns=5)
    return fig


@styled
def recommendation(frame: pd.DataFrame, quantity: str = "peak_lr") -> Figure:
    """What the laws that apply say for one run, with their spread: the columns of `recommend`; open: beyond the range fitted on.

    A horizontal line holds low to high over a law's own printed fits. ValueError where no law applies.
    """
    need(frame, "law", "quantity", "value", "low", "high", "applies", "extrapolation")
    rows = frame[frame["applies"].astype(bool) & (frame["quantity"] == quantity)].sort_values("value")
    some(rows, f"law that gives a {QUANTITIES.get(quantity, quantity)} here; the column why_not tells each law's reason")
    fig = Drawing(layout="constrained", figsize=(7, 1.6 + 0.42 * len(rows)))
    ax = fig.subplots()
    colour = house_colours()[0]
    for place, row in enumerate(rows.itertuples()):
        inside = row.extrapolation == 1
        ax.plot(row.value, place, "o", color=colour, mfc=colour if inside else "white", ms=7, mew=1.6, zorder=3)
        if not math.isnan(row.low):
            ax.hlines(place, row.low, row.high, color=colour, lw=1.2)
    ax.axvspan(rows["value"].min(), rows["value"].max(), color="#E69F00", alpha=0.15, lw=0)
    ax.set(xscale="log", xlim=(rows["value"].min() / 1.6, rows["value"].max() * 1.6), ylim=(-0.6, len(rows) - 0.4),
           xlabel=QUANTITIES.get(quantity, quantity))
    ax.set_yticks(range(len(rows)), [f"{row.law}  {row.value:.3g}" for row in rows.itertuples()])
    _few_ticks(ax.xaxis, *ax.get_xlim())
    ax.set_title(f"{rows['value'].max() / rows['value'].min():.2g}-fold apart; filled: inside the range fitted on")
    return fig


def _line(ax, rows, mark) -> None:
    """One law, its segments drawn by where they lie; a segment is inside only if both ends are."""
    x, y, beyond = (rows[name].to_numpy(float) for name in ("horizon_tokens", "peak_lr", "extrapolation"))
    kind = np.where(np.isnan(beyond), 2, np.where(beyond > 1, 1, 0))
    for i in range(len(x) - 1):
        ax.plot(x[i : i + 2], y[i : i + 2], color=mark["color"], ls=list(WHERE.values())[max(kind[i], kind[i + 1])])
    every = max(1, len(x) // 6)
    ax.plot(x[::every], y[::every], mark["marker"], color=mark["color"], ms=4.5)


def _few_ticks(axis, low, high) -> None:
    """Labelled ticks of 1, 2, 5 within a narrow range, where powers of ten alone would leave the axis bare."""
    ticks = [m * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    shown = [t for t in ticks if low <= t <= high]
    axis.set_ticks(shown, labels=[f"{t:.3g}" for t in shown])
    axis.set_minor_locator(NullLocator())
