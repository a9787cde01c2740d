"""Figures of the printed optimum norms: over horizons at each batch, and how their slope depends on how the batch is chosen."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from etastar.plots.style import MARKERS, Drawing, house_colours, legend_above, log2_axis, need, some, styled, two_lines

NORM = "log2 of the output norm at the best rate (RMS→∞)"
BATCH_COLOURS = "cividis"  # light and dark in order of the batch, so that it reads without hue


@styled
def printed_norms(optima: pd.DataFrame, profiles: pd.DataFrame, band: tuple[float, float]) -> Figure:
    """The optimum norm over horizons, one line a fixed batch, and over a continuous batch with its error: the columns of
    `norm_parabola.norm_optima` (with batch_sequences) and of `batch_profiles`; `band` is shaded.

    Rings mark the batch of least loss on the grid.
    """
    need(optima, "horizon_tokens", "batch_sequences", "log2_norm", "loss")
    need(profiles, "horizon_tokens", "log2_norm", "log2_norm_se")
    fig = Drawing(layout="constrained", figsize=(7.4, 5))
    ax = fig.subplots()
    ax.axhspan(*band, color="#56B4E9", alpha=0.25, lw=0, label=f"printed band {np.mean(band):g} ± {np.ptp(band) / 2:.2g}")
    batches = sorted(optima["batch_sequences"].unique())
    for i, batch in enumerate(batches):
        of = optima[optima["batch_sequences"] == batch].sort_values("horizon_tokens")
        colour = colormaps[BATCH_COLOURS](0.9 * (1 - i / max(1, len(batches) - 1)))
        ax.plot(of["horizon_tokens"], of["log2_norm"], marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.2, color=colour,
                label=f"batch {batch} sequences")
    best = optima.loc[optima.groupby("horizon_tokens")["loss"].idxmin()]
    ax.plot(best["horizon_tokens"], best["log2_norm"], "o", ms=13, mfc="none", mec="black", mew=1.4, label="best batch of the grid")
    ax.errorbar(profiles["horizon_tokens"], profiles["log2_norm"], profiles["log2_norm_se"], fmt="X--", color="#D55E00", ms=9, lw=2,
                capsize=4, mec="white", label="continuous batch, ± 1 error")
    log2_axis(ax, optima["horizon_tokens"])
    ax.set(xlabel="horizon (tokens)", ylabel=NORM)
    legend_above(fig, ax, columns=3)
    return fig


@styled
def norm_choices(table: pd.DataFrame, margin: float = 0.06) -> Figure:
    """The optimum norm at each horizon, and its slope with the 95 % interval, by choice of batch and fit: the columns of
    `norm_parabola.batch_choices` or `choices`. Shaded: slopes within ±`margin` of zero."""
    need(table, "batch", "fit", "slope", "slope_low", "slope_high")
    horizons = [name for name in table if name.startswith("2^")]
    some(horizons, "columns of horizons (2^31, …)")
    several = table["fit"].nunique() > 1
    names = [f"{row.fit}; batch {row.batch}" if several else f"batch {row.batch}" for row in table.itertuples()]
    places = np.arange(len(table))
    fig = Drawing(layout="constrained", figsize=(9.6, 0.34 * len(table) + 2))
    left, right = fig.subplots(1, 2, sharey=True)
    for i, horizon in enumerate(horizons):
        colour = house_colours()[i % len(house_colours())]
        aside = 0.12 * (i - (len(horizons) - 1) / 2)  # equal norms would hide one another
        left.plot(table[horizon], places + aside, MARKERS[i % len(MARKERS)], color=colour, ms=6, mec="white", mew=0.6,
                  label=f"$2^{{{horizon[2:]}}}$ tokens")
    right.axvspan(-margin, margin, color="#56B4E9", alpha=0.25, lw=0, label=f"within ±{margin:g}")
    right.axvline(0, color="black", lw=0.8)
    right.hlines(places, table["slope_low"], table["slope_high"], color="#0072B2", lw=2, label="95 % interval over horizons")
    right.plot(table["slope"], places, "o", color="#0072B2", ms=5)
    left.set_yticks(places, names)
    left.set(xlabel=two_lines(NORM), ylim=(len(table) - 0.5, -0.5))
    right.set(xlabel="slope of log2 norm\n(octaves per octave of tokens)")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    handles, labels = (sum(both, []) for both in zip(left.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True))
    fig.legend(handles, labels, loc="outside upper left", ncols=4, alignment="left")
    return fig
