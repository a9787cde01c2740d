"""Figures of study 07: norms of a checkpoint's matrices, scores of its exports, printed scores with ours."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from etastar.plots.style import Drawing, legend_above, marks, need, some, styled

OWN = {"embedding": "1→RMS", "hidden": "RMS→RMS", "output": "RMS→∞"}
READERS = {"hand": "our decoder", "harness": "lm-evaluation-harness", "untrained": "before training", "placebo": "another text's start"}


@styled
def norms_by_layer(frame: pd.DataFrame) -> Figure:
    """Own norms of hidden matrices over the layers, one panel a checkpoint: columns checkpoint, layer, role, name, part, norm, at_start.

    The embedding's and the head's own norms stand in the panel's title; a grey line is the mean at the start where it is known. A point
    is the mean over the experts of a layer.
    """
    need(frame, "checkpoint", "layer", "role", "name", "part", "norm", "at_start")
    hidden = frame[frame["role"] == "hidden"].assign(matrix=lambda f: [matrix_of(*row) for row in zip(f["name"], f["part"], strict=True)])
    names, matrices = list(frame["checkpoint"].unique()), list(hidden["matrix"].unique())
    fig = Drawing(layout="constrained", figsize=(1.2 + 3.9 * len(names), 4.2))
    panels = fig.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(panels, names, strict=True):
        rows = hidden[hidden["checkpoint"] == name]
        for matrix, mark in zip(matrices, marks(matrices), strict=True):
            mean = rows[rows["matrix"] == matrix].groupby("layer")["norm"].mean()
            ax.plot(mean.index.astype(int), mean, **mark, ms=4, label=matrix)
        if rows["at_start"].notna().any():
            ax.axhline(rows["at_start"].iloc[0], color="#8C8C8C", lw=1, label="mean at the start")
        ends = frame[(frame["checkpoint"] == name) & frame["role"].isin(("embedding", "output"))]
        told = "; ".join(f"{role} {norm:.3g} ({OWN[role]})" for role, norm in zip(ends["role"], ends["norm"], strict=True))
        ax.set_title(f"{name}\n{told}", fontsize=9)
        ax.set(xlabel="layer", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("operator norm RMS→RMS")
    legend_above(fig, panels[0], columns=5)
    return fig


def matrix_of(name: str, part: str) -> str:
    """What a hidden matrix does, from its name in a checkpoint: q, k, v, o; gate, up, down, of experts too; router."""
    if part:
        return part
    stem = name.removesuffix(".weight").removesuffix(".layer").split(".")[-1]
    return {"output_linear": "down"}.get(stem, stem.removesuffix("_proj"))


@styled
def cloze_accuracy(frame: pd.DataFrame, chance: float) -> Figure:
    """Share of items whose true continuation is picked: columns arm, seed, reader, accuracy, se (points); bars are 95 % over items."""
    need(frame, "arm", "seed", "reader", "accuracy", "se")
    arms, readers = list(frame["arm"].unique()), [r for r in READERS if r in set(frame["reader"])]
    fig = Drawing(layout="constrained", figsize=(7.5, 3.8))
    ax = fig.subplots()
    ax.axvline(chance, color="#8C8C8C", lw=1, label="chance")
    for reader, mark in zip(readers, marks(readers), strict=True):
        rows = frame[frame["reader"] == reader]
        order = rows.groupby("arm").cumcount()
        y = [arms.index(arm) + 0.19 * (readers.index(reader) - (len(readers) - 1) / 2) + 0.045 * (k - 1) for arm, k in
             zip(rows["arm"], order, strict=True)]
        ax.errorbar(rows["accuracy"], y, xerr=1.96 * rows["se"], fmt=mark["marker"], color=mark["color"], ms=5, lw=1, label=READERS[reader])
    ax.set_yticks(range(len(arms)), arms)
    ax.set(xlabel="true continuation of four picked (% of items)", ylim=(len(arms) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    legend_above(fig, ax, columns=3)
    return fig


@styled
def window_losses(frame: pd.DataFrame) -> Figure:
    """Loss by the step of a sliding window: columns arm, stride, nats_per_token, nats_per_token_se, bits_per_byte, bits_per_byte_se."""
    need(frame, "arm", "stride", "nats_per_token", "nats_per_token_se", "bits_per_byte", "bits_per_byte_se")
    fig = Drawing(layout="constrained", figsize=(8.4, 3.8))
    arms = list(frame["arm"].unique())
    for ax, column, label in zip(fig.subplots(1, 2), ("nats_per_token", "bits_per_byte"), ("nats per token", "bits per byte"), strict=True):
        for arm, mark in zip(arms, marks(arms), strict=True):
            rows = frame[frame["arm"] == arm]
            ax.errorbar(rows["stride"], rows[column], yerr=1.96 * rows[f"{column}_se"], capsize=3, ms=5, label=arm, **mark)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(frame["stride"].unique()), [str(s) for s in sorted(frame["stride"].unique())])
        ax.minorticks_off()
        ax.set(xlabel="the window moves by (tokens)", ylabel=f"held-out loss ({label})")
    legend_above(fig, ax, title="bars: 95 % over documents")
    return fig


@styled
def printed_scores(frame: pd.DataFrame, ours: Mapping[str, pd.DataFrame]) -> Figure:
    """Printed scores of released models and of those beside them, with ours: columns released, model, benchmark, score (points).

    `ours` maps a released model to rows of benchmark, score and se, as `beside_published` gives them.
    """
    need(frame, "released", "model", "benchmark", "score")
    some(frame, "scores")
    released = list(frame["released"].unique())
    benchmarks = list(frame["benchmark"].unique())
    fig = Drawing(layout="constrained", figsize=(9.2, 0.34 * len(benchmarks) + 2.4))
    panels = fig.subplots(1, len(released), sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, released, strict=True):
        rows = frame[frame["released"] == name]
        models = list(rows["model"].unique())
        for i, (model, mark) in enumerate(zip(models, marks(models), strict=True)):
            own = rows[rows["model"] == model]
            y = np.array([benchmarks.index(b) for b in own["benchmark"]]) + 0.13 * (i - (len(models) - 1) / 2)
            ax.plot(own["score"], y, mark["marker"], color=mark["color"], ms=6 if i == 0 else 4, label=model)
        if name in ours:
            _add_ours(ax, ours[name], benchmarks)
        ax.set_yticks(range(len(benchmarks)), benchmarks)
        ax.set(xlabel="score (%)", ylim=(len(benchmarks) - 0.5, -0.5))
        ax.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=""))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    return fig


def _add_ours(ax, ours: pd.DataFrame, benchmarks: list[str]) -> None:
    shown = ours[ours["benchmark"].isin(benchmarks)]
    y = [benchmarks.index(benchmark) + 0.34 for benchmark in shown["benchmark"]]
    ax.errorbar(shown["score"], y, xerr=1.96 * shown["se"], fmt="|", color="black", ms=9, lw=1.2, label="evaluated here (95 %)")
