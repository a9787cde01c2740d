"""The best learning rate as the vertex of a fitted bowl in log2 LR: never an argmin, never beyond the grid.

All seeds share a grid; each seed has its own polynomial. A seed's vertex is one Newton step from the vertex of the mean
bowl with the mean bowl's curvature, so that a noisy seed cannot throw it far; intervals are Student's over seeds. Without
seeds the interval holds the rates at which the fitted slope is not told from zero (Fieller), within what was tried.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

# Bowls are skewed, and a test for the cubic term misses it at the noise of a few seeds: intervals of the vertex then cover
# 74 % in place of 95 % (97 % with the term always in). So it is in wherever five rates leave a residual.
LEAST_CUBIC_POINTS = 5


class EdgeOptimum(ValueError):
    """The best rate lies at the edge of the grid; the message says which rates to add."""


@dataclasses.dataclass(frozen=True)
class Bowl:
    """A fitted bowl; rates are absolute, losses in nats, `curvature` in nats per octave², `n` points in the fit.

    `vertices` are the seeds' own best log2 rates, in the order of `seeds`; `window_sd` is the spread of the vertex over fit
    windows in octaves, which the interval includes.
    """

    best_lr: float
    best_lr_low: float
    best_lr_high: float
    best_loss: float
    best_loss_low: float
    best_loss_high: float
    curvature: float
    curvature_low: float
    curvature_high: float
    r2: float
    n: int
    degree: int
    window_sd: float
    seeds: tuple
    vertices: tuple
    centre: float
    coefficients: tuple
    coefficients_per_seed: tuple

    def loss_at(self, lr) -> np.ndarray:
        """Loss of the mean bowl at these rates."""
        return np.polyval(self.coefficients, np.log2(lr) - self.centre)

    def seed_loss_at(self, seed, lr) -> np.ndarray:
        """Loss of one seed's own bowl at these rates."""
        return np.polyval(self.coefficients_per_seed[self.seeds.index(seed)], np.log2(lr) - self.centre)

    @property
    def best_log2_lr(self) -> float:
        """The vertex in octaves."""
        return math.log2(self.best_lr)


def fit_bowl(lr, loss, seed=None, sigma: float | None = None, level: float = 0.95) -> Bowl:
    """Fit a bowl to losses at learning rates; NaN losses are diverged runs and wall the bowl off on the right.

    `seed` (same length) makes the seed the unit of the interval; without it the interval comes from `sigma` (sd of a loss in
    nats) or the scatter about the curve. Every seed needs the same rates. Raises EdgeOptimum (with the rates to add) where
    the best rate is at the edge of what was tried or at the wall, ValueError for fewer than three usable rates, rates ≤ 0,
    no curvature, or `sigma` beside several seeds, whose own spread is the error.
    """
    x, y_SxP, seeds, wall = _grid(lr, loss, seed)
    if sigma is not None and len(seeds) > 1:
        raise ValueError(f"give seed or sigma: the spread over {len(seeds)} seeds is the error, so sigma={sigma:g} would not be used")
    _refuse_edge(x, y_SxP.mean(0), wall)
    degree = 3 if len(x) >= LEAST_CUBIC_POINTS else 2
    centre = float(x[y_SxP.mean(0).argmin()])
    coefficients_S = np.array([np.polyfit(x - centre, y, degree) for y in y_SxP])
    mean = coefficients_S.mean(0)
    vertex = _vertex(mean, x[0] - centre, x[-1] - centre)
    if vertex is None:
        raise EdgeOptimum(f"the fitted bowl has no minimum within 2^{x[0]:g} … 2^{x[-1]:g}; {_advice(x, y_SxP.mean(0))}")
    curvature = float(np.polyval(np.polyder(mean, 2), vertex))
    steps_S = np.array([-np.polyval(np.polyder(c), vertex) / curvature for c in coefficients_S])
    window_sd = _window_spread(x, y_SxP.mean(0), degree, vertex + centre)
    best_loss = float(np.polyval(mean, vertex))
    residual_SxP = y_SxP - np.array([np.polyval(c, x - centre) for c in coefficients_S])
    if len(seeds) > 1:
        (below, above), half_loss, half_curve = _over_seeds(coefficients_S, steps_S, vertex, level)
    else:
        (below, above), half_loss, half_curve = _without_seeds(mean, residual_SxP, x - centre, vertex, sigma, level)
    window = stats.norm.ppf(0.5 + level / 2) * window_sd
    best = vertex + centre
    total = ((y_SxP - y_SxP.mean(1, keepdims=True)) ** 2).sum()
    return Bowl(2**best, 2 ** (best - math.hypot(below, window)), 2 ** (best + math.hypot(above, window)),
                best_loss, best_loss - half_loss, best_loss + half_loss,
                curvature, curvature - half_curve, curvature + half_curve, float(1 - (residual_SxP**2).sum() / total),
                y_SxP.size, degree, window_sd, tuple(seeds), tuple(best + steps_S), centre, tuple(mean),
                tuple(tuple(c) for c in coefficients_S))


