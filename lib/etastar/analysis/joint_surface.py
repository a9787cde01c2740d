"""The optimum over learning rate and batch of all horizons at once: one bowl that moves on a power law of the tokens.

Loss = floor(horizon, seed) + k·L(v; s) + κ·L(w; t), where w = log2 batch − log2 best batch(D) and v = log2 rate − log2 best
rate(batch, D) are octaves from the best batch and from the valley, both lines in log2 D, and L(u; s) = (e^(s·u) − s·u − 1)/s² is
u²/2 with a skew. In log2 (rate, batch) its second derivatives are A = [[k, −kρ], [−kρ, κ + kρ²]], positive definite for any k,
κ > 0 (A = M·diag(k, κ)·Mᵀ, a Cholesky factor free of its scale), and ρ = −A12/A11 is the exponent of the batch in the best rate.
The model is fitted to the mean over seeds; a seed's estimate is one Gauss–Newton step from it, with its Jacobian.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import optimize

from etastar.analysis.lr_batch_grid import LrBatchGrid, fitted, lr_batch_grid, refuse_excess, slopes
from etastar.analysis.lr_batch_surface import WINDOWS, Surfaces, optimum_columns, refuse_edges
from etastar.analysis.valley import linex

WORST_EXCESS = 0.3  # nats above the best of a horizon: beyond it a cell only says "worse"
LARGEST_SKEW = 1.0  # per octave: one octave up the slope is then 2.7 times that one octave down
SKEWS = {"none": 0, "lr": 1, "both": 2}
BEND = 5  # where ln k stands among the parameters: three of the valley and two of the best batch go before it


@dataclasses.dataclass(frozen=True)
class JointSurface(Surfaces):
    """`Surfaces` of one bowl for all horizons, with its shape: every horizon enters, `cells` are on the law, edges are only told.

    lr_batch_exponent (ρ) and lr_horizon_exponent are those of the best rate at a given batch, ∝ batch^ρ · tokens^…; curvatures are
    in nats per octave², `lr_skew` and `batch_skew` per octave, `scatter` the residual sd of the mean over seeds in nats.
    """

    lr_batch_exponent: float
    lr_batch_exponent_low: float
    lr_batch_exponent_high: float
    lr_horizon_exponent: float
    lr_horizon_exponent_low: float
    lr_horizon_exponent_high: float
    lr_batch_exponent_per_seed: tuple
    lr_horizon_exponent_per_seed: tuple
    lr_curvature: float
    batch_curvature: float
    lr_skew: float
    batch_skew: float
    scatter: float
    r2: float
    censored: int


def fit_joint_surface(frame: pd.DataFrame, norm: str = "log2_norm", *, worst_excess: float = WORST_EXCESS, skew: str = "both",
                      level: float = 0.95) -> JointSurface:
    """Fit one moving bowl to the rows of `fit_surfaces`, and read the norm at its vertex at every horizon.

    Cells over `worst_excess` nats above their horizon's best, and those where a seed diverged, enter as worse than the best.
    `skew`: "both", along the rate "lr" only (three batches tell no skew), or "none". The norm at the optimum is free at every
    horizon; about it the norm is linear, with slopes that may change with log2 D, and quadratic. Raises EdgeOptimum where
    fewer than two horizons have their optimum within their grid, ValueError for bad rows (as `lr_batch_grid`), another `skew` and
    cells too ragged.
    """
    if skew not in SKEWS:
        raise ValueError(f"skew is {', '.join(map(repr, SKEWS))}; got {skew!r}")
    refuse_excess(worst_excess)
    grid = lr_batch_grid(frame, (norm,))
    problem = _Problem(grid, worst_excess, SKEWS[skew])
    plain = _Problem(grid, worst_excess, 0)
    p = problem.solve(np.append(plain.solve(plain.start()), [0.05] * problem.skews))  # from the best bowl without skew
    others = [other.per_seed(other.solve(p), norm) for other in (_Problem(grid, worst_excess * factor, SKEWS[skew]) for factor in WINDOWS)]
    return _surface(problem, p, norm, others, level)


class _Problem:
    """Residuals over the cells; parameters: the valley's level and exponents of D and batch, the best batch's level and exponent
    of D, ln k, ln κ, the skew along the rate, that along the batch.
    """

    def __init__(self, grid: LrBatchGrid, worst_excess: float, skews: int):
        self.grid, self.skews, self.horizon = grid, skews, grid.horizon
        self.windows = [grid.window(h, worst_excess) for h in range(len(grid.horizons))]
        self.near = np.zeros(len(grid.horizon), dtype=bool)
        self.near[np.concatenate(self.windows)] = True
        self.best = np.array([w[grid.mean_loss[w].argmin()] for w in self.windows])
        self.count = np.bincount(self.horizon[self.near])
        self.middle = float(grid.log2_batch[self.near].mean())
        batch, ones = grid.log2_batch - self.middle, np.ones(len(grid.horizon))
        self.valley = np.column_stack([ones, grid.octaves[grid.horizon], batch])
        self.batches = self.valley[:, :2]

    def away(self, p):
        """(v, w): octaves of every cell from the valley and from the best batch."""
        return self.grid.log2_lr - self.valley @ p[:3], self.valley[:, 2] - self.batches @ p[3:BEND]

    def rise(self, p):
        """(rise above the vertex, its Jacobian): (C,), (C, parameters)."""
        v, w = self.away(p)
        k, kappa = np.exp(p[BEND:BEND + 2])
        skews = np.concatenate([p[BEND + 2:], np.zeros(2)])
        along, slope_v, skew_v = linex(v, skews[0])
        across, slope_w, skew_w = linex(w, skews[1])
        columns = [-k * slope_v[:, None] * self.valley, -kappa * slope_w[:, None] * self.batches,
                   np.column_stack([k * along, kappa * across, k * skew_v, kappa * skew_w][:2 + self.skews])]
        return k * along + kappa * across, np.column_stack(columns)

    def mean(self, values):
        """Means over the near cells of each horizon: values (…, C) to (…, H)."""
        return np.stack([values[..., w].mean(-1) for w in self.windows], axis=-1)

    def within(self, values):
        """Values (…, C) less their horizon's mean over near cells: the floors are fitted away."""
        return values - self.mean(values)[..., self.horizon]

    def misfit(self, rise, loss):
        """Of near cells the misfit of losses (…, C), of the others how far the model puts them above the best."""
        loss = np.where(self.near, loss, 0.0)
        above = self.within(rise) + self.mean(loss)[..., self.horizon] - loss[..., self.best[self.horizon]]
        return np.where(self.near, self.within(rise) - self.within(loss), above)

    def both(self, p):
        """(residuals (C,) of the mean over seeds, Jacobian, which cells are active)."""
        rise, jacobian = self.rise(p)
        residual = self.misfit(rise, self.grid.mean_loss)
        active = self.near | (residual < 0)
        return np.where(active, residual, 0.0), np.where(active[:, None], self.within(jacobian.T).T, 0.0), active

    def solve(self, start):
        free = np.full(BEND, np.inf)
        low, high = (np.concatenate([s * free, np.full(2, b), np.full(self.skews, s * LARGEST_SKEW)]) for s, b in ((-1, -12.0), (1, 6.0)))
        return optimize.least_squares(lambda p: self.both(p)[0], start, jac=lambda p: self.both(p)[1], bounds=(low, high), x_scale="jac").x

    def start(self):
        """Without skew: the valley through each batch's best rate, the best batches by their profiles, the median bends of both."""
        g, rows, batches, bends, profile_bends = self.grid, [], [], [], []
        for h, window in enumerate(self.windows):
            lowest = []
            for batch in np.unique(g.log2_batch[window]):
                row = window[g.log2_batch[window] == batch]
                vertex, bend = _parabola(g.log2_lr[row], g.mean_loss[row])
                rows.append((1.0, g.octaves[h], batch - self.middle, vertex))
                lowest.append((batch - self.middle, g.mean_loss[row].min()))
                bends.append(bend)
            vertex, bend = _parabola(*np.array(lowest).T)
            batches.append(vertex)
            profile_bends.append(bend)
        rows = np.array(rows)
        valley = np.linalg.lstsq(rows[:, :3], rows[:, 3], rcond=None)[0]
        best = np.polynomial.polynomial.polyfit(g.octaves, batches, 1)
        return np.concatenate([valley, best, np.log([np.median(bends), np.median(profile_bends)])])

    def steps(self, p):
        """Every seed's Gauss–Newton step (S, parameters) from the joint fit; their mean is zero there."""
        rise, _ = self.rise(p)
        _, jacobian, active = self.both(p)
        residual = np.where(active, self.misfit(rise, self.grid.loss), 0.0)
        return -residual @ np.linalg.pinv(jacobian).T

    def optima(self, p, steps):
        """(log2 best rates, log2 best batches) on the law (H,) each, and the seeds' steps from them (S, H) each."""
        line = np.column_stack([np.ones(len(self.grid.octaves)), self.grid.octaves])
        batch = line @ p[3:BEND]
        lr = line @ p[:2] + p[2] * batch
        step_batch = steps[:, 3:BEND] @ line.T
        return lr, batch + self.middle, steps[:, :2] @ line.T + steps[:, 2:3] * batch + p[2] * step_batch, step_batch

    def norms(self, p, steps, name):
        """The seeds' norms (S, H) at their own optima."""
        at = np.flatnonzero(self.near)
        v, w = (a[at] for a in self.away(p))
        levels, d = np.eye(len(self.windows))[self.horizon[at]], self.valley[at, 1]
        u = v + p[2] * w  # octaves from the best rate of the best batch
        design = np.column_stack([levels, u, w, u * d, w * d, u**2, u * w, w**2])
        coefficients, _, rank, _ = np.linalg.lstsq(design, self.grid.fields[name][:, at].T, rcond=None)
        if rank < design.shape[1]:
            raise ValueError(f"the {len(at)} cells near the best do not determine a quadratic in rate and batch; give three batches "
                             "three rates each about the best of every horizon")
        coefficients = coefficients.T
        first = len(self.windows)
        by_lr, by_batch, by_lr_d, by_batch_d = coefficients[:, first:first + 4].mean(0)
        _, _, lr, batch = self.optima(p, steps)
        octaves = self.grid.octaves
        return coefficients[:, :first] + (by_lr + by_lr_d * octaves) * lr + (by_batch + by_batch_d * octaves) * batch

    def per_seed(self, p, name) -> dict:
        """The exponents and the norm's slope of every seed, by the names of `JointSurface`."""
        steps = self.steps(p)
        lr, batch, step_lr, step_batch = self.optima(p, steps)
        octaves = self.grid.octaves
        return {"lr_exponent": slopes(octaves, lr + step_lr), "batch_exponent": slopes(octaves, batch + step_batch),
                "norm_slope": slopes(octaves, self.norms(p, steps, name)), "lr_batch_exponent": p[2] + steps[:, 2],
                "lr_horizon_exponent": p[1] + steps[:, 1]}


