"""The optimum over learning rate and batch at every horizon, and what a norm is there: two steps.

First, at each horizon, a quadratic in (log2 rate, log2 batch) over the window about the best cell: its vertex is the optimum,
never the best cell, whose batch is an octave coarse. A norm, or any other column, is a quadratic over the same window, read at
the vertex. Second, lines through the vertices and the norms over log2 tokens. A seed's vertex is one Newton step from the
vertex of the mean over seeds; all intervals are Student's over seeds, widened by the spread over windows.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.bowl import EdgeOptimum
from etastar.analysis.lr_batch_grid import LrBatchGrid, fitted, interval_columns, lr_batch_grid, refuse_excess, said, slopes

WORST_EXCESS = 0.15  # nats above the best of a horizon: about an octave and a half to each side of usual bowls
WINDOWS = (2 / 3, 1.5)  # other windows, as shares of the one asked for
SADDLE = "saddle"


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """best_lr ∝ tokens^lr_exponent, best batch ∝ tokens^batch_exponent; norm_slope is octaves of the norm there per octave of tokens.

    `cells` has a row a horizon: horizon_tokens, best_lr, best_batch_tokens, best_loss (nats), log2_norm (whatever the norm's
    column is called), each with _low and _high (NaN for one seed), lr_curvature (nats per octave² at a given batch),
    batch_curvature (the same along the valley), lr_batch_exponent (of the best rate in the batch), edge ("" where the optimum is
    bracketed) and n (cells in the window). Per-seed values are in the order of `seeds`; `n` is the horizons that enter.
    """

    lr_exponent: float
    lr_exponent_low: float
    lr_exponent_high: float
    batch_exponent: float
    batch_exponent_low: float
    batch_exponent_high: float
    norm_slope: float
    norm_slope_low: float
    norm_slope_high: float
    lr_exponent_per_seed: tuple
    batch_exponent_per_seed: tuple
    norm_slope_per_seed: tuple
    seeds: tuple
    n: int
    level: float
    window_sd: dict = dataclasses.field(compare=False, repr=False)
    cells: pd.DataFrame = dataclasses.field(compare=False, repr=False)


def fit_surfaces(frame: pd.DataFrame, norm: str = "log2_norm", *, worst_excess: float = WORST_EXCESS, level: float = 0.95) -> Surfaces:
    """Fit the optimum of each horizon by itself, then lines over the horizons.

    `frame` has a row a run and horizon: horizon_tokens, batch_tokens, peak_lr, seed, loss (nats; NaN diverged) and `norm` (in
    octaves). A window holds the cells within `worst_excess` nats of the horizon's best, three by three at least. A horizon whose
    vertex is outside its window (`edge`) or whose quadratic is no bowl ("saddle") stands in `cells` and enters no line. Raises
    EdgeOptimum where fewer than two horizons are left, ValueError for bad rows (as `lr_batch_grid`) and windows too ragged.
    """
    refuse_excess(worst_excess)
    grid = lr_batch_grid(frame, (norm,))
    optima = horizon_optima(grid, worst_excess)
    refuse_edges(grid.horizons, [o.edge for o in optima])
    inside = bracketed(optima)
    found = _lines(grid, optima, inside, norm)
    others = [_lines(grid, other, kept, norm) for factor in WINDOWS if len(
        kept := bracketed(other := horizon_optima(grid, worst_excess * factor))) > 1]
    return Surfaces(**fitted(found, others, level), seeds=grid.seeds, n=len(inside), level=level,
                    cells=pd.DataFrame([optimum_row(grid, o, norm, level) for o in optima]))


# -- one horizon -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HorizonOptimum:
    """The optimum of horizon number h: `at` (log2 rate, log2 batch), the seeds' `steps` (S, 2) from it, its cells and edge.

    `taylor` (6, cells) turns values at the cells into value, gradient and second derivatives (rr, rb, bb) at the optimum.
    """

    h: int
    cells: np.ndarray
    at: np.ndarray
    taylor: np.ndarray
    bends: np.ndarray
    steps: np.ndarray
    loss: np.ndarray
    edge: str

    @property
    def batch_curvature(self) -> float:
        """Second derivative of the loss in log2 batch where the rate is best for each batch."""
        rr, rb, bb = self.bends.mean(0)
        return float(bb - rb**2 / rr)

    def read(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values (S,) at each seed's own optimum, gradients (S, 2) at the optimum) of a field (S, C) over the grid."""
        coefficients = values[:, self.cells] @ self.taylor.T
        return coefficients[:, 0] + self.steps @ coefficients[:, 1:3].mean(0), coefficients[:, 1:3]