def cross_fitted(lr, loss, seed) -> dict:
    """Per seed: the rate tuned on the other seeds and the loss of its own bowl there, so that nothing is chosen on what it
    is reported on. Returns {seed: (tuned_lr, loss)}; raises as `fit_bowl`, and for fewer than two seeds.
    """
    lr, loss, seed = np.asarray(lr, dtype=float), np.asarray(loss, dtype=float), np.asarray(seed)
    if len(set(seed.tolist())) < 2:
        raise ValueError("cross-fitting needs at least two seeds: one to tune on, one to report on")
    whole = fit_bowl(lr, loss, seed)
    return {s: (tuned := fit_bowl(lr[seed != s], loss[seed != s], seed[seed != s]).best_lr, float(whole.seed_loss_at(s, tuned)))
            for s in whole.seeds}


def _grid(lr, loss, seed):
    """(log2 rates, losses (seeds, rates), seeds, log2 rate of the wall or None), diverged rates cut off."""
    lr, loss = np.asarray(lr, dtype=float), np.asarray(loss, dtype=float)
    seed = np.zeros(len(lr), dtype=int) if seed is None else np.asarray(seed)
    if not len(lr) == len(loss) == len(seed):
        raise ValueError(f"lr, loss and seed must be equally long; got {len(lr)}, {len(loss)}, {len(seed)}")
    if not (np.isfinite(lr) & (lr > 0)).all():
        raise ValueError(f"learning rates must be positive; got {sorted(set(lr[~(lr > 0)].tolist()))}")
    rates, seeds = np.unique(lr), list(dict.fromkeys(seed.tolist()))
    table = {}
    for r, y, s in zip(lr, loss, seed.tolist(), strict=True):
        table.setdefault((s, r), []).append(y)
    lacking = [(s, r) for s in seeds for r in rates if (s, r) not in table]
    if lacking:
        raise ValueError(f"every seed needs every rate; seed {lacking[0][0]} lacks lr {lacking[0][1]:.3g} ({len(lacking)} lacking in all)")
    y_SxP = np.array([[np.mean(table[s, r]) for r in rates] for s in seeds])
    diverged = ~np.isfinite(y_SxP).all(0)
    wall = float(np.log2(rates[diverged][0])) if diverged.any() else None
    usable = np.log2(rates) < (np.inf if wall is None else wall)
    if usable.sum() < 3:
        raise ValueError(f"a bowl needs at least 3 rates at which no seed diverged; got {int(usable.sum())} of {len(rates)}")
    return np.log2(rates[usable]), y_SxP[:, usable], seeds, wall


def _refuse_edge(x, mean_P, wall) -> None:
    best = int(mean_P.argmin())
    if 0 < best < len(x) - 1:
        return
    if best == len(x) - 1 and wall is not None:
        raise EdgeOptimum(f"the best rate 2^{x[best]:g} is the last before runs diverge at 2^{wall:g}; "
                          f"add rates between them, 2^{(x[best] + wall) / 2:g} for example")
    raise EdgeOptimum(f"the best of the rates 2^{x[0]:g} … 2^{x[-1]:g} is at the edge, 2^{x[best]:g}; {_advice(x, mean_P)}")


