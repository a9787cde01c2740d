"""Figures of power laws: the valley of best rates, its slopes and bowls, a forecast, and what knobs and rivals of a Power schedule cost."""

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from etastar.plots.style import LOSS, Drawing, house_colours, legend_above, log2_axis, marks, need, some, styled

AXES = {"horizon_tokens": "horizon (tokens)", "batch_tokens": "batch (tokens)", "width": "width (channels)"}
NAMES = {"horizon_tokens": "{} tokens", "batch_tokens": "batch of {} tokens", "width": "width {}"}
EDGES = {"": 0, "low": -1, "high": 1, "wall": 1}  # which way the true optimum lies, where the grid did not hold it
AT_EDGE = "at the edge of its grid, the optimum lies beyond"
RATE = "best peak learning rate"
KNOBS = {"η_p": r"$\eta_p$", "b": "$b$"}
REACH = 4  # intervals may run out of view this many fold beyond the points and lines, which they would press flat
WIDE = 1.0  # regrets beyond this share of the tokens would press the small ones flat on a straight axis


@styled
def valley_lines(cells: pd.DataFrame, lines: pd.DataFrame, along: str) -> Figure:
    """Best rate over `along` (horizon_tokens, batch_tokens or width) with the fitted law, solid, and published slopes, thin.

    `cells`: along, best_lr (NaN: left out), low, high, edge ("" inside its grid; low, high or wall: open, an arrow towards the optimum).
    `lines`: name, exponent, published, fitted, low, high. All lines meet in the mean of the inner cells' logs, where least squares pass.
    """
    cells = _known(cells, along, "best_lr", "low", "high", "edge")
    need(lines, "name", "exponent", "published", "fitted", "low", "high")
    fig, ax = _rates_axes()
    inner = cells[_beyond(cells) == 0] if (_beyond(cells) == 0).any() else cells
    x, y = inner[along].to_numpy(float), inner["best_lr"].to_numpy(float)
    ends = np.array([cells[along].min(), cells[along].max()], dtype=float)
    lines = lines.sort_values("fitted", ascending=False, kind="stable")
    first = 0 if lines["fitted"].any() else 1  # only what was fitted is solid
    for row, mark in zip(lines.itertuples(), marks(range(first + len(lines)))[first:], strict=True):
        level = np.exp(np.log(y).mean() + row.exponent * (np.log(ends) - np.log(x).mean()))
        told = f"{row.exponent:.2f} [{row.low:.2f}, {row.high:.2f}]" if row.fitted and not np.isnan(row.low) else f"{row.exponent:.3g}"
        line = "-" if row.fitted else mark["linestyle"]
        ax.plot(ends, level, color=mark["color"], ls=line, lw=1.1 if row.published else 1.8, label=f"{row.name}: {_minus(told)}")
    _points(ax, cells, along, hollow=_beyond(cells) != 0, labels=("best rate, interval upright", AT_EDGE))
    _finish_rates(ax, cells[along], cells["best_lr"], AXES.get(along, along))
    legend_above(fig, ax, columns=2)
    return fig


@styled
def local_slopes(slopes: pd.DataFrame, published: Mapping) -> Figure:
    """The exponent between neighbours, a level bar with its interval upright, a panel an `along`.

    Columns along, from_value, to_value, slope, low, high. `published` maps names to exponents, or each `along` to such a mapping.
    """
    need(slopes, "along", "from_value", "to_value", "slope", "low", "high")
    panels_of = list(slopes["along"].unique())
    nested = any(isinstance(value, Mapping) for value in published.values())
    fig = Drawing(layout="constrained", figsize=(4.4 * len(panels_of) + 2.6 * (len(panels_of) == 1), 4.2))
    colour = house_colours()[0]
    for ax, along in zip(fig.subplots(1, len(panels_of), squeeze=False)[0], panels_of, strict=True):
        rows = slopes[slopes["along"] == along]
        levels = published.get(along, {}) if nested else published
        if 0 not in levels.values():
            ax.axhline(0, color="black", lw=0.8)
        for (name, exponent), mark in zip(levels.items(), marks([None, *levels])[1:], strict=True):
            ax.axhline(exponent, color=mark["color"], ls=mark["linestyle"], lw=1.2, label=f"{name}: {_minus(f'{exponent:.3g}')}")
        ax.hlines(rows["slope"], rows["from_value"], rows["to_value"], color=colour, lw=3, label="measured, interval upright")
        middle = np.sqrt(rows["from_value"].astype(float) * rows["to_value"])
        ax.vlines(middle, rows["low"], rows["high"], color=colour, lw=1.4)
        ax.plot(middle, rows["slope"], "o", color=colour, ms=6)
        log2_axis(ax, pd.concat([rows["from_value"], rows["to_value"]]))
        ax.set(xlabel=AXES.get(along, along), ylabel="exponent of the best rate\nbetween neighbours")
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if len(panels_of) == 1 else 1)
    return fig


