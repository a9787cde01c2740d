"""Figures of μP against fitting: bowls by width, best rates over width, depth and tokens, their drifts, and how steadily runs trained."""

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from etastar.plots.mup_pieces import CELL, ROOM, RUN, SCALINGS, Design, arm_name, bowl, scaling_looks, vertex
from etastar.plots.norm_pieces import batch_looks, crossed, hold, octaves, panels_of, path, perhaps, rows_down
from etastar.plots.power_laws import AXES
from etastar.plots.style import LINES, LOSS, Drawing, legend_above, log2_axis, marks, need, some, styled

DEPTH_RULES = ("completep", "alpha 0.5", "alpha 0", "sp")
BEST = "best peak learning rate (log2)"
LITTLE = 0.5  # octaves
MEASURES = {
    "attention_logit_max": "largest attention logit", "stream_delta": "change of the stream\nsince initialization (ratio)",
    "feature_rank": "effective rank of features\n(dimensions)", "update_ratio": "update over weight\n(ratio of RMS)",
    "spikes": "loss spikes (count)", "grad_norm_over_median": "largest gradient norm\nover the median (ratio)",
}


@styled
def scaling_bowls(rows: pd.DataFrame, cells: pd.DataFrame | None, scaling: str) -> Figure:
    """Loss over peak rate, a curve a width, under a scaling ("sp" or "mup") at the horizon that most widths have; μP's hold the base.

    `rows`: scaling, kind, width, depth, horizon_tokens, peak_lr, seed, loss (nats; NaN diverged); only kind "" is drawn, of the usual
    depth. Means are of rates at which no seed diverged. `cells`: the same without rate, seed and loss, and best_lr, low, high, best_loss.
    """
    need(rows, *RUN)
    if scaling not in ("sp", "mup"):
        raise ValueError(f"no scaling {scaling!r} over width; it is one of sp, mup")
    design = Design.of(rows)
    own = design.widths(rows, scaling)
    some(own, f"runs under {SCALINGS[scaling]}")
    looks = batch_looks(pd.concat([design.widths(rows, name)["width"] for name in ("sp", "mup")]))
    fig = Drawing(layout="constrained", figsize=(7, 5))
    ax = fig.subplots()
    log2_axis(ax, own["peak_lr"])
    for i, (width, of) in enumerate(own.groupby("width")):
        bowl(ax, of, looks[width], 2 ** (0.12 * (i - (own["width"].nunique() - 1) / 2)))
        ax.plot([], [], **looks[width] | {"ms": 8}, label=f"width {width:,g}")
    _bowl_view(ax, own)
    best = design.widths(perhaps(cells, *CELL), scaling).dropna(subset="best_lr").sort_values("width")
    best = best[best["width"].isin(own["width"])]
    if len(best) > 1:
        ax.plot(best["best_lr"], best["best_loss"], color="black", ls=(0, (1, 2)), lw=1.2, label="best rates, joined")
    for row in best.itertuples():
        vertex(ax, row, looks[row.width])
    ax.set(xlabel="peak learning rate", ylabel=LOSS)
    notes = ["faint: seeds"] + ["large: best rate, interval level"] * bool(len(best)) + crossed(own["loss"], "× above: diverged")
    legend_above(fig, ax, f"{SCALINGS[scaling]}, {octaves(design.tokens)} tokens, depth {design.depth}\n{'; '.join(notes)}")
    return fig


@styled
def best_rates(cells: pd.DataFrame) -> Figure:
    """Best rate over width (mixtures dashed), depth and tokens with intervals; dotted: the base's at the horizon most widths have.

    `cells`: scaling, kind, width, depth, horizon_tokens, best_lr (NaN: left out), low, high, best_loss. A panel needs two points of a line
    and a line two points; where no panel has them, the first with a point is drawn.
    """
    need(cells, *CELL)
    cells = cells.dropna(subset="best_lr")
    some(cells, "cells with a best rate")
    design = Design.of(cells)
    panels = {"width": _over_width(cells, design), "depth": _over_depth(cells, design), "horizon_tokens": _over_tokens(cells, design)}
    shown = {along: _joined(lines, along) for along, lines in panels.items() if _joined(lines, along)}
    shown = shown or dict([(along, lines) for along, lines in panels.items() if lines][:1])
    some(shown, "cells that differ in width, depth or tokens alone")
    fig = Drawing(layout="constrained", figsize=(3.4 * len(shown) + 1.2 + 1.6 * (len(shown) == 1), 4.6))
    axes = fig.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    plain = design.widths(cells, "sp")
    for ax, (along, lines) in zip(axes, shown.items(), strict=True):
        _rates_panel(ax, along, lines)
        for rate in plain.loc[plain["width"] == design.base, "best_lr"]:
            ax.axhline(np.log2(rate), color="black", ls=":", lw=1.2, zorder=1, label="best of the base")
        ax.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0))
    axes[0].set_ylabel(BEST)
    hold(axes[0], np.log2(pd.concat([of["best_lr"] for lines in shown.values() for of, _ in lines.values()])))
    return fig


