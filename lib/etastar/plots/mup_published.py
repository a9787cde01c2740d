"""Figures of laws of the best rate in size and tokens on released grids: the rates with the laws' slopes, and what a proxy's rate costs."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from etastar.analysis.size_horizon import fit_size_horizon
from etastar.archives.steplaw import short
from etastar.plots.style import LINES, Drawing, house_colours, legend_above, marks, need, some, styled, two_lines

LAW_NAMES = {"fitting": "Fitting", "bjorck": "Bjorck", "steplaw": "Step Law"}


@styled
def rates_and_rules(held: dict[str, pd.DataFrame], exponents: dict[str, dict[str, float]]) -> Figure:
    """The best rate over tokens (left, a line a size) and over size (right, brought to the mean log horizon by the fitted exponent).

    `held` names the rows (a fixed batch, the best batch): frames of cell, params, horizon_tokens, peak_lr. `exponents` maps laws to
    their "size" and "horizon": lines of that slope through the mean of the logs, for their constants have no common unit. Black is the
    least-squares law of the rows.
    """
    some(held, "frames of best rates")
    fig = Drawing(layout="constrained", figsize=(9.6, 3.5 * len(held) + 0.9))
    panels = fig.subplots(len(held), 2, squeeze=False, sharex="col", sharey="row")
    sizes = sorted({n for rates in held.values() for n in rates["params"]})
    drawn = dict(zip(sizes, marks(sizes), strict=True))
    for (left, right), (name, rates) in zip(panels, held.items(), strict=True):
        need(rates, "cell", "params", "horizon_tokens", "peak_lr")
        fit = fit_size_horizon(rates)
        middle = {axis: np.exp(np.log(rates[axis]).mean()) for axis in ("params", "horizon_tokens", "peak_lr")}
        for params, of in rates.sort_values("horizon_tokens").groupby("params"):
            mark = drawn[params]
            left.plot(of["horizon_tokens"], of["peak_lr"], marker=mark["marker"], color=mark["color"], lw=0.8, ms=6)
            at_middle = of["peak_lr"] * (of["horizon_tokens"] / middle["horizon_tokens"]) ** -fit.horizon.value
            right.plot(of["params"], at_middle, mark["marker"], color=mark["color"], ms=6, alpha=0.85)
        for ax, axis, which in ((left, "horizon_tokens", "horizon"), (right, "params", "size")):
            slopes = {"least squares": getattr(fit, which).value} | {LAW_NAMES.get(law, law): of[which] for law, of in exponents.items()}
            _slopes(ax, slopes, rates[axis], middle[axis], middle["peak_lr"])
            _log_axes(ax)
        left.set_title(name, loc="left")
        left.set_ylabel("best learning rate")
    panels[-1][0].set_xlabel("horizon (tokens)")
    panels[-1][1].set_xlabel("parameters (without embedding and head)")
    _legend_of(fig, panels[0][0], drawn, exponents)
    return fig


@styled
def ratio_lines(table: pd.DataFrame, ways=None) -> Figure:
    """How far each way misses the target's best rate, and what that costs, over how many times larger the target is than the proxy.

    `table` as `proxy_target.head_to_head` gives it; `ways` chooses, all but those without a search by default. Faint points are targets
    at one batch, lines the mean over targets, batches of one averaged first.
    """
    need(table, "way", "cell", "ratio", "miss_octaves", "excess", "flops")
    chosen = list(table.loc[table["flops"] > 0, "way"].unique() if ways is None else ways)
    some(chosen, "ways that searched")
    fig = Drawing(layout="constrained", figsize=(9.6, 4.6))
    panels = fig.subplots(1, 2)
    for i, (way, mark) in enumerate(zip(chosen, marks(chosen), strict=True)):
        of = table[table["way"] == way].assign(permil=lambda rows: 1000 * rows["excess"])
        ratio = of["ratio"].round(2)
        for ax, column in zip(panels, ("miss_octaves", "permil"), strict=True):
            aside = 2 ** (0.03 * (i - (len(chosen) - 1) / 2))
            ax.plot(ratio * aside, of[column], mark["marker"], color=mark["color"], alpha=0.18, ms=4, mew=0)
            mean = of.groupby([ratio, "cell"])[column].mean().groupby("ratio").mean()
            ax.plot(mean.index * aside, mean, marker=mark["marker"], color=mark["color"], ls=mark["linestyle"], ms=7, mec="white",
                    label=way)
    for ax, label in zip(panels, ("octaves off the target's best rate", "loss above that at the target's best rate (permil)"), strict=True):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(sorted(table["ratio"].round(2).unique())))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.axhline(0, color="black", lw=0.8)
        ax.margins(y=0.08)
        ax.set(xlabel="target's parameters over the proxy's", ylabel=two_lines(label))
    panels[1].set_yscale("symlog", linthresh=1)
    panels[1].yaxis.set_major_locator(FixedLocator([-1, 0, 1, 2, 5, 10, 20]))
    panels[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))
    panels[1].yaxis.set_minor_locator(NullLocator())
    legend_above(fig, panels[0], "faint: targets at one batch; lines: mean over targets", columns=3)
    return fig


def _slopes(ax, slopes: dict[str, float], x: pd.Series, middle: float, height: float) -> None:
    """A line a slope through (middle, height) over the range of x, the first black and solid; each slope told at its right end."""
    ends = np.array([x.min(), x.max()], dtype=float)
    for i, (name, slope) in enumerate(slopes.items()):
        colour, style = ("black", "-") if i == 0 else (house_colours()[-i], LINES[i % len(LINES)])
        ax.plot(ends, height * (ends / middle) ** slope, color=colour, ls=style, lw=1.8, label=name, zorder=3)


def _log_axes(ax) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x < 1e9 else f"{x / 1e9:g}B"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"$2^{{{round(np.log2(y))}}}$"))
    ax.yaxis.set_minor_locator(NullLocator())


def _legend_of(fig, ax, drawn: dict, exponents: dict) -> None:
    """Sizes as marks, laws as lines with both exponents; above all panels."""
    for params, mark in drawn.items():
        ax.plot([], [], marker=mark["marker"], color=mark["color"], lw=0.8, label=short(params))
    for line in ax.get_lines():
        law = next((law for law in exponents if LAW_NAMES.get(law, law) == line.get_label()), None)
        if law is not None:
            told = f"$N^{{{exponents[law]['size']:.2f}}} D^{{{exponents[law]['horizon']:.2f}}}$"
            line.set_label(f"{line.get_label()}: {told}")
    legend_above(fig, ax, "lines of laws pass through the mean of the logs", columns=5)
