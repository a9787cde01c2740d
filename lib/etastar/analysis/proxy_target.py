"""A rate for a large model from small ones: the small model's rate kept, or moved by a rule; what each misses and loses at the target.

`rates` has one row a cell and batch: cell, params, horizon_tokens, batch_tokens, peak_lr, the best rate there; `runs` are the grid they
come from (`analysis.lr_grids`). A proxy is a size below the target's. Its anchor is the cell of the longest horizon that is not beyond
the target's: what a search at this size would have run. Rules by exponents move the anchor's rate; a fitted rule is Eq. 6 of arXiv
2601.05049 through the cells of all sizes up to the proxy's. No rule sees a run of the target's size.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.cooldown_archive import clustered_mean
from etastar.analysis.jackknife import jackknife
from etastar.analysis.laws import laws as registry
from etastar.analysis.lr_grids import LOSS, LossGrid
from etastar.analysis.paired import Estimate
from etastar.analysis.size_horizon import AXES

KEPT, FITTED, FITTED_EQUAL = "kept", "fitted", "fitted, equal FLOPs"
BY_FITTING = "Fitting's exponents"
ANCHORED = {BY_FITTING: "fitting", "Bjorck's exponents": "bjorck", "Step Law's exponents": "steplaw"}
PRINTED = "Step Law, printed"  # where the grid is Step Law's own, it has seen the target
WAYS = (KEPT, FITTED, FITTED_EQUAL, *ANCHORED, PRINTED)
COLUMN_UNITS = {"excess": "loss_fraction", "error_octaves": "octaves", "miss_octaves": "octaves"}
LEAST_CELLS = 4  # through which a rule of three coefficients is fitted


@dataclasses.dataclass(frozen=True)
class Search:
    """What a proxy gives to find a target's rate: the anchor's row, and the rows of all cells up to its size by rising FLOPs."""

    target: dict
    anchor: dict
    cells: pd.DataFrame

    def kept(self) -> tuple[float, float]:
        """(the anchor's rate, FLOPs of its runs)."""
        return self.anchor["peak_lr"], self.anchor["flops"]

    def moved(self, law: str) -> tuple[float, float]:
        """The anchor's rate moved by the exponents that a law prints."""
        octaves = sum(power * np.log2(self.target[name] / self.anchor[name])
                      for name, power in registry[law].formulas["lr"].exponents.items())
        return self.anchor["peak_lr"] * 2**octaves, self.anchor["flops"]

    def fitted(self, budget: float = np.inf) -> tuple[float, float] | None:
        """The rule through the cheapest cells of these FLOPs in all; None where they do not determine it."""
        cells = self.cells[self.cells["flops"].cumsum() <= budget]
        design = _design(cells)
        if len(cells) < LEAST_CELLS or np.linalg.matrix_rank(design - [[0, *design[:, 1:].mean(0)]], tol=1e-6) < 3:
            return None
        found, *_ = np.linalg.lstsq(design, np.log2(cells["peak_lr"].to_numpy(float)), rcond=None)
        return float(2.0 ** (found @ [1, *(np.log2(self.target[name]) for name in AXES)])), float(cells["flops"].sum())

    def printed(self) -> tuple[float, float]:
        """Step Law as printed, which needs no search."""
        return float(registry["steplaw"].lr(**{name: float(self.target[name]) for name in AXES})), 0.0


def head_to_head(rates: pd.DataFrame, runs: pd.DataFrame, loss: str = LOSS) -> pd.DataFrame:
    """Every way to a rate for every target and every smaller size, at each batch for itself; one batch a cell counts as one batch.

    Columns: way, cell (the target), params, horizon_tokens, batch_tokens, proxy_params, ratio (params over proxy_params), peak_lr,
    error_octaves (log2 over the target's best rate), miss_octaves (its size), excess (loss above that at the target's own best rate, as a
    share, straight between runs in log rate), clipped (read at the edge of the runs), flops (6·N·D over the runs searched), target_runs
    (runs of the target that these pay for). A fitted rule needs four cells of two sizes; FITTED_EQUAL fits to the cheapest cells that
    together cost no more than the anchor. ValueError where no target has a smaller size.
    """
    rates, grids = _with_flops(rates, runs), {name: LossGrid.of(of, loss) for name, of in runs.groupby("cell", sort=False)}
    held = rates.groupby("batch_tokens") if rates["cell"].duplicated().any() else [(None, rates)]
    rows = [row for _, of in held for search in _searches(of) for row in _rows(search, grids[search.target["cell"]])]
    if not rows:
        raise ValueError("no target has a smaller size with a horizon no longer than its own; add sizes")
    return pd.DataFrame(rows)


def difference(table: pd.DataFrame, way: str, against: str, column: str = "excess", least_ratio: float = 2.0) -> Estimate:
    """Mean of a column at one way less that at another, at the largest proxy at least `least_ratio` below each target.

    The target cell is the unit: batches of one are averaged first. Targets share proxies, which is not in the error. ValueError for fewer
    than three targets that have both.
    """
    pairs = nearest(table, (way, against), least_ratio).pivot(index=["cell", "batch_tokens"], columns="way", values=column)
    pairs = pairs.reindex(columns=[way, against]).dropna()
    by_target = (pairs[way] - pairs[against]).groupby("cell").mean()
    if len(by_target) < 3:
        raise ValueError(f"{len(by_target)} targets have both {way!r} and {against!r} at {least_ratio:g} times their proxy; add sizes")
    return dataclasses.replace(clustered_mean(by_target, by_target.index), unit=COLUMN_UNITS.get(column, column))


def nearest(table: pd.DataFrame, ways, least_ratio: float) -> pd.DataFrame:
    """The rows of these ways at the smallest ratio of at least `least_ratio` at which a target has all of them."""
    of = table[table["way"].isin(ways) & (table["ratio"] >= least_ratio * 0.99)]  # sizes are multiples of two to a per cent
    complete = of.groupby(["cell", "batch_tokens", "ratio"])["way"].transform("nunique") == len(ways)
    of = of[complete]
    return of[of["ratio"] == of.groupby(["cell", "batch_tokens"])["ratio"].transform("min")]


def ratio_slopes(table: pd.DataFrame, column: str = "excess") -> pd.DataFrame:
    """How a column grows with the target: a line over log2 ratio beside a level for each target and batch, errors of leaving out a target.

    Columns: way, slope, low, high (95 %), targets, n. Ways without a ratio to vary, or with fewer than four targets, are left out.
    """
    rows = []
    for way, of in table.dropna(subset=[column]).groupby("way", sort=False):
        of = of[of.groupby(["cell", "batch_tokens"])["ratio"].transform("nunique") > 1]
        if of["cell"].nunique() >= 4 and way != PRINTED:
            (slope,) = jackknife(of["cell"], lambda kept, of=of: _within_slope(of[kept], column))
            low, high = slope.interval()
            rows.append({"way": way, "slope": slope.value, "low": low, "high": high, "targets": of["cell"].nunique(), "n": len(of)})
    return pd.DataFrame(rows, columns=["way", "slope", "low", "high", "targets", "n"])


def by_ratio(table: pd.DataFrame) -> pd.DataFrame:
    """Means over targets by way and ratio, batches averaged first: way, ratio, error_octaves, miss_octaves (mean of absolutes), excess,
    target_runs, clipped (share), targets."""
    means = table.assign(ratio=table["ratio"].round(2))
    columns = ["error_octaves", "miss_octaves", "excess", "target_runs", "clipped"]
    of_target = means.groupby(["way", "ratio", "cell"], sort=False)[columns].mean()
    grouped = of_target.groupby(["way", "ratio"])
    return grouped.mean().join(grouped.size().rename("targets")).reset_index()


# -- searches ----------------------------------------------------------------------------------------------------------


def _searches(rates: pd.DataFrame):
    """A Search for every cell by every smaller size that ran a horizon no longer than the target's."""
    targets, by_cost = rates.to_dict("records"), rates.sort_values("flops")
    for params in np.unique(rates["params"]):
        cells = by_cost[by_cost["params"] <= params]
        own = sorted((row for row in targets if row["params"] == params), key=lambda row: row["horizon_tokens"])
        for target in targets:
            reached = [row for row in own if row["horizon_tokens"] <= target["horizon_tokens"]]
            if reached and target["params"] > params:
                yield Search(target, reached[-1], cells)


def _rows(search: Search, grid: LossGrid):
    target = search.target
    found = {KEPT: search.kept(), FITTED: search.fitted(), FITTED_EQUAL: search.fitted(search.anchor["flops"]),
             **{way: search.moved(law) for way, law in ANCHORED.items()}, PRINTED: search.printed()}
    own, _ = grid.loss_at(target["peak_lr"], target["batch_tokens"])
    for way, pair in found.items():
        if pair is not None:
            rate, flops = pair
            there, clipped = grid.loss_at(rate, target["batch_tokens"])
            error = float(np.log2(rate / target["peak_lr"]))
            yield {"way": way, **{name: target[name] for name in ("cell", *AXES, "batch_tokens")},
                   "proxy_params": search.anchor["params"], "ratio": target["params"] / search.anchor["params"], "peak_lr": rate,
                   "error_octaves": error, "miss_octaves": abs(error), "excess": there / own - 1, "clipped": clipped,
                   "flops": flops, "target_runs": flops / _flops(target)}


def _with_flops(rates: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The FLOPs of the runs behind each best rate: those at its batch, or all of its cell where each cell has one batch of its own."""
    if unknown := sorted(set(rates["cell"]) - set(runs["cell"])):
        raise ValueError(f"no runs of cell {', '.join(unknown)}; give the runs that the rates come from")
    keys = ["cell", "batch_tokens"] if rates["cell"].duplicated().any() else ["cell"]
    count = rates[keys].merge(runs.groupby(keys).size().rename("count").reset_index(), on=keys, how="left")["count"]
    return rates.assign(flops=count.to_numpy(float) * _flops(rates))


def _flops(rows):
    """6·N·D of one run, in floats: integers overflow."""
    return 6.0 * rows["params"] * rows["horizon_tokens"]


def _design(cells: pd.DataFrame) -> np.ndarray:
    return np.column_stack([np.ones(len(cells)), *(np.log2(cells[name].to_numpy(float)) for name in AXES)])


def _within_slope(table: pd.DataFrame, column: str) -> float:
    keys = [table["cell"], table["batch_tokens"]]
    x, y = np.log2(table["ratio"]), table[column]
    x, y = (v - v.groupby(keys).transform("mean") for v in (x, y))
    return float((x * y).sum() / (x**2).sum())
