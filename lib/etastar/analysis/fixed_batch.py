"""The best learning rate at each given batch and horizon, and what a norm is there: the optimum that is not profiled over batch.

Each (horizon, batch) has its own bowl in log2 rate; the vertices give the rule best rate ∝ batch^a · tokens^b, the norms at
them one slope per octave of tokens for every batch. In arXiv 2510.03871 Fig. 12a these norms rise with the tokens, where those at
the best batch stay.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.bowl import LEAST_CUBIC_POINTS, EdgeOptimum
from etastar.analysis.lr_batch_grid import (
    LEAST,
    LrBatchGrid,
    bounds,
    fitted,
    interval_columns,
    lr_batch_grid,
    refuse_excess,
    three_about,
)
from etastar.analysis.lr_batch_surface import WINDOWS, WORST_EXCESS


@dataclasses.dataclass(frozen=True)
class FixedBatch:
    """Best rate = 2^log2_prefactor · batch_tokens^lr_batch_exponent · horizon_tokens^lr_horizon_exponent at a given batch.

    `norm_slope` (octaves of the norm per octave of tokens) is common to the batches, which have their own levels: their slopes'
    mean, weighted by what each says. `batches` has a row a batch: batch_tokens, norm_slope, _low, _high, n (horizons; NaN where
    fewer than two are bracketed). `cells` has a row a horizon and batch: best_lr, best_loss, log2_norm, each with _low and _high,
    lr_curvature (nats per octave²), edge ("" | "lr low" | "lr high" | "few rates"), n (rates in the window).
    """

    log2_prefactor: float
    lr_batch_exponent: float
    lr_batch_exponent_low: float
    lr_batch_exponent_high: float
    lr_horizon_exponent: float
    lr_horizon_exponent_low: float
    lr_horizon_exponent_high: float
    norm_slope: float
    norm_slope_low: float
    norm_slope_high: float
    lr_batch_exponent_per_seed: tuple
    lr_horizon_exponent_per_seed: tuple
    norm_slope_per_seed: tuple
    seeds: tuple
    n: int
    level: float
    window_sd: dict = dataclasses.field(compare=False, repr=False)
    batches: pd.DataFrame = dataclasses.field(compare=False, repr=False)
    cells: pd.DataFrame = dataclasses.field(compare=False, repr=False)


def fixed_batch(frame: pd.DataFrame, norm: str = "log2_norm", *, worst_excess: float = WORST_EXCESS, level: float = 0.95) -> FixedBatch:
    """Fit a bowl at every horizon and batch of the rows of `fit_surfaces`, the rule through the vertices, and the norm's slopes.

    A bowl is a parabola, a cubic where five rates or more lie within `worst_excess` nats of the batch's best; three rates at
    least. Vertices outside their window are flagged and enter nothing. Raises EdgeOptimum where those left do not tell batch from
    horizon, ValueError for bad rows (as `lr_batch_grid`).
    """
    refuse_excess(worst_excess)
    grid = lr_batch_grid(frame, (norm,))
    bowls = _bowls(grid, norm, worst_excess)
    found = _estimates(grid, bowls)
    if found is None:
        told = [f"{b.edge} at {grid.horizons[b.h]:.4g} tokens in batches of {2**b.log2_batch:.4g}" for b in bowls if b.edge]
        raise EdgeOptimum(f"{len(bowls) - len(told)} of {len(bowls)} best rates lie within their grids, too few to tell batch from "
                          f"horizon; add rates on these sides: {', '.join(told[:6])}")
    others = [other for f in WINDOWS if (other := _estimates(grid, _bowls(grid, norm, worst_excess * f))) is not None]
    estimates = {name: found[name] for name in ("lr_batch_exponent", "lr_horizon_exponent", "norm_slope")}
    inside = [b for b in bowls if not b.edge]
    batches = [_batch_row(batch, inside, found, others, level) for batch in np.unique(grid.log2_batch)]
    return FixedBatch(float(found["log2_prefactor"].mean()), **fitted(estimates, others, level), seeds=grid.seeds, n=len(inside),
                      level=level, batches=pd.DataFrame(batches), cells=pd.DataFrame([_row(grid, b, level) for b in bowls]))


# -- bowls -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Bowl:
    """The bowl of horizon h and a batch: the seeds' own log2 best rates, losses and norms there (S,), or nan with an `edge`."""

    h: int
    log2_batch: float
    log2_lr: np.ndarray
    loss: np.ndarray
    norm: np.ndarray
    bend: float
    edge: str
    n: int


def _bowls(grid: LrBatchGrid, norm: str, worst_excess: float) -> list[_Bowl]:
    keys = sorted(set(zip(grid.horizon.tolist(), grid.log2_batch.tolist(), strict=True)))
    return [_bowl(grid, norm, h, batch, worst_excess) for h, batch in keys]