@styled
def valley_bowls(frame: pd.DataFrame, cells: pd.DataFrame, by: str) -> Figure:
    """Loss over peak rate, a colour a value of `by`: columns by, peak_lr, seed, loss (nats; NaN diverged); seeds faint, means joined.

    Means are of rates at which no seed diverged. `cells` (by, best_lr, low, high, edge) puts the best rate and its interval on the means'
    line; one at the edge of its grid is open, with an arrow towards the optimum.
    """
    need(frame, by, "peak_lr", "seed", "loss")
    need(cells, by, "best_lr", "low", "high", "edge")
    fig = Drawing(layout="constrained", figsize=(7, 4.8))
    ax = fig.subplots()
    values = sorted(frame[by].unique())
    log2_axis(ax, frame["peak_lr"])
    ax.margins(x=0.08, y=0.1)
    for (i, value), mark in zip(enumerate(values), marks(values), strict=True):
        rows = frame[frame[by] == value]
        mean = _seeds_and_mean(ax, rows, "peak_lr", mark)
        ax.plot([], [], **(mark | {"ms": 8}), label=NAMES.get(by, by + " {}").format(_count(value)))
        _diverged(ax, rows, rows["peak_lr"] * 2 ** (0.12 * (i - (len(values) - 1) / 2)), mark)
        if len(mean):
            _vertices(ax, cells[cells[by] == value].dropna(subset="best_lr"), mean, mark)
    notes = ["faint: seeds", "large: best rate and its interval"] + ["open: at the edge of its grid"] * bool((_beyond(cells) != 0).any())
    notes += ["× above: diverged"] * bool((~np.isfinite(frame["loss"])).any())
    ax.set(xlabel="peak learning rate", ylabel=LOSS)
    legend_above(fig, ax, "; ".join(notes), columns=3)
    return fig


@styled
def power_sensitivity(frame: pd.DataFrame) -> Figure:
    """Loss over how far a knob of the Power schedule moves its last rate: columns knob, octaves, seed, loss (nats; NaN diverged).

    A line a knob over one axis, so that they are moved alike; seeds faint. With a column `value`, those of the knob b stand above.
    """
    need(frame, "knob", "octaves", "seed", "loss")
    fig = Drawing(layout="constrained", figsize=(7, 4.4))
    ax = fig.subplots()
    ax.axvline(0, color="black", lw=0.8)
    knobs = list(frame["knob"].unique())
    for (i, knob), mark in zip(enumerate(knobs), marks(knobs), strict=True):
        rows = frame[frame["knob"] == knob]
        mean = _seeds_and_mean(ax, rows, "octaves", mark)
        ax.plot(mean.index, mean, mark["marker"], color=mark["color"])
        ax.plot([], [], **mark, label=KNOBS.get(knob, knob))
        _diverged(ax, rows, rows["octaves"] + 0.06 * (i - (len(knobs) - 1) / 2), mark)
    moved = frame[frame["knob"] == "b"]
    if "value" in frame and len(moved):
        ticks = moved[moved["octaves"].isin(_apart(moved["octaves"].unique(), np.ptp(ax.get_xlim()) / 16))].drop_duplicates("octaves")
        above = ax.secondary_xaxis("top")
        above.set_xticks(ticks["octaves"], [_minus(f"{value:.3g}") for value in ticks["value"]])
        above.set_xlabel("value of $b$ (exponent of the tokens seen)")
    ax.set(xlabel="last rate over that of the setting (octaves)", ylabel=LOSS)
    lost = ~np.isfinite(frame["loss"])
    legend_above(fig, ax, "faint: seeds; upright: the setting" + "; × above: diverged" * bool(lost.any()))
    return fig


