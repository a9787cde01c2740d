"""The best learning rate over size and horizon, eta*(N, D): its exponents, whether they are straight, and whose hold at which batch.

Frames have one row a cell (a size at a horizon): cell, params, horizon_tokens, peak_lr, the best rate there; and batch_tokens where it
is held fixed, as `steplaw_refit.fixed_batch_rates` gives them, or each cell's own best, as `lr_grids.optima` does. The form is Eq. 6 of
arXiv 2601.05049, eta* = c·N^a·D^b; arXiv 2606.29158 says that it is not straight. One run a point: errors are those of the scatter
about the law or of leaving out a cell (or a whole size, for what a size's shape does to its rate is the same in all of its cells),
whichever is wider.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.jackknife import jackknife
from etastar.analysis.laws import laws as registry
from etastar.analysis.paired import Estimate

UNITS = ("cell", "params")
RIVALS = ("fitting", "bjorck", "steplaw")  # laws of the registry that have an exponent in size and one in tokens
BEND = "octaves per octave²"


@dataclasses.dataclass(frozen=True)
class SizeHorizon:
    """Rate 2^log2_level · params^size · tokens^horizon; errors of the exponents over `unit`; `r2` in logs, `n` cells."""

    log2_level: float
    size: Estimate
    horizon: Estimate
    r2: float
    n: int
    unit: str

    def rate(self, params, horizon_tokens):
        """The law at a size and a horizon, without embedding and in tokens as the rows it was fitted to."""
        return 2**self.log2_level * np.asarray(params, float) ** self.size.value * np.asarray(horizon_tokens, float) ** self.horizon.value


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Second derivatives of log2 rate by log2 params (`size`), log2 tokens (`horizon`) and one by each (`mixed`), per octave².

    Above 0 the rate falls ever more slowly, and a straight line through small models underestimates it at large ones. `p` is that of
    the F test against the straight law; r2 of both; `n` cells.
    """

    size: Estimate
    horizon: Estimate
    mixed: Estimate
    r2_straight: float
    r2_bent: float
    p: float
    n: int


def fit_size_horizon(rates: pd.DataFrame, unit: str = "cell") -> SizeHorizon:
    """Least squares in logs of the best rate on params and horizon_tokens, a row a cell.

    `unit` is "cell" or "params" (all cells of a size): errors are those of leaving one out in turn, or of the scatter where wider.
    Raises ValueError for missing columns, rates that are not positive, several rows of a cell, fewer than 4 units, and cells that do
    not tell size from horizon, also where one unit is left out.
    """
    _refuse(rates, unit)
    design, y = _design(rates), np.log2(rates["peak_lr"].to_numpy(float))
    level, size, horizon = _estimates(design, y, rates[unit], "exponent")
    return SizeHorizon(level.value, size, horizon, _r2(_residual(design, y), y), len(rates), unit)


def curvature(rates: pd.DataFrame, unit: str = "cell") -> Curvature:
    """The bends of the best rate over size and horizon: a second-order surface in logs, a row a cell (arXiv 2606.29158).

    Arguments and errors as `fit_size_horizon`; six coefficients need seven cells, and three sizes.
    """
    _refuse(rates, unit)
    design, y = _bent_design(rates), np.log2(rates["peak_lr"].to_numpy(float))
    *_, over_size, over_tokens, mixed = _estimates(design, y, rates[unit], BEND)
    df = len(y) - design.shape[1]
    straight, bent = _residual(_design(rates), y), _residual(design, y)
    p = float(stats.f.sf((straight - bent) / 3 / (bent / df), 3, df)) if bent > 0 else 0.0
    return Curvature(over_size, over_tokens, mixed, _r2(straight, y), _r2(bent, y), p, len(y))


def exponents_by_batch(rates: pd.DataFrame, least_cells: int = 10, unit: str = "cell", level: float = 0.95) -> pd.DataFrame:
    """Both exponents at every fixed batch of `least_cells` or more, and the laws whose exponent lies in the interval.

    Columns: batch_tokens, size and horizon each with _low, _high (Student, errors over `unit`) and _holds (names of RIVALS,
    comma between, empty for none), r2, n.
    """
    rows = []
    for batch, of in rates.groupby("batch_tokens"):
        if len(of) >= least_cells:
            rows.append({"batch_tokens": float(batch)} | exponent_columns(fit_size_horizon(of, unit), level))
    if not rows:
        raise ValueError(f"no batch has {least_cells} cells; the most is {rates.groupby('batch_tokens').size().max()}")
    return pd.DataFrame(rows)


