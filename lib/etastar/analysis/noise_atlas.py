"""How far a final loss strays, by what it strays with: initial parameters, order of the data, both, or the way of computing alone.

Runs come as a frame, one row a run: setting (all of a recipe but what is named here), arm, width, horizon_tokens, peak_lr, seed (of
the parameters), data_seed (of the order), execution, loss (nats, NaN diverged). Sources of noise are read off which of the seeds
vary, so that any runs will do. A deviation's interval is chi-square's; with the three degrees of freedom of four seeds it reaches from
0.57 to 3.7 times the deviation, and is meant to. It takes losses to be normal, which one run that spiked is not: then the deviation
is that run's, and the losses themselves are to be looked at.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.bowl import fit_bowl
from etastar.analysis.paired import SHARED_REFERENCE

SOURCES = {"seed": "initial parameters alone", "order": "order of the data alone", "both": "both", "rerun": "way of computing alone"}
CELL = ["source", "arm", "width", "horizon_tokens", "relative_lr"]
COLUMNS = ["setting", "arm", "width", "horizon_tokens", "peak_lr", "seed", "data_seed", "execution", "loss"]
FARTHEST = 3.0  # octaves of horizon, width and rate together, beyond which a cell says nothing of another


@dataclasses.dataclass(frozen=True)
class Deviation:
    """A standard deviation in nats with its chi-square interval, of `df` degrees of freedom."""

    sd: float
    sd_low: float
    sd_high: float
    df: float


def deviation(sd: float, df: float, level: float = 0.95) -> Deviation:
    """`sd` with its interval; unbounded where there are no degrees of freedom, 0 … 0 for what never strays."""
    if not df > 0 or not math.isfinite(sd):
        return Deviation(sd, 0.0, math.inf, max(df, 0.0))
    low, high = stats.chi2.ppf((0.5 - level / 2, 0.5 + level / 2), df)
    return Deviation(sd, sd * math.sqrt(df / high), sd * math.sqrt(df / low) if low > 0 else math.inf, df)


def with_relative_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with relative_lr, the peak rate over the best one, and reference, where the best one was read.

    It is the vertex of the arm's own bowl over seeds, else that of the bowl nearest in width and horizon, else the middle of the
    arm's rates, which is no measurement. Raises ValueError for columns that lack or rates that are not positive.
    """
    if lacking := [name for name in COLUMNS if name not in runs]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; runs need {', '.join(COLUMNS)}")
    if not (runs["peak_lr"] > 0).all():
        raise ValueError(f"peak rates must be positive; got {sorted(set(runs.loc[~(runs['peak_lr'] > 0), 'peak_lr']))}")
    groups, best = dict(list(runs.groupby(["arm", "width", "horizon_tokens"]))), {}
    for key, rows in groups.items():
        if (vertex := _vertex(rows)) is not None:
            best[key] = vertex
    made = []
    for key, rows in groups.items():
        if best:
            # The same arm's bowl is nearer than another's; then the nearest horizon and width.
            near = min(best, key=lambda other, key=key: (other[0] != key[0], _octaves(other[1], key[1]) + _octaves(other[2], key[2])))
            reference, lr = ("own bowl" if near == key else "nearest bowl"), best[near]
        else:
            reference, lr = "middle of the rates", float(np.exp(np.log(rows["peak_lr"].unique()).mean()))
        made.append(rows.assign(relative_lr=rows["peak_lr"] / lr, reference=reference))
    return pd.concat(made).sort_index()


def by_source(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs by what varies within a setting: those columns, source and group; a run may be in several groups.

    A group of source "seed" has one data_seed and of "order" one seed: the largest such group alone, since others of the setting tell
    of the same seeds again. In "both" a run's two seeds are equal. "rerun" are runs alike in both seeds that were computed in
    different ways. Groups have two runs or more.
    """
    groups = []
    for setting, rows in runs.groupby("setting", sort=False):
        way = rows["execution"].mode().iloc[0]
        plain = rows[rows["execution"] == way].drop_duplicates(["seed", "data_seed"])
        found = [(source, max((g for _, g in plain.groupby(held)), key=len)) for source, held in (("seed", "data_seed"), ("order", "seed"))]
        found.append(("both", plain[plain["seed"] == plain["data_seed"]]))
        found += [("rerun", g) for _, g in rows.groupby(["seed", "data_seed"]) if g["execution"].nunique() > 1]
        groups += [g.assign(source=source, group=f"{setting} {source} {i}") for i, (source, g) in enumerate(found) if len(g) > 1]
    if not groups:
        raise ValueError("no two runs differ in a seed or in how they were computed alone; train a recipe with other seeds")
    return pd.concat(groups, ignore_index=True)


def noise_table(runs: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Deviation of the final loss by source and cell: source, arm, width, horizon_tokens, relative_lr, sd, sd_low, sd_high, df, n,
    diverged, mean_loss, peak_lr (nats; diverged runs are left out and counted).
    """
    rows = []
    for keys, cell in by_source(runs if "relative_lr" in runs else with_relative_rates(runs)).groupby([*CELL, "peak_lr"], sort=True):
        within = [g["loss"].dropna() for _, g in cell.groupby("group")]
        df = sum(max(len(losses) - 1, 0) for losses in within)
        square = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in within)
        told = deviation(math.sqrt(square / df) if df else math.nan, df, level)
        rows.append({**dict(zip([*CELL, "peak_lr"], keys, strict=True)), **dataclasses.asdict(told), "n": int(cell["loss"].notna().sum()),
                     "diverged": int(cell["loss"].isna().sum()), "mean_loss": cell["loss"].mean()})
    return pd.DataFrame(rows)


