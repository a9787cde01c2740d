"""The valley of the best learning rate over many cells (horizons, batches, widths), fitted in one piece.

Each cell has a bowl in log2 LR, loss = floor + k [(e^(s·u) − s·u − 1)/s² + q u⁴/24], u = log2 LR − vertex: a parabola k u²/2
with a skew k s u³/6, steep on the right as bowls are, and a free quartic term, without which a bowl that is not exactly this
one shifts the exponent by several of its errors. A cell whose optimum is beyond its grid or its wall of divergence tells by
its slope, through the shared shape, where its vertex is. Vertices lie on a power law of the cells' regressors. Every seed
has its own floor in every cell, and the seed is the unit of all intervals: a seed's estimate is one Gauss–Newton step from
the joint fit with the joint curvature.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import optimize

from etastar.analysis.bowl import EdgeOptimum
from etastar.analysis.log_points import LN2, LogPoints, log_points, refuse_undetermined, regressors
from etastar.analysis.power_law import half_width

WORST_EXCESS = 0.5  # nats above the best of a cell: beyond it a bowl is no bowl, and all one can say is "worse"
LARGEST_SKEW = 2.0  # per octave
QUARTIC = (-0.3, 0.6)  # per octave²: below it bowls would turn down again within the usual ±3 octaves


@dataclasses.dataclass(frozen=True)
class Valley:
    """best_lr = prefactor · Π x_k^exponents_k, with curvature (nats per octave²) and skew (per octave) at the vertices.

    `curvature_exponents` are those of the curvature in the regressors (0 where it is shared), `covariance` is of (ln prefactor,
    exponents), `df` seeds − 1 or, without seeds, the residual degrees of freedom; `scatter` is the residual sd in nats.
    `cells` has a row a cell: the regressors, best_lr (the cell's own vertex, by the shared shape), low, high, on_valley (the
    law), edge ("" | "low" | "high" | "wall": the best of its rates is interior, at an end or last before runs diverge), rates
    and censored (runs that enter only as worse than the best).
    """

    prefactor: float
    prefactor_low: float
    prefactor_high: float
    names: tuple
    exponents: tuple
    exponents_low: tuple
    exponents_high: tuple
    curvature: float
    curvature_low: float
    curvature_high: float
    curvature_exponents: tuple
    skew: float
    skew_low: float
    skew_high: float
    covariance: np.ndarray = dataclasses.field(compare=False, repr=False)
    scatter: float
    r2: float
    n: int
    df: float
    level: float
    seeds: tuple
    exponents_per_seed: tuple
    cells: pd.DataFrame = dataclasses.field(compare=False, repr=False)

    def predict(self, x) -> np.ndarray:
        """The best rate at x, given as in the fit."""
        return np.exp(self._log_design(x) @ self._coefficients)

    def interval(self, x) -> pd.DataFrame:
        """The best rate at x with its interval: predicted, low, high. The law is taken to hold at x."""
        design = self._log_design(x)
        mean = design @ self._coefficients
        half = half_width(np.einsum("ij,jk,ik->i", design, self.covariance, design), self.level, self.df)
        return pd.DataFrame({"predicted": np.exp(mean), "low": np.exp(mean - half), "high": np.exp(mean + half)})

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([math.log(self.prefactor), *self.exponents])

    def _log_design(self, x) -> np.ndarray:
        names, columns = regressors(x)
        names = self.names if len(names) == len(self.names) == 1 and "x" in (names + self.names) else names
        if set(names) != set(self.names):
            raise ValueError(f"the valley is over {', '.join(self.names)}; got {', '.join(names)}")
        return np.column_stack([np.ones(len(columns)), *(np.log(columns[:, names.index(name)]) for name in self.names)])


def fit_valley(x, lr, loss, seed=None, *, curvature: str = "shared", skew: bool = True, worst_excess: float = WORST_EXCESS,
               level: float = 0.95) -> Valley:
    """Fit the valley to losses (points,) at rates `lr` in cells of equal `x` (array, dict or DataFrame of regressors > 0).

    NaN losses are diverged runs: they, and losses over `worst_excess` nats above their cell's best, enter as "worse than the
    best run of the cell and seed". `curvature` is "shared" or "log-linear" in the regressors; `skew=False` fits parabolas, for
    grids of three or four rates. Every seed needs the same rates in a cell. Raises EdgeOptimum where no cell has its best rate
    inside its grid, ValueError for bad values, one seed, cells with fewer than two finite rates, too few cells or collinear
    regressors.
    """
    if curvature not in ("shared", "log-linear"):
        raise ValueError(f"curvature is 'shared' or 'log-linear'; got {curvature!r}")
    grid = _grid(x, lr, loss, seed, worst_excess)
    edges = _edges(grid)
    if all(edges):
        raise EdgeOptimum("no cell has its best rate inside its grid, so there is no bowl to fit: " + _edge_advice(grid, edges))
    problem = _Problem(grid, curvature == "log-linear", skew)
    found = optimize.least_squares(problem.residual, problem.start(edges), jac=problem.jacobian, bounds=problem.bounds(), x_scale="jac")
    return _valley(problem, found.x, edges, level)


# -- the grid ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Points by cell and seed. `group` numbers (cell, seed) pairs; `finite` points have a loss, the rest are only worse than `best`."""

    names: tuple
    seeds: tuple
    log2_x_CxK: np.ndarray
    u: np.ndarray
    loss: np.ndarray
    cell: np.ndarray
    seed: np.ndarray
    finite: np.ndarray
    best: np.ndarray
    diverged: np.ndarray

    @property
    def group(self) -> np.ndarray:
        return self.cell * max(1, len(self.seeds)) + self.seed