def horizon_optima(grid: LrBatchGrid, worst_excess: float) -> list[HorizonOptimum]:
    """The optimum of every horizon, bracketed or not."""
    return [_optimum(grid, h, worst_excess) for h in range(len(grid.horizons))]


def bracketed(optima: list[HorizonOptimum]) -> list[HorizonOptimum]:
    """Those optima that lie within their windows."""
    return [o for o in optima if not o.edge]


def refuse_edges(horizons_tokens, edges) -> None:
    """EdgeOptimum where fewer than two horizons have their optimum within the grid."""
    outside = [f"{tokens:.4g} tokens: {edge}" for tokens, edge in zip(horizons_tokens, edges, strict=True) if edge]
    if len(edges) - len(outside) < 2:
        raise EdgeOptimum(f"{len(edges) - len(outside)} of {len(edges)} horizons have their optimum within the grid, two are needed "
                          f"({'; '.join(outside)}); add rates or batches on those sides, or seeds where there is a saddle")


def _optimum(grid: LrBatchGrid, h: int, worst_excess: float) -> HorizonOptimum:
    cells = grid.window(h, worst_excess)
    at = np.array([grid.log2_lr[cells], grid.log2_batch[cells]])
    start = at[:, grid.mean_loss[cells].argmin()]
    if np.linalg.matrix_rank(_quadratic(at - start[:, None])) < 6:
        about = said((np.log2(grid.horizons[h]), *start[::-1]))
        raise ValueError(f"the {len(cells)} cells about {about} do not determine a quadratic in rate and batch; give three batches there "
                         "three rates each")
    _, slope, bends = np.split(_taylor(at, start) @ grid.mean_loss[cells], [1, 3])
    bowl = bends[0] > 0 and bends[0] * bends[2] > bends[1] ** 2
    vertex = start - np.linalg.solve(_matrix(bends), slope) if bowl else start
    taylor = _taylor(at, vertex)
    own = grid.loss[:, cells] @ taylor.T
    steps = -np.linalg.solve(_matrix(bends), own[:, 1:3].T).T if bowl else np.full((len(own), 2), np.nan)
    edge = grid.edge(h, cells, *vertex) if bowl else SADDLE
    return HorizonOptimum(h, cells, vertex if bowl else np.full(2, np.nan), taylor, own[:, 3:], steps, own[:, 0], edge)


def _quadratic(offsets: np.ndarray) -> np.ndarray:
    """Columns value, gradient, second derivatives at the origin of offsets (2, cells)."""
    r, b = offsets
    return np.column_stack([np.ones(len(r)), r, b, r**2 / 2, r * b, b**2 / 2])


def _taylor(at: np.ndarray, about: np.ndarray) -> np.ndarray:
    return np.linalg.pinv(_quadratic(at - about[:, None]))


def _matrix(bends) -> np.ndarray:
    rr, rb, bb = bends
    return np.array([[rr, rb], [rb, bb]])


# -- over horizons -----------------------------------------------------------------------------------------------------


def _lines(grid: LrBatchGrid, optima, inside, norm: str) -> dict:
    """Slopes per seed over the bracketed horizons, by the names of `Surfaces`."""
    octaves = grid.octaves[[o.h for o in inside]]
    vertices = np.stack([o.at + o.steps for o in inside], axis=1)  # (S, H, 2)
    norms = np.column_stack([o.read(grid.fields[norm])[0] for o in inside])
    return {"lr_exponent": slopes(octaves, vertices[..., 0]), "batch_exponent": slopes(octaves, vertices[..., 1]),
            "norm_slope": slopes(octaves, norms)}


def optimum_row(grid: LrBatchGrid, o: HorizonOptimum, norm: str, level: float) -> dict:
    """The row of an optimum in `Surfaces.cells`."""
    bowl = o.edge != SADDLE
    own = np.column_stack([o.at + o.steps, o.loss, o.read(grid.fields[norm])[0]]) if bowl else np.full((len(o.loss), 4), np.nan)
    rr, rb, _ = o.bends.mean(0)
    return {"horizon_tokens": grid.horizons[o.h], **optimum_columns(own, level), "lr_curvature": rr,
            "batch_curvature": o.batch_curvature if bowl else np.nan, "lr_batch_exponent": -rb / rr if bowl else np.nan,
            "edge": o.edge, "n": len(o.cells)}


def optimum_columns(own: np.ndarray, level: float) -> dict:
    """Columns of `cells` from the seeds' own (log2 rate, log2 batch, loss, log2 norm): (S, 4)."""
    columns = {}
    for i, (name, base) in enumerate((("best_lr", 2), ("best_batch_tokens", 2), ("best_loss", None), ("log2_norm", None))):
        columns |= interval_columns(name, own[:, i], level, base)
    return columns
