"""What the published runs of arXiv 2405.18392 and 2501.18965 say of cosine, cooldown and averaging; frames in, numbers out.

`runs` is `es.archive("haegele")`, `evaluations` is `etastar.archives.evaluations("haegele")`, or any frames with their columns. All
losses are on the full validation set, in nats per token. All runs have one seed: nothing here is seed noise.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.paired import Estimate

SWEEP = ("", "sl", "sl53", "sl93", "sl166", "ann0.2")  # series of the scaling sweep; the names' sizes mean nothing
SIZE_124M = 123_587_328
SETTING = ["dataset", "model", "params", "batch_tokens", "steps"]
LARGEST_LOSS = 6.0  # runs above it have diverged and stand in no table of rates


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line y = slope·x + intercept; `_se` by ordinary least squares, `_low`, `_high` 95 % clustered by model size."""

    slope: float
    intercept: float
    slope_se: float
    intercept_se: float
    slope_low: float
    slope_high: float
    intercept_low: float
    intercept_high: float
    r2: float
    n: int
    clusters: int


def fit_line(x, y, cluster) -> Line:
    """Least squares with intervals from cluster-robust errors (t with clusters − 1 degrees of freedom); ValueError below 3 clusters."""
    import statsmodels.api as sm

    x, y, cluster = np.asarray(x, dtype=float), np.asarray(y, dtype=float), pd.factorize(np.asarray(cluster))[0]
    clusters = len(set(cluster))
    if clusters < 3:
        raise ValueError(f"errors clustered by size need three sizes; got {clusters}")
    model = sm.OLS(y, sm.add_constant(x))
    plain, robust = model.fit(), model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)
    (low0, high0), (low1, high1) = robust.conf_int()
    numbers = (plain.params[1], plain.params[0], plain.bse[1], plain.bse[0], low1, high1, low0, high0, plain.rsquared)
    return Line(*map(float, numbers), len(x), clusters)


def sweep_pairs(runs: pd.DataFrame, dataset: str = "slimpajama") -> pd.DataFrame:
    """Cosine to 10 % beside a 20 % linear cooldown of the same size and length in the scaling sweep, each at its own peak rate.

    Columns: params, steps, tokens, cosine, cooldown, difference (cooldown − cosine, nats).
    """
    sweep = runs[runs["series"].isin(SWEEP) & (runs["dataset"] == dataset)]
    keys = [*SETTING, "tokens"]
    cosine = sweep[_is_cosine(sweep, 0.1)].set_index(keys)["final_loss"].rename("cosine")
    cooldown = sweep[_is_cooldown(sweep, 0.2, "linear")].set_index(keys)["final_loss"].rename("cooldown")
    pairs = pd.concat([cosine, cooldown], axis=1, join="inner").dropna().reset_index().sort_values(["params", "steps"], ignore_index=True)
    return pairs[["params", "steps", "tokens", "cosine", "cooldown"]].assign(difference=pairs["cooldown"] - pairs["cosine"])


def averaging_pairs(runs: pd.DataFrame, evaluations: pd.DataFrame, dataset: str = "slimpajama") -> pd.DataFrame:
    """Cosine to 10 % beside the constant trunk of its size read at the same step, raw and averaged, in the scaling sweep.

    Columns: params, steps, tokens, cosine, cosine_averaged, constant, averaged; the averaging window was picked on this very set.
    """
    sweep = runs[runs["series"].isin(SWEEP) & (runs["dataset"] == dataset)]
    keys = ["dataset", "model", "params", "batch_tokens"]
    trunks = sweep.loc[sweep["schedule"] == "constant", ["run", *keys]]
    read = trunks.merge(evaluations, on="run")[[*keys, "step", "loss", "swa_loss"]]
    read = read.rename(columns={"step": "steps", "loss": "constant", "swa_loss": "averaged"})
    cosine = sweep.loc[_is_cosine(sweep, 0.1), [*keys, "steps", "tokens", "final_loss", "swa_loss"]]
    cosine = cosine.rename(columns={"final_loss": "cosine", "swa_loss": "cosine_averaged"})
    pairs = cosine.merge(read, on=[*keys, "steps"]).dropna(subset=["cosine", "averaged"])
    return pairs.sort_values(["params", "steps"], ignore_index=True)[
        ["params", "steps", "tokens", "cosine", "cosine_averaged", "constant", "averaged"]]


