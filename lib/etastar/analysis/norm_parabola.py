"""The optimum output norm, as arXiv 2510.03871 finds it (App. A.4 and its toolkit), and how far that number can be trusted.

The paper fits, at each horizon and batch, a parabola to loss over log2 norm, takes the best batch of the grid, and finds its norm
constant over horizons. Beside it stand the optimum over a continuous batch, a table of choices, and what the batch grid alone does.
Frames have one row a run and horizon: model, horizon_tokens, batch_tokens, log2_norm, loss (nats per token), and, where known,
peak_lr and loss_sd. Norms are log2 of the operator norm of the head, but any norm will do.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.bowl import EdgeOptimum
from etastar.analysis.paired import Estimate
from etastar.analysis.power_law import PowerLaw, fit_power_law

SETTING = ["model", "horizon_tokens"]
CELL = [*SETTING, "batch_tokens"]
LEAST_SD = 1e-6  # nats; as in the paper's toolkit, so that losses without a spread weigh alike
LEAST_POINTS = 3
SMOOTHED_FROM_TOKENS, SMOOTHED_TO_SEQUENCES = 2**33, 128  # where the paper averages neighbouring logged points
MOST_DRAWS = 100_000
PAPER_FIT = {"nearest": 7, "fixed": True, "log_loss": False}
FITS = {  # one change at a time
    "as the paper": {}, "5 nearest": {"nearest": 5}, "all points": {"nearest": None}, "free level": {"fixed": False},
    "log loss": {"log_loss": True}, "best run, no fit": {"nearest": 0},
}


# -- from logged rows to points ----------------------------------------------------------------------------------------


def points_at(runs: pd.DataFrame, horizons, smoothed_from_tokens=SMOOTHED_FROM_TOKENS,
              smoothed_to_sequences=SMOOTHED_TO_SEQUENCES) -> pd.DataFrame:
    """One point a run at each horizon: the row logged there, or its mean with the rows before and after it (norms in log2).

    `runs`: rows of `archives.norm_transfer`, with batch_sequences and run. Averaged are horizons of `smoothed_from_tokens` or more at
    batches up to `smoothed_to_sequences`, as the paper has it; loss_sd is the population deviation (0 elsewhere). Runs that have no
    row at a horizon are left out of it. ValueError where no run has any.
    """
    found, asked, keys = [], [int(h) for h in horizons], ["run", "model", "batch_tokens", "batch_sequences", "peak_lr"]
    logged = runs.drop_duplicates([*keys, "horizon_tokens"]).sort_values([*keys, "horizon_tokens"])
    for (run, *cell), rows in logged.groupby(keys):
        horizon, norm, loss = (rows[name].to_numpy() for name in ("horizon_tokens", "log2_norm", "loss"))
        for at in np.flatnonzero(np.isin(horizon, asked)):
            wide = int(horizon[at] >= smoothed_from_tokens and cell[2] <= smoothed_to_sequences)
            window = slice(max(0, at - wide), at + wide + 1)
            found.append((run, *cell, horizon[at], norm[window].mean(), loss[window].mean(), loss[window].std()))
    if not found:
        raise ValueError(f"no run has a row at {', '.join(f'{h:g}' for h in horizons)} tokens; rows reach from "
                         f"{runs['horizon_tokens'].min():g} to {runs['horizon_tokens'].max():g}")
    return pd.DataFrame(found, columns=["run", "model", "batch_tokens", "batch_sequences", "peak_lr", "horizon_tokens", "log2_norm", "loss",
                                        "loss_sd"])


def first_reach(runs: pd.DataFrame, low: float, high: float) -> pd.DataFrame:
    """The first horizon at which each run's log2 norm lies within [low, high]: run, model, batch_tokens, peak_lr, horizon_tokens."""
    inside = runs[runs["log2_norm"].between(low, high)].sort_values("horizon_tokens", kind="stable")
    columns = ["run", "model", "batch_tokens", "peak_lr", "horizon_tokens"]
    return inside.drop_duplicates(["run", "model", "batch_tokens", "peak_lr"])[columns].reset_index(drop=True)