def _grid(x, lr, loss, seed, worst_excess) -> _Grid:
    points = log_points(x, pd.Series(np.asarray(lr, dtype=float), name="lr"), None, None)
    loss = np.asarray(loss, dtype=float)
    if not len(loss) == len(points.log_y) == len(loss if seed is None else seed):
        raise ValueError(f"points must be equally many; got lr: {len(points.log_y)}, loss: {len(loss)}"
                         + ("" if seed is None else f", seed: {len(seed)}"))
    cell, _, first = _numbered_cells(points)
    refuse_undetermined(points)
    seeds, at = np.unique(np.zeros(len(loss)) if seed is None else np.asarray(seed), return_inverse=True)
    if seed is not None and len(seeds) < 2:
        raise ValueError(f"one seed ({seeds[0]}) has no spread; run more seeds, or leave seed out and let the scatter be the error")
    _refuse_holes(points, cell, at, seeds)
    best = np.full(len(loss), np.inf)
    group = cell * len(seeds) + at
    finite = np.isfinite(loss)
    lowest = np.full(group.max() + 1, np.inf)
    np.minimum.at(lowest, group[finite], loss[finite])
    best = lowest[group]
    near = finite & (loss <= best + worst_excess)
    few = [c for c in range(cell.max() + 1) if len(np.unique(points.log_y[near & (cell == c)])) < 2]
    if few:
        raise ValueError(f"{len(few)} of {cell.max() + 1} cells have fewer than two rates within {worst_excess:g} nats of their best, "
                         f"{_said(points, first[few[0]])} for example; add rates there or leave these cells out")
    return _Grid(points.names, () if seed is None else tuple(seeds.tolist()), points.log_x[first] / LN2, points.log_y / LN2, loss, cell, at,
                 near, best, ~finite)


def _numbered_cells(points: LogPoints):
    _, first, cell = np.unique(points.log_x, axis=0, return_index=True, return_inverse=True)
    return cell.ravel(), len(first), first


def _said(points: LogPoints, row: int) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in zip(points.names, np.exp(points.log_x[row]), strict=True))


def _refuse_holes(points: LogPoints, cell, at, seeds) -> None:
    for c in range(cell.max() + 1):
        rates, column = np.unique(points.log_y[cell == c], return_inverse=True)
        counts = np.zeros((len(seeds), len(rates)), dtype=int)
        np.add.at(counts, (at[cell == c], column), 1)
        if (counts != 1).any():
            s, r = np.argwhere(counts != 1)[0]
            raise ValueError(f"every seed needs one loss at every rate of a cell; seed {seeds[s]} has {counts[s, r]} at lr "
                             f"{np.exp(rates[r]):.4g}, {_said(points, np.flatnonzero(cell == c)[0])}")


def _edges(grid: _Grid) -> list[str]:
    """Where the best rate of each cell lies, by its loss over seeds at the rates that no seed diverged at."""
    found = []
    for c in range(len(grid.log2_x_CxK)):
        here = grid.cell == c
        rates, column = np.unique(grid.u[here], return_inverse=True)
        loss = np.where(grid.diverged[here], np.inf, grid.loss[here])
        mean = np.bincount(column, loss) / np.bincount(column)
        best, last = int(mean.argmin()), int(np.isfinite(mean).sum()) - 1
        wall = best < len(rates) - 1 and not np.isfinite(mean[best + 1])
        found.append("wall" if wall else "low" if best == 0 else "high" if best == last else "")
    return found