@styled
def regrets(frame: pd.DataFrame) -> Figure:
    """What each method loses against WSD tuned for the cell, a row a cell: columns method, cell, seed, regret_tokens.

    `regret_tokens` is a share (0.1: as if a tenth of the tokens were lost), NaN diverged; dots are seeds, the large mark is the mean of
    those that ended. The axis is logarithmic beyond 10 % where a regret passes 100 %.
    """
    need(frame, "method", "cell", "seed", "regret_tokens")
    cells, methods = list(frame["cell"].unique()), list(frame["method"].unique())
    fig = Drawing(layout="constrained", figsize=(7.5, (0.22 * len(methods) + 0.25) * len(cells) + 1.7))
    ax = fig.subplots()
    ax.axvline(0, color="black", lw=1, label="wsd tuned for the cell")
    for (i, method), mark in zip(enumerate(methods), marks(methods), strict=True):
        rows = frame[frame["method"] == method]
        y = rows["cell"].map(cells.index) + 0.76 * ((i + 0.5) / len(methods) - 0.5)
        ended = np.isfinite(rows["regret_tokens"])
        ax.plot(100 * rows["regret_tokens"][ended], y[ended], mark["marker"], color=mark["color"], alpha=0.35, ms=4, mew=0)
        mean = rows[ended].groupby(y[ended])["regret_tokens"].mean()
        ax.plot(100 * mean, mean.index, mark["marker"], color=mark["color"], mec="white", mew=1, ms=8.5, label=method)
        ax.plot(np.full((~ended).sum(), 0.985), y[~ended], "x", color=mark["color"], mew=1.4, transform=ax.get_yaxis_transform())
    for y in range(1, len(cells)):
        ax.axhline(y - 0.5, color="#CCCCCC", lw=0.8)
    ax.set_yticks(range(len(cells)), [re.sub(r"2\^(-?[\d.]+)", r"$2^{\1}$", str(cell)) for cell in cells])
    ax.set(xlabel="regret (% of the tokens)", ylim=(len(cells) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    if (frame["regret_tokens"].abs() > WIDE).any():
        _wide(ax)
    notes = ["faint: seeds, large: mean"] + ["× at the right: diverged"] * bool((~np.isfinite(frame["regret_tokens"])).any())
    legend_above(fig, ax, "; ".join(notes), columns=3)
    return fig


@styled
def prediction(cells: pd.DataFrame, predicted: pd.DataFrame) -> Figure:
    """Best rate over horizon and what a law fitted on the short ones says of the long: filled cells were used, open ones held out.

    `cells`: horizon_tokens, best_lr, low, high, perhaps edge (an arrow towards the optimum). `predicted`: horizon_tokens, predicted, low,
    high, used (bool); the band holds low to high from the last horizon used on, where the line turns dashed.
    """
    cells = _known(cells, "horizon_tokens", "best_lr", "low", "high")
    need(predicted, "horizon_tokens", "predicted", "low", "high", "used")
    law = predicted.sort_values("horizon_tokens")
    used = law[law["used"].astype(bool)]
    some(used, "horizons used in the fit")
    fig, ax = _rates_axes()
    inside = law[law["horizon_tokens"] <= used["horizon_tokens"].max()]
    beyond = law[law["horizon_tokens"] >= used["horizon_tokens"].max()]
    colour = house_colours()[1]
    ax.plot(inside["horizon_tokens"], inside["predicted"], color=colour, label="fitted law")
    ax.plot(beyond["horizon_tokens"], beyond["predicted"], color=colour, ls="--", label="its forecast")
    ax.fill_between(beyond["horizon_tokens"], beyond["low"], beyond["high"], color=colour, alpha=0.18, lw=0, label="and its interval")
    held = ~cells["horizon_tokens"].isin(used["horizon_tokens"])
    _points(ax, cells, "horizon_tokens", held, ("used in the fit", "held out"))
    horizons, rates = pd.concat([cells["horizon_tokens"], law["horizon_tokens"]]), pd.concat([cells["best_lr"], law["predicted"]])
    _finish_rates(ax, horizons, rates, AXES["horizon_tokens"])
    at_edge = "edge" in cells and (_beyond(cells) != 0).any()
    legend_above(fig, ax, "upright: intervals" + f"; arrow: {AT_EDGE}" * bool(at_edge), columns=3)
    return fig


def _rates_axes() -> tuple:
    fig = Drawing(layout="constrained", figsize=(7, 4.4))
    ax = fig.subplots()
    ax.set_yscale("log", base=2)
    ax.margins(x=0.07, y=0.14)
    return fig, ax


def _finish_rates(ax, values, rates, label: str) -> None:
    """Octaves on both axes; on the rates' also halves or quarters, where few octaves are in view."""
    log2_axis(ax, values)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, rates.min() / REACH), min(high, rates.max() * REACH))
    low, high = np.log2(ax.get_ylim())
    step = next(s for s in (0.25, 0.5, *2.0 ** np.arange(9)) if (high - low) / s <= 8)
    ax.yaxis.set_major_locator(FixedLocator(2.0 ** (step * np.arange(np.ceil(low / step), np.floor(high / step) + 1))))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"$2^{{{round(np.log2(y), 2):g}}}$"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel=label, ylabel=RATE)