# -- one parabola ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parabola:
    """loss = a·x² + b·x + c over x = log2 norm, or log loss where it was fitted so; its minimum at `log2_norm` with `loss` in nats.

    Standard errors come from the scatter about it (NaN where none is left). `n` points fitted, `closest` the position of the given
    point nearest to the minimum in both coordinates, `inside` whether the minimum lies among the points fitted.
    """

    a: float
    b: float
    c: float
    log2_norm: float
    log2_norm_se: float
    loss: float
    loss_se: float
    n: int
    closest: int
    inside: bool


def nearest_points(log2_norm, loss, nearest: int | None = 7) -> np.ndarray:
    """Positions of the points nearest in log2 norm to the least loss, itself first; None means all.

    Where all lie to one side of it, the farthest gives way to the nearest point on the other side, if there is one.
    """
    x, best = np.asarray(log2_norm, dtype=float), int(np.argmin(loss))
    order = np.argsort(np.abs(x - x[best]), kind="stable")
    if nearest is None or nearest >= len(x):
        return order
    kept, rest = order[:nearest], order[nearest:]
    for side in (np.less, np.greater):
        across = rest[side(x[rest], x[best])]
        if len(across) and not side(x[kept], x[best]).any():
            return np.append(kept[:-1], across[0])
    return kept


def fit_parabola(log2_norm, loss, loss_sd=None, *, nearest: int | None = 7, fixed_loss: float | None = None,
                 initial_loss: float = math.inf, log_loss: bool = False) -> Parabola:
    """The parabola of loss over log2 norm through the points nearest to the least loss (arXiv 2510.03871, App. A.4).

    All arrays (points,). Losses that are not finite or reach `initial_loss` are dropped. `fixed_loss` fixes c, the loss at log2 norm
    0, where the weights of the head were initialised; None leaves it free. `loss_sd` weighs points by 1/sd². `log_loss` fits log loss,
    as the paper's text (not its code) has it. ValueError for unlike lengths, too few points, and points with no minimum.
    """
    x, y = np.asarray(log2_norm, dtype=float), np.asarray(loss, dtype=float)
    sd = np.ones_like(y) if loss_sd is None else np.maximum(np.asarray(loss_sd, dtype=float), LEAST_SD)
    if not len(x) == len(y) == len(sd):
        raise ValueError(f"log2_norm, loss and loss_sd must be equally long; got {len(x)}, {len(y)}, {len(sd)}")
    if nearest is not None and nearest < LEAST_POINTS:
        raise ValueError(f"nearest must be {LEAST_POINTS} or more, or None for all points; got {nearest}")
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(sd) & (y < initial_loss))
    if len(kept) < LEAST_POINTS:
        raise ValueError(f"a parabola needs {LEAST_POINTS} points with a loss below {initial_loss:g}; got {len(kept)} of {len(x)}")
    used = kept[nearest_points(x[kept], y[kept], nearest)]
    level, spread = (np.log, sd / y) if log_loss else (np.asarray, sd)
    powers = [2, 1] if fixed_loss is not None else [2, 1, 0]
    at_zero = 0.0 if fixed_loss is None else float(level(fixed_loss))
    coefficients, covariance = _weighted(x[used, None] ** powers, level(y[used]) - at_zero, spread[used])
    a, b = coefficients[:2]
    if not a > 0:
        raise ValueError(f"the loss has no minimum over log2 norm {x[used].min():.3g} … {x[used].max():.3g} (a = {a:.3g}); "
                         "add learning rates on both sides of the best")
    c = at_zero if fixed_loss is not None else float(coefficients[2])
    vertex, least = -b / (2 * a), c - b**2 / (4 * a)
    norm_se = _delta(covariance, [b / (2 * a**2), -1 / (2 * a), 0])
    loss_se = _delta(covariance, [b**2 / (4 * a**2), -b / (2 * a), 1])
    best = float(np.exp(least)) if log_loss else float(least)
    closest = kept[np.argmin((x[kept] - vertex) ** 2 + (y[kept] - best) ** 2)]
    return Parabola(float(a), float(b), c, float(vertex), norm_se, best, loss_se * (best if log_loss else 1.0), len(used), int(closest),
                    bool(x[used].min() <= vertex <= x[used].max()))


