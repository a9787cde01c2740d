"""The runs of study 05 as a table: what arm each belongs to, how it was trained, and the norms that its matrices end with."""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd

from etastar.model.norms import operator_norms
from etastar.recipe import AdamW, Recipe, Scion
from etastar.schedules import WSD
from etastar.studies import measured as common
from etastar.studies.norm_transfer_design import DECAY_SHARE, GROUPS

SCION, ADAMW = "scion", "adamw"
AXES = ["horizon_tokens", "batch_tokens", "peak_lr", "seed"]


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to: optimizer, momentum, decay, normalization, shape and layer-group ratios."""
    optimizer = recipe.optimizer
    name = ADAMW if isinstance(optimizer, AdamW) else SCION
    name += f", momentum {optimizer.momentum:g}" if isinstance(optimizer, Scion) and optimizer.momentum != 1 else ""
    name += ", decayed" if isinstance(recipe.schedule, WSD) else ""
    name += ", pre-norm" if recipe.model.normalization == "pre" else ""
    name += f", {recipe.model.width}×{recipe.model.depth}"
    moved = [f"{group} 2^{math.log2(ratio):g}" for group, ratio in zip(GROUPS, recipe.lr_ratios, strict=True) if ratio != 1]
    return name + "".join(f", {part}" for part in moved)


def told(run) -> dict:
    """What a run is and the log2 norms of its matrices at the end; NaN where it diverged."""
    r = run.recipe
    decay = 1 - DECAY_SHARE if isinstance(r.schedule, WSD) else 1.0
    row = {"run_id": run.run_id, "optimizer": ADAMW if isinstance(r.optimizer, AdamW) else SCION, "batch_tokens": r.batch_tokens,
           "steps": r.total_steps, "width": r.model.width, "depth": r.model.depth, "normalization": r.model.normalization,
           "varied": "decayed" if decay < 1 else "momentum" if getattr(r.optimizer, "momentum", 1) != 1 else "",
           "main": r.lr_ratios == (1.0, 1.0, 1.0), "log2_lr": math.log2(r.peak_lr), "log2_lr_steps": math.log2(r.lr().sum()),
           "constant_tokens": 2 ** round(math.log2(r.horizon_tokens * decay))}
    row |= {f"ratio_{group}": math.log2(ratio) if ratio else -math.inf for group, ratio in zip(GROUPS, r.lr_ratios, strict=True)}
    return row | (dict.fromkeys(NORMS, math.nan) if run.status == "diverged" else norms_of(run))


NORMS = ("log2_norm", "log2_output_rms", "log2_hidden", "log2_input")


def norms_of(run) -> dict[str, float]:
    """Log2 norms of a run's weights: of the head RMS→∞ and RMS→RMS, the largest RMS→RMS of a hidden matrix, 1→RMS of the token table."""
    by_role = {role: rows.max(numeric_only=True) for role, rows in operator_norms(run.model()).groupby("role")}
    values = by_role["output"].norm, by_role["output"].rms_to_rms, by_role["hidden"].norm, by_role["embedding"].norm
    return dict(zip(NORMS, np.log2(values).tolist(), strict=True))


def frame_of(runs) -> pd.DataFrame:
    """One row a run: arm, peak_lr, seed, horizon_tokens (of the constant part), loss, and what `told` tells."""
    frame = common.losses(runs, arm_of)
    frame = frame.merge(pd.DataFrame([told(r) for r in {r.run_id: r for r in runs}.values()]), on="run_id")
    return frame.assign(horizon_tokens=frame.constant_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Grids:
    """All runs; `shape` is the (width, depth) that most horizons have, `side_tokens` the horizon at which other arms were run."""

    frame: pd.DataFrame
    shape: tuple[int, int]

    @staticmethod
    def of(runs) -> "Grids":
        """Of all runs of a preset."""
        frame = frame_of(runs)
        shapes = frame[frame.main].groupby(["width", "depth"]).horizon_tokens.nunique()
        return Grids(frame, shapes.idxmax())

    def arm(self, name: str, width: int | None = None, depth: int | None = None) -> str:
        """The arm of the main shape, or of another."""
        return f"{name}, {width or self.shape[0]}×{depth or self.shape[1]}"

    @functools.cached_property
    def surfaces(self) -> dict[str, pd.DataFrame]:
        """The grid of every arm without layer-group ratios."""
        return {arm: self._surface(arm) for arm in self.frame[self.frame.main].arm.unique()}

    def surface(self, arm: str) -> pd.DataFrame:
        """The grid of an arm: at every horizon the cells with most seeds, in batches of three rates or more; empty for fewer than three."""
        return self.surfaces.get(arm, self.frame.iloc[:0])

    def _surface(self, arm: str) -> pd.DataFrame:
        rows, kept = self.frame[self.frame.arm == arm].drop_duplicates(AXES), []
        for _, at in rows.groupby("horizon_tokens"):
            cells = at.groupby(["batch_tokens", "peak_lr"])
            at = at[cells.seed.transform("nunique") == cells.seed.nunique().max()]  # cells run with fewer seeds were for something else
            at = at[at.groupby("batch_tokens").peak_lr.transform("nunique") >= 3]
            if at.batch_tokens.nunique() >= 3:
                kept.append(at)
        if not kept:
            return rows.iloc[:0]
        table = pd.concat(kept)
        return table[table.seed.isin(set.intersection(*(set(at.seed) for at in kept)))].sort_values(AXES)
