"""Figures of the target that fitting and transfer predict a rate for: its bowls with those rates, and regret over the ratio of sizes."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from etastar.analysis.paired import mean_estimate
from etastar.plots.mup_pieces import CELL, ROOM, RUN, SCALINGS, Design, bowl, vertex
from etastar.plots.norm_pieces import crossed, hold, inside, octaves, perhaps
from etastar.plots.style import DIFFERENCE, LOSS, Drawing, log2_axis, marks, need, some, styled, two_lines

FAR = 3.0  # octaves beyond the rates tried that stay in view
BLACK = {"color": "black", "linestyle": "-", "marker": "o"}
FITTED, TRANSFERRED, KEPT = "fitted", "transferred", "base's rate kept, SP"
METHODS = {  # which of the house's marks a method has, alike where what is assumed of the tokens is alike
    FITTED: 0, "fitted, at transfer's FLOPs": 5, "fitted by losses (eq. 4)": 2, "published exponents": 3, KEPT: 4,
    TRANSFERRED: 1, "transferred, published horizon rule": 3, "transferred, no horizon rule": 4,
}
RATIO_METHODS = {FITTED: "fitted, SP", TRANSFERRED: "transferred, μP", KEPT: KEPT}


@styled
def head_to_head(rows: pd.DataFrame, cells: pd.DataFrame | None, target: pd.DataFrame) -> Figure:
    """The target's own bowls under SP and μP, and upright at which rate each method put it: colour and marker a method, faint its seeds.

    `rows` and `cells` as for `scaling_bowls`; the target is the widest μP model of the longest horizon. `target`: method, parametrization,
    seed, log2_lr (NaN: left out), octaves from the seed's best, loss, regret (nats). What is far out of view stands open at its side.
    """
    need(rows, *RUN)
    need(target, "method", "parametrization", "seed", "log2_lr", "octaves", "loss", "regret")
    target = target.dropna(subset=["log2_lr", "loss"])
    plain = Design.of(rows).of_kind(rows)
    some(plain, "runs under SP or μP")
    width, tokens = Design.of(rows).target(rows)
    at = plain[(plain["width"] == width) & (plain["horizon_tokens"] == tokens)]
    scalings = [scaling for scaling in ("sp", "mup") if (at["scaling"] == scaling).any()]
    fig = Drawing(layout="constrained", figsize=(4.7 * len(scalings) + 1, 5.6))
    panels = fig.subplots(1, len(scalings), squeeze=False, sharey=True)[0]
    panels[0].set_ylim(*_view(at, target["loss"]))
    for ax, scaling in zip(panels, scalings, strict=True):
        of = at[at["scaling"] == scaling]
        _target_panel(ax, of, _cell_of(cells, of), target[target["parametrization"] == scaling])
        ax.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), alignment="left", title=f"{SCALINGS[scaling]}: octaves off; nats lost")
    panels[0].set_ylabel(LOSS)
    notes = ["large black: best rate, interval level", "faint: seeds", "open at a side: out of view"]
    notes += crossed(at["loss"], "× above: diverged")
    fig.suptitle(f"target: width {width:,g}, {octaves(tokens)} tokens\n{'; '.join(notes)}", x=0.01, ha="left", fontsize=10)
    return fig


@styled
def regret_by_ratio(ratios: pd.DataFrame) -> Figure:
    """Regret over how many times larger the target is than the base, means with 95 % intervals over seeds; and what μP gains by transfer.

    Columns method, seed, ratio (of parameters), regret, loss (nats; NaN left out), parametrization. The second panel, loss of SP at the
    fitted rate less that of μP at the transferred one by seed, is there where both are.
    """
    need(ratios, "method", "seed", "ratio", "regret", "loss", "parametrization")
    kept = ratios[np.isfinite(ratios["regret"])]
    methods = [method for method in RATIO_METHODS if (kept["method"] == method).any()]
    some(methods, f"regret of {FITTED}, {TRANSFERRED} or {KEPT}")
    gap = ratios.pivot_table(index=["ratio", "seed"], columns="method", values="loss").reindex(columns=[FITTED, TRANSFERRED]).dropna()
    gap = (gap[FITTED] - gap[TRANSFERRED]).rename("gap").reset_index()
    fig = Drawing(layout="constrained", figsize=(4.2 * (1 + bool(len(gap))) + 1.2, 4.2))
    panels = fig.subplots(1, 1 + bool(len(gap)), squeeze=False)[0]
    for i, method in enumerate(methods):
        aside, look = 2 ** (0.06 * (i - (len(methods) - 1) / 2)), _method_look(method) | {"label": RATIO_METHODS[method]}
        _over_ratio(panels[0], kept[kept["method"] == method], "regret", look, aside)
    panels[0].set_ylabel("regret: loss above that\nat the tuned rate (nats per token)")
    regrets = kept.loc[kept["method"].isin(methods), "regret"]
    hold(panels[0], regrets, max(0.01, np.ptp(regrets)))
    for ax in panels[1:]:
        _over_ratio(ax, gap, "gap", {"color": "black", "linestyle": "-", "marker": "D", "label": "SP fitted less μP transferred"})
        ax.set_ylabel(two_lines(DIFFERENCE))
        hold(ax, pd.concat([gap["gap"], pd.Series([0.0])]), max(0.01, np.ptp(gap["gap"])))
    for ax in panels:
        _ratio_axis(ax, ratios["ratio"])
        ax.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), alignment="left", title="faint: seeds; upright: 95 % interval")
    return fig


def _target_panel(ax, rows: pd.DataFrame, cell: pd.DataFrame, guesses: pd.DataFrame) -> None:
    """The target's bowl with its best rate, black, and the rates it was given, by method."""
    _rate_view(ax, rows["peak_lr"], 2.0 ** guesses["log2_lr"])
    bowl(ax, rows, BLACK | {"label": "the target's own runs"})
    for row in cell.itertuples():
        vertex(ax, row, BLACK)
    for method, of in guesses.groupby("method", sort=False):
        _guess(ax, of, _method_look(method))
    ax.set_xlabel("peak learning rate")