def norm_optima(points: pd.DataFrame, *, nearest: int | None = 7, fixed: bool = True, log_loss: bool = False,
                initial_loss: float = math.inf) -> pd.DataFrame:
    """The optimum of every cell (model, horizon, batch) by its parabola: CELL, log2_norm, loss, their _se, a, b, c, n, inside, and the
    peak_lr of the closest point where rates are known.

    c is fixed at `initial_loss` unless `fixed` is False. `nearest=0` takes the best run as it is. Cells of fewer than three points
    below `initial_loss` are left out and named in .attrs["left_out"]. ValueError where no cell is left, or `initial_loss` is wanting.
    """
    if fixed and nearest != 0 and not math.isfinite(initial_loss):
        raise ValueError("c is fixed at initial_loss, which is not given; give the loss at initialisation or fixed=False")
    rows, left_out = [], []
    for cell, of in points.groupby(CELL):
        of = of[np.isfinite(of["loss"]) & (of["loss"] < initial_loss)]
        if len(of) < LEAST_POINTS:
            left_out.append(cell)
            continue
        fit = _best_run(of) if nearest == 0 else fit_parabola(
            of["log2_norm"], of["loss"], of.get("loss_sd"), nearest=nearest, fixed_loss=initial_loss if fixed else None,
            log_loss=log_loss)
        row = dict(zip(CELL, cell, strict=True)) | dataclasses.asdict(fit)
        rows.append(row | {"peak_lr": of["peak_lr"].iloc[fit.closest] if "peak_lr" in of else math.nan})
    if not rows:
        raise ValueError(f"no model, horizon and batch has {LEAST_POINTS} runs with a loss below {initial_loss:g}")
    optima = pd.DataFrame(rows).drop(columns="closest")
    optima.attrs["left_out"] = left_out
    return optima


def _best_run(of: pd.DataFrame) -> Parabola:
    best = int(np.argmin(of["loss"]))
    nan, x = math.nan, of["log2_norm"]
    return Parabola(nan, nan, nan, float(x.iloc[best]), nan, float(of["loss"].iloc[best]), nan, 1, best, True)


def _weighted(design, y, sd):
    """Least squares with weights 1/sd²: coefficients, and their covariance scaled by the scatter (NaN where none is left)."""
    coefficients, *_ = np.linalg.lstsq(design / sd[:, None], y / sd, rcond=None)
    left = len(y) - design.shape[1]
    scale = float((((y - design @ coefficients) / sd) ** 2).sum()) / left if left else math.nan
    scaled = design / sd[:, None]
    return coefficients, np.linalg.pinv(scaled.T @ scaled) * scale


def _delta(covariance, gradient) -> float:
    """Standard error of a function of the coefficients from its gradient, which may be longer than they are."""
    g = np.array(gradient[:len(covariance)])
    return float(np.sqrt(g @ covariance @ g))


def same_norm_excess(optima: pd.DataFrame) -> pd.DataFrame:
    """What the optimum norm costs at every other batch: SETTING, batch_tokens, octaves (of the batch from the best of the grid), excess
    (nats), the loss of that batch's own parabola at the optimum's norm above the optimum, and excess_se, the errors of both minima
    (NaN where these are not known); `optima` fitted on plain loss."""
    optima = optima.assign(loss_se=optima.get("loss_se", math.nan))
    best = best_batches(optima)[[*SETTING, "batch_tokens", "log2_norm", "loss", "loss_se"]]
    both = optima.merge(best, on=SETTING, suffixes=("", "_best"))
    x = both["log2_norm_best"]
    both = both.assign(octaves=np.log2(both["batch_tokens"] / both["batch_tokens_best"]),
                       excess=both["a"] * x**2 + both["b"] * x + both["c"] - both["loss_best"],
                       excess_se=np.hypot(both["loss_se"], both["loss_se_best"]))
    return both.loc[both["octaves"] != 0, [*CELL, "octaves", "excess", "excess_se"]].reset_index(drop=True)