@styled
def drift_forest(drifts: pd.DataFrame) -> Figure:
    """Drift of the best rate, a row each with its interval; half an octave to either side is shaded. Open: differences of two drifts.

    Columns drift (its name), octaves (NaN: left out), low, high (NaN: none), seeds (how many).
    """
    need(drifts, "drift", "octaves", "low", "high", "seeds")
    known = drifts.dropna(subset="octaves").reset_index(drop=True)
    some(known, "drifts in octaves")
    fig = Drawing(layout="constrained", figsize=(8.5, 0.34 * len(known) + 1.6))
    ax = fig.subplots()
    ax.axvspan(-LITTLE, LITTLE, color="#56B4E9", alpha=0.15, lw=0, label=f"within ±{LITTLE:g} octaves")
    ax.axvline(0, color="black", lw=0.8)
    colour = marks(["drift"])[0]["color"]
    ax.hlines(known.index, known["low"], known["high"], color=colour, lw=2)
    differs = known["drift"].str.contains(" − ")
    for rows, fill, label in ((known[~differs], colour, "drift"), (known[differs], "white", "difference of two drifts")):
        if len(rows):
            ax.plot(rows["octaves"], rows.index, "o", color=colour, mfc=fill, mew=1.6, ms=7, label=label)
    hold(ax, pd.concat([known["octaves"], pd.Series([-LITTLE, LITTLE])]), along="x")
    rows_down(ax, [_drift_name(name) for name in known["drift"]])
    words = ax.secondary_yaxis("right")
    words.set_yticks(known.index, [_drift_told(row) for row in known.itertuples()])
    words.tick_params(length=0)
    words.spines["right"].set_visible(False)
    ax.set_xlabel("drift of the best rate, largest less base (octaves)")
    legend_above(fig, ax, "level: 95 % interval")
    return fig


@styled
def steadiness(table: pd.DataFrame) -> Figure:
    """How steadily runs trained and how far features moved, over the rate: SP solid, μP dashed, a colour a kind, faint the seeds.

    Columns scaling, kind, width, log2_lr, seed and those of analysis.stability.summary. Of the widths with most kinds the largest is
    drawn, so that what steadies runs (QK-norm, z-loss) is compared at one width. A panel whose measure was nowhere logged is left out.
    """
    need(table, "scaling", "kind", "width", "log2_lr", "seed")
    kinds = table.groupby("width")["kind"].nunique()
    width = kinds.index[kinds == kinds.max()].max()
    of = table[table["width"] == width]
    shown = [name for name in MEASURES if name in of and np.isfinite(of[name].astype(float)).any()]
    some(shown, "measure of stability or features")
    fig, panels = panels_of(len(shown), 3.1, 2.6, "peak learning rate (log2)", "")
    looks = _steady_looks(of)
    for ax, measure in zip(panels, shown, strict=True):
        known = of[np.isfinite(of[measure].astype(float))]
        for (scaling, kind), look in looks.items():
            path(ax, known[(known["scaling"] == scaling) & (known["kind"] == kind)], "log2_lr", measure, look, by="log2_lr")
        _measure_axis(ax, measure, known[measure])
    for (scaling, kind), look in looks.items():
        panels[0].plot([], [], **look, label=arm_name(scaling, kind))
    legend_above(fig, panels[0], f"width {width:,g}; faint: seeds", columns=3)
    return fig


def _bowl_view(ax, rows: pd.DataFrame) -> None:
    """Half an octave beyond the rates, and losses up to ROOM above the best of the worst width."""
    ax.set_xlim(rows["peak_lr"].min() * 2**-0.5, rows["peak_lr"].max() * 2**0.5)
    best = rows[np.isfinite(rows["loss"])].groupby("width")["loss"].min()
    if len(best):
        low, high = ax.get_ylim()
        ax.set_ylim(low, min(high, best.max() + ROOM))