def perplexity_line(x_loss, y_loss, cluster) -> Line:
    """Line through perplexities, as arXiv 2405.18392's figures plot cosine (y) against cooldown or averaging (x)."""
    return fit_line(np.exp(np.asarray(x_loss, dtype=float)), np.exp(np.asarray(y_loss, dtype=float)), cluster)


def clustered_mean(values, cluster) -> Estimate:
    """Mean with a standard error clustered by `cluster`: df is clusters − 1, n the values; ValueError below 3 clusters."""
    values, cluster = np.asarray(values, dtype=float), np.asarray(cluster)
    sums = pd.Series(values - values.mean()).groupby(cluster).sum()
    if len(sums) < 3:
        raise ValueError(f"errors clustered by size need three sizes; got {len(sums)}")
    se = math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values)
    return Estimate(float(values.mean()), se, len(sums) - 1, len(values))


def averaging_recovery(runs: pd.DataFrame, evaluations: pd.DataFrame, dataset: str = "slimpajama") -> pd.DataFrame:
    """Share of the cooldown's drop that averaging the constant trunk recovers: params, steps, tokens, drop, recovered, gap (nats)."""
    both = averaging_pairs(runs, evaluations, dataset).merge(sweep_pairs(runs, dataset)[["params", "steps", "cooldown"]],
                                                             on=["params", "steps"])
    drop = both["constant"] - both["cooldown"]
    return both[["params", "steps", "tokens"]].assign(drop=drop, recovered=(both["constant"] - both["averaged"]) / drop,
                                                      gap=both["averaged"] - both["cooldown"])


@dataclasses.dataclass(frozen=True)
class RerunNoise:
    """Per-run deviation (nats) of reruns of one recipe and seed: from `pairs` of them, `largest` difference of a pair."""

    sd: float
    pairs: int
    largest: float


def rerun_noise(runs: pd.DataFrame) -> RerunNoise:
    """Noise between runs of one `group`: of kernels and devices only, since their seeds are the same. Not seed noise.

    Pairs that branch from one trunk share its noise, so this is a lower bound on what straight reruns differ by. ValueError
    where no recipe was run twice.
    """
    losses = runs.dropna(subset=["final_loss"]).groupby("group")["final_loss"]
    again = losses.agg(["size", "min", "max", "var"]).query("size > 1")
    if again.empty:
        raise ValueError("no recipe was run twice")
    freedom = again["size"] - 1
    return RerunNoise(float(np.sqrt((again["var"] * freedom).sum() / freedom.sum())), int(freedom.sum()),
                      float((again["max"] - again["min"]).max()))


def rate_table(runs: pd.DataFrame, params: int = SIZE_124M, dataset: str = "slimpajama") -> pd.DataFrame:
    """Mean loss of every schedule, length and peak rate at one size: steps, arm, peak_lr, loss, runs; diverged runs left out."""
    chosen = runs[(runs["params"] == params) & (runs["dataset"] == dataset) & (runs["final_loss"] < LARGEST_LOSS)]
    chosen = chosen.assign(arm=arm_names(chosen))
    keys = ["steps", "arm", "schedule", "cooldown_fraction", "shape", "peak_lr"]
    return chosen.groupby(keys, dropna=False)["final_loss"].agg(loss="mean", runs="size").reset_index()


def arm_names(runs: pd.DataFrame) -> pd.Series:
    """Names as "cosine to 10 %", "20 % linear", "constant"; a cosine to 1e-7 counts as to 0."""
    def name(run):
        if run.schedule == "cosine":
            return f"cosine to {round(100 * run.floor)} %"
        return "constant" if run.schedule == "constant" else f"{100 * run.cooldown_fraction:g} % {run.shape}"

    return pd.Series([name(run) for run in runs.itertuples()], index=runs.index, dtype=object)


