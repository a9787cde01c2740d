"""Figures of the rules of norm transfer: exponents, how far would-be invariants drift, and rates tuned by layer group."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from etastar.plots.norm_pieces import cap_above, crossed, hold, level, octaves, panels_of, path, rows_down
from etastar.plots.style import LINES, Drawing, legend_above, marks, need, styled

GROUPS = ("input", "hidden", "output")


@styled
def rule_exponents(rules: pd.DataFrame) -> Figure:
    """Exponents by optimizer and method with their intervals, a panel a rule: columns rule, optimizer, method, value, low, high, published.

    A diamond is the published exponent (NaN: none). One colour and marker an optimizer.
    """
    need(rules, "rule", "optimizer", "method", "value", "low", "high", "published")
    names = list(rules["optimizer"].unique())
    lines = list(dict.fromkeys(zip(rules["optimizer"], rules["method"], strict=True)))
    lines.sort(key=lambda line: names.index(line[0]))
    titles = list(rules["rule"].unique())
    fig, panels = panels_of(len(titles), 3.2, 0.34 * len(lines) + 1.2, "exponent", "", sharey=True)
    for ax, title in zip(panels, titles, strict=True):
        of = rules[rules["rule"] == title]
        ax.axvline(0, color="black", lw=0.8)
        for name, mark in zip(names, marks(names), strict=True):
            at = of[of["optimizer"] == name]
            y = [lines.index((name, method)) for method in at["method"]]
            level(ax, at["value"], at["low"], at["high"], y, mark)
            ax.plot(at["published"], y, "d", color="black", mfc="none", ms=9, ls="")
        hold(ax, pd.concat([of["value"], of["published"], pd.Series([0.0])]), 1.0, "x")
        ax.set_title(title)
        rows_down(ax, [", ".join(map(str, line)) for line in lines])
    for name, mark in zip(names, marks(names), strict=True):
        panels[0].plot([], [], mark["marker"], color=mark["color"], ms=7, label=name)
    if rules["published"].notna().any():
        panels[0].plot([], [], "d", color="black", mfc="none", ms=9, label="published")
    legend_above(fig, panels[0], "level: interval")
    return fig


@styled
def invariants(rivals: pd.DataFrame) -> Figure:
    """How far each candidate drifts at the optimum over the horizons, in half-widths of the loss basin: ±1 dashed.

    Columns candidate, optimizer, drift, low, high; a row a candidate, a colour an optimizer.
    """
    need(rivals, "candidate", "optimizer", "drift", "low", "high")
    candidates, names = list(rivals["candidate"].unique()), list(rivals["optimizer"].unique())
    fig = Drawing(layout="constrained", figsize=(7.5, (0.22 * len(names) + 0.24) * len(candidates) + 1.6))
    ax = fig.subplots()
    ax.axvspan(-1, 1, color="#56B4E9", alpha=0.15, lw=0, label="within the basin's half-width")
    for side in (-1, 1):
        ax.axvline(side, color="black", lw=1, ls="--")
    ax.axvline(0, color="black", lw=0.8)
    for i, (name, mark) in enumerate(zip(names, marks(names), strict=True)):
        of = rivals[rivals["optimizer"] == name]
        y = of["candidate"].map(candidates.index) + 0.6 * ((i + 0.5) / len(names) - 0.5)
        level(ax, of["drift"], of["low"], of["high"], y, mark)
        ax.plot([], [], mark["marker"], color=mark["color"], ms=7, label=name)
    shown = pd.concat([rivals["drift"], pd.Series([-1.0, 1.0])])
    hold(ax, shown, shown.abs().max(), "x")
    rows_down(ax, candidates)
    ax.set(xlabel="drift from the first to the last horizon (half-widths of the loss basin)")
    legend_above(fig, ax, "level: interval")
    return fig


@styled
def layer_groups(gains: pd.DataFrame, ratios: pd.DataFrame) -> Figure:
    """What rates tuned by layer group gain over one rate, and the loss as one group's rate moves alone.

    `gains`: optimizer, normalization ("pre" or "everywhere"), batch, horizon_tokens, gain_percent (of the loss), low, high; a colour a
    horizon. `ratios`: optimizer, normalization, batch, group (input, hidden or output), log2_ratio (octaves), loss_excess (nats above
    one rate; NaN diverged), seed.
    """
    need(gains, "optimizer", "normalization", "batch", "horizon_tokens", "gain_percent", "low", "high")
    need(ratios, "optimizer", "normalization", "batch", "group", "log2_ratio", "loss_excess", "seed")
    if unknown := sorted(set(ratios["group"]) - set(GROUPS)):
        raise ValueError(f"no layer group {', '.join(map(repr, unknown))}; a group is one of {', '.join(GROUPS)}")
    lines = list(dict.fromkeys(zip(gains["optimizer"], gains["normalization"], gains["batch"], strict=True)))
    settings = list(dict.fromkeys(zip(ratios["optimizer"], ratios["normalization"], strict=True)))
    columns = min(len(settings), 2)
    heights = [0.36 * len(lines) + 1.5, 2.7 * -(-len(settings) // columns) + 1]
    fig = Drawing(layout="constrained", figsize=(8, sum(heights)))
    above, under = fig.subfigures(2, 1, height_ratios=heights)
    _gains(above, gains, lines)
    _ratios(under, ratios, settings, columns)
    return fig


def _gains(fig, gains: pd.DataFrame, lines: list) -> None:
    ax = fig.subplots()
    ax.axvline(0, color="black", lw=0.8)
    horizons = sorted(gains["horizon_tokens"].unique())
    for i, (horizon, mark) in enumerate(zip(horizons, marks(horizons), strict=True)):
        of = gains[gains["horizon_tokens"] == horizon]
        y = [lines.index(line) for line in zip(of["optimizer"], of["normalization"], of["batch"], strict=True)]
        level(ax, of["gain_percent"], of["low"], of["high"], np.array(y) + 0.5 * ((i + 0.5) / len(horizons) - 0.5), mark)
        ax.plot([], [], mark["marker"], color=mark["color"], ms=7, label=f"{octaves(horizon)} tokens")
    span = pd.concat([gains["gain_percent"], pd.Series([0.0])])
    hold(ax, span, max(1.0, np.ptp(span)), "x")
    rows_down(ax, [f"{name}, {_placed(where)}, batch {_starred(batch)}" for name, where, batch in lines])
    ax.set_xlabel("gain of rates tuned by layer group over one rate (% of the loss)")
    legend_above(fig, ax, "level: interval")


def _ratios(fig, ratios: pd.DataFrame, settings: list, columns: int) -> None:
    panels = fig.subplots(-(-len(settings) // columns), columns, squeeze=False, sharex=True, sharey=True).ravel()
    groups = [group for group in GROUPS if group in set(ratios["group"])]
    batches = list(ratios["batch"].unique())
    for i, (ax, (name, where)) in enumerate(zip(panels, settings, strict=False)):
        at = ratios[(ratios["optimizer"] == name) & (ratios["normalization"] == where)]
        for (group, batch), of in at.groupby(["group", "batch"]):
            look = marks(GROUPS)[GROUPS.index(group)] | {"linestyle": LINES[batches.index(batch) % len(LINES)]}
            path(ax, of, "log2_ratio", "loss_excess", look, by="log2_ratio")
        ax.axhline(0, color="black", lw=0.8)
        ax.set(title=f"{name}, {_placed(where)}", xlabel="rate of the group over the others (log2)" if i + columns >= len(settings) else "")
        ax.set_ylabel("loss above that of one rate\n(nats per token)" if i % columns == 0 else "")
        ax.tick_params(labelbottom=True)
    for ax in panels[len(settings):]:
        ax.remove()
    cap_above(panels[0], ratios["loss_excess"])
    for group in groups:
        mark = marks(GROUPS)[GROUPS.index(group)]
        panels[0].plot([], [], mark["marker"], color=mark["color"], ms=7, label=group)
    for batch, line in zip(batches, LINES, strict=False):
        panels[0].plot([], [], color="#8C8C8C", ls=line, label=f"batch {_starred(batch)}")
    legend_above(fig, panels[0], "; ".join(["faint: seeds", *crossed(ratios["loss_excess"], "× above: diverged")]), columns=5)


def _placed(normalization: str) -> str:
    return {"pre": "norm before blocks", "everywhere": "norm everywhere"}.get(normalization, normalization)


def _starred(batch) -> str:
    return str(batch).replace("B*", "$B^*$")
