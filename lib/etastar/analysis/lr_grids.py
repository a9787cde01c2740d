"""Grids of learning rate by batch size, one a cell (a size at a horizon): near-best runs, the loss between points, the best point.

Frames have one row a run with the columns cell, params, horizon_tokens, peak_lr, batch_tokens and a loss in nats per token, as
`es.archive("steplaw")`; `loss` names the loss column. Every point of a published grid is one run, so the least loss of a cell is
low by selection: the loss at the true optimum lies above it by about two standard deviations of a run.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy import optimize, stats

from etastar.analysis.bowl import EdgeOptimum

LOSS = "smooth_loss"
POWERS = {2: ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)),
          3: ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3))}  # of log2 rate and log2 batch


def best_runs(runs: pd.DataFrame, loss: str = LOSS) -> pd.DataFrame:
    """The run of least loss of every cell: its rows of `runs`."""
    return runs.loc[runs.groupby("cell", sort=False)[loss].idxmin()].reset_index(drop=True)


def near_best(runs: pd.DataFrame, within: float = 0.0025, loss: str = LOSS) -> pd.DataFrame:
    """Runs whose loss is less than a share `within` above the least of their cell; arXiv 2401.02954 and 2503.04715 fit laws to these."""
    if not within > 0:
        raise ValueError(f"within is a share of the least loss above it and must be positive; got {within}")
    return runs[runs[loss] / runs.groupby("cell")[loss].transform("min") - 1 < within].reset_index(drop=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LossGrid:
    """The loss between the points of one cell: straight in log rate at each batch that was run, then in log batch between these.

    Nothing is extrapolated: a rate or batch beyond what was run is read at the edge, and said to be `clipped`.
    """

    batches: np.ndarray
    rates: tuple
    losses: tuple

    @classmethod
    def of(cls, rows: pd.DataFrame, loss: str = LOSS) -> "LossGrid":
        """The grid of one cell's runs; several at one point are averaged. ValueError for losses that are not finite."""
        if bad := int((~np.isfinite(rows[loss])).sum()):
            raise ValueError(f"{bad} of {len(rows)} losses are not finite; give diverged runs the loss they ended at, or leave them out")
        points = rows.groupby(["batch_tokens", "peak_lr"])[loss].mean()
        batches = points.index.unique(level=0)
        lines = [points.loc[batch] for batch in batches]
        return cls(batches.to_numpy(float), tuple(line.index.to_numpy(float) for line in lines), tuple(line.to_numpy() for line in lines))

    @property
    def least(self) -> float:
        """The least loss of any run."""
        return min(float(line.min()) for line in self.losses)

    def surface(self, rates, batches) -> np.ndarray:
        """Losses at rates by batches, (rates, batches); rates of 0 or less are read at the lowest that was run."""
        log_rates = np.log(np.maximum(rates, 1e-300))
        lines = np.stack([np.interp(log_rates, np.log(tried), loss) for tried, loss in zip(self.rates, self.losses, strict=True)])
        return np.stack([np.interp(np.log(batches), np.log(self.batches), lines[:, i]) for i in range(len(log_rates))])

    def loss_at(self, peak_lr: float, batch_tokens: float) -> tuple[float, bool]:
        """(loss, clipped) at a rate and a batch; a law may say a rate of 0 or less."""
        above = int(np.searchsorted(self.batches, batch_tokens))
        pair = {above} if batch_tokens in self.batches else {above - 1, above} & set(range(len(self.batches)))
        clipped = not self.batches[0] <= batch_tokens <= self.batches[-1] or any(
            not self.rates[i][0] <= peak_lr <= self.rates[i][-1] for i in pair)
        return float(self.surface([peak_lr], [batch_tokens])[0, 0]), clipped

    def at_best_batch(self, peak_lr) -> tuple[float, float, bool]:
        """(batch, loss, clipped) where the loss is least over the batches that were run; `peak_lr` is a rate or a function of batch."""
        rate = peak_lr if callable(peak_lr) else lambda batch: peak_lr
        found = [(batch, *self.loss_at(rate(batch), batch)) for batch in self.batches]
        return min(found, key=lambda point: point[1])


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best point of a cell from a polynomial surface: rate, batch in tokens, loss in nats; intervals from the scatter of runs.

    `noise_sd` is that scatter in nats, `n` the runs in the fit.
    """

    best_lr: float
    best_lr_low: float
    best_lr_high: float
    best_batch_tokens: float
    best_batch_tokens_low: float
    best_batch_tokens_high: float
    best_loss: float
    noise_sd: float
    n: int


def fit_optimum(rows: pd.DataFrame, within: float = 0.02, degree: int = 3, loss: str = LOSS, level: float = 0.95) -> Optimum:
    """The best rate and batch of one cell: least of a polynomial in log rate and log batch through the runs near the best.

    `within` is the share above the least loss that a run may have. A basin is steeper on its right: a quadratic (degree 2) over
    a wide window pulls the rate down, the cubic does not. Raises EdgeOptimum where the least lies at the edge of the runs,
    ValueError for a degree other than 2 or 3 and for too few runs.
    """
    if degree not in POWERS:
        raise ValueError(f"degree must be 2 or 3; got {degree}")
    rows = near_best(rows.assign(cell=0), within, loss)
    x, z = np.log2(rows["peak_lr"].to_numpy(float)), np.log2(rows["batch_tokens"].to_numpy(float))
    middle = x.mean(), z.mean()
    x, z = x - middle[0], z - middle[1]
    design = _terms(x, z, degree)
    if len(rows) < design.shape[1] + 3 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"{len(rows)} runs within {within:g} of the best do not determine a surface of degree {degree}; widen the window")
    coefficients, *_ = np.linalg.lstsq(design, rows[loss].to_numpy(float), rcond=None)
    df = len(rows) - design.shape[1]
    noise = math.sqrt(float(((rows[loss] - design @ coefficients) ** 2).sum()) / df)
    best = _least(coefficients, degree, x, z)
    half = stats.t.ppf(0.5 + level / 2, df) * _vertex_errors(design, coefficients, best, degree) * noise
    lr, batch = (2.0 ** (m + b + np.array([0, -h, h])) for m, b, h in zip(middle, best, half, strict=True))
    return Optimum(*map(float, lr), *map(float, batch), float(_terms(*best, degree) @ coefficients), noise, len(rows))


def optima(runs: pd.DataFrame, within: float = 0.02, degree: int = 3, loss: str = LOSS) -> pd.DataFrame:
    """`fit_optimum` of every cell: one row a cell, its own columns with peak_lr and batch_tokens those of the fitted optimum, and
    the optimum's intervals, loss, noise_sd and n.

    Cells whose optimum is at an edge are left out and told in .attrs["at_edge"].
    """
    found, at_edge = [], []
    for cell, rows in runs.groupby("cell", sort=False):
        try:
            best = fit_optimum(rows, within, degree, loss)
        except EdgeOptimum:
            at_edge.append(cell)
            continue
        own = {name: value for name, value in rows.iloc[0].items() if rows[name].nunique() == 1}
        found.append(own | {"peak_lr": best.best_lr, "batch_tokens": best.best_batch_tokens} | dataclasses.asdict(best))
    frame = pd.DataFrame(found)
    frame.attrs["at_edge"] = tuple(at_edge)
    return frame


def best_rate(rows: pd.DataFrame, octaves: float = 1.0, loss: str = LOSS) -> float:
    """The best rate at one batch: vertex of the parabola in log rate through the runs within ±`octaves` of the best run.

    NaN where the best run is at the edge of its rates or the vertex lies beyond the runs used; nothing is extrapolated.
    """
    line = rows.groupby("peak_lr")[loss].mean().sort_index()
    x, y = np.log2(line.index.to_numpy(float)), line.to_numpy(float)
    at = int(np.argmin(y))
    if at in (0, len(y) - 1):
        return math.nan
    near = np.abs(x - x[at]) <= octaves + 0.05  # published rates are rounded to three digits
    bend, slope, _ = np.polyfit(x[near] - x[at], y[near], 2)
    vertex = x[at] - slope / (2 * bend)
    return float(2**vertex) if bend > 0 and x[near][0] <= vertex <= x[near][-1] else math.nan


def _terms(x, z, degree: int) -> np.ndarray:
    return np.stack([x**p * z**q for p, q in POWERS[degree]], axis=-1)


def _slopes(x, z, degree: int, by_x: int, by_z: int) -> np.ndarray:
    """Derivatives of the surface's terms at a point: `by_x` times in log rate, `by_z` times in log batch."""
    def power(value, exponent, times):
        return math.perm(exponent, times) * value ** (exponent - times) if exponent >= times else 0.0

    return np.array([power(x, p, by_x) * power(z, q, by_z) for p, q in POWERS[degree]])


