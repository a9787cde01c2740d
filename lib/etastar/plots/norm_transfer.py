"""Figures of norm transfer: the loss over the output norm and over rate and batch, the norm at the optimum, and how the norm grows."""

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from etastar.plots.norm_pieces import (
    NORM,
    arrow,
    batch_looks,
    cap_above,
    crossed,
    edged,
    hold,
    inside,
    notes_on,
    octaves,
    panels_of,
    path,
    perhaps,
    sides,
    star,
)
from etastar.plots.power_laws import AXES
from etastar.plots.style import LINES, LOSS, MARKERS, Drawing, legend_above, log2_axis, marks, need, some, styled, two_lines

STEPS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # nats above the best cell
QUADRATIC = ("a11", "a12", "a22", "best_lr", "best_batch_tokens")
FARTHEST = 0.2  # nats above its best to which the fitted quadratic is drawn: it is local
DIVERGED = "#D55E00"
KINDS = {"width": AXES["width"], "depth": "depth (blocks)"}


@styled
def loss_by_norm(rows: pd.DataFrame, optima: pd.DataFrame | None = None) -> Figure:
    """Loss over the output norm, a panel a horizon and a colour a batch, joined in the order of the rate: one optimizer's runs.

    `rows`: optimizer, horizon_tokens, batch_tokens, peak_lr, seed, loss (nats; NaN diverged), log2_norm. `optima`: optimizer,
    horizon_tokens, log2_norm, log2_norm_low, log2_norm_high, best_loss, edge. Means are of rates at which no seed diverged.
    """
    need(rows, "optimizer", "horizon_tokens", "batch_tokens", "peak_lr", "seed", "loss", "log2_norm")
    name = _one_optimizer(rows)
    optima = edged(perhaps(optima, "optimizer", "horizon_tokens", "log2_norm", "log2_norm_low", "log2_norm_high", "best_loss", "edge"))
    optima = optima[optima["optimizer"] == name]
    horizons = sorted(rows["horizon_tokens"].unique())
    fig, panels = panels_of(len(horizons), 3.5, 3.3, NORM, LOSS, sharex=True)
    looks = batch_looks(rows["batch_tokens"])
    for ax, horizon in zip(panels, horizons, strict=True):
        at = rows[rows["horizon_tokens"] == horizon]
        for batch, of in at.groupby("batch_tokens"):
            path(ax, of, "log2_norm", "loss", looks[batch])
        ax.set_title(f"{octaves(horizon)} tokens")
    panels[0].set_xlim(panels[0].get_xlim())  # before intervals that may be wide
    for ax, horizon in zip(panels, horizons, strict=True):
        for row in optima[optima["horizon_tokens"] == horizon].itertuples():
            at = inside(ax, row.log2_norm, row.best_loss) if row.edge else (row.log2_norm, row.best_loss)
            ax.plot([row.log2_norm_low, row.log2_norm_high], [at[1]] * 2, "-", color="black", lw=2)
            star(ax, at, row.edge, (sides(row.edge)[1], 0))
        cap_above(ax, rows.loc[rows["horizon_tokens"] == horizon, "loss"])
    for batch, look in looks.items():
        panels[0].plot([], [], **look, label=f"batch of {octaves(batch)} tokens")
    panels[0].plot([], [], "*-", color="black", ms=11, label="optimum of the surface")
    notes = [name, "faint: seeds", *notes_on(optima, "log2_norm"), *crossed(rows["loss"], "× above: diverged")]
    legend_above(fig, panels[0], "; ".join(notes), columns=3)
    return fig