def best_over_rates(runs: pd.DataFrame, steps: int, params: int = SIZE_124M) -> pd.DataFrame:
    """Least loss of every arm over its published peak rates: arm, best_loss, at_lr, rates; best first.

    A least value over a grid is low by selection and by a grid's coarseness; arms with more rates gain more.
    """
    table = rate_table(runs, params).query("steps == @steps")
    best = table.loc[table.groupby("arm")["loss"].idxmin(), ["arm", "loss", "peak_lr"]]
    best = best.rename(columns={"loss": "best_loss", "peak_lr": "at_lr"})
    return best.merge(table.groupby("arm").size().rename("rates"), on="arm").sort_values("best_loss", ignore_index=True)


def rate_optima(runs: pd.DataFrame, steps: int, params: int = SIZE_124M) -> pd.DataFrame:
    """Best peak rate of every arm: vertex of the parabola in log rate through the best rate and its nearest two.

    Columns: arm, best_lr (NaN where the vertex lies outside those three or there are fewer), rates. Three points have no
    error: the grid's octaves leave about ±20 %.
    """
    table = rate_table(runs, params).query("steps == @steps")
    rows = [{"arm": arm, "best_lr": 2 ** vertex(of.set_index("peak_lr")["loss"])[0], "rates": len(of)} for arm, of in table.groupby("arm")]
    return pd.DataFrame(rows)


def vertex(losses: pd.Series, more: int = 0) -> tuple[float, float]:
    """Best log2 rate and the loss there, from losses by peak rate: the parabola through the best rate and its nearest two.

    `more` of −1 or 1 makes it the cubic through the next rate below or above as well. NaN where there are too few rates or
    the least of the curve lies outside those three.
    """
    losses = losses.sort_index()
    log_lr, loss = np.log2(losses.index.to_numpy(dtype=float)), losses.to_numpy()
    middle = min(max(int(np.argmin(loss)), 1), len(loss) - 2)
    first, last = middle - 1 - (more < 0), middle + 1 + (more > 0)
    if len(loss) < 3 or first < 0 or last >= len(loss):
        return math.nan, math.nan
    centre = log_lr[middle]
    curve = np.polynomial.Polynomial.fit(log_lr[first : last + 1] - centre, loss[first : last + 1], last - first, domain=[])
    slope, bend = curve.deriv(), curve.deriv(2)
    level = [r.real for r in slope.roots() if abs(r.imag) < 1e-6]
    level = [r - slope(r) / bend(r) for r in level if bend(r) > 0]  # roots of a cubic that is all but a parabola are inexact
    best = [r for r in level if log_lr[middle - 1] <= centre + r <= log_lr[middle + 1]]
    return (float(centre + best[0]), float(curve(best[0]))) if best else (math.nan, math.nan)


def from_reruns(measure, table: pd.DataFrame, noise: RerunNoise, unit: str = "nats") -> Estimate:
    """What `measure` makes of a `rate_table`'s losses, with the error that rerun noise of its runs gives it.

    `measure` takes losses by (steps, arm, peak_lr) and returns a number; its error is of first order in the noise, as if no
    two runs shared a trunk. df are the noise's pairs and n is 1, for the runs have one seed.
    """
    losses, runs = (table.set_index(["steps", "arm", "peak_lr"]).sort_index()[name] for name in ("loss", "runs"))
    step, variance = 1e-6, 0.0
    for i, count in enumerate(runs):
        up, down = losses.copy(), losses.copy()
        up.iloc[i] += step
        down.iloc[i] -= step
        variance += ((measure(up) - measure(down)) / (2 * step)) ** 2 / count
    return Estimate(float(measure(losses)), noise.sd * math.sqrt(variance), noise.pairs, 1, unit)