def _advice(x, mean_P) -> str:
    step = float(np.median(np.diff(x)))
    low = mean_P.argmin() < len(x) / 2
    more = [x[0] - step, x[0] - 2 * step] if low else [x[-1] + step, x[-1] + 2 * step]
    return "add lr " + " and ".join(f"{2**m:.3g} (2^{m:g})" for m in more)


def _vertex(coefficients, low: float, high: float) -> float | None:
    """The minimum of a polynomial within [low, high], the lowest where there are two; None where there is none."""
    roots = np.roots(np.polyder(coefficients))
    real = roots[np.abs(roots.imag) < 1e-9].real
    inside = [r for r in real if low <= r <= high and np.polyval(np.polyder(coefficients, 2), r) > 0]
    return float(min(inside, key=lambda r: np.polyval(coefficients, r))) if inside else None


def _window_spread(x, mean_P, degree: int, vertex: float) -> float:
    """Standard deviation of the vertex over reasonable windows: without the first, without the last point, both."""
    found = [vertex]
    for window in (slice(1, None), slice(None, -1), slice(1, -1)):
        points = x[window]
        if len(points) >= degree + 1 and len(points) >= 3:
            other = _vertex(np.polyfit(points - vertex, mean_P[window], min(degree, len(points) - 1)), points[0] - vertex,
                            points[-1] - vertex)
            if other is not None:
                found.append(vertex + other)
    return float(np.std(found)) if len(found) > 1 else 0.0


def _over_seeds(coefficients_S, steps_S, vertex, level):
    """Student half-widths over seeds: (below, above) the vertex in octaves, of the loss and of the curvature there."""
    losses = [np.polyval(c, vertex) for c in coefficients_S]
    curves = [np.polyval(np.polyder(c, 2), vertex) for c in coefficients_S]
    t = stats.t.ppf(0.5 + level / 2, len(steps_S) - 1)
    half, half_loss, half_curve = (t * float(np.std(v, ddof=1)) / math.sqrt(len(steps_S)) for v in (steps_S, losses, curves))
    return (half, half), half_loss, half_curve


def _without_seeds(coefficients, residual_SxP, x, vertex, sigma, level):
    """Half-widths as `_over_seeds`, from the error of the coefficients of one curve."""
    powers = np.arange(len(coefficients) - 1, -1, -1)
    df = residual_SxP.size - len(coefficients)
    if sigma is None and df < 1:
        raise ValueError(f"{residual_SxP.size} points leave no scatter to judge a fit of degree {powers[0]} by; "
                         "give sigma, seeds or more rates")
    spread = sigma if sigma is not None else math.sqrt((residual_SxP**2).sum() / df)
    t = stats.norm.ppf(0.5 + level / 2) if sigma is not None else stats.t.ppf(0.5 + level / 2, df)
    design = np.vander(x, len(coefficients))
    covariance = np.linalg.inv(design.T @ design) * spread**2
    at = vertex ** powers.astype(float)
    bend = np.array([p * (p - 1) * vertex ** max(p - 2, 0) for p in powers])
    return (_fieller(coefficients, covariance, t, vertex, x[0], x[-1]),
            t * math.sqrt(at @ covariance @ at), t * math.sqrt(bend @ covariance @ bend))


def _fieller(coefficients, covariance, t, vertex, low, high):
    """How far below and above the vertex the slope is within t errors of zero, at most to the ends of the grid.

    The delta method is too narrow where the curvature is poorly known: 90 % for 95 % at five rates over two octaves.
    """
    slope = np.polyder(coefficients)
    powers = np.arange(len(slope), 0, -1)
    variance = np.zeros(2 * len(slope) - 1)
    for i, p in enumerate(powers):
        for j, q in enumerate(powers):
            variance[i + j] += p * q * covariance[i, j]
    roots = np.roots(np.polymul(slope, slope) - t**2 * variance)
    real = roots[np.abs(roots.imag) < 1e-9].real
    below = max((r for r in real if low < r < vertex), default=low)
    above = min((r for r in real if vertex < r < high), default=high)
    return vertex - below, above - vertex