@styled
def optimal_norm(optima: pd.DataFrame, fixed: pd.DataFrame | None = None) -> Figure:
    """The output norm at the best rate and batch over the horizon, a panel an optimizer; grey: at the best rate of fixed batches.

    `optima`: optimizer, horizon_tokens, log2_norm (NaN: left out), log2_norm_low, log2_norm_high, edge; perhaps basin, the half-width of
    the loss basin in octaves of the norm, drawn as a band. `fixed`: optimizer, horizon_tokens, batch_tokens, log2_norm.
    """
    need(optima, "optimizer", "horizon_tokens", "log2_norm", "log2_norm_low", "log2_norm_high", "edge")
    optima = edged(optima)
    fixed = perhaps(fixed, "optimizer", "horizon_tokens", "batch_tokens", "log2_norm").dropna(subset="log2_norm")
    known = optima.dropna(subset="log2_norm")
    some(known, "horizons with an optimum")
    names = list(dict.fromkeys([*optima["optimizer"], *fixed["optimizer"]]))
    fig, panels = panels_of(len(names), 4.6, 4, AXES["horizon_tokens"], NORM, sharex=True, sharey=True)
    greys = batch_looks(fixed["batch_tokens"], "Greys", (0.75, 0.45))
    for ax, name, mark in zip(panels, names, marks(names), strict=True):
        for batch, of in fixed[fixed["optimizer"] == name].groupby("batch_tokens"):
            ax.plot(of["horizon_tokens"], of["log2_norm"], **greys[batch] | {"lw": 1, "ms": 4})
        rows = known[known["optimizer"] == name].sort_values("horizon_tokens")
        if "basin" in rows:
            _band(ax, rows, mark["color"])
        _norms(ax, rows, rows["horizon_tokens"], mark)
        log2_axis(ax, pd.concat([known["horizon_tokens"], fixed["horizon_tokens"]]))
        ax.margins(x=0.1)
        panels[0].plot([], [], **mark | {"ms": 8}, label=f"{name}: best rate and batch")
    for batch, look in greys.items():
        panels[0].plot([], [], **look | {"lw": 1, "ms": 4}, label=f"best rate at {octaves(batch)} tokens a batch")
    hold(panels[0], pd.concat([known["log2_norm"], fixed["log2_norm"]]))
    notes = ["upright: interval"] + ["light: half-width of the basin"] * ("basin" in optima) + notes_on(optima, "log2_norm")
    legend_above(fig, panels[0], "; ".join(notes), columns=2 if len(names) == 1 else 3)
    return fig


@styled
def surfaces(rows: pd.DataFrame, optima: pd.DataFrame | None = None, fits: pd.DataFrame | None = None) -> Figure:
    """Mean loss above the best cell over batch and rate, a panel a horizon, with the fitted quadratic and its optimum: one optimizer.

    `rows` as for `loss_by_norm`, without the norm. `optima`: horizon_tokens, best_lr, best_batch_tokens, edge and perhaps their _low and
    _high. `fits`: horizon_tokens, a11, a12, a22 (nats per octave²), best_lr, best_batch_tokens: loss − best = ½ zᵀAz with z = (log2 rate,
    log2 batch) − optimum; a NaN draws none. A cell of which a seed diverged is a cross.
    """
    need(rows, "optimizer", "horizon_tokens", "batch_tokens", "peak_lr", "seed", "loss")
    name = _one_optimizer(rows)
    optima = _of_optimizer(edged(perhaps(optima, "horizon_tokens", "best_lr", "best_batch_tokens", "edge")), name)
    fits = _of_optimizer(perhaps(fits, "horizon_tokens", *QUADRATIC), name).dropna(subset=list(QUADRATIC))
    horizons = sorted(rows["horizon_tokens"].unique())
    fig, panels = panels_of(len(horizons), 3.4, 3.3, AXES["batch_tokens"], "peak learning rate", sharex=True, sharey=True)
    side = _side(rows["peak_lr"])
    for ax, horizon in zip(panels, horizons, strict=True):
        mesh = _cells(ax, rows[rows["horizon_tokens"] == horizon], side)
        ax.set_title(f"{octaves(horizon)} tokens")
        _rates_and_batches(ax, rows)
        for row in fits[fits["horizon_tokens"] == horizon].itertuples():
            _contours(ax, row)
        for row in optima[optima["horizon_tokens"] == horizon].itertuples():
            _optimum(ax, row)
    panels[0].plot([], [], "*", color="black", ms=11, label="optimum of the surface")
    if len(fits):
        panels[0].plot([], [], color="black", lw=0.9, label="fitted surface, at the steps of the colours")
    fig.colorbar(mesh, ax=panels, extend="max", ticks=STEPS, format="%g", label="loss above the best cell (nats per token)")
    legend_above(fig, panels[0], "; ".join([name, *notes_on(optima, "best_lr"), *crossed(rows["loss"], "×: a seed diverged")]))
    return fig