def exponent_columns(fit: SizeHorizon, level: float = 0.95) -> dict:
    """A fit as the columns of `exponents_by_batch`, batch_tokens left out."""
    row = {}
    for name, estimate in (("size", fit.size), ("horizon", fit.horizon)):
        low, high = estimate.interval(level)
        held = [law for law, pair in published_exponents().items() if low <= pair[name] <= high]
        row |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high, f"{name}_holds": ", ".join(held)}
    return row | {"r2": fit.r2, "n": fit.n}


@functools.lru_cache
def published_exponents() -> dict[str, dict[str, float]]:
    """Name → {"size", "horizon"}: the exponents that the laws of RIVALS print, as the registry of laws has them."""
    told = {name: registry[name].formulas["lr"].exponents for name in RIVALS}
    return {name: {"size": of["params"], "horizon": of["horizon_tokens"]} for name, of in told.items()}


# -- least squares -----------------------------------------------------------------------------------------------------

AXES = ("params", "horizon_tokens")


def _design(rates: pd.DataFrame) -> np.ndarray:
    return np.column_stack([np.ones(len(rates)), *(np.log2(rates[name].to_numpy(float)) for name in AXES)])


def _bent_design(rates: pd.DataFrame) -> np.ndarray:
    """1, n, d, n²/2, d²/2, n·d in octaves about the middle: the last three coefficients are second derivatives."""
    n, d = (_design(rates)[:, 1:] - _design(rates)[:, 1:].mean(0)).T
    return np.column_stack([np.ones(len(rates)), n, d, n**2 / 2, d**2 / 2, n * d])


def _estimates(design: np.ndarray, y: np.ndarray, units: pd.Series, name: str) -> list[Estimate]:
    """Coefficients with the error of leaving out or that of the scatter about the law, whichever is larger: a jackknife of few units may
    be small by chance. ValueError where no scatter is left."""
    left_out = jackknife(units, lambda kept: _solve(design[kept], y[kept]), name)
    df = len(y) - design.shape[1]
    if df < 1:
        raise ValueError(f"{len(y)} cells leave no scatter to judge {design.shape[1]} coefficients by; add cells")
    errors = np.sqrt(_residual(design, y) / df * np.diag(np.linalg.inv(design.T @ design)))
    return [dataclasses.replace(e, se=max(e.se, float(se)), df=min(e.df, df)) for e, se in zip(left_out, errors, strict=True)]


def _solve(design: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients of log2 rates on a design; ValueError where the cells do not determine them."""
    centred = design[:, 1:] - design[:, 1:].mean(0)
    if np.linalg.matrix_rank(centred, tol=1e-6 * max(np.linalg.norm(centred), 1e-12)) < design.shape[1] - 1:
        raise ValueError(f"{len(design)} cells do not determine {design.shape[1]} coefficients, also where a unit is left out; add "
                         "sizes and horizons")
    return np.linalg.lstsq(design, y, rcond=None)[0]


def _residual(design: np.ndarray, y: np.ndarray) -> float:
    """Sum of squares that least squares leaves."""
    return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())


def _r2(residual: float, y: np.ndarray) -> float:
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - residual / total if total else math.nan


def _refuse(rates: pd.DataFrame, unit: str) -> None:
    if lacking := [name for name in ("cell", *AXES, "peak_lr") if name not in rates]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, rates))}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    if bad := int((~(rates["peak_lr"] > 0)).sum()):
        raise ValueError(f"{bad} of {len(rates)} best rates are not positive; leave out cells whose best rate is at an edge")
    if (twice := rates["cell"].duplicated()).any():
        raise ValueError(f"cell {rates.loc[twice, 'cell'].iloc[0]!r} has several rows; give one batch, or each cell's own optimum")