def _bowl(grid: LrBatchGrid, norm: str, h: int, batch: float, worst_excess: float) -> _Bowl:
    row = np.flatnonzero((grid.horizon == h) & (grid.log2_batch == batch) & np.isfinite(grid.mean_loss))
    none = np.full(len(grid.seeds), np.nan)
    if len(row) < LEAST:
        return _Bowl(h, batch, none, none, none, np.nan, "few rates", len(row))
    best = int(grid.mean_loss[row].argmin())
    near = grid.mean_loss[row] <= grid.mean_loss[row[best]] + worst_excess
    near[three_about(best, len(row))] = True
    row = row[near]
    degree = 3 if len(row) >= LEAST_CUBIC_POINTS else 2
    vertex, bend, inside = _vertex(grid.log2_lr[row], grid.mean_loss[row], degree)
    if not inside:
        side = "lr low" if grid.mean_loss[row[0]] < grid.mean_loss[row[-1]] else "lr high"
        return _Bowl(h, batch, none, none, none, bend, side, len(row))
    taylor = _taylor(grid.log2_lr[row] - vertex, degree)
    loss, norms = grid.loss[:, row] @ taylor.T, grid.fields[norm][:, row] @ taylor.T
    steps = -loss[:, 1] / bend
    return _Bowl(h, batch, vertex + steps, loss[:, 0], norms[:, 0] + norms[:, 1].mean() * steps, bend, "", len(row))


def _vertex(x: np.ndarray, loss: np.ndarray, degree: int) -> tuple[float, float, bool]:
    """(vertex, bend, whether it is a minimum within x) by Newton steps from the lowest point; one finds that of a parabola."""
    vertex = float(x[loss.argmin()])
    for _ in range(50):
        _, slope, bend, *_ = (_taylor(x - vertex, degree) @ loss).tolist()
        if bend <= 0 or not x[0] <= vertex <= x[-1]:
            break
        if abs(slope / bend) < 1e-10:
            return vertex, bend, True
        vertex -= slope / bend
    return vertex, bend, False


def _taylor(u: np.ndarray, degree: int) -> np.ndarray:
    """Turns values at offsets u into value, slope, second derivative (and third) at 0."""
    return np.linalg.pinv(np.column_stack([np.ones(len(u)), u, u**2 / 2, u**3 / 6][:degree + 1]))


# -- the rule and the slopes -------------------------------------------------------------------------------------------


def _estimates(grid: LrBatchGrid, bowls: list[_Bowl]) -> dict | None:
    """Per-seed estimates (S,): the rule's by name, the norm's common slope, and each batch's under its log2; None if undetermined."""
    inside = [b for b in bowls if not b.edge]
    octaves, batch = np.array([grid.octaves[b.h] for b in inside]), np.array([b.log2_batch for b in inside])
    design = np.column_stack([np.ones(len(inside)), batch, octaves])
    if len(inside) < 3 or np.linalg.matrix_rank(design - design.mean(0) * [0, 1, 1]) < 3:
        return None
    rule = np.linalg.lstsq(design, np.array([b.log2_lr for b in inside]), rcond=None)[0]
    level = rule[0] - rule[2] * np.log2(grid.horizons).mean()
    centred = octaves - np.array([octaves[batch == b].mean() for b in batch])
    if not centred.any():
        return None
    norms = np.array([b.norm for b in inside])
    found = {"log2_prefactor": level, "lr_batch_exponent": rule[1], "lr_horizon_exponent": rule[2],
             "norm_slope": centred @ norms / (centred**2).sum()}
    for b in np.unique(batch):
        c = centred * (batch == b)
        if c.any():
            found[float(b)] = c @ norms / (c**2).sum()
    return found


def _batch_row(batch: float, inside, found: dict, others: list[dict], level: float) -> dict:
    n = sum(b.log2_batch == batch for b in inside)
    if batch in found:
        known = bounds("norm_slope", found[batch], level, [o[batch] for o in others if batch in o])
    else:
        known = dict.fromkeys(("norm_slope", "norm_slope_low", "norm_slope_high"), np.nan)
    return {"batch_tokens": 2.0**batch, **known, "n": n}


def _row(grid: LrBatchGrid, b: _Bowl, level: float) -> dict:
    row = {"horizon_tokens": grid.horizons[b.h], "batch_tokens": 2.0**b.log2_batch}
    for name, values, base in (("best_lr", b.log2_lr, 2), ("best_loss", b.loss, None), ("log2_norm", b.norm, None)):
        row |= interval_columns(name, values, level, base)
    return row | {"lr_curvature": b.bend, "edge": b.edge, "n": b.n}