# -- the optimum over a continuous batch -------------------------------------------------------------------------------


def best_batches(optima: pd.DataFrame) -> pd.DataFrame:
    """The cell of least loss at each model and horizon: what the paper calls the optimum; a batch of the grid."""
    return optima.loc[optima.groupby(SETTING)["loss"].idxmin()].reset_index(drop=True)


def batch_profiles(optima: pd.DataFrame, around: int = 2) -> pd.DataFrame:
    """The optimum over a continuous batch: columns SETTING, batch_tokens, log2_batch_se, log2_norm, log2_norm_se, loss, curvature
    (nats per octave²), peak_lr (NaN where rates are not known), batches and df.

    At each setting the losses of the best batch of the grid and of `around` batches on either side make a parabola over log2 batch;
    lines through their norms and log rates are read at its vertex. Errors come from the scatter about both, pooled over settings (NaN with
    `around=1`, where none is left). EdgeOptimum where a best batch is at the edge of its grid, naming all of them.
    """
    fits = {key: _profile(of.sort_values("batch_tokens"), around) for key, of in optima.groupby(SETTING)}
    if at_edge := [f"{horizon:.3g} tokens of {model} (batch {fits[model, horizon]:.3g})" for model, horizon in fits
                   if isinstance(fits[model, horizon], float)]:
        raise EdgeOptimum(f"the best batch is at the edge of the grid at {', '.join(at_edge)}; add batches beyond it")
    loss_df, norm_df = (sum(f[name][2] for f in fits.values()) for name in ("loss", "norm"))
    loss_var, norm_var = (sum(f[name][1] for f in fits.values()) / df if df else math.nan
                          for name, df in (("loss", loss_df), ("norm", norm_df)))
    rows = []
    for (model, horizon), f in fits.items():
        (q2, q1, q0), (slope, level), vertex = f["loss"][0], f["norm"][0], f["vertex"]
        vertex_se = _delta(f["loss"][3] * loss_var, [q1 / (2 * q2**2), -1 / (2 * q2), 0])
        norm_se = math.hypot(_delta(f["norm"][3] * norm_var, [vertex, 1]), slope * vertex_se)
        rows.append((model, horizon, 2 ** (vertex + f["centre"]), vertex_se, level + slope * vertex, norm_se, q0 - q1**2 / (4 * q2), 2 * q2,
                     2 ** np.polyval(f["rate"], vertex), f["batches"], loss_df))
    return pd.DataFrame(rows, columns=[*SETTING, "batch_tokens", "log2_batch_se", "log2_norm", "log2_norm_se", "loss", "curvature",
                                       "peak_lr", "batches", "df"])


def _profile(of: pd.DataFrame, around: int) -> dict | float:
    """Loss and norm over log2 batch about the best batch, each (coefficients, sum of squares, df, covariance); a batch at the edge."""
    best = int(np.argmin(of["loss"]))
    window = of.iloc[max(0, best - around): best + around + 1]
    x = np.log2(window["batch_tokens"].to_numpy(float))
    centre = float(np.log2(of["batch_tokens"].iloc[best]))
    if best in (0, len(of) - 1):
        return float(of["batch_tokens"].iloc[best])
    parts = {name: _least(x - centre, window[name if name == "loss" else "log2_norm"].to_numpy(float), degree)
             for name, degree in (("loss", 2), ("norm", 1))}
    q2, q1, _ = parts["loss"][0]
    known = "peak_lr" in window and np.isfinite(window["peak_lr"]).all()
    rate = np.polyfit(x - centre, np.log2(window["peak_lr"]), 1) if known else [math.nan]
    return parts | {"rate": rate, "vertex": -q1 / (2 * q2), "centre": centre, "batches": len(window)}


