"""Figures of published laws on measured grids of learning rate by batch size: the basin, what a law costs, its exponents."""

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from etastar.analysis.lr_grids import LOSS, LossGrid
from etastar.plots.style import Drawing, house_colours, legend_above, log2_axis, marks, need, some, styled, two_lines

LEVELS = (0, 1, 2, 4, 8, 16, 32, 64)  # permil above the best run
QUANTITIES = {"lr_params_exponent": "rate: exponent of\nparameters", "lr_tokens_exponent": "rate: exponent of\ntokens",
              "batch_tokens_exponent": "batch: exponent of\ntokens"}
UNITS = {"row": "interval over rows", "cell": "interval over cells"}


@styled
def law_map(runs: pd.DataFrame, points: pd.DataFrame | None = None, cells=None, loss: str = LOSS) -> Figure:
    """Loss over learning rate and batch, a panel a cell, in permil above its best run, with the point of every law.

    `runs`: cell, peak_lr, batch_tokens and the loss; `points`: law, cell, peak_lr, batch_tokens, as `law_excess` gives them. `cells`
    names the panels, all by default. Dots are runs; between them the loss is straight in the logs.
    """
    need(runs, "cell", "peak_lr", "batch_tokens", loss)
    cells = list(runs["cell"].unique() if cells is None else cells)
    some(cells, "cells")
    if unknown := sorted(set(cells) - set(runs["cell"])):
        raise ValueError(f"no cell {', '.join(unknown)}; there are {', '.join(runs['cell'].unique())}")
    columns = min(len(cells), 2)
    rows = -(-len(cells) // columns)
    fig = Drawing(layout="constrained", figsize=(5.2 * columns + 0.8, 3.9 * rows + 0.7))
    panels = fig.subplots(rows, columns, squeeze=False).ravel()
    laws = [] if points is None else list(points["law"].unique())
    drawn = dict(zip(laws, marks(laws), strict=True))
    for ax, cell in zip(panels, cells, strict=False):
        mesh = _basin(ax, runs[runs["cell"] == cell], loss)
        for law, mark in drawn.items():
            at = points[(points["cell"] == cell) & (points["law"] == law)]
            ax.plot(at["batch_tokens"], at["peak_lr"], mark["marker"], color=mark["color"], mec="white", mew=1.2, ms=10, clip_on=False)
        ax.set(title=cell, xlabel="batch (tokens)", ylabel="peak learning rate")
    for ax in panels[len(cells):]:
        ax.remove()
    panels[0].plot([], [], ".", color="black", ms=2, label="runs")
    for law, mark in drawn.items():
        panels[0].plot([], [], mark["marker"], color=mark["color"], mec="white", mew=1.2, ms=10, label=law)
    fig.colorbar(mesh, ax=panels[:len(cells)].tolist(), extend="max", label="loss above the best run (permil)")
    legend_above(fig, panels[0])
    return fig


@styled
def law_costs(excess: pd.DataFrame, floor: float | None = None) -> Figure:
    """What every law costs on every cell, faint, and their mean: columns law, how, excess_permil, batch_from, in_sample; one colour
    a `how`, as `law_excess.judged_laws` has them.

    `floor` is the mean excess of the cells' own optima, which no law can be asked to beat.
    """
    need(excess, "law", "how", "excess_permil", "batch_from", "in_sample")
    laws = excess.groupby(["law", "how"])["excess_permil"].mean().groupby("law").min().sort_values().index.tolist()
    hows = list(excess["how"].unique())
    fig = Drawing(layout="constrained", figsize=(8, 0.55 * len(laws) + 1.9))
    ax = fig.subplots()
    for (i, how), mark in zip(enumerate(hows), marks(hows), strict=True):
        aside = 0.24 * (i - (len(hows) - 1) / 2)
        of = excess[excess["how"] == how]
        y = np.array([laws.index(law) for law in of["law"]]) + aside
        ax.plot(of["excess_permil"], y, mark["marker"], color=mark["color"], alpha=0.3, ms=4, mew=0)
        for law, rows in of.groupby("law"):
            fill = mark["color"] if (rows["batch_from"] != "law").all() else "white"
            ax.plot(rows["excess_permil"].mean(), laws.index(law) + aside, mark["marker"], color=mark["color"], mfc=fill, mew=1.8, ms=8)
            if rows["in_sample"].all():
                ax.annotate("  in-sample", (rows["excess_permil"].max(), laws.index(law) + aside), va="center", fontsize=8)
        ax.plot([], [], mark["marker"], color=mark["color"], mfc="white", mew=1.8, ms=8, label=f"{how}, mean")
    if floor is not None:
        ax.axvline(floor, color="black", ls="--", lw=1, label=f"the cells' own optima: {floor:.2f}")
    ax.set_yticks(range(len(laws)), laws)
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_locator(FixedLocator([0, 0.5, 1, 2, 5, 10, 20, 50]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="loss above the best run of the cell (permil)", ylim=(len(laws) - 0.5, -0.5), xlim=(0, None))
    ax.grid(axis="y", visible=False)
    legend_above(fig, ax, "faint: cells; filled mean: the batch was picked on this grid", columns=2)
    return fig


@styled
def exponent_estimates(table: pd.DataFrame) -> Figure:
    """Exponents by estimator with their 95 % intervals, a panel a quantity: columns estimator, unit, quantity, estimate, low, high,
    published, as `steplaw_refit.estimators` has them. The upright line is the published exponent."""
    need(table, "estimator", "unit", "quantity", "estimate", "low", "high", "published")
    names, quantities = list(table["estimator"].unique()), list(table["quantity"].unique())
    units = list(table["unit"].unique())
    fig = Drawing(layout="constrained", figsize=(3 * len(quantities) + 2.4, 0.48 * len(names) + 1.9))
    panels = fig.subplots(1, len(quantities), squeeze=False, sharey=True)[0]
    for ax, quantity in zip(panels, quantities, strict=True):
        of = table[table["quantity"] == quantity]
        ax.axvline(of["published"].iloc[0], color="black", ls="--", lw=1, label="published")
        for (i, unit), mark in zip(enumerate(units), marks(units), strict=True):
            rows = of[of["unit"] == unit]
            y = np.array([names.index(name) for name in rows["estimator"]]) + 0.24 * (i - (len(units) - 1) / 2)
            ax.hlines(y, rows["low"], rows["high"], color=mark["color"], lw=2)
            ax.plot(rows["estimate"], y, mark["marker"], color=mark["color"], label=UNITS.get(unit, unit))
        ax.set(xlabel=QUANTITIES.get(quantity, quantity), ylim=(len(names) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(names)), names)
    legend_above(fig, panels[0])
    return fig


@styled
def batch_exponents(table: pd.DataFrame, flip=None, published=None) -> Figure:
    """The exponent of the best rate in tokens at each fixed batch: columns batch_tokens, tokens_exponent and its _low, _high.

    `flip` (a `SignFlip`) shades where the exponent changes its sign; `published` maps names to exponents, drawn as level lines.
    """
    need(table, "batch_tokens", "tokens_exponent", "tokens_exponent_low", "tokens_exponent_high")
    fig = Drawing(layout="constrained", figsize=(7, 4.4))
    ax = fig.subplots()
    if flip is not None:
        low, high = max(flip.batch_tokens_low, table["batch_tokens"].min()), min(flip.batch_tokens_high, table["batch_tokens"].max())
        ax.axvspan(low, high, color="#56B4E9", alpha=0.2, lw=0,
                   label=f"sign changes: {_tokens(flip.batch_tokens)} [{_tokens(low)}, {_tokens(high)}]")
    ax.axhline(0, color="black", lw=0.8)
    for (name, exponent), mark in zip((published or {}).items(), marks(range(1, 1 + len(published or {}))), strict=True):
        ax.axhline(exponent, color=house_colours()[-1], ls=mark["linestyle"], lw=1.3, label=f"{name}: {exponent:+.3g}".replace("-", "−"))
    ax.vlines(table["batch_tokens"], table["tokens_exponent_low"], table["tokens_exponent_high"], color="#0072B2", lw=2)
    ax.plot(table["batch_tokens"], table["tokens_exponent"], "o-", color="#0072B2", label="released runs, 95 % over cells")
    log2_axis(ax, table["batch_tokens"])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    ax.set(xlabel="batch held fixed (tokens)", ylabel=two_lines("exponent of the best rate in tokens (at fixed size and batch)"))
    legend_above(fig, ax, columns=2)
    return fig


def _basin(ax, rows: pd.DataFrame, loss: str):
    """One cell's loss as filled levels over log batch and log rate, its runs as dots."""
    grid = LossGrid.of(rows, loss)
    rates = np.geomspace(rows["peak_lr"].min(), rows["peak_lr"].max(), 80)
    batches = np.geomspace(rows["batch_tokens"].min(), rows["batch_tokens"].max(), 80)
    excess = 1000 * (grid.surface(rates, batches) / grid.least - 1)
    colours = "cividis_r"
    mesh = ax.contourf(batches, rates, excess, levels=LEVELS, cmap=colours, extend="max",
                       norm=BoundaryNorm(LEVELS, 256, extend="max"))
    ax.plot(rows["batch_tokens"], rows["peak_lr"], ".", color="black", ms=2)
    log2_axis(ax, rows["batch_tokens"])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    ax.set_yscale("log", base=2)
    low, high = np.log2(rates[[0, -1]])
    ax.yaxis.set_major_locator(FixedLocator([2.0**k for k in range(int(np.ceil(low)), int(high) + 1)]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"$2^{{{round(np.log2(y))}}}$"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(visible=False)
    return mesh


def _tokens(count: float) -> str:
    return EngFormatter(places=0, sep="")(count)
