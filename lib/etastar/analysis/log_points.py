"""Points of a power law, checked: positive, equally many, one a seed and x, regressors that can be told apart."""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.analysis.units import warn_of_units

LN2 = math.log(2)
LARGEST_CONDITION = 1e3  # of standardized logarithms: beyond it regressors are one and the same to a part in a thousand


@dataclasses.dataclass(frozen=True)
class LogPoints:
    """Checked points in natural logarithms: (points, regressors), (points,), seed labels or None, sd or None."""

    names: tuple
    log_x: np.ndarray
    log_y: np.ndarray
    seed: np.ndarray | None
    sigma: np.ndarray | None

    @property
    def cell(self) -> np.ndarray:
        """A number a point, alike where x is."""
        return np.unique(self.log_x, axis=0, return_inverse=True)[1].ravel()

    def take(self, which) -> "LogPoints":
        """Some of the points, by number or mask."""
        seed, sigma = (None if a is None else a[which] for a in (self.seed, self.sigma))
        return LogPoints(self.names, self.log_x[which], self.log_y[which], seed, sigma)


def regressors(x) -> tuple[tuple, np.ndarray]:
    """Names and a (points, regressors) array of an array, Series, dict or DataFrame."""
    if isinstance(x, dict | pd.DataFrame):
        columns = {str(name): np.asarray(x[name], dtype=float) for name in x}
        shapes = {c.shape for c in columns.values() if c.ndim}
        if not columns or len(shapes) > 1:
            raise ValueError("regressors must be equally long; got " + (", ".join(f"{n}: {c.size}" for n, c in columns.items()) or "none"))
        return tuple(columns), np.column_stack([np.broadcast_to(c, max(shapes, default=(1,))) for c in columns.values()])
    values = np.atleast_1d(np.asarray(x, dtype=float))
    if values.ndim != 1:
        raise ValueError(f"x has shape {values.shape}; name several regressors in a dict or DataFrame")
    return (str(getattr(x, "name", None) or "x"),), values[:, None]


def refuse_not_positive(name: str, values) -> None:
    """ValueError where values are missing, infinite or not positive."""
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        mend = "; log2 rates are passed as 2**rate" if "lr" in name and (values < 0).any() else ""
        raise ValueError(f"{name} must be positive and finite: {int(bad.sum())} of {len(values)} are not, "
                         f"{np.unique(values[bad])[:3].tolist()} for example; drop these points or give values{mend}")


def log_points(x, y, seed, sigma_log2) -> LogPoints:
    """The checked points of the arguments of `fit_power_law`."""
    names, columns = regressors(x)
    sizes = {"x": len(columns), "y": np.size(y)} | ({} if seed is None else {"seed": len(seed)})
    if sigma_log2 is not None and np.ndim(sigma_log2):
        sizes["sigma_log2"] = len(sigma_log2)
    if len(set(sizes.values())) != 1:
        raise ValueError("points must be equally many; got " + ", ".join(f"{name}: {size}" for name, size in sizes.items()))
    y_name, y = str(getattr(y, "name", None) or "y"), np.atleast_1d(np.asarray(y, dtype=float))
    for name, values in (*zip(names, columns.T, strict=True), (y_name, y)):
        refuse_not_positive(name, values)
        warn_of_units(name, values, stacklevel=3)
    sigma = None if sigma_log2 is None else np.broadcast_to(np.asarray(sigma_log2, dtype=float), y.shape) * LN2
    if sigma is not None:
        refuse_not_positive("sigma_log2", sigma / LN2)
    seed = None if seed is None else np.asarray(seed)
    points = LogPoints(names, np.log(columns), np.log(y), seed, sigma)
    if seed is not None:
        _refuse_seeds(points)
    return points


def _refuse_seeds(points: LogPoints) -> None:
    seeds, at = np.unique(points.seed, return_inverse=True)
    if len(seeds) < 2:
        raise ValueError(f"one seed ({seeds[0]}) has no spread; run more seeds, or leave seed out and let the scatter be the error")
    counts = np.zeros((len(seeds), points.cell.max() + 1), dtype=int)
    np.add.at(counts, (at, points.cell), 1)
    if (counts != 1).any():
        s, c = np.argwhere(counts != 1)[0]
        where = ", ".join(f"{n} = {v:.4g}" for n, v in zip(points.names, np.exp(points.log_x[points.cell == c][0]), strict=True))
        raise ValueError(f"every seed needs one y at every x; seed {seeds[s]} has {counts[s, c]} at {where}")


def by_seed(x, y, seed, sigma_log2):
    """(log x rising, log y (seeds, x), sd of a point or NaN) of one regressor."""
    points = log_points(x, y, seed, sigma_log2)
    if len(points.names) > 1:
        raise ValueError(f"one regressor is needed, got {', '.join(points.names)}; hold the others fixed")
    log_x, labels = np.unique(points.log_x[:, 0]), np.zeros(len(points.log_y)) if seed is None else points.seed
    if len(log_x) < 2:
        raise ValueError(f"at least 2 different {points.names[0]} are needed; got {len(log_x)}")
    if seed is None and len(points.log_y) != len(log_x):
        raise ValueError(f"{len(points.log_y)} points at {len(log_x)} different {points.names[0]}: several at one need seed labels")
    order = np.lexsort((points.log_x[:, 0], labels))
    sigma = np.full(len(points.log_y), np.nan) if points.sigma is None else points.sigma
    return log_x, points.log_y[order].reshape(-1, len(log_x)), sigma[order][:len(log_x)]


def _standardized(log_x: np.ndarray) -> np.ndarray:
    z = log_x - log_x.mean(0)
    spread = z.std(0)
    return z / np.where(spread > 1e-12, spread, np.inf)


def determined(log_x: np.ndarray) -> bool:
    """Whether the points tell the exponents apart."""
    z = _standardized(log_x)
    return len(np.unique(log_x, axis=0)) > log_x.shape[1] and z.any(0).all() and np.linalg.cond(z) < LARGEST_CONDITION


def refuse_undetermined(points: LogPoints) -> None:
    """ValueError where points are too few, a regressor does not vary or several are collinear."""
    cells, needed = len(np.unique(points.log_x, axis=0)), len(points.names) + 1
    if cells < needed:
        raise ValueError(f"{len(points.names)} exponents and a prefactor need at least {needed} different x; got {cells}")
    z = _standardized(points.log_x)
    constant = [name for name, column in zip(points.names, z.T, strict=True) if not column.any()]
    if constant:
        raise ValueError(f"{', '.join(constant)} does not vary, so it has no exponent; leave it out or vary it")
    if not determined(points.log_x):
        raise ValueError(f"the logarithms of {', '.join(points.names)} are collinear (condition number {np.linalg.cond(z):.3g}, at most "
                         f"{LARGEST_CONDITION:g}), so their exponents cannot be told apart; leave one out or vary them separately")
