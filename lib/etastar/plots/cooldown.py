"""Figures of cooldowns and averages: lengths, the line between weights, spans of averages, and what published runs say of them."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from etastar.analysis.cooldown_archive import perplexity_line
from etastar.plots.style import DIFFERENCE, LOSS, Drawing, house_colours, legend_above, marks, need, some, styled, two_lines

READ_OUTS = {"swa": "mean of the last windows (SWA)", "lawa": "mean of the last checkpoints (LAWA)",
             "ema": "moving average (EMA), by its horizon"}
REFERENCE_LINES = ("-", "--", ":", "-.")
NEAR = 0.06  # nats; a rate further off would press all others flat


@styled
def length_lines(frame: pd.DataFrame, label: str = DIFFERENCE) -> Figure:
    """Difference over the cooldown's share of the steps, one line a peak rate: columns fraction, peak_lr, difference.

    Columns low and high, where there are, are drawn as intervals.
    """
    need(frame, "fraction", "peak_lr", "difference")
    fig = Drawing(layout="constrained", figsize=(7, 4.2))
    ax = fig.subplots()
    rates = sorted(frame["peak_lr"].unique())
    for (i, rate), mark in zip(enumerate(rates), marks(rates), strict=True):
        rows = frame[frame["peak_lr"] == rate].sort_values("fraction")
        x = rows["fraction"] * 1.025 ** (i - (len(rates) - 1) / 2)
        ax.plot(x, rows["difference"], **mark, label=f"peak rate {_rate(rate)}")
        if {"low", "high"} <= set(rows):
            ax.vlines(x, rows["low"], rows["high"], color=mark["color"], lw=1, alpha=0.7)
    ax.axhline(0, color="black", lw=0.8)
    _share_axis(ax, frame["fraction"])
    ax.set(xlabel="cooldown, share of the steps", ylabel=two_lines(label))
    legend_above(fig, ax, "upright: interval" if {"low", "high"} <= set(frame) else None)
    return fig


@styled
def loss_on_line(frame: pd.DataFrame) -> Figure:
    """Loss along the straight line from the weights before a cooldown (0) to those after it (1): columns share, seed, loss."""
    need(frame, "share", "seed", "loss")
    fig = Drawing(layout="constrained", figsize=(6.5, 4))
    ax = fig.subplots()
    for i, (_, rows) in enumerate(frame.sort_values("share").groupby("seed")):
        ax.plot(rows["share"], rows["loss"], color="#56B4E9", lw=0.8, label="seeds" if i == 0 else None)
    mean = frame.groupby("share")["loss"].mean()
    ax.plot(mean.index, mean, color="#0072B2", marker="o", ms=3.5, lw=2, label="mean")
    for end in (0, 1):
        ax.axvline(end, color="black", lw=0.8, ls="--")
    ax.set(xlabel="share of the way from the weights before the cooldown (0) to those after it (1)", ylabel=LOSS)
    legend_above(fig, ax)
    return fig


@styled
def averaging_spans(frame: pd.DataFrame, references: Mapping[str, float]) -> Figure:
    """Loss of averaged weights over what they average: columns read_out (swa, lawa, ema), span, loss, seed; faint points are seeds.

    `span` is the share of the run averaged over, an EMA's horizon as such a share. `references` (name → loss) are level lines.
    """
    need(frame, "read_out", "span", "loss", "seed")
    fig = Drawing(layout="constrained", figsize=(7, 4.6))
    ax = fig.subplots()
    names = list(frame["read_out"].unique())
    for name, mark in zip(names, marks(names), strict=True):
        rows = frame[frame["read_out"] == name]
        ax.plot(rows["span"], rows["loss"], mark["marker"], color=mark["color"], alpha=0.25, ms=4, mew=0)
        mean = rows.groupby("span")["loss"].mean()
        ax.plot(mean.index, mean, **mark, label=READ_OUTS.get(name, name))
    for (name, loss), line in zip(references.items(), REFERENCE_LINES * len(references), strict=False):
        ax.axhline(loss, color="#555555", lw=1.2, ls=line, label=f"{name}: {loss:.4f}")
    _share_axis(ax, frame["span"])
    ax.set(xlabel="span of the average, share of the run", ylabel=LOSS)
    legend_above(fig, ax, "faint points: seeds", columns=2)
    return fig


@styled
def perplexity_lines(pairs: Mapping[str, pd.DataFrame]) -> Figure:
    """Perplexity of cosine over that of another way to end a run, a panel each: columns params, cosine, other (nats per token).

    Points are runs by model size; the line is fitted with its slope and intercept told with standard errors. The diagonal is dotted.
    """
    some(pairs, "pairs")
    for frame in pairs.values():
        need(frame, "params", "cosine", "other")
    fig = Drawing(layout="constrained", figsize=(4.6 * len(pairs) + 1.2 * (len(pairs) == 1), 5))
    panels = fig.subplots(1, len(pairs), squeeze=False)[0]
    sizes = sorted(set().union(*(frame["params"] for frame in pairs.values())))
    drawn = dict(zip(sizes, marks(sizes), strict=True))
    for ax, (name, frame) in zip(panels, pairs.items(), strict=True):
        line = perplexity_line(frame["other"], frame["cosine"], frame["params"])
        for size, rows in frame.groupby("params"):
            ax.plot(np.exp(rows["other"]), np.exp(rows["cosine"]), drawn[size]["marker"], color=drawn[size]["color"], mfc="none", mew=1.4)
        ends = np.exp(np.array([frame[["other", "cosine"]].to_numpy().min(), frame[["other", "cosine"]].to_numpy().max()]))
        ax.plot(ends, ends, color="black", ls=":", lw=1)
        ax.plot(ends, line.slope * ends + line.intercept, color="black", lw=1)
        ax.set(xlabel=f"perplexity of {name}", ylabel="perplexity of cosine")
        title = f"slope {line.slope:.3f} ± {line.slope_se:.3f}, intercept {line.intercept:.3f} ± {line.intercept_se:.3f}"
        ax.set_title(title.replace("-", "−"))
    for size in sizes:
        panels[0].plot([], [], drawn[size]["marker"], color=drawn[size]["color"], mfc="none", mew=1.4, label=f"{size / 1e6:.0f}M")
    panels[0].plot([], [], color="black", lw=1, label="fitted")
    panels[0].plot([], [], color="black", ls=":", lw=1, label="equal")
    legend_above(fig, panels[0], "model size; ±: standard error", columns=5)
    return fig


@styled
def published_lengths(frame: pd.DataFrame) -> Figure:
    """Published loss over the cooldown's share of the steps, a panel a horizon and a line a peak rate.

    Columns steps, cooldown_fraction, peak_lr, loss, as `analysis.cooldown_archive.rate_table` has them. Rates that stay more than
    0.06 nats above a panel's best are not drawn.
    """
    need(frame, "steps", "cooldown_fraction", "peak_lr", "loss")
    horizons, rates = sorted(frame["steps"].unique()), sorted(frame["peak_lr"].unique())
    drawn, shown = dict(zip(rates, marks(rates), strict=True)), set()
    rows = math.ceil(len(horizons) / 2)
    fig = Drawing(layout="constrained", figsize=(8.5, 3 * rows + 0.8))
    panels = fig.subplots(rows, 2, squeeze=False).ravel()
    for ax, horizon in zip(panels, horizons, strict=False):
        of = frame[frame["steps"] == horizon]
        for rate, line in of.groupby("peak_lr"):
            if line["loss"].min() < of["loss"].min() + NEAR:
                shown.add(rate)
                line = line.sort_values("cooldown_fraction")
                ax.plot(100 * line["cooldown_fraction"], line["loss"], **drawn[rate])
        ax.set(title=f"{horizon:,} steps", xlabel="cooldown (% of the steps)", ylabel=two_lines(LOSS))
    for ax in panels[len(horizons):]:
        ax.remove()
    for rate in sorted(shown):
        panels[0].plot([], [], **drawn[rate], label=f"peak rate {rate:g}")
    title = f"not drawn, more than {NEAR} nats above the best: {', '.join(f'{r:g}' for r in rates if r not in shown)}"
    legend_above(fig, panels[0], title if set(rates) - shown else None)
    return fig


@styled
def published_shapes(table: pd.DataFrame) -> Figure:
    """Published 1-sqrt minus linear (nats) over peak rate, a line a horizon: `analysis.cooldown_archive.shape_table`."""
    some(table, "rates")
    fig = Drawing(layout="constrained", figsize=(6.5, 4))
    ax = fig.subplots()
    for steps, mark in zip(table, marks(table.columns), strict=True):
        line = table[steps].dropna()
        ax.plot(line.index, line, **mark, label=f"{steps:,} steps")
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xscale="log", xlabel="peak learning rate", ylabel="1-sqrt minus linear (nats per token)")
    ax.xaxis.set_major_locator(FixedLocator(list(table.index)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    legend_above(fig, ax, "below 0: 1-sqrt ends lower")
    return fig


@styled
def overshoot(pairs: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """What a cosine cut off early loses against one whose cycle ends there, over cycle length by steps.

    `pairs`: ratio, penalty, averaged_penalty (nats); `bins`: ratio_from, ratio_to, penalty, low, high, n; two pairs get no interval.
    """
    need(pairs, "ratio", "penalty", "averaged_penalty")
    need(bins, "ratio_from", "ratio_to", "penalty", "low", "high", "n")
    fig = Drawing(layout="constrained", figsize=(7, 4.2))
    ax = fig.subplots()
    for row in bins.dropna(subset="penalty").itertuples():
        ends = [row.ratio_from, min(row.ratio_to, pairs["ratio"].max())]
        if row.n > 2:
            ax.fill_between(ends, row.low, row.high, color="#56B4E9", alpha=0.25, lw=0)
        ax.plot(ends, [row.penalty] * 2, color="#0072B2", lw=2)
    ax.fill_between([], [], [], color="#56B4E9", alpha=0.25, lw=0, label="95 % interval of the mean")
    ax.plot([], [], color="#0072B2", lw=2, label="mean")
    ax.plot(pairs["ratio"], pairs["penalty"], "o", color="#0072B2", label="last weights")
    ax.plot(pairs["ratio"], pairs["averaged_penalty"], "s", color="#D55E00", mfc="none", label="averaged weights")
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="cosine cycle over steps trained", ylabel="cut off minus matched (nats per token)")
    legend_above(fig, ax, columns=2)
    return fig


@styled
def law_predictions(frame: pd.DataFrame) -> Figure:
    """Predicted over measured final loss by law, a panel a peak rate; the diagonal is a law without error.

    Columns law, memory, peak_lr, cooldown_fraction, shape, predicted, measured; a line joins linear cooldowns from short to long.
    """
    need(frame, "law", "memory", "peak_lr", "cooldown_fraction", "shape", "predicted", "measured")
    rates = sorted(frame["peak_lr"].unique())
    fig = Drawing(layout="constrained", figsize=(4.6 * len(rates) + 1.2 * (len(rates) == 1), 4.8))
    panels = fig.subplots(1, len(rates), squeeze=False, sharex=True, sharey=True)[0]
    names = frame["law"] + frame["memory"].map(lambda m: "" if np.isnan(m) else f", memory {m:g}")
    laws = list(names.unique())
    for ax, rate in zip(panels, rates, strict=True):
        for law, mark in zip(laws, marks(laws), strict=True):
            rows = frame[(names == law) & (frame["peak_lr"] == rate)].sort_values("cooldown_fraction")
            line, others = rows[rows["shape"] == "linear"], rows[rows["shape"] != "linear"]
            ax.plot(line["measured"], line["predicted"], **(mark | {"lw": 0.8}), label=law)
            ax.plot(others["measured"], others["predicted"], mark["marker"], color=mark["color"], mfc="white")
        ends = [frame[["measured", "predicted"]].to_numpy().min(), frame[["measured", "predicted"]].to_numpy().max()]
        ax.plot(ends, ends, color=house_colours()[6], ls=":", lw=1, label="no error")
        ax.set(title=f"peak rate {rate:g}", xlabel="measured final loss (nats per token)", ylabel="predicted final loss (nats per token)")
    legend_above(fig, panels[0], "joined: linear cooldowns, the shortest with the highest measured loss; hollow: other shapes", columns=2)
    return fig


def _rate(rate: float) -> str:
    quarters = 4 * math.log2(rate)
    return f"$2^{{{round(quarters) / 4:g}}}$" if abs(quarters - round(quarters)) < 1e-6 else f"{rate:.3g}"


def _share_axis(ax, shares) -> None:
    """A log axis with ticks at the shares themselves, in per cent; one nearer to the last than a twelfth of the axis is left out."""
    ticks, apart = [], (max(shares) / min(shares)) ** (1 / 12)
    for share in sorted(set(shares)):
        if not ticks or share >= ticks[-1] * apart:
            ticks.append(share)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    ax.xaxis.set_minor_locator(NullLocator())
