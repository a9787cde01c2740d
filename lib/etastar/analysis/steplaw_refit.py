"""The exponents of arXiv 2503.04715's laws of rate and batch, refitted to its released grids by several estimators.

`runs` is `es.archive("steplaw")` or any frame of `analysis.lr_grids`. The laws are η* = c·N^a·D^b and B* = c·D^b, N without embedding
and head, B in tokens. The authors keep every run within 0.25 % of its cell's best, fit by least squares in logs and take the mean
over bootstraps of rows. Rows of one cell share its size, its horizon and its least loss, so intervals over rows are too narrow: the cell is
the unit of ours.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.lr_grids import LOSS, best_rate, best_runs, near_best, optima

PUBLISHED = {"lr_params_exponent": -0.713, "lr_tokens_exponent": 0.307, "batch_tokens_exponent": 0.571}  # arXiv 2503.04715
COEFFICIENTS = ["log_lr_prefactor", "lr_params_exponent", "lr_tokens_exponent", "log_batch_prefactor", "batch_tokens_exponent"]
WINDOWS = (0.015, 0.02, 0.03)
LEAST_CELLS = 5


@dataclasses.dataclass(frozen=True)
class StepLawFit:
    """Rate lr_prefactor·N^lr_params_exponent·D^lr_tokens_exponent, batch batch_prefactor·D^batch_tokens_exponent (tokens).

    `_low` and `_high` are 95 % intervals, `n` the rows and `cells` the cells behind them; r2 are of the logs (NaN for a mean of
    bootstraps).
    """

    lr_prefactor: float
    lr_prefactor_low: float
    lr_prefactor_high: float
    lr_params_exponent: float
    lr_params_exponent_low: float
    lr_params_exponent_high: float
    lr_tokens_exponent: float
    lr_tokens_exponent_low: float
    lr_tokens_exponent_high: float
    batch_prefactor: float
    batch_prefactor_low: float
    batch_prefactor_high: float
    batch_tokens_exponent: float
    batch_tokens_exponent_low: float
    batch_tokens_exponent_high: float
    lr_r2: float
    batch_r2: float
    n: int
    cells: int

    def law(self, params, horizon_tokens) -> tuple:
        """(peak rate, batch in tokens) at a size and a horizon."""
        lr = self.lr_prefactor * params**self.lr_params_exponent * horizon_tokens**self.lr_tokens_exponent
        return lr, self.batch_prefactor * horizon_tokens**self.batch_tokens_exponent


def log_design(rows: pd.DataFrame, columns) -> np.ndarray:
    """A column of ones, then the natural logs of these columns."""
    return np.column_stack([np.ones(len(rows)), *(np.log(rows[name].to_numpy(float)) for name in columns)])


def fit_rows(rows: pd.DataFrame, window_spread=None) -> StepLawFit:
    """Least squares in logs over rows with params, horizon_tokens, peak_lr, batch_tokens; Student intervals, right for one row a cell.

    `window_spread` (one number a coefficient, in the order of COEFFICIENTS) is added to the errors. ValueError for fewer than
    5 cells.
    """
    cells = _count_cells(rows)
    (lr, lr_half, lr_r2), (batch, batch_half, batch_r2) = (
        _student(log_design(rows, columns), np.log(rows[of].to_numpy(float)))
        for of, columns in (("peak_lr", ["params", "horizon_tokens"]), ("batch_tokens", ["horizon_tokens"])))
    spread = np.zeros(5) if window_spread is None else stats.norm.ppf(0.975) * np.asarray(window_spread)
    middle, half = np.concatenate([lr, batch]), np.hypot(np.concatenate([lr_half, batch_half]), spread)
    return _fit(middle, middle - half, middle + half, lr_r2, batch_r2, len(rows), cells)


def bootstrap(rows: pd.DataFrame, count: int = 1000, by: str = "row", seed: int = 0) -> pd.DataFrame:
    """Coefficients of `count` resamples, by "row" as the authors do or by whole "cell": columns as `archives.bootstrap("steplaw")`.

    Resamples of fewer than 3 different cells are drawn again. ValueError for another unit and for fewer than 5 cells.
    """
    if by not in ("row", "cell"):
        raise ValueError(f"by must be 'row' or 'cell'; got {by!r}")
    _count_cells(rows)
    draw = np.random.default_rng(seed)
    group = np.arange(len(rows)) if by == "row" else pd.factorize(rows["cell"])[0]
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    cell = pd.factorize(rows["cell"])[0]
    lr_design, lr = log_design(rows, ["params", "horizon_tokens"]), np.log(rows["peak_lr"].to_numpy(float))
    batch_design, batch = log_design(rows, ["horizon_tokens"]), np.log(rows["batch_tokens"].to_numpy(float))
    found = []
    while len(found) < count:
        chosen = np.concatenate([members[g] for g in draw.integers(len(members), size=len(members))])
        if len(set(cell[chosen])) >= 3:
            found.append(np.concatenate([np.linalg.lstsq(design[chosen], y[chosen], rcond=None)[0]
                                         for design, y in ((lr_design, lr), (batch_design, batch))]))
    return pd.DataFrame(found, columns=COEFFICIENTS)


def mean_of_bootstraps(coefficients: pd.DataFrame, n: int = 0, cells: int = 0) -> StepLawFit:
    """The law as the authors state it, the mean of bootstrap coefficients, with their 2.5 % and 97.5 % points as the interval."""
    low, high = np.quantile(coefficients[COEFFICIENTS], [0.025, 0.975], axis=0)
    return _fit(coefficients[COEFFICIENTS].mean().to_numpy(), low, high, math.nan, math.nan, n, cells)


def authors_fit(runs: pd.DataFrame, within: float = 0.0025, by: str = "row", count: int = 1000, loss: str = LOSS) -> StepLawFit:
    """The repository's own procedure on these runs; `by` "cell" resamples whole cells in place of rows."""
    rows = near_best(runs, within, loss)
    return mean_of_bootstraps(bootstrap(rows, count, by), len(rows), rows["cell"].nunique())


