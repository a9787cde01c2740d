"""What `etastar tune` found: the bowls of the small runs, and the line through their vertices out to the asked run."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from etastar.plots.style import LOSS, Drawing, house_colours, legend_above, log2_axis, marks, need, some, styled


@styled
def tuned(runs: pd.DataFrame, bowls: Mapping, cells: pd.DataFrame, lines: pd.DataFrame) -> Figure:
    """Left: losses of the first arm's runs and their bowls, a colour a horizon; right: best rates over horizons and the fitted law.

    `runs`: arm, peak_lr, seed, horizon_tokens, loss (nats; NaN diverged); `bowls`: (arm, horizon) → Bowl; `cells`: arm, horizon_tokens,
    best_lr, low, high; `lines`: arm, horizon_tokens, lr, low, high, of which the arm "asked" is the run whose rate is wanted.
    """
    need(runs, "arm", "peak_lr", "horizon_tokens", "loss")
    need(cells, "arm", "horizon_tokens", "best_lr", "low", "high")
    need(lines, "arm", "horizon_tokens", "lr", "low", "high")
    some(bowls, "bowls")
    fig = Drawing(layout="constrained", figsize=(11, 4.8))
    left, right = fig.subplots(1, 2)
    _bowls(left, runs[runs["arm"] == cells["arm"].iloc[0]], bowls)
    _line(right, cells, lines)
    legend_above(fig, right, title=f"left: {cells['arm'].iloc[0]}, points are seeds; bars and shade: 95 % intervals")
    return fig


def _bowls(ax, runs: pd.DataFrame, bowls: Mapping) -> None:
    horizons = sorted(runs["horizon_tokens"].unique())
    for horizon, mark in zip(horizons, marks(horizons), strict=True):
        rows = runs[(runs["horizon_tokens"] == horizon) & np.isfinite(runs["loss"])]
        ax.plot(rows["peak_lr"], rows["loss"], mark["marker"], color=mark["color"], alpha=0.4, ms=4, mew=0)
        told = EngFormatter(places=1, sep="")(horizon)
        ax.annotate(f"{told} tokens", (rows["peak_lr"].max(), rows.loc[rows["peak_lr"] == rows["peak_lr"].max(), "loss"].mean()),
                    xytext=(5, 0), textcoords="offset points", color=mark["color"], va="center", fontsize="small")
        bowl = bowls.get((runs["arm"].iloc[0], horizon))
        if bowl is not None:
            x = np.geomspace(max(rows["peak_lr"].min(), bowl.best_lr / 4), min(rows["peak_lr"].max(), bowl.best_lr * 4), 100)
            ax.plot(x, bowl.loss_at(x), color=mark["color"], linestyle=mark["linestyle"])
            ax.plot(bowl.best_lr, bowl.best_loss, mark["marker"], mfc="white", mec=mark["color"], mew=1.6, ms=8)
    log2_axis(ax, runs["peak_lr"])
    ax.set_xlim(None, runs["peak_lr"].max() * 2.2)
    ax.set(xlabel="peak learning rate", ylabel=LOSS)


def _line(ax, cells: pd.DataFrame, lines: pd.DataFrame) -> None:
    arms = list(cells["arm"].unique())
    for arm, mark in zip(arms, marks(arms), strict=True):
        rows, law = cells[cells["arm"] == arm], lines[lines["arm"] == arm]
        reach = np.abs(rows[["low", "high"]].to_numpy().T - rows["best_lr"].to_numpy())
        ax.errorbar(rows["horizon_tokens"], rows["best_lr"], reach, fmt=mark["marker"], color=mark["color"], ms=6, lw=1.2, label=arm)
        ax.plot(law["horizon_tokens"], law["lr"], color=mark["color"], linestyle=mark["linestyle"])
    asked, colour = lines[lines["arm"] == "asked"], house_colours()[len(arms) % len(house_colours())]
    ax.plot(asked["horizon_tokens"], asked["lr"], color=colour, linestyle=":", label="law for the asked batch and width")
    ax.fill_between(asked["horizon_tokens"], asked["low"], asked["high"], color=colour, alpha=0.15, lw=0)
    last = asked.loc[asked["horizon_tokens"].idxmax()]
    ax.plot(last["horizon_tokens"], last["lr"], "*", color=colour, ms=14, label=f"asked run: {last['lr']:.3g}")
    ax.set(xscale="log", yscale="log", xlabel="horizon (tokens)", ylabel="best peak learning rate")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