def pair_table(runs: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Pairs of cells (an arm at a rate) over the seeds that both were trained with: correlation of their losses, and what their
    difference strays by.

    Columns: width, horizon_tokens, a, b, relative_lr (the geometric mean), octaves_apart (of their rates), correlation with its
    interval (Fisher; nan below four seeds), sd, sd_low, sd_high, df (of the difference), independent_sd (what it would be of
    unpaired runs), n.
    """
    runs = runs if "relative_lr" in runs else with_relative_rates(runs)
    plain = runs[(runs["seed"] == runs["data_seed"]) & (runs["execution"] == runs["execution"].mode().iloc[0])]
    rows = []
    for (width, horizon), cell in plain.groupby(["width", "horizon_tokens"]):
        wide = cell.pivot_table(index="seed", columns=["arm", "relative_lr", "peak_lr", "setting"], values="loss")
        for (a, x), (b, y) in itertools.combinations(zip(wide.columns, wide.to_numpy().T, strict=True), 2):
            if (both := np.isfinite(x) & np.isfinite(y)).sum() > 1:
                rows.append({"width": width, "horizon_tokens": horizon, "a": _cell_name(a), "b": _cell_name(b),
                             "relative_lr": math.sqrt(a[1] * b[1]), "octaves_apart": _octaves(a[2], b[2]),
                             **_pair(x[both], y[both], level)})
    return pd.DataFrame(rows)


def _pair(x, y, level: float) -> dict:
    n, sds = len(x), (x.std(ddof=1), y.std(ddof=1))
    r = float(np.corrcoef(x, y)[0, 1]) if min(sds) > 0 else math.nan
    half = stats.norm.ppf(0.5 + level / 2) / math.sqrt(n - 3) if n > 3 else math.nan
    low, high = (math.tanh(math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)) + side * half) for side in (-1, 1))
    told = deviation(float((x - y).std(ddof=1)), n - 1, level)
    return {"correlation": r, "correlation_low": low, "correlation_high": high, **dataclasses.asdict(told),
            "independent_sd": math.hypot(*sds), "n": n}


def deviation_near(table: pd.DataFrame, width: int, horizon_tokens: int, relative_lr: float, shared: float = SHARED_REFERENCE) -> Deviation:
    """The deviation at a width, horizon and share of the best rate: variances of a table's cells pooled, near cells counting most.

    `table` is of one source (`noise_table`) or of pairs (`pair_table`). A cell's weight halves with every octave of width, horizon
    and rate together; cells share seeds, so that k of them have the degrees of freedom of k / (1 + (k − 1)·shared²). Raises
    ValueError where no cell is within three octaves, naming the nearest.
    """
    kept = table[table["df"] > 0]
    if "source" in kept and kept["source"].nunique() > 1:
        raise ValueError(f"variances of {', '.join(kept['source'].unique())} are not pooled; take the rows of one source")
    asked = {"width": width, "horizon_tokens": horizon_tokens, "relative_lr": relative_lr}
    if bad := [f"{name}={given}" for name, given in asked.items() if not given > 0]:
        raise ValueError(f"{', '.join(bad)} must be positive")
    far = sum(np.abs(np.log2(kept[name].to_numpy(dtype=float) / given)) for name, given in asked.items())
    if not len(kept) or far.min() > FARTHEST:
        nearest = "there is none" if not len(kept) else ", ".join(f"{n} {kept.iloc[far.argmin()][n]:g}" for n in asked)
        raise ValueError(f"no measured cell is within {FARTHEST:g} octaves of width {width}, {horizon_tokens:,} tokens, {relative_lr:g} of "
                         f"the best rate; nearest: {nearest}. Train some there, as etastar.studies.noise.run does")
    weight = np.where(far <= FARTHEST, 2.0**-far, 0.0)
    df = kept["df"].to_numpy(dtype=float)
    sd = math.sqrt(float((weight * df * kept["sd"] ** 2).sum() / (weight * df).sum()))
    cells = weight.sum() ** 2 / (weight**2).sum()
    return deviation(sd, float((weight * df).sum() / weight.sum() * cells / (1 + (cells - 1) * shared**2)))


def _vertex(rows: pd.DataFrame) -> float | None:
    """The best rate of an arm's bowl over the pairs of seeds that have all rates; None for fewer than three rates or one at an edge."""
    plain = rows.drop_duplicates(["seed", "data_seed", "peak_lr"])
    every = plain[plain.groupby(["seed", "data_seed"])["peak_lr"].transform("nunique") == plain["peak_lr"].nunique()]
    if every["peak_lr"].nunique() < 3:
        return None
    mean = every.groupby("peak_lr")["loss"].mean()  # NaN where a seed diverged
    try:
        return fit_bowl(mean.index.to_numpy(), mean.to_numpy(), sigma=1.0).best_lr  # the vertex alone is used
    except ValueError:
        return None


def _octaves(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def _cell_name(cell: tuple) -> str:
    return f"{cell[0]} at {cell[1]:.2g} η*"