def _least(u, y, degree):
    design = np.vander(u, degree + 1)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    return coefficients, float(((y - design @ coefficients) ** 2).sum()), len(u) - degree - 1, np.linalg.inv(design.T @ design)


# -- is the norm constant? ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Constancy:
    """How constant log2 norm is over horizons at the best batch of the grid, beside other ways of choosing the batch.

    `sd` (n − 1) and `slope` (per octave of tokens) at the best batch. `random_share`: of all ways to choose a batch at each horizon,
    how many are as constant; `random_sd` their 5th, 50th and 95th percentile. `wander_sd` and `wander_slope`: the same percentiles
    where each best batch is moved by up to one step of the grid; `wander_slope_sd` the deviation of those slopes. `exact`: all ways
    were counted, not a sample of them. `fixed`: batch_tokens, sd, slope, slope_low, slope_high (95 %) at each fixed batch.
    """

    sd: float
    slope: float
    random_share: float
    random_sd: tuple
    wander_sd: tuple
    wander_slope: tuple
    wander_slope_sd: float
    exact: bool
    fixed: pd.DataFrame = dataclasses.field(compare=False)


def constancy(optima: pd.DataFrame, seed: int = 0) -> Constancy:
    """Judge the constancy of one model's optimum norms over horizons; `optima` as `norm_optima` gives them, one row a cell.

    ValueError for several models, fewer than three horizons, or a horizon that lacks a batch.
    """
    if optima["model"].nunique() != 1 or optima["horizon_tokens"].nunique() < 3:
        raise ValueError(f"constancy is asked of one model at three horizons or more; got {optima['model'].nunique()} models and "
                         f"{optima['horizon_tokens'].nunique()} horizons")
    norms, losses = (optima.pivot(index="horizon_tokens", columns="batch_tokens", values=v) for v in ("log2_norm", "loss"))
    if norms.isna().any(axis=None):
        raise ValueError(f"{int(norms.isna().sum().sum())} of {norms.size} horizons and batches have no optimum; leave these batches out")
    x, grid, best = np.log2(norms.index.to_numpy(float)), norms.to_numpy(), losses.to_numpy().argmin(1)
    steps = [range(max(0, b - 1), min(grid.shape[1], b + 2)) for b in best]
    (wander, all_near), (random, all_far) = (_choices(c, seed) for c in (steps, [range(grid.shape[1])] * len(x)))
    at_best = grid[np.arange(len(x)), best]
    wander_sd, random_sd = (_sd(grid, c) for c in (wander, random))
    slopes = _slopes(x, grid[np.arange(len(x)), wander])
    fixed = [_fixed_row(batch, norms.index.to_numpy(float), norms[batch].to_numpy()) for batch in norms]
    return Constancy(float(at_best.std(ddof=1)), float(_slopes(x, at_best[None])[0]),
                     float((random_sd <= at_best.std(ddof=1) + 1e-9).mean()), _percentiles(random_sd), _percentiles(wander_sd),
                     _percentiles(slopes), float(slopes.std()), all_near and all_far, pd.DataFrame(fixed))


def norm_slope(horizon_tokens, log2_norm) -> Estimate:
    """Slope of log2 norm per octave of tokens by least squares, its error from the scatter about the line; unit "exponent".

    ValueError below three horizons, which leave no scatter.
    """
    x, y = np.log2(np.asarray(horizon_tokens, dtype=float)), np.asarray(log2_norm, dtype=float)
    if len(x) < 3 or len(set(x)) < 3:
        raise ValueError(f"a slope with an error needs three horizons; got {len(set(x))}")
    found = stats.linregress(x, y)
    return Estimate(float(found.slope), float(found.stderr), len(x) - 2, len(x), "exponent")


