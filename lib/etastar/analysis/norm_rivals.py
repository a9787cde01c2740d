"""Is the norm what stays? Candidates for the invariant side by side, each in the unit of its own basin at the optimum.

A candidate (log2 of a norm, of rate · steps, of the sum of rates) drifts if its value at the optimum over rate and batch changes
with the horizon. A drift means little beside a basin that is wide in the candidate, and much beside a narrow one: so drifts are
told in half-widths of the basin, the candidate's change along the best batch at which the loss is `excess` above its best.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.lr_batch_grid import bounds, lr_batch_grid, refuse_excess, slopes
from etastar.analysis.lr_batch_surface import (
    SADDLE,
    WORST_EXCESS,
    HorizonOptimum,
    bracketed,
    horizon_optima,
    optimum_row,
    refuse_edges,
)

EXCESS = 0.01  # nats
FLAT = 1e-9  # octaves of a candidate per octave of the rate


@dataclasses.dataclass(frozen=True)
class Rivals:
    """Candidates at the optimum: `table` has a row a candidate, the steadiest in units of its basin first; `cells` by horizon.

    `table`: candidate, slope (octaves per octave of tokens), drift (octaves from the first to the last horizon on that line),
    half_width (mean over horizons, octaves), drift_in_widths, with _low and _high for slope, drift and drift_in_widths,
    and drift_per_seed (in widths).
    `cells`: candidate, horizon_tokens, value, half_width, with _low and _high. `excess` is in nats, `n` the horizons that enter.
    """

    table: pd.DataFrame = dataclasses.field(compare=False, repr=False)
    cells: pd.DataFrame = dataclasses.field(compare=False, repr=False)
    excess: float
    seeds: tuple
    n: int
    level: float


def rivals(frame: pd.DataFrame, candidates=("log2_norm",), *, excess: float = EXCESS, worst_excess: float = WORST_EXCESS,
           level: float = 0.95) -> Rivals:
    """Read every candidate column (octaves) of the rows of `fit_surfaces` at the optima of the horizons that bracket theirs.

    Raises EdgeOptimum where fewer than two horizons do, ValueError for bad rows (as `lr_batch_grid`), no candidate, an `excess` not
    above zero, and a candidate that does not change with the rate along the best batch, which has no basin.
    """
    names = list(dict.fromkeys([candidates] if isinstance(candidates, str) else candidates))
    if not names or not excess > 0:
        raise ValueError(f"rivals needs candidate columns and an excess above 0 nats; got {names} and {excess:g}")
    refuse_excess(worst_excess)
    grid = lr_batch_grid(frame, tuple(names))
    optima = horizon_optima(grid, worst_excess)
    refuse_edges(grid.horizons, [o.edge for o in optima])
    inside = bracketed(optima)
    octaves, rows, cells = grid.octaves[[o.h for o in inside]], [], []
    for name in names:
        read = [o.read(grid.fields[name]) for o in inside]
        values = np.column_stack([v for v, _ in read])
        widths = np.column_stack([_half_width(o, gradient[:, 0], excess, name) for o, (_, gradient) in zip(inside, read, strict=True)])
        rows.append({"candidate": name, **_drift(octaves, values, widths, level)})
        cells += [{"candidate": name, "horizon_tokens": grid.horizons[o.h], **bounds("value", values[:, i], level),
                   **bounds("half_width", widths[:, i], level)} for i, o in enumerate(inside)]
    table = pd.DataFrame(rows).sort_values("drift_in_widths", key=np.abs, ignore_index=True)
    return Rivals(table, pd.DataFrame(cells), excess, grid.seeds, len(inside), level)


def horizon_optimum(frame: pd.DataFrame, norm: str = "log2_norm", *, excess: float = EXCESS, worst_excess: float = WORST_EXCESS,
                level: float = 0.95) -> dict:
    """The optimum of one horizon by itself: its row of `Surfaces.cells`, and what the seeds say of it.

    More keys: `seeds`, `norm_per_seed` and `loss_per_seed` at the optimum, `basin` and `basin_per_seed` (half-widths in octaves of the
    norm at which the loss is `excess` above its best), and the second derivatives a11, a12, a22 in log2 (rate, batch). NaN where the
    quadratic is a saddle. Raises ValueError for bad rows (as `lr_batch_grid`) and for several horizons.
    """
    refuse_excess(worst_excess)
    grid = lr_batch_grid(frame, (norm,), least_horizons=1)
    if len(grid.horizons) > 1:
        raise ValueError(f"one horizon is asked for; got {', '.join(f'{h:.4g}' for h in grid.horizons)} tokens: fit each by itself")
    o = horizon_optima(grid, worst_excess)[0]
    row, lost = optimum_row(grid, o, norm, level), np.full(len(grid.seeds), np.nan)
    bowl = o.edge != SADDLE
    values, gradient = o.read(grid.fields[norm]) if bowl else (lost, None)
    basin = _half_width(o, gradient[:, 0], excess, norm) if bowl else lost
    rr, rb, bb = o.bends.mean(0)
    return {**row, "seeds": grid.seeds, "norm_per_seed": tuple(values), "loss_per_seed": tuple(o.loss if bowl else lost),
            "basin": float(np.mean(basin)), "basin_per_seed": tuple(basin), "a11": rr, "a12": rb, "a22": bb}


def _half_width(o: HorizonOptimum, by_lr: np.ndarray, excess: float, name: str) -> np.ndarray:
    """Half-widths (S,): |d candidate / d log2 rate| · √(2·excess / curvature), a seed's own to first order about the mean's."""
    mean, bend = by_lr.mean(), o.bends[:, 0].mean()
    if abs(mean) < FLAT:
        raise ValueError(f"{name} does not change with the rate along the best batch, so its basin has no width in it; leave it out")
    share = 1 + (by_lr - mean) / mean - (o.bends[:, 0] - bend) / bend / 2
    return abs(mean) * np.sqrt(2 * excess / bend) * share


def _drift(octaves: np.ndarray, values: np.ndarray, widths: np.ndarray, level: float) -> dict:
    slope = slopes(octaves, values)
    drift, width = slope * np.ptp(octaves), widths.mean(1)
    ratio = drift / width.mean() - drift.mean() * (width - width.mean()) / width.mean() ** 2
    return {**bounds("slope", slope, level), **bounds("drift", drift, level), "half_width": float(width.mean()),
            **bounds("drift_in_widths", ratio, level), "drift_per_seed": tuple(ratio.tolist())}