@styled
def norm_growth(curves: pd.DataFrame, published: pd.DataFrame | None = None, margin: float | None = None) -> Figure:
    """The output norm over rate · steps with its bound 1 + rate · steps, and below it the difference from the points a paper prints.

    `curves`: peak_lr, batch_tokens, seed, log2_lr_steps, log2_norm, of a constant rate from norm 1: a colour a batch, a line style a rate.
    `published`: log2_lr_steps, log2_norm; curves are read there along straight lines. `margin` (octaves) shades what counts as equal.
    """
    need(curves, "peak_lr", "batch_tokens", "seed", "log2_lr_steps", "log2_norm")
    curves = curves[np.isfinite(curves["log2_lr_steps"]) & np.isfinite(curves["log2_norm"])].sort_values("log2_lr_steps")
    some(curves, "points with a norm")
    published = perhaps(published, "log2_lr_steps", "log2_norm").sort_values("log2_lr_steps")
    below = len(published) > 0
    fig = Drawing(layout="constrained", figsize=(7, 4.6 + 1.9 * below))
    panels = fig.subplots(1 + below, 1, squeeze=False, sharex=True, height_ratios=[2.6, 1][: 1 + below])[:, 0]
    rates = sorted(curves["peak_lr"].unique())
    looks = batch_looks(curves["batch_tokens"])
    for (rate, batch, _), of in curves.groupby(["peak_lr", "batch_tokens", "seed"]):
        look = looks[batch] | {"linestyle": LINES[rates.index(rate) % len(LINES)]}
        panels[0].plot(of["log2_lr_steps"], of["log2_norm"], **look | {"marker": ""}, lw=1.3)
        if below:
            aside = 0.12 * (list(looks).index(batch) - (len(looks) - 1) / 2)
            _differences(panels[1], of, published, aside, look | {"marker": MARKERS[rates.index(rate) % len(MARKERS)]})
    x = np.linspace(curves["log2_lr_steps"].min(), curves["log2_lr_steps"].max(), 100)
    panels[0].plot(x, np.log2(1 + 2**x), color="black", lw=0.8, label="bound 1 + rate · steps")
    if below:
        _published(panels, published, margin)
    _growth_legend(fig, panels, looks, rates)
    return fig


@styled
def norm_locations(models: pd.DataFrame) -> Figure:
    """The output norm at the optimum over width and depth, a panel each and a colour an optimizer.

    Columns kind ("width" or "depth"), value, optimizer, log2_norm (NaN: left out), log2_norm_low, log2_norm_high, edge.
    """
    need(models, "kind", "value", "optimizer", "log2_norm", "log2_norm_low", "log2_norm_high", "edge")
    if unknown := sorted(set(models["kind"]) - set(KINDS)):
        raise ValueError(f"no kind {', '.join(map(repr, unknown))}; a kind is one of {', '.join(KINDS)}")
    models = edged(models)
    known = models.dropna(subset="log2_norm")
    some(known, "models with an optimum")
    kinds = [kind for kind in KINDS if kind in set(known["kind"])]
    names = list(models["optimizer"].unique())
    fig, panels = panels_of(len(kinds), 4.2, 3.6, "", NORM, sharey=True)
    for ax, kind in zip(panels, kinds, strict=True):
        at = known[known["kind"] == kind]
        for i, (name, mark) in enumerate(zip(names, marks(names), strict=True)):
            rows = at[at["optimizer"] == name].sort_values("value")
            _norms(ax, rows, rows["value"] * 2 ** (0.08 * (i - (len(names) - 1) / 2)), mark)
        log2_axis(ax, at["value"])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.margins(x=0.12)
        ax.set_xlabel(KINDS[kind])
    for name, mark in zip(names, marks(names), strict=True):
        panels[0].plot([], [], **mark | {"ms": 8}, label=name)
    hold(panels[0], known["log2_norm"])
    legend_above(fig, panels[0], "; ".join(["upright: interval", *notes_on(models, "log2_norm")]))
    return fig