def _edge_advice(grid: _Grid, edges: list[str]) -> str:
    low, high = edges.count("low"), edges.count("high") + edges.count("wall")
    return f"{low} of {len(edges)} cells want lower rates, {high} higher ones; add rates there"


# -- the joint fit -----------------------------------------------------------------------------------------------------


class _Problem:
    """Residuals of the joint fit; parameters are level, exponents, ln curvature, its exponents or none, skew and quartic or none."""

    def __init__(self, grid: _Grid, curvature_varies: bool, skewed: bool):
        self.grid, self.skewed = grid, skewed
        self.centre = grid.log2_x_CxK.mean(0)
        self.design = np.column_stack([np.ones(len(grid.cell)), (grid.log2_x_CxK - self.centre)[grid.cell]])
        self.lines = self.design.shape[1]
        self.bends = self.lines if curvature_varies else 1
        self.count = np.maximum(np.bincount(grid.group[grid.finite], minlength=grid.group.max() + 1), 1)

    def unpack(self, p):
        """(level and exponents, ln curvature and exponents, skew, quartic)."""
        shape = p[self.lines + self.bends:] if self.skewed else (0.0, 0.0)
        return p[:self.lines], p[self.lines:self.lines + self.bends], *shape

    def bowl(self, p):
        """Every point's rise above its vertex, with its derivatives over the vertex, ln curvature, skew and quartic."""
        line, bend, skew, quartic = self.unpack(p)
        u = self.grid.u - self.design @ line
        k = np.exp(self.design[:, :self.bends] @ bend)
        rise, slope, by_skew = linex(u, skew)
        rise, slope = rise + quartic * u**4 / 24, slope + quartic * u**3 / 6
        return k * rise, -k * slope, k * rise, k * by_skew, k * u**4 / 24

    def within(self, values):
        """Values less their group's mean over finite points: the floor of a cell and seed is fitted away."""
        g = self.grid
        mean = np.bincount(g.group[g.finite], values[g.finite], minlength=len(self.count)) / self.count
        return values - mean[g.group]

    def both(self, p):
        """(residuals, Jacobian): of finite points the misfit, of the others how far the model puts them below the best."""
        g = self.grid
        rise, over_vertex, over_bend, *over_shape = self.bowl(p)
        columns = [over_vertex * d for d in self.design.T] + [over_bend * d for d in self.design[:, :self.bends].T]
        columns += over_shape if self.skewed else []
        loss = np.where(g.finite, g.loss, 0.0)
        floor = self.within(loss) - loss  # less the group's mean loss
        misfit = np.where(g.finite, self.within(rise) - self.within(loss), self.within(rise) - floor - g.best)
        active = g.finite | (misfit < 0)
        jacobian = np.column_stack([self.within(c) for c in columns])
        return np.where(active, misfit, 0.0), np.where(active[:, None], jacobian, 0.0)

    def residual(self, p):
        return self.both(p)[0]

    def jacobian(self, p):
        return self.both(p)[1]

    def start(self, edges) -> np.ndarray:
        """A line through the cells' best rates, interior cells if they determine one; the curvature of the interior cells' bowls."""
        g, best, bends = self.grid, [], []
        for c in range(len(edges)):
            here = (g.cell == c) & g.finite
            best.append(g.u[here][g.loss[here].argmin()])
            if not edges[c] and len(np.unique(g.u[here])) > 2:
                bends.append(2 * np.polyfit(g.u[here] - best[-1], g.loss[here], 2)[0])
        design = np.column_stack([np.ones(len(edges)), g.log2_x_CxK - self.centre])
        inside = np.array([not e for e in edges])
        use = inside if np.linalg.matrix_rank(design[inside]) == self.lines else np.ones(len(edges), dtype=bool)
        line = np.linalg.lstsq(design[use], np.array(best)[use], rcond=None)[0]
        bend = np.zeros(self.bends)
        bend[0] = math.log(max(np.median(bends) if bends else 0.0, 1e-3))
        return np.concatenate([line, bend, [0.1, 0.0] if self.skewed else []])

    def bounds(self):
        """Limits that keep exponentials finite and bowls bowls."""
        free = np.full(self.lines + self.bends, np.inf)
        free[self.lines] = 12.0
        shape = ([-LARGEST_SKEW, QUARTIC[0]], [LARGEST_SKEW, QUARTIC[1]]) if self.skewed else ([], [])
        return np.concatenate([-free, shape[0]]), np.concatenate([free, shape[1]])