def optimum_fit(runs: pd.DataFrame, windows=WINDOWS, degree: int = 3, loss: str = LOSS) -> StepLawFit:
    """Our estimator: one fitted optimum a cell, least squares over cells, Student over cells and the spread over windows in it.

    `windows` are shares above the least loss; the middle one gives the estimate.
    """
    fits = [fit_rows(optima(runs, within, degree, loss)) for within in windows]
    logs = [[math.log(f.lr_prefactor), f.lr_params_exponent, f.lr_tokens_exponent, math.log(f.batch_prefactor), f.batch_tokens_exponent]
            for f in fits]
    return fit_rows(optima(runs, windows[len(windows) // 2], degree, loss), np.std(logs, axis=0))


def estimators(runs: pd.DataFrame, published: pd.DataFrame | None = None, count: int = 1000, loss: str = LOSS) -> pd.DataFrame:
    """Every exponent by every estimator: estimator, unit, quantity, estimate, low, high, published, published_inside, n, cells.

    `published` are the authors' bootstraps (`archives.bootstrap("steplaw")`). `published_inside` says whether the interval holds
    the printed exponent.
    """
    least = best_runs(runs, loss)
    fits = [("authors' bootstraps", "row", None if published is None else mean_of_bootstraps(published))]
    fits += [(f"runs within {100 * within:g} %", by, authors_fit(runs, within, by, count, loss))
             for within in (0.0005, 0.001, 0.0025, 0.005) for by in ("row", "cell")]
    fits += [("best run", "cell", fit_rows(least)),
             ("quadratic optimum, within 2 %", "cell", fit_rows(optima(runs, 0.02, 2, loss))),
             ("quadratic optimum, within 3 %", "cell", fit_rows(optima(runs, 0.03, 2, loss))),
             ("cubic optimum, windows 1.5 to 3 %", "cell", optimum_fit(runs, loss=loss))]
    rows = [{"estimator": name, "unit": unit, "quantity": quantity, "estimate": getattr(fit, quantity),
             "low": (low := getattr(fit, f"{quantity}_low")), "high": (high := getattr(fit, f"{quantity}_high")), "published": printed,
             "published_inside": low <= printed <= high, "n": fit.n, "cells": fit.cells}
            for name, unit, fit in fits if fit is not None for quantity, printed in PUBLISHED.items()]
    return pd.DataFrame(rows)


def fixed_batch_rates(runs: pd.DataFrame, octaves: float = 1.0, least_cells: int = 10, loss: str = LOSS) -> pd.DataFrame:
    """The best rate of every cell at every batch that at least `least_cells` cells ran: cell, params, horizon_tokens, batch_tokens,
    peak_lr; batches at which the best run is at the edge of its rates are left out."""
    cells_at = runs.groupby("batch_tokens")["cell"].nunique()
    rows = [{"cell": cell, "params": of["params"].iloc[0], "horizon_tokens": of["horizon_tokens"].iloc[0], "batch_tokens": batch,
             "peak_lr": best_rate(of, octaves, loss)}
            for (batch, cell), of in runs.groupby(["batch_tokens", "cell"], sort=False) if cells_at[batch] >= least_cells]
    return pd.DataFrame(rows).dropna(subset="peak_lr").sort_values("batch_tokens", ignore_index=True)


def fixed_batch_exponents(rates: pd.DataFrame) -> pd.DataFrame:
    """Exponents of the best rate in params and tokens at each fixed batch: batch_tokens, params_exponent and tokens_exponent with
    _low and _high (95 %, Student over cells), r2, n."""
    rows = []
    for batch, of in rates.groupby("batch_tokens"):
        middle, half, r2 = _student(log_design(of, ["params", "horizon_tokens"]), np.log(of["peak_lr"].to_numpy(float)))
        rows.append({"batch_tokens": batch} | {f"{name}{end}": middle[i] + sign * half[i]
                                               for i, name in ((1, "params_exponent"), (2, "tokens_exponent"))
                                               for end, sign in (("", 0), ("_low", -1), ("_high", 1))} | {"r2": r2, "n": len(of)})
    return pd.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class SignFlip:
    """The batch, in tokens, at which the exponent of the best rate in tokens passes from below 0 to above; `n` cells."""

    batch_tokens: float
    batch_tokens_low: float
    batch_tokens_high: float
    slope_per_octave: float
    slope_per_octave_low: float
    slope_per_octave_high: float
    n: int


def sign_flip(rates: pd.DataFrame, count: int = 1000, seed: int = 0) -> SignFlip:
    """Where the exponent in tokens at fixed batch changes its sign, if it is straight in log batch; bootstrap over whole cells.

    One regression of log rate on log N, log D, log B, log² B, log N·log B and log D·log B over all cells and batches. An end of
    the interval is infinite where a resample's exponent does not rise with the batch.
    """
    n, d, b = (np.log(rates[name].to_numpy(float)) for name in ("params", "horizon_tokens", "batch_tokens"))
    b = (b - (origin := b.mean())) / math.log(2)
    design = np.column_stack([np.ones(len(rates)), n, d, b, b**2, n * b, d * b])
    y, cell = np.log(rates["peak_lr"].to_numpy(float)), pd.factorize(rates["cell"])[0]
    members = [np.flatnonzero(cell == c) for c in range(cell.max() + 1)]

    def found(rows):
        at = np.linalg.lstsq(design[rows], y[rows], rcond=None)[0]
        return (-at[2] / at[6] if at[6] > 0 else math.copysign(math.inf, -at[2])), at[6]

    chosen = np.random.default_rng(seed).integers(len(members), size=(count, len(members)))
    resampled = np.array([found(np.concatenate([members[c] for c in cells])) for cells in chosen])
    (flip, slope), low, high = found(np.arange(len(y))), *np.quantile(resampled, [0.025, 0.975], axis=0, method="inverted_cdf")
    tokens = np.exp(origin + math.log(2) * np.array([flip, low[0], high[0]]))
    return SignFlip(*map(float, tokens), float(slope), float(low[1]), float(high[1]), len(members))


def _count_cells(rows: pd.DataFrame) -> int:
    cells = rows["cell"].nunique()
    if cells < LEAST_CELLS:
        raise ValueError(f"a law in size and horizon needs at least {LEAST_CELLS} cells; got {cells}")
    return cells


def _student(design: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients, half-widths of their 95 % intervals, r2) of least squares; NaN half-widths where no scatter is left."""
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    left, df = float(((y - design @ found) ** 2).sum()), len(y) - design.shape[1]
    if df < 1:
        raise ValueError(f"{len(y)} points leave no scatter to judge {design.shape[1]} coefficients by")
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * left / df)
    return found, stats.t.ppf(0.975, df) * errors, 1 - left / float(((y - y.mean()) ** 2).sum())


def _fit(middle, low, high, lr_r2, batch_r2, n, cells) -> StepLawFit:
    """From coefficients in the order of COEFFICIENTS; prefactors leave their logs."""
    values = np.array([middle, low, high])
    values[:, [0, 3]] = np.exp(values[:, [0, 3]])
    return StepLawFit(*map(float, values.T.ravel()), float(lr_r2), float(batch_r2), n, cells)