def _parabola(x, y) -> tuple[float, float]:
    """(vertex within half the range beyond x, bend) of a parabola through (x, y), for a start: the lowest point where it is none."""
    bend, slope, _ = np.polyfit(x - x.mean(), y, 2) if len(x) > 2 else (0.0, 0.0, 0.0)
    if bend <= 1e-4:
        return float(x[y.argmin()]), 0.05
    reach = np.ptp(x) / 2
    return float(x.mean() + np.clip(-slope / bend / 2, -2 * reach, 2 * reach)), float(2 * bend)


# -- what comes of it --------------------------------------------------------------------------------------------------


def _surface(problem: _Problem, p, norm: str, others: list[dict], level: float) -> JointSurface:
    grid, found = problem.grid, problem.per_seed(p, norm)
    cells = _cells(problem, p, norm, level)
    refuse_edges(cells["horizon_tokens"], cells["edge"])
    residual, jacobian, _ = problem.both(p)
    near = problem.near
    df = near.sum() - len(grid.horizons) - jacobian.shape[1]
    total = (problem.within(np.where(near, grid.mean_loss, 0.0))[near] ** 2).sum()
    squares = (residual[near] ** 2).sum()
    skews = [*p[BEND + 2:].tolist(), 0.0, 0.0]
    return JointSurface(**fitted(found, others, level), seeds=grid.seeds, n=len(grid.horizons), level=level, cells=cells,
                        lr_curvature=math.exp(p[BEND]),
                        batch_curvature=math.exp(p[BEND + 1]), lr_skew=skews[0], batch_skew=skews[1],
                        scatter=math.sqrt(squares / df) if df > 0 else math.nan, r2=float(1 - squares / total),
                        censored=int((~near).sum()) * len(grid.seeds))


def _cells(problem: _Problem, p, norm: str, level: float) -> pd.DataFrame:
    grid, steps = problem.grid, problem.steps(p)
    rise, jacobian = problem.rise(p)
    lr, batch, step_lr, step_batch = problem.optima(p, steps)
    loss = problem.mean(grid.loss) - problem.mean(rise) - steps @ problem.mean(jacobian.T)
    norms, rows = problem.norms(p, steps, norm), []
    for h, horizon in enumerate(grid.horizons):
        own = np.column_stack([lr[h] + step_lr[:, h], batch[h] + step_batch[:, h], loss[:, h], norms[:, h]])
        tried = np.flatnonzero((grid.horizon == h) & np.isfinite(grid.mean_loss))
        rows.append({"horizon_tokens": horizon, **optimum_columns(own, level), "edge": grid.edge(h, tried, lr[h], batch[h]),
                     "n": len(problem.windows[h])})
    return pd.DataFrame(rows)