def linex(u, s):
    """(e^(s·u) − s·u − 1)/s² and its derivatives over u and over s; near s = 0 by their series."""
    z = np.clip(s * u, -60, 30)
    small = np.abs(z) < 1e-3
    safe, over = np.where(small, 1.0, z), np.expm1(z)
    rise = u**2 * np.where(small, 0.5 + z / 6 + z**2 / 24, (over - z) / safe**2)
    slope = u * np.where(small, 1 + z / 2 + z**2 / 6, over / safe)
    by_skew = u**3 * np.where(small, 1 / 6 + z / 12 + z**2 / 40, (safe * over - 2 * (over - z)) / safe**3)
    return rise, slope, by_skew


def _valley(problem: _Problem, p, edges, level: float) -> Valley:
    g = problem.grid
    residual, jacobian = problem.both(p)
    steps_SxQ, covariance, df, scatter = _errors(problem, residual, jacobian)
    line, bend, skew, _ = problem.unpack(p)
    lines = problem.lines
    move = np.eye(lines) * LN2 ** np.r_[1.0, np.zeros(lines - 1)]  # log2 level about the centre → ln prefactor, exponents as they are
    move[0, 1:] = -problem.centre * LN2
    coefficients, line_covariance = move @ line, move @ covariance[:lines, :lines] @ move.T
    half = half_width(np.diag(line_covariance), level, df)
    low, high = coefficients - half, coefficients + half
    half_bend = float(half_width(covariance[lines, lines], level, df))
    half_skew = float(half_width(covariance[-2, -2], level, df)) if problem.skewed else 0.0
    within = problem.within(np.where(g.finite, g.loss, 0.0))[g.finite]
    with np.errstate(over="ignore"):
        prefactor = np.exp([coefficients[0], low[0], high[0]])
    return Valley(*prefactor.tolist(), g.names, *(tuple(v[1:].tolist()) for v in (coefficients, low, high)),
                  *np.exp([bend[0], bend[0] - half_bend, bend[0] + half_bend]).tolist(),
                  tuple((bend[1:] / LN2).tolist()) if problem.bends > 1 else (0.0,) * (lines - 1),
                  float(skew), float(skew - half_skew), float(skew + half_skew), line_covariance, scatter,
                  float(1 - (residual[g.finite] ** 2).sum() / (within**2).sum()), len(g.loss), df, level, g.seeds,
                  tuple(tuple((line + step)[1:lines].tolist()) for step in steps_SxQ[:, :lines]),
                  _cells(problem, p, residual, edges, level, scatter, df))


def _errors(problem: _Problem, residual, jacobian):
    """(a seed's step from the joint fit, covariance of the joint fit, degrees of freedom, residual sd in nats)."""
    g = problem.grid
    inverse = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True)
    df = g.finite.sum() - (np.bincount(g.group[g.finite]) > 0).sum() - jacobian.shape[1]
    scatter = math.sqrt((residual[g.finite] ** 2).sum() / df) if df > 0 else math.nan
    if not g.seeds:
        return np.empty((0, len(inverse))), inverse * scatter**2, float(max(df, 0)), scatter
    steps = np.array([-len(g.seeds) * inverse @ (jacobian[g.seed == s].T @ residual[g.seed == s]) for s in range(len(g.seeds))])
    return steps, np.cov(steps.T) / len(g.seeds), len(g.seeds) - 1.0, scatter


def _cells(problem: _Problem, p, residual, edges, level, scatter, df) -> pd.DataFrame:
    """Each cell's own vertex: one step from the law along the cell's own slope, with the joint shape."""
    g, count = problem.grid, max(1, len(problem.grid.seeds))
    slope = np.where(g.finite, problem.within(problem.bowl(p)[1]), 0.0)
    on_valley = np.column_stack([np.ones(len(edges)), g.log2_x_CxK - problem.centre]) @ problem.unpack(p)[0]
    rows = []
    for c, edge in enumerate(edges):
        here = g.cell == c
        weight = (slope[here] ** 2).sum()
        steps = -np.bincount(g.seed[here], (slope * residual)[here], minlength=count) / (weight / count)
        variance = steps.var(ddof=1) / count if g.seeds else scatter**2 / weight
        half = float(half_width(variance, level, df))
        own = on_valley[c] + steps.mean()
        rows.append(dict(zip(g.names, 2.0 ** g.log2_x_CxK[c], strict=True)) | {
            "best_lr": 2**own, "low": 2 ** (own - half), "high": 2 ** (own + half), "on_valley": 2 ** on_valley[c], "edge": edge,
            "rates": len(np.unique(g.u[here])), "censored": int((~g.finite[here]).sum())})
    return pd.DataFrame(rows)