def choices(points: pd.DataFrame, initial_loss: float) -> pd.DataFrame:
    """The optimum norm of one model by every fit of FITS, with the batch picked on the grid and profiled: columns batch, fit, a column
    a horizon ("2^33"), sd, slope (per octave of tokens), slope_low, slope_high (95 %). A best batch at the edge leaves its row out."""
    rows = []
    for name, change in FITS.items():
        optima = norm_optima(points, initial_loss=initial_loss, **(PAPER_FIT | change))
        rows += batch_choices(optima, name).to_dict("records")
    return pd.DataFrame(rows)


def batch_choices(optima: pd.DataFrame, fit: str = "") -> pd.DataFrame:
    """The optimum norm of one model with the batch picked on the grid, and profiled with 1, 2 and all batches to either side: columns
    batch, fit (as given), a column a horizon, sd, slope, slope_low, slope_high."""
    ways = {"picked on the grid": None, "profiled, 1 to a side": 1, "profiled, 2 to a side": 2, "profiled, all": len(optima)}
    rows = []
    for name, around in ways.items():
        try:
            found = best_batches(optima) if around is None else batch_profiles(optima, around)
        except EdgeOptimum:
            continue
        slope = norm_slope(found["horizon_tokens"], found["log2_norm"])
        low, high = slope.interval()
        by_horizon = {f"2^{math.log2(h):g}": v for h, v in zip(found["horizon_tokens"], found["log2_norm"], strict=True)}
        rows.append({"batch": name, "fit": fit, **by_horizon, "sd": float(found["log2_norm"].std()), "slope": slope.value,
                     "slope_low": low, "slope_high": high})
    return pd.DataFrame(rows)


def _fixed_row(batch, horizons, norms) -> dict:
    slope = norm_slope(horizons, norms)
    return {"batch_tokens": batch, "sd": float(norms.std(ddof=1)), "slope": slope.value, "slope_low": slope.interval()[0],
            "slope_high": slope.interval()[1]}


def _choices(ranges, seed):
    """(all ways to take one of each range, True), or a sample of them and False where there are more than MOST_DRAWS."""
    if math.prod(map(len, ranges)) <= MOST_DRAWS:
        return np.array(list(itertools.product(*ranges))), True
    draw = np.random.default_rng(seed)
    return np.column_stack([draw.choice(np.array(r), MOST_DRAWS) for r in ranges]), False


def _sd(grid, chosen):
    return grid[np.arange(len(grid)), chosen].std(axis=1, ddof=1)


def _slopes(x, norms):
    u = x - x.mean()
    return norms @ u / (u @ u)


def _percentiles(values) -> tuple:
    return tuple(float(v) for v in np.quantile(values, [0.05, 0.5, 0.95]))


# -- rules of rate and batch -------------------------------------------------------------------------------------------


def rate_rule(batch, horizon_tokens, lr) -> PowerLaw:
    """lr = prefactor · batch^A · tokens^C by least squares in logs (arXiv 2510.03871, Fig. 3): the prefactor is in the unit of `batch`,
    sequences of 4096 tokens in the paper. Of the points of `first_reach` it is the rule of the first reach."""
    columns = {"batch": np.asarray(batch, dtype=float), "horizon_tokens": np.asarray(horizon_tokens, dtype=float)}
    return fit_power_law(columns, np.asarray(lr, dtype=float))  # without its name: a rate above 1 is no slip of units here


def tokens_rule(horizon_tokens, y) -> PowerLaw:
    """y = prefactor · tokens^b, of the best batch or of the rate at it."""
    return fit_power_law({"horizon_tokens": np.asarray(horizon_tokens, dtype=float)}, np.asarray(y, dtype=float))


def exponent(law: PowerLaw, name: str) -> Estimate:
    """An exponent of a fitted law with its standard error; `name` "log2_prefactor" is log2 of the prefactor (octaves)."""
    if name == "log2_prefactor":
        whole = Estimate(math.log(law.prefactor), math.sqrt(law.covariance[0, 0]), law.df, law.n, "")
        return whole.scaled(1 / math.log(2), "octaves")
    at = law.names.index(name)
    return Estimate(law.exponents[at], math.sqrt(law.covariance[at + 1, at + 1]), law.df, law.n, "exponent")
