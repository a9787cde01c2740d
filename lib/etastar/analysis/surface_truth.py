"""Losses over rate, batch and horizon whose optimum and norm are known: the control of the surface fits, and their power.

What a design of horizons, batches and rates can say of a norm's slope depends on the noise of runs, the bowl's curvatures and
how coarse the batches are; drawn many times from a known surface and fitted as the study fits, it is known before any run.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.joint_surface import fit_joint_surface
from etastar.analysis.lr_batch_grid import AXES
from etastar.analysis.paired import Estimate
from etastar.analysis.valley import linex


@dataclasses.dataclass(frozen=True)
class SurfaceTruth:
    """A bowl over log2 rate and batch that moves with the tokens, at its given place at `horizon_tokens`.

    Curvatures are in nats per octave² (`lr_curvature` at a given batch, `batch_curvature` along the valley), skews per octave: the
    bowl is steeper at high rates and batches where positive. The norm at the optimum is 2^(log2_norm + norm_slope · octaves of
    tokens) and rises by `norm_by_lr` and `norm_by_batch` octaves per octave away from it. Of the noise, `seed_sd` shifts all runs of
    a seed, `run_sd` (nats) and `norm_sd` (octaves) are each run's own, the share `shared` of their variance common to the horizons
    of one trunk. ValueError for curvatures ≤ 0, deviations < 0 and a share outside 0 … 1.
    """

    best_lr: float
    best_batch_tokens: float
    horizon_tokens: float
    lr_exponent: float = -0.28
    batch_exponent: float = 0.45
    lr_batch_exponent: float = 0.6
    lr_curvature: float = 0.08
    batch_curvature: float = 0.06
    lr_skew: float = 0.2
    batch_skew: float = 0.2
    best_loss: float = 4.0
    loss_slope: float = -0.05
    log2_norm: float = 7.0
    norm_slope: float = 0.0
    norm_by_lr: float = 0.7
    norm_by_batch: float = -0.2
    run_sd: float = 0.01
    seed_sd: float = 0.02
    norm_sd: float = 0.03
    shared: float = 0.5

    def __post_init__(self):
        for name, fine in {"above 0": ("best_lr", "best_batch_tokens", "horizon_tokens", "lr_curvature", "batch_curvature"),
                           "0 or more": ("run_sd", "seed_sd", "norm_sd")}.items():
            bad = {f: v for f in fine if not (v := getattr(self, f)) >= 0 or (name == "above 0" and v == 0)}
            if bad:
                raise ValueError(f"a surface needs these {name}: " + ", ".join(f"{f}={v:g}" for f, v in bad.items()))
        if not 0 <= self.shared <= 1:
            raise ValueError(f"shared is a share of variance, 0 … 1; got {self.shared:g}")

    def expected(self, design: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """(losses in nats, log2 norms) of the cells of a design: columns horizon_tokens, batch_tokens, peak_lr."""
        octaves, batch, lr = (np.log2(design[name].to_numpy(float) / here) for name, here in zip(
            AXES, (self.horizon_tokens, self.best_batch_tokens, self.best_lr), strict=True))
        w = batch - self.batch_exponent * octaves
        u = lr - self.lr_exponent * octaves
        valley = self.lr_curvature * linex(u - self.lr_batch_exponent * w, self.lr_skew)[0]
        return (self.best_loss + self.loss_slope * octaves + valley + self.batch_curvature * linex(w, self.batch_skew)[0],
                self.log2_norm + self.norm_slope * octaves + self.norm_by_lr * u + self.norm_by_batch * w)

    def draw(self, design: pd.DataFrame, seeds: int, rng) -> pd.DataFrame:
        """Rows of `fit_surfaces` for `seeds` seeds of a design: its columns, seed, loss, log2_norm."""
        loss, norm = self.expected(design)
        _, trunk = np.unique(design[["batch_tokens", "peak_lr"]].to_numpy(float), axis=0, return_inverse=True)
        trunk, rows = trunk.ravel(), []
        for seed in range(seeds):
            own = [np.sqrt(self.shared) * rng.normal(size=trunk.max() + 1)[trunk] + np.sqrt(1 - self.shared) * rng.normal(size=len(trunk))
                   for _ in range(2)]
            rows.append(design[list(AXES)].assign(seed=seed, loss=loss + rng.normal(0, self.seed_sd) + self.run_sd * own[0],
                                                  log2_norm=norm + self.norm_sd * own[1]))
        return pd.concat(rows, ignore_index=True)


@dataclasses.dataclass(frozen=True)
class NormSlopeUncertainty:
    """What a design says of a norm's slope (octaves per octave of tokens): sd over draws, bias, and what `seeds` seeds can show.

    `detectable` is the smallest slope that a two-sided 5 % test finds with 80 % power, `provable_margin` the smallest margin within
    which a slope of zero is shown with 80 % power, `coverage` the share of intervals that hold the truth, `refused` that of draws
    that cannot be fitted.
    """

    sd: float
    bias: float
    detectable: float
    provable_margin: float
    coverage: float
    refused: float
    seeds: int
    draws: int
    runs: int


def norm_slope_uncertainty(design: pd.DataFrame, truth: SurfaceTruth, *, seeds: int, draws: int = 100, rng=0,
                           fit=fit_joint_surface) -> NormSlopeUncertainty:
    """Draw `draws` studies of `design` (rows horizon_tokens, batch_tokens, peak_lr: one a cell) from `truth` and fit each with `fit`.

    `rng` is a Generator or a seed. One run (batch, rate, seed) is read at all its horizons. Raises ValueError for a design without
    these columns or with fewer than three batches or rates at a horizon, for fewer than two seeds or draws, and where more than
    half of the draws cannot be fitted.
    """
    if seeds < 2 or draws < 2:
        raise ValueError(f"the spread needs at least 2 seeds and 2 draws; got {seeds} and {draws}")
    missing = [name for name in AXES if name not in design]
    if missing:
        raise ValueError(f"the design lacks {', '.join(missing)}; it has {', '.join(map(str, design.columns))}")
    rng, found, told = np.random.default_rng(rng), [], ""
    for _ in range(draws):
        try:
            found.append(fit(truth.draw(design, seeds, rng)))
        except ValueError as error:
            told = str(error)
    if len(found) <= draws / 2:
        raise ValueError(f"{draws - len(found)} of {draws} draws of this design cannot be fitted, the last because {told}")
    slope = np.array([f.norm_slope for f in found])
    estimate = Estimate(truth.norm_slope, float(slope.std(ddof=1)), seeds - 1, seeds)
    covered = np.mean([f.norm_slope_low <= truth.norm_slope <= f.norm_slope_high for f in found])
    return NormSlopeUncertainty(estimate.se, float(slope.mean() - truth.norm_slope), estimate.detectable(), estimate.provable_margin(),
                                float(covered), 1 - len(found) / draws, seeds, draws,
                                seeds * len(design[["batch_tokens", "peak_lr"]].drop_duplicates()))