def _rates_and_batches(ax, rows: pd.DataFrame) -> None:
    """Octaves on both axes, three quarters of one beyond the grid."""
    log2_axis(ax, rows["batch_tokens"])
    ax.set_yscale("log", base=2)
    low, high = np.log2(rows["peak_lr"].min()), np.log2(rows["peak_lr"].max())
    step = max(1, round((high - low) / 8))
    ax.yaxis.set_major_locator(FixedLocator(2.0 ** np.arange(np.floor(low), np.ceil(high) + 1, step)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: octaves(y)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(rows["batch_tokens"].min() * 2**-0.75, rows["batch_tokens"].max() * 2**0.75), ylim=(2 ** (low - 0.75), 2 ** (high + 0.75)))


def _norms(ax, rows: pd.DataFrame, x: pd.Series, mark: dict) -> None:
    """Norms joined by a line with upright intervals; those outside their grid open, with an arrow where the rate's side is told."""
    widths = np.where(rows["edge"] == "", 1.8, 0.8)  # thin, so that an arrow along it is seen
    ax.vlines(x, rows["log2_norm_low"], rows["log2_norm_high"], color=mark["color"], lw=widths)
    ax.plot(x, rows["log2_norm"], color=mark["color"], linestyle=mark["linestyle"])
    for at, norm, edge in zip(x, rows["log2_norm"], rows["edge"], strict=True):
        ax.plot(at, norm, mark["marker"], color=mark["color"], mfc="white" if edge else mark["color"], mew=1.6, ms=8, zorder=3)
        arrow(ax, (at, norm), (0, sides(edge)[1]), mark["color"])


def _band(ax, rows: pd.DataFrame, colour: str) -> None:
    """The half-width of the basin about each norm; rimmed, so that one horizon alone is seen."""
    pale = tuple(1 - 0.2 * (1 - part) for part in to_rgb(colour))
    low, high = rows["log2_norm"] - rows["basin"], rows["log2_norm"] + rows["basin"]
    ax.fill_between(rows["horizon_tokens"], low, high, fc=pale, ec=pale, lw=8, zorder=0)


def _side(rates: pd.Series) -> float:
    """The side of a cell in printer's points, so that neighbours within a panel of some 160 do not touch."""
    octaves_of = np.log2(np.unique(rates))
    gap = np.diff(octaves_of).min() if len(octaves_of) > 1 else 1.0
    return float(np.clip(160 * gap / (np.ptp(octaves_of) + 1.5), 3, 10))


def _cells(ax, rows: pd.DataFrame, side: float):
    """Cells at their batch and rate in the colour of their mean loss above the best; crosses where a seed diverged."""
    cells = rows.groupby(["batch_tokens", "peak_lr"])["loss"].agg(lambda loss: loss.mean(skipna=False)).reset_index()
    kept, lost = cells[np.isfinite(cells["loss"])], cells[~np.isfinite(cells["loss"])]
    ax.plot(lost["batch_tokens"], lost["peak_lr"], "x", color=DIVERGED, ms=0.6 * side, mew=1.4)
    excess, norm = kept["loss"] - kept["loss"].min(), BoundaryNorm(STEPS, 256, extend="max")
    return ax.scatter(kept["batch_tokens"], kept["peak_lr"], c=excess, marker="s", s=side**2, cmap="cividis_r", norm=norm)


def _contours(ax, fit) -> None:
    """Level lines of ½ zᵀAz at the steps of the colours up to FARTHEST."""
    batch, rate = np.meshgrid(*(np.geomspace(*limits, 120) for limits in (ax.get_xlim(), ax.get_ylim())))
    r, b = np.log2(rate / fit.best_lr), np.log2(batch / fit.best_batch_tokens)
    excess = (fit.a11 * r**2 + 2 * fit.a12 * r * b + fit.a22 * b**2) / 2
    ax.contour(batch, rate, excess, levels=[step for step in STEPS[1:] if step <= FARTHEST], colors="black", linewidths=0.9)


def _optimum(ax, row) -> None:
    """The optimum with the intervals it may have; brought within view where it is outside its grid."""
    batch, rate = row.best_batch_tokens, row.best_lr
    if row.edge:
        batch, rate = inside(ax, batch, rate)
    if hasattr(row, "best_lr_low"):
        ax.plot([batch] * 2, [row.best_lr_low, row.best_lr_high], "-", color="black", lw=1.6, scalex=False, scaley=False)
    if hasattr(row, "best_batch_tokens_low"):
        ax.plot([row.best_batch_tokens_low, row.best_batch_tokens_high], [rate] * 2, "-", color="black", lw=1.6, scalex=False, scaley=False)
    star(ax, (batch, rate), row.edge, sides(row.edge))


def _differences(ax, curve: pd.DataFrame, published: pd.DataFrame, aside: float, look: dict) -> None:
    """A curve less the printed points within its span, a little aside of them."""
    x, norm = curve["log2_lr_steps"], curve["log2_norm"]
    at = published[published["log2_lr_steps"].between(x.min() - 1e-9, x.max() + 1e-9)]
    difference = np.interp(at["log2_lr_steps"], x, norm) - at["log2_norm"]
    ax.plot(at["log2_lr_steps"] + aside, difference, look["marker"], color=look["color"], ms=5, mew=0, alpha=0.8)


def _published(panels, published: pd.DataFrame, margin: float | None) -> None:
    """The printed points, and nought with the margin below."""
    look = {"color": "black", "mfc": "white", "ms": 8, "mew": 1.4, "zorder": 4, "label": "published"}
    panels[0].plot(published["log2_lr_steps"], published["log2_norm"], "d", **look)
    if margin is not None:
        panels[1].axhspan(-margin, margin, color="#56B4E9", alpha=0.15, lw=0)
        panels[0].fill_between([], [], [], color="#56B4E9", alpha=0.15, lw=0, label=f"within ±{margin:g}")
    panels[1].axhline(0, color="black", lw=0.8)
    panels[1].set_ylabel("measured less\npublished\n(octaves)")


def _growth_legend(fig, panels, looks: dict, rates: list) -> None:
    for batch, look in looks.items():
        panels[0].plot([], [], color=look["color"], lw=3, label=f"batch of {octaves(batch)} tokens")
    for rate, line, marker in zip(rates, LINES * len(rates), MARKERS * len(rates), strict=False):
        panels[0].plot([], [], color="#8C8C8C", ls=line, marker=marker if len(panels) > 1 else "", label=f"rate {octaves(rate)}")
    panels[0].set_ylabel(two_lines(NORM))
    panels[-1].set_xlabel("rate · steps (log2)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(fig, panels[0], columns=3)


def _one_optimizer(rows: pd.DataFrame) -> str:
    names = list(rows["optimizer"].unique())
    if len(names) > 1:
        raise ValueError(f"one optimizer a figure; the rows have {', '.join(map(str, names))}: choose those of one")
    return names[0]


def _of_optimizer(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return frame[frame["optimizer"] == name] if "optimizer" in frame else frame
