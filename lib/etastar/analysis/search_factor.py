"""How far a search for the best learning rate can be cut: the "search factor" of the Fitting paradigm (arXiv 2601.05049).

Two savings over the full grid of sizes × horizons × rates. Few rates: L(eta | N, D) = L_min + C (log eta − eta_min)² (eq. 2)
needs three. Few horizons: either the best rates of short horizons extrapolate, eta*(N, D) being a power law (eq. 6), or the
loss at each rate does, L(D) = L0 + A·D^−gamma (eq. 4). `search_factor` replays such searches on a grid that was run in full
and tells what each saves and what it loses.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
from scipy import optimize

from etastar.analysis.bowl import fit_bowl
from etastar.analysis.log_points import refuse_not_positive
from etastar.analysis.power_law import fit_power_law

COLUMNS = ("params", "horizon_tokens", "lr", "loss", "compute")
GAMMA = (0.02, 2.0)  # an exponent near 0 is a logarithm, one of 2 has long met its floor


@dataclasses.dataclass(frozen=True)
class Parabola:
    """Eq. 2 fitted to a few rates: best_lr, best_loss and `curvature`, C in nats per (ln eta)²; `r2` and `n` of the fit."""

    best_lr: float
    best_loss: float
    curvature: float
    r2: float
    n: int


@dataclasses.dataclass(frozen=True)
class HorizonLaw:
    """Eq. 4: loss = L0 + A · tokens^−gamma, in nats; A is that of tokens as given."""

    L0: float
    A: float
    gamma: float
    n: int

    def predict(self, horizon_tokens) -> np.ndarray:
        """Loss at these horizons."""
        return self.L0 + self.A * np.asarray(horizon_tokens, dtype=float) ** -self.gamma


def fit_parabola(lr, loss) -> Parabola:
    """The parabola in ln lr through (rates,) losses in nats; ValueError for fewer than three finite points or where it opens downwards.

    Bowls are steeper on the right, so wide windows put the vertex low; `fit_bowl` has the cubic term and the intervals.
    """
    lr, loss = np.asarray(lr, dtype=float), np.asarray(loss, dtype=float)
    refuse_not_positive("lr", lr)
    keep = np.isfinite(loss)
    if len(np.unique(lr[keep])) < 3:
        raise ValueError(f"a parabola needs at least 3 rates with a finite loss; got {len(np.unique(lr[keep]))}")
    log_lr = np.log(lr[keep])
    centre = log_lr.mean()
    coefficients = np.polyfit(log_lr - centre, loss[keep], 2)
    bend, slope, level = coefficients
    if not bend > 0:
        raise ValueError(f"the losses at {np.unique(lr[keep]).tolist()} do not bend upwards, so no rate is best; add rates on both sides")
    vertex = -slope / (2 * bend)
    residual, total = loss[keep] - np.polyval(coefficients, log_lr - centre), loss[keep] - loss[keep].mean()
    r2 = 1 - (residual**2).sum() / (total**2).sum()
    return Parabola(math.exp(centre + vertex), float(level - bend * vertex**2), float(bend), float(r2), int(keep.sum()))


def fit_horizon_law(horizon_tokens, loss) -> HorizonLaw:
    """Least squares of L0 + A·D^−gamma to losses in nats at (points,) horizons; exact through three that fall ever more slowly.

    gamma stays within 0.02 … 2. Raises ValueError for values that are missing or not positive and fewer than three horizons.
    """
    tokens, loss = np.asarray(horizon_tokens, dtype=float), np.asarray(loss, dtype=float)
    refuse_not_positive("horizon_tokens", tokens)
    refuse_not_positive("loss", loss)
    if len(np.unique(tokens)) < 3:
        raise ValueError(f"a floor, a level and an exponent need at least 3 different horizons; got {len(np.unique(tokens))}")
    middle = np.exp(np.log(tokens).mean())

    def missed(gamma):
        """Sum of squares that the best floor and level leave at this exponent."""
        x, y = (v - v.mean() for v in ((tokens / middle) ** -gamma, loss))
        return (y @ y) - (x @ y) ** 2 / (x @ x)

    ladder = np.geomspace(*GAMMA, 60)
    best = int(np.argmin([missed(g) for g in ladder]))
    around = ladder[max(best - 1, 0)], ladder[min(best + 1, len(ladder) - 1)]
    gamma = float(optimize.minimize_scalar(missed, bounds=around, method="bounded", options={"xatol": 1e-10}).x)
    rise, level = np.polyfit((tokens / middle) ** -gamma, loss, 1)
    return HorizonLaw(float(level), float(rise * middle**gamma), gamma, len(tokens))


def search_factor(grid: pd.DataFrame, n_lr=(3, 5), spacing_octaves=(1.0, 2.0), n_horizons=(2, 3)) -> pd.DataFrame:
    """Replay cheap searches for the best rate of the grid's largest cell: a row a choice of rates, spacing, horizons and way.

    `grid`: a row a run of params, horizon_tokens, lr, loss (nats; NaN = diverged) and compute (any unit), at one batch size; the
    rates of a cell evenly spaced in octaves. A search runs, in each cell of the n_horizons shortest of every size, n_lr rates of
    the spacing about the best it sees; the largest cell is never run. `way` is "rates" (eq. 6: best rates extrapolate) or
    "losses" (eq. 4: the losses of each rate do, at the largest cell's size; from 3 horizons on). Where the sparse rates begin
    is chance: errors are over all ways to begin, `refused` of which found no bowl.

    Columns: n_lr, spacing_octaves, n_horizons, way, runs, cost_share (of the whole grid's compute, the largest cell's included),
    best_lr (of the whole largest cell, by `fit_bowl`), error_octaves (mean of absolutes), error_worst, excess (mean of loss at the
    proposed rate, interpolated in log lr, over the cell's least loss, less 1), excess_worst, refused. Raises ValueError for
    missing columns, a spacing that the grid does not have, or no horizon short of the largest cell's.
    """
    _refuse_grid(grid)
    grid, unit = _numbered_rates(grid)
    target = _largest(grid)
    truth = fit_bowl(target["lr"].to_numpy(), target["loss"].to_numpy())
    rows = []
    for count, spacing, horizons in itertools.product(n_lr, spacing_octaves, n_horizons):
        step, short = _step(unit, spacing), _shortest(grid, target, horizons)
        for way in ("rates", "losses"):
            if way == "losses" and horizons < 3:
                continue
            searches = [_search(short, target, count, step, begin, way) for begin in range(step)]
            rows.append({"n_lr": count, "spacing_octaves": spacing, "n_horizons": horizons, "way": way}
                        | _judged(searches, target, truth.best_log2_lr, grid["compute"].sum()))
    return pd.DataFrame(rows)


# -- one search --------------------------------------------------------------------------------------------------------


def _search(short: pd.DataFrame, target: pd.DataFrame, count: int, step: int, begin: int, way: str) -> dict | None:
    """{proposed log2 rate, runs, compute} of one search; None where it finds no bowl."""
    if way == "losses":
        short = short[short["params"] == target["params"].iloc[0]]
    cells = {cell: _few_rates(rows, count, step, begin) for cell, rows in short.groupby(["params", "horizon_tokens"])}
    bowls = {cell: runs for cell, runs in cells.items() if runs is not None}
    try:
        proposed = _by_rates(bowls, target) if way == "rates" else _by_losses(bowls, short, target)
    except ValueError:
        return None
    run = pd.concat(bowls.values())
    return {"log2_lr": proposed, "runs": len(run), "compute": run["compute"].sum()}


def _few_rates(rows: pd.DataFrame, count: int, step: int, begin: int) -> pd.DataFrame | None:
    """`count` neighbouring rates of the sparse ones about the best of these; None where that is the first or last of them."""
    sparse = rows[rows["rate"] % step == begin].sort_values("rate")
    loss = sparse["loss"].fillna(np.inf).to_numpy()
    best = int(loss.argmin())
    if len(sparse) < count or not 0 < best < len(sparse) - 1:
        return None
    first = min(max(best - count // 2, 0), len(sparse) - count)
    return sparse.iloc[first:first + count]


def _by_rates(bowls: dict, target: pd.DataFrame) -> float:
    """Vertices of the short cells, and their power law at the largest cell."""
    cells = pd.DataFrame(list(bowls), columns=["params", "horizon_tokens"]).astype(float)
    vertices = [fit_parabola(runs["lr"], runs["loss"]).best_lr for runs in bowls.values()]
    varying = [name for name in cells if cells[name].nunique() > 1]
    if not varying:
        raise ValueError("one cell has no law")
    fixed = [name for name in cells if name not in varying and cells[name].iloc[0] != target[name].iloc[0]]
    if fixed:
        raise ValueError(f"{', '.join(fixed)} must vary to be extrapolated")
    law = fit_power_law(cells[varying], vertices)
    return float(np.log2(law.predict({name: target[name].iloc[:1] for name in varying})[0]))


def _by_losses(bowls: dict, short: pd.DataFrame, target: pd.DataFrame) -> float:
    """The losses of the rates that every short cell ran, each extrapolated in tokens, and the parabola through them."""
    if len(bowls) < short["horizon_tokens"].nunique():
        raise ValueError("a horizon has no bowl")
    shared = sorted(set.intersection(*(set(runs["rate"]) for runs in bowls.values())))
    far, runs = target["horizon_tokens"].iloc[0], pd.concat(bowls.values())
    at = [runs[runs["rate"] == rate] for rate in shared]
    losses = [fit_horizon_law(r["horizon_tokens"], r["loss"]).predict(far) for r in at]
    return float(np.log2(fit_parabola([r["lr"].mean() for r in at], losses).best_lr))


def _judged(searches, target: pd.DataFrame, best_log2_lr: float, whole: float) -> dict:
    found = [s for s in searches if s is not None]
    tried = target[np.isfinite(target["loss"])].sort_values("lr")
    log2_lr, loss = np.log2(tried["lr"].to_numpy()), tried["loss"].to_numpy()
    error = np.array([s["log2_lr"] - best_log2_lr for s in found])
    excess = np.array([np.interp(s["log2_lr"], log2_lr, loss, left=math.nan, right=math.nan) / loss.min() - 1 for s in found])
    told = {"runs": np.mean([s["runs"] for s in found]), "cost_share": np.mean([s["compute"] for s in found]) / whole,
            "best_lr": 2**best_log2_lr, "error_octaves": np.abs(error).mean(), "error_worst": np.abs(error).max(),
            "excess": excess.mean(), "excess_worst": excess.max()} if found else {}
    return told | {"refused": len(searches) - len(found)}


# -- the grid ----------------------------------------------------------------------------------------------------------


def _refuse_grid(grid: pd.DataFrame) -> None:
    if lacking := [name for name in COLUMNS if name not in grid]:
        raise ValueError(f"the grid lacks {', '.join(lacking)}; it needs {', '.join(COLUMNS)}")
    for name in set(COLUMNS) - {"loss"}:
        refuse_not_positive(name, grid[name].to_numpy(dtype=float))
    if (twice := grid.duplicated(["params", "horizon_tokens", "lr"])).any():
        first = grid[twice].iloc[0]
        raise ValueError(f"{int(twice.sum())} runs are of a size, horizon and rate that another run has, params {first['params']:.4g}, "
                         f"horizon_tokens {first['horizon_tokens']:.4g}, lr {first['lr']:.4g} for example; take one batch size and seed")


def _largest(grid: pd.DataFrame) -> pd.DataFrame:
    cost = grid["compute"].groupby([grid["params"], grid["horizon_tokens"]]).max()
    params, tokens = cost.idxmax()
    return grid[(grid["params"] == params) & (grid["horizon_tokens"] == tokens)]


def _shortest(grid: pd.DataFrame, target: pd.DataFrame, horizons: int) -> pd.DataFrame:
    """The `horizons` shortest of every size, the largest cell left out."""
    others = grid.drop(target.index)
    rank = others.groupby("params")["horizon_tokens"].rank("dense")
    short = others[rank <= horizons]
    own = short.loc[short["params"] == target["params"].iloc[0], "horizon_tokens"].nunique()
    if own < horizons:
        raise ValueError(f"the largest cell's size has {own} shorter horizons, not {horizons}; ask for fewer")
    return short


def _numbered_rates(grid: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """The grid in floats (integers of params × tokens overflow) with a number `rate` a rate, and their spacing in octaves.

    Published grids round one and the same rate differently from cell to cell; numbers make them alike.
    """
    grid = grid[list(COLUMNS)].astype(float)
    log2_lr = np.log2(grid["lr"])
    cells = log2_lr.groupby([grid["params"], grid["horizon_tokens"]])
    unit = float(np.median(np.concatenate([np.diff(np.sort(rates)) for _, rates in cells])))
    place = (log2_lr - log2_lr.min()) / unit
    if (np.abs(place - place.round()) > 0.1).any():
        odd = grid["lr"][np.abs(place - place.round()).idxmax()]
        raise ValueError(f"the rates are not evenly spaced in octaves: most are {unit:.3g} apart, but {odd:.4g} lies between; leave it out")
    return grid.assign(rate=place.round().astype(int)), unit


def _step(unit: float, spacing: float) -> int:
    """How many grid rates a spacing in octaves spans."""
    step = round(spacing / unit)
    if step < 1 or abs(step * unit - spacing) > 0.1 * unit:
        raise ValueError(f"the grid's rates are {unit:.3g} octaves apart, so they have no spacing of {spacing:g}; take a multiple of it")
    return step