def _least(coefficients, degree: int, x, z) -> np.ndarray:
    """Where the surface is least within the box of the runs; EdgeOptimum where that is on the box's edge."""
    surface = functools.partial(_terms, degree=degree)
    box = [(x.min(), x.max()), (z.min(), z.max())]
    start = int(np.argmin(surface(x, z) @ coefficients))
    scale = 1 / np.ptp(surface(x, z) @ coefficients)
    best = optimize.minimize(lambda at: scale * float(surface(*at) @ coefficients), (x[start], z[start]), bounds=box,
                             jac=lambda at: scale * _gradient(at, degree) @ coefficients, options={"ftol": 1e-15, "gtol": 1e-10}).x
    if any(np.isclose(at, edge, atol=1e-6) for at, ends in zip(best, box, strict=True) for edge in ends):
        raise EdgeOptimum(f"the fitted surface is least at the edge of its {len(x)} runs; add runs there or widen the window")
    return best


def _gradient(at, degree: int) -> np.ndarray:
    return np.stack([_slopes(*at, degree, 1, 0), _slopes(*at, degree, 0, 1)])


def _vertex_errors(design, coefficients, best, degree: int) -> np.ndarray:
    """Standard errors of the optimum in octaves for runs of unit noise: the fitted slope there moves it by the inverse curvature."""
    bend = np.array([[_slopes(*best, degree, 2, 0), _slopes(*best, degree, 1, 1)],
                     [_slopes(*best, degree, 1, 1), _slopes(*best, degree, 0, 2)]]) @ coefficients
    moves = np.linalg.solve(bend, _gradient(best, degree))
    return np.sqrt(np.diag(moves @ np.linalg.inv(design.T @ design) @ moves.T))
