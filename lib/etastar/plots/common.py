"""The figures that every study shares: schedules, bowls, curves, the forest of verdicts, differences by seed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from etastar.plots.style import DIFFERENCE, LOSS, Drawing, legend_above, log2_axis, marks, need, some, styled

VERDICT_MARKS = {  # colour and shape, so that neither is needed alone; the verdict's word stands beside them
    "reproduced": ("#009E73", "o"),
    "contradicted": ("#D55E00", "X"),
    "differs at this scale": ("#E69F00", "s"),
    "inconclusive": ("#0072B2", "D"),
    "untested": ("#8C8C8C", "_"),
}
UNITS = {  # axis label and the value that means no difference
    "token_fraction": ("loss difference as a share of tokens (negative: as good as that many more tokens)", 0),
    "nats": (DIFFERENCE, 0),
    "octaves": ("difference in log2 (octaves)", 0),
    "octaves per octave": ("slope of a log2 norm (octaves per octave of tokens)", 0),
    "half-widths": ("difference of drifts (half-widths of the loss basin)", 0),
    "loss_fraction": ("loss difference as a share of the loss (negative: lower)", 0),
    "ratio": ("ratio", 1),
    "exponent": ("exponent", None),
    "share": ("share", None),
    "points": ("score (points)", None),
}


@styled
def schedule_lines(curves: Mapping[str, np.ndarray], batch_tokens: int, label: str = "learning rate") -> Figure:
    """Learning rate over tokens seen, one line a schedule; each array holds the rate of every step."""
    some(curves, "schedules")
    fig = Drawing(layout="constrained")
    ax = fig.subplots()
    for (name, lr), mark in zip(curves.items(), marks(curves), strict=True):
        ax.plot(
            (np.arange(len(lr)) + 1) * batch_tokens, lr, color=mark["color"], linestyle=mark["linestyle"], label=name
        )
    ax.set(xlabel="tokens", ylabel=label, ylim=(0, None), xlim=(0, None))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_above(fig, ax)
    return fig


@styled
def lr_bowls(frame: pd.DataFrame, bowls: Mapping | None = None) -> Figure:
    """Final loss over peak learning rate: columns arm, peak_lr, loss (nats; NaN diverged), seed; one colour an arm.

    Points are seeds. `bowls` (arm → fitted Bowl) adds the fitted curve, its vertex and the interval of the best rate.
    """
    need(frame, "arm", "peak_lr", "loss", "seed")
    bowls = bowls or {}
    fig = Drawing(layout="constrained", figsize=(7, 4.4))
    ax = fig.subplots()
    arms = list(frame["arm"].unique())
    for (i, arm), mark in zip(enumerate(arms), marks(arms), strict=True):
        rows = frame[frame["arm"] == arm]
        aside = 2 ** (0.05 * (i - (len(arms) - 1) / 2))
        kept = rows[np.isfinite(rows["loss"])]
        ax.plot(kept["peak_lr"] * aside, kept["loss"], mark["marker"], color=mark["color"], alpha=0.55, ms=4, mew=0)
        ax.plot([], [], **mark, label=arm)
        if arm in bowls:
            _bowl(ax, bowls[arm], kept, mark)
        else:
            mean = kept.groupby("peak_lr")["loss"].mean()
            ax.plot(mean.index, mean, color=mark["color"], linestyle=mark["linestyle"])
        lost = rows[~np.isfinite(rows["loss"])]
        if len(lost):
            height = np.full(len(lost), 0.98)
            ax.plot(lost["peak_lr"] * aside, height, "x", color=mark["color"], transform=ax.get_xaxis_transform())
    log2_axis(ax, frame["peak_lr"])
    ax.set(xlabel="peak learning rate", ylabel=LOSS)
    notes = ["points: seeds"] + ["hollow: fitted best rate with its 95 % interval"] * bool(bowls)
    notes += ["× above: diverged"] * bool((~np.isfinite(frame["loss"])).any())
    legend_above(fig, ax, title="; ".join(notes))
    return fig


@styled
def loss_curves(frame: pd.DataFrame) -> Figure:
    """Loss over tokens: columns arm, tokens and val_loss or train_loss (nats per token); seeds averaged, spread shaded.

    Both columns make two panels. Arms keep their colour and line style.
    """
    need(frame, "arm", "tokens")
    shown = [
        (column, label)
        for column, label in (("train_loss", "training loss (nats per token)"), ("val_loss", LOSS))
        if column in frame and frame[column].notna().any()
    ]
    if not shown:
        raise ValueError(f"loss_curves needs a column val_loss or train_loss; got {', '.join(frame.columns)}")
    fig = Drawing(layout="constrained", figsize=(4.4 * len(shown) + 2.6 * (len(shown) == 1), 4.2))
    panels = fig.subplots(1, len(shown), squeeze=False)[0]
    arms = list(frame["arm"].unique())
    for ax, (column, label) in zip(panels, shown, strict=True):
        for arm, mark in zip(arms, marks(arms), strict=True):
            rows = (
                frame[(frame["arm"] == arm) & frame[column].notna()]
                .groupby("tokens")[column]
                .agg(["mean", "min", "max"])
            )
            ax.plot(rows.index, rows["mean"], color=mark["color"], linestyle=mark["linestyle"], label=arm)
            ax.fill_between(rows.index, rows["min"], rows["max"], color=mark["color"], alpha=0.15, lw=0)
        ax.set(xlabel="tokens", ylabel=label)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_above(fig, panels[-1])
    return fig


@styled
def verdict_forest(board: pd.DataFrame) -> Figure:
    """Estimate and interval of every claim that has one, its published value, and its verdict by word and shape.

    Columns claim, estimate, low, high, verdict; published, unit, paper, evidence where known. One panel a unit.
    """
    need(board, "claim", "estimate", "low", "high", "verdict")
    rows = board[board["estimate"].notna()].reset_index(drop=True)
    some(rows, "claims with an estimate")
    units = rows["unit"].fillna("") if "unit" in rows else pd.Series("", index=rows.index)
    groups = [(unit, rows[units == unit]) for unit in units.unique()]
    heights = [len(group) + 1.4 for _, group in groups]
    fig = Drawing(layout="constrained", figsize=(9, 0.42 * sum(heights) + 0.9))
    panels = fig.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (unit, group) in zip(panels, groups, strict=True):
        _forest_panel(ax, unit, group)
    handles = [Line2D([], [], color="black", marker="d", mfc="none", ls="", ms=8, label="published value")]
    handles += [
        Line2D([], [], color=colour, marker=shape, label=verdict)
        for verdict, (colour, shape) in VERDICT_MARKS.items()
        if verdict in set(rows["verdict"])
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=3)
    return fig


@styled
def paired_differences(
    frame: pd.DataFrame, margin: float | None = None, label: str = DIFFERENCE
) -> Figure:
    """Seeds' differences by contrast: columns contrast, seed, difference, and perhaps low, high (its 95 % interval).

    `margin` shades what counts as equal. Every seed is a point, the upright line is their mean.
    """
    need(frame, "contrast", "seed", "difference")
    contrasts = list(frame["contrast"].unique())
    fig = Drawing(layout="constrained", figsize=(7.5, 0.6 * len(contrasts) + 1.6))
    ax = fig.subplots()
    if margin is not None:
        ax.axvspan(-margin, margin, color="#56B4E9", alpha=0.15, lw=0, label=f"within ±{margin:g}: equal")
    ax.axvline(0, color="black", lw=0.8)
    for y, contrast in enumerate(contrasts):
        rows = frame[frame["contrast"] == contrast].sort_values("seed")
        spread = np.linspace(-0.16, 0.16, len(rows)) if len(rows) > 1 else [0]
        ax.plot(
            rows["difference"],
            y + np.asarray(spread),
            "o",
            color="#0072B2",
            alpha=0.5,
            ms=4,
            mew=0,
            label="seeds" if y == 0 else None,
        )
        ax.plot(
            [rows["difference"].mean()] * 2,
            [y - 0.28, y + 0.28],
            color="#D55E00",
            lw=2,
            label="mean" if y == 0 else None,
        )
        if {"low", "high"} <= set(rows):
            ax.plot(
                rows[["low", "high"]].iloc[0],
                [y, y],
                color="#D55E00",
                lw=1.2,
                label="95 % interval" if y == 0 else None,
            )
    ax.set_yticks(range(len(contrasts)), contrasts)
    ax.set(xlabel=label, ylim=(len(contrasts) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper left", ncols=4)
    return fig


def _bowl(ax, bowl, rows, mark) -> None:
    x = np.geomspace(rows["peak_lr"].min(), rows["peak_lr"].max(), 200)
    ax.plot(x, bowl.loss_at(x), color=mark["color"], linestyle=mark["linestyle"])
    ax.plot([bowl.best_lr_low, bowl.best_lr_high], [bowl.best_loss] * 2, color=mark["color"], lw=3, alpha=0.4)
    ax.plot(bowl.best_lr, bowl.best_loss, mark["marker"], mfc="white", mec=mark["color"], mew=1.6, ms=8)


def _forest_panel(ax, unit: str, rows: pd.DataFrame) -> None:
    for y, row in enumerate(rows.to_dict("records")):
        colour, shape = VERDICT_MARKS.get(row["verdict"], ("#000000", "."))
        ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=2)
        ax.plot(row["estimate"], y, shape, color=colour, ms=8)
        published = row.get("published")
        if published is not None and np.isfinite(published):
            ax.plot(published, y, "d", mfc="none", mec="black", ms=10, mew=1.3)
    label, none = UNITS.get(unit, (unit, None))
    if none is not None:
        ax.axvline(none, color="black", lw=0.8)
    ax.set_yticks(range(len(rows)), [_claim_label(row) for row in rows.to_dict("records")])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
    ax.grid(axis="y", visible=False)
    words = ax.secondary_yaxis("right")
    words.set_yticks(range(len(rows)), list(rows["verdict"]))
    words.tick_params(length=0)
    words.spines["right"].set_visible(False)


def _claim_label(row: dict) -> str:
    source = ", ".join(str(row[key]) for key in ("paper", "evidence") if row.get(key))
    return f"{row['claim']}\n{source}" if source else str(row["claim"])
