"""Rates of their own for layer groups (input : hidden : output): what they gain over one rate, and which group minds most."""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.analysis.paired import mean_estimate
from etastar.studies.measured import LEAST_STEPS, Contrast
from etastar.studies.norm_transfer_design import GROUPS

RATIOS = [f"ratio_{group}" for group in GROUPS]
AT_BEST, LARGE = "B*", "4B*"


@dataclasses.dataclass(frozen=True)
class Condition:
    """Where layer groups were moved: optimizer, normalization, batch and horizon; `rows` are the runs of the seeds that all have."""

    optimizer: str
    normalization: str
    batch: str
    batch_tokens: int
    horizon_tokens: int
    rows: pd.DataFrame

    @property
    def equal(self) -> pd.DataFrame:
        """Loss at one rate for all groups: seed × log2 rate."""
        return _table(self.rows[(self.rows[RATIOS] == 0).all(axis=1)], "log2_lr")

    @property
    def middle(self) -> float:
        """The log2 rate that groups are moved from."""
        return float(self.rows[(self.rows[RATIOS] != 0).any(axis=1)].log2_lr.iloc[0])

    def moved(self, group: str) -> pd.DataFrame:
        """Loss with one group's rate moved from the middle: seed × octaves, 0 among them."""
        others = [f"ratio_{name}" for name in GROUPS if name != group]
        rows = self.rows[(self.rows[others] == 0).all(axis=1) & (self.rows.log2_lr == self.middle)]
        return _table(rows, f"ratio_{group}")

    @property
    def every(self) -> pd.DataFrame:
        """Loss of every setting of rate and ratios: seed × setting."""
        labels = self.rows[["log2_lr", *RATIOS]].round(6).astype(str).agg("/".join, axis=1)
        return _table(self.rows.assign(setting=labels), "setting")


def _table(rows: pd.DataFrame, columns: str) -> pd.DataFrame:
    return rows.pivot_table(index="seed", columns=columns, values="loss", dropna=False).sort_index(axis=1)


def conditions(frame: pd.DataFrame) -> list[Condition]:
    """All conditions in which each group was moved, by optimizer, normalization, horizon and rising batch."""
    made = []
    moved = frame[(frame[RATIOS] != 0).any(axis=1)]
    for (optimizer, normalization), arm in moved.groupby(["optimizer", "normalization"]):
        smallest = arm.batch_tokens.min()
        for (batch, tokens), at in arm.groupby(["batch_tokens", "horizon_tokens"]):
            here = frame[(frame.optimizer == optimizer) & (frame.normalization == normalization) & (frame.batch_tokens == batch)
                         & (frame.horizon_tokens == tokens) & (frame.width == at.width.iloc[0]) & (frame.depth == at.depth.iloc[0])
                         & (frame.varied == "") & frame.seed.isin(at.seed)]
            made.append(Condition(optimizer, normalization, AT_BEST if batch == smallest else LARGE, int(batch), int(tokens), here))
    return made


def gain(condition: Condition) -> np.ndarray:
    """By seed, least loss over all settings over the least at one rate, less 1; both settings are chosen by the other seeds."""
    every, equal = condition.every, condition.equal
    if len(every) < 2:
        return np.array([])
    return np.array([_chosen(every, seed) / _chosen(equal, seed) - 1 for seed in every.index])


def _chosen(table: pd.DataFrame, seed) -> float:
    return float(table.loc[seed, table.drop(index=seed).mean(skipna=False).idxmin()])