def _over_width(cells: pd.DataFrame, design: Design) -> dict:
    """Lines of SP and μP, dense and, broken and open, of every mixture, dashed for that of most widths."""
    mixtures = cells[cells["kind"].str.fullmatch(r"\d+ experts top \d+")].groupby("kind")["width"].nunique()
    lines = {}
    for i, kind in enumerate(["", *mixtures.sort_values(ascending=False, kind="stable").index]):
        look = {"linestyle": LINES[i % len(LINES)], "mfc": "white"} if kind else {}
        for scaling in ("sp", "mup"):
            own = design.widths(cells, scaling, kind)
            if (own["scaling"] == scaling).any():
                lines[arm_name(scaling, kind)] = own, scaling_looks()[scaling] | look
    return lines


def _joined(lines: dict, along: str) -> dict:
    """Those of two points or more."""
    return {name: line for name, line in lines.items() if line[0][along].nunique() > 1}


def _over_depth(cells: pd.DataFrame, design: Design) -> dict:
    """Lines of the depth rules and of SP at the base's width."""
    at = cells[(cells["kind"] == "") & (cells["horizon_tokens"] == design.tokens) & (cells["width"] == design.base)]
    return {SCALINGS[rule]: (at[at["scaling"] == rule], scaling_looks()[rule]) for rule in DEPTH_RULES if (at["scaling"] == rule).any()}


def _over_tokens(cells: pd.DataFrame, design: Design) -> dict:
    """Lines of SP at the base, dashed, and of SP and μP at the target's width."""
    plain = design.of_kind(cells)
    if plain.empty:
        return {}
    arms = {("sp", design.base): {"linestyle": "--", "mfc": "white"}}
    arms |= {(scaling, design.target(cells)[0]): {} for scaling in ("sp", "mup")}
    lines = {f"{SCALINGS[scaling]}, width {width:,g}": (plain[(plain["scaling"] == scaling) & (plain["width"] == width)],
                                                       scaling_looks()[scaling] | look) for (scaling, width), look in arms.items()}
    return {name: line for name, line in lines.items() if len(line[0])}


def _rates_panel(ax, along: str, lines: dict) -> None:
    """Best rates joined along an axis, a little aside of one another, with upright intervals."""
    for i, (name, (of, look)) in enumerate(lines.items()):
        of = of.sort_values(along)
        x = of[along] * 2 ** (0.07 * (i - (len(lines) - 1) / 2))
        ax.vlines(x, np.log2(of["low"]), np.log2(of["high"]), color=look["color"], lw=1.4)
        ax.plot(x, np.log2(of["best_lr"]), **look | {"ms": 7, "mew": 1.4}, zorder=3, label=name)
    log2_axis(ax, pd.concat([of[along] for of, _ in lines.values()]))
    if along != "horizon_tokens":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.margins(x=0.12)
    ax.set_xlabel(AXES.get(along, "depth (blocks)"))


def _drift_name(drift: str) -> str:
    """Scalings by their names."""
    pattern = r"\b(" + "|".join(map(re.escape, SCALINGS)) + r")\b"
    return re.sub(pattern, lambda found: SCALINGS[found[0]], drift).replace(": drift over ", ": over ")


def _drift_told(row) -> str:
    interval = f" [{row.low:+.2f}, {row.high:+.2f}]" if np.isfinite(row.high - row.low) else ""
    return f"{row.octaves:+.2f}{interval}, {row.seeds:g} seed{'s' * (row.seeds != 1)}".replace("-", "−")


def _steady_looks(rows: pd.DataFrame) -> dict:
    """(scaling, kind) → look, of those that are there: colour and marker a kind, SP solid and filled, μP dashed and open."""
    kinds, present = sorted(rows["kind"].unique()), set(zip(rows["scaling"], rows["kind"], strict=True))
    drawn = {(scaling, kind): mark | look for kind, mark in zip(kinds, marks(kinds), strict=True)
             for scaling, look in (("sp", {"linestyle": "-"}), ("mup", {"linestyle": "--", "mfc": "white"}))}
    return {arm: look for arm, look in drawn.items() if arm in present}


def _measure_axis(ax, measure: str, values: pd.Series) -> None:
    """Counts in whole numbers from 0; logarithmic where all are above 0 and span a factor above 8."""
    ax.set_ylabel(MEASURES[measure])
    ax.xaxis.set_major_locator(MaxNLocator(5))
    fold = values.max() / values.min() if values.min() > 0 else 0
    if measure == "spikes":
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    elif fold > 8:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if fold < 300 else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
