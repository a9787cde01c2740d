"""Power laws y = prefactor · x₁^e₁ · x₂^e₂ …, fitted as lines in logarithms.

Where runs have seeds, the seed is the unit: each seed has its own line, and intervals are Student's over the lines. Branches
of one trunk share noise, so horizons are never resampled. One exponent over the range is not the whole truth: `local_slopes`
and `curvature` tell how straight the line is.
"""

import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.linear_model import OLS, WLS
from statsmodels.robust.norms import HuberT
from statsmodels.robust.robust_linear_model import RLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from etastar.analysis.log_points import (
    LN2,
    LogPoints,
    by_seed,
    determined,
    log_points,
    refuse_not_positive,
    refuse_undetermined,
    regressors,
)
from etastar.analysis.paired import mean_estimate

METHODS = ("ols", "wls", "huber", "theil_sen")


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted power law; `exponents` in the order of `names`, `covariance` of (ln prefactor, exponents), `n` points, `r2` in logs.

    `df` are the degrees of freedom of the intervals: seeds − 1, points − coefficients, inf where the noise was given, 0 where
    as many coefficients as points leave no error to judge by (the intervals are then unbounded). `scatter_log2` is the sd of
    a new point about the law in octaves.
    """

    prefactor: float
    prefactor_low: float
    prefactor_high: float
    names: tuple
    exponents: tuple
    exponents_low: tuple
    exponents_high: tuple
    covariance: np.ndarray = dataclasses.field(compare=False, repr=False)
    r2: float
    n: int
    method: str
    level: float
    df: float
    scatter_log2: float
    seeds: tuple
    coefficients_per_seed: tuple = dataclasses.field(repr=False)
    _points: LogPoints = dataclasses.field(compare=False, repr=False)

    def predict(self, x) -> np.ndarray:
        """The law at x, given as in the fit: an array for one regressor, else a dict or DataFrame of them."""
        return np.exp(self._design(x) @ self._coefficients)

    def interval(self, x) -> pd.DataFrame:
        """The law at x with intervals: predicted, low and high of the mean, new_low and new_high of a new point.

        The new point is one more row, or the row of one more seed. The law is taken to hold at x: what an extrapolation adds
        (`curvature`, `extrapolation_error`) is not in it.
        """
        design = self._design(x)
        mean, variance = design @ self._coefficients, np.einsum("ij,jk,ik->i", design, self.covariance, design)
        # A mean over S seeds has 1/S of a seed's variance, so that a new seed's line adds S times the mean's.
        new = variance * (1 + len(self.seeds)) + (self.scatter_log2 * LN2) ** 2
        half, half_new = (half_width(v, self.level, self.df) for v in (variance, new))
        columns = {"predicted": mean, "low": mean - half, "high": mean + half, "new_low": mean - half_new, "new_high": mean + half_new}
        return pd.DataFrame({name: np.exp(v) for name, v in columns.items()})

    def leave_one_out(self) -> pd.DataFrame:
        """Each point beside what a fit to the other cells predicts there: the regressors, y, predicted, error_log2.

        A cell is all points of the same x (its seeds share it). Raises ValueError where too few cells remain for a fit.
        """
        predicted = np.empty(self.n)
        for cell in np.unique(self._points.cell):
            held = self._points.cell == cell
            law = _fit(self._points.take(~held), self.method, self.level)
            predicted[held] = law.predict(dict(zip(self.names, np.exp(self._points.log_x[held]).T, strict=True)))
        frame = pd.DataFrame(dict(zip(self.names, np.exp(self._points.log_x).T, strict=True)))
        y = np.exp(self._points.log_y)
        return frame.assign(y=y, predicted=predicted, error_log2=np.log2(predicted / y))

    def extrapolation_error(self, x, y) -> np.ndarray:
        """log2(predicted / y) at points that were not in the fit: +1 is an octave too high."""
        y = np.asarray(y, dtype=float)
        refuse_not_positive("y", y)
        return np.log2(self.predict(x) / y)

    def bootstrap(self, count: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Refits to resampled rows, or to resampled seeds where there are any: prefactor and a column an exponent, (count, …).

        Resamples that determine no law are drawn again. Over 3, 5, 8 seeds a percentile interval covers only 75, 83, 90 %:
        the fit's own interval is the one to report. Raises ValueError where no resample determines a law.
        """
        rng, found = np.random.default_rng(seed), []
        per_seed = np.array(self.coefficients_per_seed)
        for _ in range(20 * count):
            if len(found) == count:
                break
            if self.seeds:
                found.append(per_seed[rng.integers(len(per_seed), size=len(per_seed))].mean(0))
                continue
            points = self._points.take(rng.integers(self.n, size=self.n))
            if not determined(points.log_x):
                continue
            found.append(_solve(points, self.method)[0])
        if len(found) < count:
            raise ValueError(f"only {len(found)} of {count} resamples of {self.n} points determine a law; give more points")
        found = np.array(found)
        return pd.DataFrame({"prefactor": np.exp(found[:, 0])} | dict(zip(self.names, found[:, 1:].T, strict=True)))

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([math.log(self.prefactor), *self.exponents])

    def _design(self, x) -> np.ndarray:
        names, columns = regressors(x)
        if len(names) == len(self.names) == 1 and "x" in (names + self.names):  # an array without a name
            names = self.names
        if set(names) != set(self.names):
            raise ValueError(f"the law is in {', '.join(self.names)}; got {', '.join(names)}")
        columns = columns[:, [names.index(name) for name in self.names]]
        for name, values in zip(self.names, columns.T, strict=True):
            refuse_not_positive(name, values)
        return np.column_stack([np.ones(len(columns)), np.log(columns)])


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Bend of ln y over ln x: ln y = … + slope·u + quadratic·u², u = ln x less its mean.

    `slope_per_octave` is how much the local exponent changes when x doubles: 2 ln 2 · quadratic.
    """

    quadratic: float
    quadratic_low: float
    quadratic_high: float
    slope_per_octave: float
    slope_per_octave_low: float
    slope_per_octave_high: float
    slope: float
    n: int


def fit_power_law(x, y, *, method: str = "ols", sigma_log2=None, seed=None, level: float = 0.95) -> PowerLaw:
    """Fit y = prefactor · Π x_k^e_k by a line in logarithms.

    x: an array (one regressor), or a dict or DataFrame of them; y > 0, (points,). `method`: least squares "ols"; "wls" with
    `sigma_log2`, the known sd of log2 y at each point (with "ols" one number for all); "huber"; "theil_sen" (one regressor).
    `seed` labels (points,), one y per seed and x: a line a seed, Student's interval over seeds. Without seeds the scatter
    about the line is the error, or `sigma_log2`. Raises ValueError for values that are missing or not positive, unequal
    lengths, too few points, collinear regressors, a single seed; UnitWarning for names whose values are implausible.
    """
    _refuse_method(method, sigma_log2, seed)
    points = log_points(x, y, seed, sigma_log2)
    if method == "theil_sen" and len(points.names) > 1:
        raise ValueError(f"theil_sen takes one regressor, got {', '.join(points.names)}; use huber")
    return _fit(points, method, level)


def local_slopes(x, y, seed=None, sigma_log2=None, level: float = 0.95) -> pd.DataFrame:
    """The exponent between neighbouring x: x_low, x_high, slope, low, high.

    One regressor; intervals are Student's over `seed`, or from the known sd `sigma_log2` of a point; without either there is
    no error to tell, and low and high are NaN. Raises ValueError as `fit_power_law`.
    """
    log_x, y_SxP, sigma = by_seed(x, y, seed, sigma_log2)
    step = np.diff(log_x)
    slopes_SxP = np.diff(y_SxP, axis=1) / step
    if seed is not None:
        low, high = zip(*(mean_estimate(s, "").interval(level) for s in slopes_SxP.T), strict=True)
    else:
        half = stats.norm.ppf(0.5 + level / 2) * np.hypot(sigma[1:], sigma[:-1]) / step
        low, high = slopes_SxP[0] - half, slopes_SxP[0] + half
    at = np.exp(log_x)
    return pd.DataFrame({"x_low": at[:-1], "x_high": at[1:], "slope": slopes_SxP.mean(0), "low": low, "high": high})


def curvature(x, y, seed=None, sigma_log2=None, level: float = 0.95) -> Curvature:
    """How much the exponent itself changes over x: the quadratic term of ln y in ln x, with its interval.

    One regressor and at least three x; errors as in `local_slopes`, else from the scatter about the parabola (unbounded where
    three points leave none). Raises ValueError as `fit_power_law`.
    """
    log_x, y_SxP, sigma = by_seed(x, y, seed, sigma_log2)
    if len(log_x) < 3:
        raise ValueError(f"curvature needs at least 3 different x; got {len(log_x)}")
    u = log_x - log_x.mean()
    design = np.column_stack([np.ones_like(u), u, u**2])
    if seed is not None:
        per_seed = np.linalg.lstsq(design, y_SxP.T, rcond=None)[0]
        low, high = mean_estimate(per_seed[2], "").interval(level)
        slope, bend = per_seed[1:].mean(1)
    else:
        (_, slope, bend), covariance, df, _ = _least_squares(design, y_SxP[0], sigma if np.isfinite(sigma).all() else None)
        half = float(half_width(covariance[2, 2], level, df))
        low, high = bend - half, bend + half
    octave = 2 * LN2
    return Curvature(float(bend), float(low), float(high), float(bend * octave), float(low * octave), float(high * octave), float(slope),
                     y_SxP.size)


def _refuse_method(method: str, sigma_log2, seed) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if method == "wls" and sigma_log2 is None:
        raise ValueError("wls needs sigma_log2, the sd of log2 y at each point; use ols without it")
    if method in ("huber", "theil_sen") and sigma_log2 is not None:
        raise ValueError(f"{method} does not use sigma_log2; leave it out, or use wls")
    if method == "ols" and sigma_log2 is not None and np.ndim(sigma_log2):
        raise ValueError("ols takes one sigma_log2 for all points; use wls for one a point")
    if method == "ols" and sigma_log2 is not None and seed is not None:
        raise ValueError("give seed or sigma_log2: the spread over seeds is the error, so sigma_log2 would not be used")


def _fit(points: LogPoints, method: str, level: float) -> PowerLaw:
    refuse_undetermined(points)
    seeds = () if points.seed is None else tuple(np.unique(points.seed).tolist())
    if seeds:
        solved = [_solve(points.take(points.seed == s), method) for s in seeds]
        per_seed = np.array([coefficients for coefficients, *_ in solved])
        coefficients, covariance, df = per_seed.mean(0), np.atleast_2d(np.cov(per_seed.T)) / len(seeds), len(seeds) - 1.0
        scatter = math.sqrt(np.mean([np.nan_to_num(s) ** 2 for *_, s in solved]))
    else:
        per_seed = np.empty((0, len(points.names) + 1))
        coefficients, covariance, df, scatter = _solve(points, method)
    half = half_width(np.diag(covariance), level, df)
    low, high = coefficients - half, coefficients + half
    residual = points.log_y - coefficients[0] - points.log_x @ coefficients[1:]
    total = ((points.log_y - points.log_y.mean()) ** 2).sum()
    r2 = 1 - (residual**2).sum() / total if total > 0 else math.nan
    with np.errstate(over="ignore"):
        prefactor = np.exp([coefficients[0], low[0], high[0]])
    return PowerLaw(*prefactor.tolist(), points.names, tuple(coefficients[1:].tolist()), tuple(low[1:].tolist()), tuple(high[1:].tolist()),
                    covariance, float(r2), len(points.log_y), method, level, float(df), float(scatter / LN2), seeds,
                    tuple(map(tuple, per_seed.tolist())), points)


def _solve(points: LogPoints, method: str):
    """(coefficients, covariance, df, scatter) of (ln prefactor, exponents) by one method, everything in natural logarithms."""
    centre = points.log_x.mean(0)  # about the centre level and slopes are nearly independent; the move back is exact
    design = np.column_stack([np.ones(len(points.log_y)), points.log_x - centre])
    if method == "huber":
        found = _huber(design, points.log_y)
    elif method == "theil_sen":
        found = _theil_sen(design[:, 1], points.log_y)
    else:
        found = _least_squares(design, points.log_y, points.sigma)
    coefficients, covariance, df, scatter = found
    move = np.eye(len(coefficients))
    move[0, 1:] = -centre
    return move @ coefficients, move @ covariance @ move.T, df, scatter


def _least_squares(design, y, sigma):
    """Least squares; a known `sigma` is the error, else the scatter is."""
    df = len(y) - design.shape[1]
    if sigma is not None:
        fit = WLS(y, design, weights=sigma**-2.0).fit(cov_type="fixed scale")
        return fit.params, fit.cov_params(), math.inf, float(np.sqrt(np.mean(sigma**2)))
    fit = OLS(y, design).fit()
    if df < 1:
        return fit.params, np.full((len(fit.params),) * 2, np.nan), 0.0, math.nan
    return fit.params, fit.cov_params(), float(df), math.sqrt(fit.ssr / df)


def _huber(design, y):
    """Huber's M-estimate; least squares where that leaves no residual to scale by."""
    exact = _least_squares(design, y, None)
    residual = y - design @ exact[0]
    if exact[2] < 1 or np.median(np.abs(residual)) < 1e-12 * max(1.0, np.abs(y).max()):
        return exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = RLM(y, design, M=HuberT()).fit()
    if fit.scale < 1e-12:  # more than half of the points lie on the line: the median deviation tells no error
        return fit.params, *exact[1:]
    return fit.params, fit.cov_params(), exact[2], float(fit.scale)


def _theil_sen(u, y):
    """Median of pairwise slopes with Sen's interval; the level's error is a median's, its scatter from the median deviation."""
    df = float(len(u) - 2)
    with np.errstate(invalid="ignore"):  # ties in a resample leave Sen's interval undefined
        told = stats.theilslopes(y, u, alpha=0.95, method="joint")
    residual = y - told.slope * u
    level = float(np.median(residual))
    scatter = 1.4826 * float(np.median(np.abs(residual - level)))
    if df < 1:
        return np.array([level, told.slope]), np.full((2, 2), np.nan), 0.0, math.nan
    error = (told.high_slope - told.low_slope) / (2 * stats.t.ppf(0.975, df))
    return np.array([level, told.slope]), np.diag([math.pi / 2 * scatter**2 / len(u), error**2]), df, scatter


def half_width(variance, level: float, df: float):
    """Student's half-width; unbounded where there are no degrees of freedom."""
    if df < 1:
        return np.full(np.shape(variance), np.inf)
    return stats.t.ppf(0.5 + level / 2, df) * np.sqrt(np.maximum(variance, 0))