def _cell_of(cells: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame:
    """The cell of a model's runs, or none where it has no best rate."""
    cells, what = perhaps(cells, *CELL).dropna(subset="best_lr"), ["scaling", "kind", "width", "depth", "horizon_tokens"]
    return cells[(cells[what] == rows[what].iloc[0]).all(axis=1)]


def _method_look(method: str) -> dict:
    """Grey crosses for a method that is none of METHODS."""
    return marks(range(8))[METHODS[method]] if method in METHODS else {"color": "#8C8C8C", "linestyle": ":", "marker": "X"}


def _view(rows: pd.DataFrame, guessed: pd.Series) -> tuple[float, float]:
    """From the least of all losses to ROOM above the best run of the worse scaling, or less far where none is there."""
    kept = rows[np.isfinite(rows["loss"])]
    if kept.empty:
        return 0.0, 1.0
    shown = pd.concat([kept["loss"], guessed])
    high = min(shown.max(), kept.groupby("scaling")["loss"].min().max() + ROOM)
    beyond = 0.07 * max(high - shown.min(), 0.01)
    return shown.min() - beyond, high + beyond


def _rate_view(ax, tried: pd.Series, guessed: pd.Series) -> None:
    """All rates that were tried, and those guessed no more than FAR octaves beyond."""
    low, high = (np.log2(np.array([tried.min(), tried.max()])) + (-FAR, FAR))
    shown = np.clip(np.log2(pd.concat([tried, guessed])), low, high)
    log2_axis(ax, 2.0**shown)
    ax.set_xlim(2.0 ** (shown.min() - 0.4), 2.0 ** (shown.max() + 0.4))


def _guess(ax, rows: pd.DataFrame, look: dict) -> None:
    """Where a method put the rate, upright, and what loss it has there; seeds faint. Out of view: open, at the side."""
    meant = 2.0 ** rows["log2_lr"].mean(), rows["loss"].mean()
    at = inside(ax, *meant)
    ax.plot(2.0 ** rows["log2_lr"], rows["loss"], look["marker"], color=look["color"], alpha=0.35, ms=4, mew=0, scalex=False)
    if at[0] == meant[0]:
        ax.axvline(at[0], color=look["color"], ls=look["linestyle"], lw=1.2)
    rim = {"mec": "white"} if at == meant else {"mfc": "white", "mew": 1.6, "clip_on": False}
    told = f"{rows['method'].iloc[0]}: {rows['octaves'].mean():+.2f}; {rows['regret'].mean():.4f}".replace("-", "−")
    ax.plot(*at, **look | {"ms": 8} | rim, zorder=5, label=told)


def _over_ratio(ax, rows: pd.DataFrame, y: str, look: dict, aside: float = 1.0) -> None:
    """Seeds faint, means over them joined, 95 % intervals upright where there are two seeds."""
    ax.axhline(0, color="black", lw=0.8)
    ax.plot(rows["ratio"] * aside, rows[y], look["marker"], color=look["color"], alpha=0.35, ms=4, mew=0)
    for ratio, values in rows.groupby("ratio")[y]:
        if len(values) > 1:
            ax.vlines(ratio * aside, *mean_estimate(values).interval(), color=look["color"], lw=1.4)
    mean = rows.groupby("ratio")[y].mean()
    ax.plot(mean.index * aside, mean, **look | {"ms": 8, "mec": "white"})


def _ratio_axis(ax, ratios: pd.Series) -> None:
    """Octaves, labelled at the ratios themselves."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(ratios.unique())))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(ratios.min() * 2**-0.5, ratios.max() * 2**0.5)
    ax.set_xlabel("target's parameters over the base's")