def gains(made: list[Condition]) -> pd.DataFrame:
    """One row a condition: optimizer, normalization, batch, horizon_tokens, gain_percent with its 95 % interval, steps."""
    rows = []
    for c in made:
        if len(per_seed := gain(c)) >= 2:
            low, high = mean_estimate(per_seed).interval()
            rows.append({"optimizer": c.optimizer, "normalization": c.normalization, "batch": c.batch, "horizon_tokens": c.horizon_tokens,
                         "gain_percent": 100 * per_seed.mean(), "low": 100 * low, "high": 100 * high,
                         "steps": c.horizon_tokens // c.batch_tokens})
    return pd.DataFrame(rows)


def ratios(made: list[Condition]) -> pd.DataFrame:
    """Loss over that of no move, by group and octaves moved: optimizer, normalization, batch, group, log2_ratio, loss_excess, seed.

    At the longer horizon of each.
    """
    rows, longest = [], max((c.horizon_tokens for c in made), default=0)
    for c in [c for c in made if c.horizon_tokens == longest]:
        for group in GROUPS:
            moved = c.moved(group)
            if 0.0 in moved:
                excess = moved.sub(moved[0.0], axis=0)
                told = {"optimizer": c.optimizer, "normalization": c.normalization, "batch": c.batch, "group": group}
                rows += [told | {"log2_ratio": octaves, "loss_excess": value, "seed": seed}
                         for octaves in moved for seed, value in excess[octaves].items()]
    return pd.DataFrame(rows)


def contrasts(made: list[Condition]) -> dict[str, Contrast]:
    """What the claims on layer groups are judged by."""
    found, horizons = {}, sorted({c.horizon_tokens for c in made})
    by = {(c.optimizer, c.normalization, c.batch, c.horizon_tokens): c for c in made}
    large, best = (by.get(("scion", "everywhere", batch, tokens)) for batch, tokens in
                   ((LARGE, horizons[0]), (AT_BEST, horizons[-1]))) if horizons else (None, None)
    for name, condition in (("layers: gain, large batch", large), ("layers: gain, best batch", best)):
        if condition is not None and len(per_seed := gain(condition)) >= 2:
            found[name] = Contrast(per_seed, "loss_fraction", "layers", condition.horizon_tokens, _short(condition))
    if large is not None and len(turned := _vertex(large, "hidden")) >= 2:
        found["layers: hidden ratio"] = Contrast(turned, "octaves", "ratios", large.horizon_tokens, _short(large))
    if best is not None:
        costs = {group: _cost(best, group) for group in GROUPS}
        if min(map(len, costs.values())) >= 2:
            over = costs["output"] - costs["input"]
            found["layers: output − input"] = Contrast(over, "nats", "layers", best.horizon_tokens, _short(best))
    pre, every = (by.get(("adamw", n, AT_BEST, horizons[-1])) if horizons else None for n in ("pre", "everywhere"))
    if pre is not None and every is not None and len(gain(pre)) == len(gain(every)) >= 2:
        found["layers: pre-norm − everywhere"] = Contrast(gain(pre) - gain(every), "loss_fraction", "layers", pre.horizon_tokens,
                                                          _short(pre) or _short(every))
    return found


def _short(condition: Condition) -> str:
    steps = condition.horizon_tokens // condition.batch_tokens
    return "" if steps >= LEAST_STEPS else f"runs of {steps} steps, fewer than {LEAST_STEPS}"


def _vertex(condition: Condition, group: str) -> np.ndarray:
    """By seed, octaves from the middle at which a group's parabola is lowest; held to the moves that were run."""
    moved = condition.moved(group)
    if moved.shape[1] < 3 or not np.isfinite(moved.to_numpy()).all():
        return np.array([])
    octaves = moved.columns.to_numpy(float)
    _, slope, bend = np.polynomial.polynomial.polyfit(octaves, moved.to_numpy().T, 2)
    if bend.mean() <= 0:
        return np.array([])
    middle = -slope.mean() / (2 * bend.mean())  # seeds by one Newton step from the mean parabola
    own = middle - (slope + 2 * bend * middle) / (2 * bend.mean())
    return own if octaves.min() <= middle <= octaves.max() else np.array([])


def _cost(condition: Condition, group: str) -> np.ndarray:
    """By seed, the mean loss of moving a group either way over no move (nats)."""
    moved = condition.moved(group)
    if 0.0 not in moved or moved.shape[1] < 3 or not math.isfinite(moved.to_numpy().sum()):
        return np.array([])
    return (moved.drop(columns=0.0).mean(axis=1) - moved[0.0]).to_numpy()