def length_table(runs: pd.DataFrame, steps: int, shape: str = "linear", params: int = SIZE_124M) -> pd.DataFrame:
    """Loss by peak rate (rows) and cooldown fraction (columns) of one shape; NaN where there was no run."""
    table = rate_table(runs, params).query("steps == @steps and schedule == 'wsd' and shape == @shape")
    return table.pivot(index="peak_lr", columns="cooldown_fraction", values="loss")


def shape_table(runs: pd.DataFrame, fraction: float = 0.2, params: int = SIZE_124M) -> pd.DataFrame:
    """1-sqrt minus linear (nats) at equal length and rate, peak rates as rows and steps as columns; below 0 favours 1-sqrt."""
    table = rate_table(runs, params).query("schedule == 'wsd' and cooldown_fraction == @fraction")
    wide = table.pivot(index=["peak_lr", "steps"], columns="shape", values="loss")
    return (wide["1-sqrt"] - wide["linear"]).unstack("steps").dropna(how="all").dropna(how="all", axis=1)


def cosine_overshoot(runs: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """A cosine cut off before its cycle's end beside one whose cycle ended there: the penalty of arXiv 2203.15556 Fig. A1.

    Columns: dataset, params, steps (where both are read), cycle_steps, ratio (cycle over steps), penalty, averaged_penalty
    (nats, cut off − matched; the latter with the cut-off run's weights averaged).
    """
    cosine = runs[_is_cosine(runs, 0.1) & runs["series"].isin(SWEEP)]
    keys = ["dataset", "model", "params", "batch_tokens", "peak_lr"]
    matched = cosine[[*keys, "steps", "final_loss"]].rename(columns={"final_loss": "matched"})
    read = cosine[["run", *keys, "steps"]].rename(columns={"steps": "cycle_steps"}).merge(evaluations, on="run")
    cut = read[read["step"] < read["cycle_steps"]].rename(columns={"step": "steps"}).merge(matched, on=[*keys, "steps"])
    table = cut[["dataset", "params", "steps", "cycle_steps"]].assign(
        ratio=cut["cycle_steps"] / cut["steps"], penalty=cut["loss"] - cut["matched"], averaged_penalty=cut["swa_loss"] - cut["matched"])
    return table.sort_values("ratio", ignore_index=True)


def overshoot_bins(overshoot: pd.DataFrame, edges=(1.1, 1.3, 1.6, 2.1, np.inf)) -> pd.DataFrame:
    """Mean penalty by ratio: ratio_from, ratio_to, penalty, low, high (95 % t, NaN for one pair), n.

    Pairs share runs, so the intervals are too narrow; they show spread, not proof.
    """
    rows = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = overshoot.loc[(overshoot["ratio"] > low) & (overshoot["ratio"] <= high), "penalty"]
        n = len(inside)
        half = stats.t.ppf(0.975, n - 1) * inside.std() / math.sqrt(n) if n > 1 else math.nan
        rows.append({"ratio_from": low, "ratio_to": high, "penalty": inside.mean(), "low": inside.mean() - half,
                     "high": inside.mean() + half, "n": n})
    return pd.DataFrame(rows)


def averaged_after_cooldown(runs: pd.DataFrame) -> pd.DataFrame:
    """What averaging adds to finished cooldowns, where it was logged: params, steps, tokens, difference (averaged − last, nats)."""
    cooled = runs[(runs["schedule"] == "wsd") & runs["swa_loss"].notna()]
    return cooled[["params", "steps", "tokens"]].assign(difference=cooled["swa_loss"] - cooled["final_loss"]).reset_index(drop=True)


def _is_cosine(runs: pd.DataFrame, floor: float) -> pd.Series:
    return (runs["schedule"] == "cosine") & np.isclose(runs["floor"], floor, atol=1e-3)


def _is_cooldown(runs: pd.DataFrame, fraction: float, shape: str) -> pd.Series:
    return (runs["schedule"] == "wsd") & np.isclose(runs["cooldown_fraction"], fraction) & (runs["shape"] == shape)
