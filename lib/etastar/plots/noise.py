"""Figures of the noise atlas: deviations by source over rate and scale, and what pairing over seeds leaves of them."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from etastar.analysis.noise_atlas import SOURCES
from etastar.plots.style import Drawing, house_colours, legend_above, marks, need, some, styled, two_lines

DEVIATION = "deviation of the final loss (nats per token)"


@styled
def noise_levels(table: pd.DataFrame) -> Figure:
    """Deviation over the rate in units of the best, a panel a width and horizon: `analysis.noise_atlas.noise_table`.

    One colour and marker a source; upright lines are chi-square intervals. Cells without two finite runs, and those that never
    strayed, are not drawn on the log axis.
    """
    need(table, "source", "width", "horizon_tokens", "relative_lr", "sd", "sd_low", "sd_high", "df")
    kept = table[(table["df"] > 0) & (table["sd"] > 0)]
    some(kept, "cells with two finite runs")
    scales = sorted(set(zip(kept["width"], kept["horizon_tokens"], strict=True)))
    sources = [name for name in SOURCES if name in set(kept["source"])]
    columns = min(3, len(scales))
    rows = -(-len(scales) // columns)
    fig = Drawing(layout="constrained", figsize=(3.1 * columns + 1.6, 2.9 * rows + 0.9))
    panels = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (width, horizon) in zip(panels, scales, strict=False):
        at = kept[(kept["width"] == width) & (kept["horizon_tokens"] == horizon)]
        for (i, source), mark in zip(enumerate(sources), marks(sources), strict=True):
            cell = at[at["source"] == source].sort_values("relative_lr")
            x = cell["relative_lr"] * 2.0 ** (0.12 * (i - (len(sources) - 1) / 2))
            ax.plot(x, cell["sd"], mark["marker"], color=mark["color"], ls="", label=SOURCES[source])
            ax.vlines(x, cell["sd_low"], cell["sd_high"], color=mark["color"], lw=1, alpha=0.7)
        ax.set(title=f"width {width}, {horizon / 1000:,.0f}k tokens", xlabel="rate over the best", ylabel=two_lines(DEVIATION))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.label_outer()
    for ax in panels[len(scales):]:
        ax.remove()
    legend_above(fig, panels[0], "upright: 95 % interval (chi-square)", columns=2)
    return fig


@styled
def pairing(pairs: pd.DataFrame) -> Figure:
    """Deviation of a paired difference over that of unpaired runs: `analysis.noise_atlas.pair_table`, one mark a distance of the rates.

    Below the dotted diagonal pairing over seeds gains.
    """
    need(pairs, "sd", "independent_sd", "octaves_apart", "n")
    fig = Drawing(layout="constrained", figsize=(6, 4.6))
    ax = fig.subplots()
    apart = pairs["octaves_apart"]
    kinds = {"arms at one rate": apart < 0.01, "rates up to 1.5 octaves apart": apart.between(0.01, 1.51),
             "rates further apart": apart > 1.51}
    for (name, chosen), mark in zip(kinds.items(), marks(kinds), strict=True):
        rows = pairs[chosen]
        if len(rows):
            ax.plot(rows["independent_sd"], rows["sd"], mark["marker"], color=mark["color"], mfc="none", mew=1.3, ls="", label=name)
    ends = np.array([pairs["independent_sd"].min(), pairs["independent_sd"].max()])
    ax.plot(ends, ends, color=house_colours()[6], ls=":", lw=1, label="pairing gains nothing")
    ax.set(xscale="log", yscale="log", xlabel="deviation of unpaired runs' difference (nats per token)",
           ylabel="deviation of paired runs' difference (nats per token)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_locator(NullLocator())
    legend_above(fig, ax, columns=2)
    return fig