def _points(ax, cells: pd.DataFrame, along: str, hollow, labels: tuple[str, str]) -> None:
    """Best rates with upright intervals, filled or hollow, and an arrow from those at the edge of their grid."""
    colour = house_colours()[0]
    ax.vlines(cells[along], cells["low"], cells["high"], color=colour, lw=1.4)
    for rows, fill, label in ((cells[~hollow], colour, labels[0]), (cells[hollow], "white", labels[1])):
        if len(rows):
            ax.plot(rows[along], rows["best_lr"], "o", color=colour, mfc=fill, mew=1.6, ms=7, zorder=3, label=label)
    if "edge" in cells:
        for x, y, way in zip(cells[along], cells["best_lr"], _beyond(cells), strict=True):
            _arrow(ax, (x, y), (0, 22 * way), colour)


def _vertices(ax, cells: pd.DataFrame, mean: pd.Series, mark: dict) -> None:
    """Best rates on the line of the means, with level intervals."""
    for row, way in zip(cells.itertuples(), _beyond(cells), strict=True):
        height = np.interp(np.log2(row.best_lr), np.log2(mean.index), mean)
        ax.plot([row.low, row.high], [height] * 2, "|-", color=mark["color"], ms=11, mew=1.4)
        fill, rim = ("white", mark["color"]) if way else (mark["color"], "white")
        ax.plot(row.best_lr, height, mark["marker"], color=mark["color"], mfc=fill, mec=rim, mew=1.2, ms=9, zorder=3)
        _arrow(ax, (row.best_lr, height), (24 * way, 0), mark["color"])


def _arrow(ax, at: tuple, reach: tuple, colour: str) -> None:
    """An arrow from a point, `reach` in printer's points; none where that is nought."""
    if any(reach):
        look = {"arrowstyle": "<-", "color": colour, "lw": 1.4, "shrinkB": 4}
        ax.annotate("", at, xytext=reach, textcoords="offset points", arrowprops=look)


def _seeds_and_mean(ax, rows: pd.DataFrame, x: str, mark: dict) -> pd.Series:
    """Seeds as faint points; a line through the means of those x at which every seed is finite, which it returns."""
    kept = rows[np.isfinite(rows["loss"])]
    ax.plot(kept[x], kept["loss"], mark["marker"], color=mark["color"], alpha=0.35, ms=4, mew=0)
    whole = rows[np.isfinite(rows["loss"]).groupby(rows[x]).transform("all")]
    mean = whole.groupby(x)["loss"].mean()
    ax.plot(mean.index, mean, color=mark["color"], linestyle=mark["linestyle"])
    return mean


def _diverged(ax, rows: pd.DataFrame, at: pd.Series, mark: dict) -> None:
    """A cross at the top for every run without a finite loss."""
    at = at[~np.isfinite(rows["loss"])]
    ax.plot(at, np.full(len(at), 0.985), "x", color=mark["color"], mew=1.4, transform=ax.get_xaxis_transform())


def _known(cells: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The cells that have a best rate; ValueError for lacking columns and where no cell has one."""
    need(cells, *columns)
    known = cells.dropna(subset="best_lr")
    some(known, "cells with a best rate")
    return known


def _beyond(cells: pd.DataFrame) -> pd.Series:
    """−1 or 1 where the optimum lies below or above the grid, else 0; ValueError for an edge that is none of EDGES."""
    edges = cells["edge"].fillna("")
    if unknown := sorted(set(edges.astype(str)) - set(EDGES)):
        raise ValueError(f"no edge {', '.join(map(repr, unknown))}; an edge is one of {', '.join(map(repr, EDGES))}")
    return edges.map(EDGES)


def _wide(ax) -> None:
    """An axis straight up to 10 % and logarithmic beyond."""
    ax.set_xscale("symlog", linthresh=10)
    ax.autoscale_view(scaley=False)  # margins of the straight axis would leave no room at the far end
    steps = [0, 5, *(m * 10.0**k for k in range(1, 7) for m in (1, 3))]
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(FixedLocator([t for t in sorted({-s for s in steps} | set(steps)) if low <= t <= high]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))
    ax.xaxis.set_minor_locator(NullLocator())


def _apart(places, least: float) -> list[float]:
    """Places that keep `least` from one another, those nearest to 0 first."""
    kept = []
    for place in sorted(places, key=abs):
        if all(abs(place - other) >= least for other in kept):
            kept.append(place)
    return kept


def _minus(text: str) -> str:
    """Numbers with a real minus and a real infinity."""
    return text.replace("-", "−").replace("inf", "∞")


def _count(value: float) -> str:
    """A power of two from 1024 on as such, else the number."""
    octaves = np.log2(value)
    return f"$2^{{{octaves:.0f}}}$" if value >= 1024 and octaves == round(octaves) else f"{value:,g}"
