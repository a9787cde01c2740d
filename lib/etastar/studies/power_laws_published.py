"""Archive evidence for study 04: what the released runs of arXiv 2503.04715 say of laws of rate and batch; nothing is trained.

Its grids are cosines to a fixed rate of 1e-5 without μP: a claim of another paper is judged as under other settings. Every point of a
grid is one run, so there is no Student's t over seeds: cells (a size at a horizon) are the unit, or sizes where cells of one size
are pooled, and the spread over windows of the fitted bowls is added. What another seed would have done is left out.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os

import numpy as np
import pandas as pd
from scipy import stats

from etastar import plots
from etastar.analysis import steplaw_refit as refits
from etastar.analysis.claims import Claim, Finding, judge, load_claims, untested
from etastar.analysis.cooldown_archive import clustered_mean, from_reruns, vertex
from etastar.analysis.law_excess import HOWS, judged_laws, law_excess, own_optimum, summary
from etastar.analysis.loss_law import fit_loss_law
from etastar.analysis.lr_grids import optima
from etastar.analysis.paired import Estimate
from etastar.analysis.search_factor import search_factor
from etastar.archives import NotFetched, archive, bootstrap
from etastar.cache import cache_folder
from etastar.studies.cooldown_published import ARCHIVE as COOLDOWN_ARCHIVE
from etastar.studies.cooldown_published import SHORT, published_logs

STUDY, ARCHIVE, LOSS_ARCHIVE = "04_power_laws", "steplaw", "chinchilla"
WINDOWS = (0.5, 1.0, 1.5)  # octaves about the best run through which a bowl is fitted; the middle one gives the estimates
INTERIOR = 0.8  # share of the cells whose best rate must be inside the rates run: those that drop out are not a random choice
RANGE, LEAST_STEPS = 16, 256  # least fold of horizons or batches behind an exponent, and least run, as the claims ask
FLAT_TOKENS = 2**19  # batches up to here and from here on have a slope of their own in the table
RESAMPLES = 200
PRINTED_EXPONENTS = {"Power": "horizon_exponent", "Bjorck et al.": "horizon_exponent_bjorck",
                     "Step Law, at its own batch": "batch_rule_turns_the_sign"}
MAPPED = ("215M, 11.4B", "537M, 50B")
SEARCHED = 4e8, 2**19  # sizes below, at one batch: those with a horizon beyond three shorter ones
PRINTED = pd.DataFrame(  # arXiv 2404.10102, with its 95 % intervals; what arXiv 2203.15556 printed of its own fit
    {"printed": [1.817, 482.01, 0.3478, 2085.43, 0.3658], "printed_low": [1.769, 285, 0.317, 1042, 0.331],
     "printed_high": [1.871, 744, 0.373, 5810, 0.415], "first_printed": [1.69, 406.4, 0.34, 410.7, 0.28]},
    index=["E", "A", "alpha", "B", "beta"])


# -- the grids ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grids:
    """The released runs with what several claims, tables and figures ask of them; `coefficients` are the authors' bootstraps."""

    runs: pd.DataFrame
    coefficients: pd.DataFrame

    @functools.cached_property
    def rates(self) -> dict[float, pd.DataFrame]:
        """The best rate of every cell at every batch, by window; none where it is at the edge of the rates run."""
        runs = self.runs[self.runs["steps"] >= LEAST_STEPS]
        return {window: _best_rates(runs, window) for window in WINDOWS}

    @functools.cached_property
    def small_batch(self) -> int:
        """The smallest batch, in tokens, at which nearly all cells have a best rate: laws of a fixed batch were found at small ones."""
        share = self.rates[WINDOWS[1]].groupby("batch_tokens").size() / self.runs["cell"].nunique()
        if not (share >= INTERIOR).any():
            raise ValueError(f"no batch has a best rate in {INTERIOR:.0%} of the cells; the most is {share.max():.0%}")
        return int(share.index[share >= INTERIOR][0])

    def at_small_batch(self, rates: pd.DataFrame | None = None) -> pd.DataFrame:
        """Best rates at `small_batch`, one a cell."""
        rates = self.rates[WINDOWS[1]] if rates is None else rates
        return rates[rates["batch_tokens"] == self.small_batch]

    def over_windows(self, measure) -> tuple[Estimate, float]:
        """(what a measure makes of the best rates, its deviation over windows, which is in the error)."""
        found = [measure(self.rates[window]) for window in WINDOWS]
        spread = float(np.std([estimate.value for estimate in found]))
        return dataclasses.replace(found[1], se=math.hypot(found[1].se, spread)), spread

    @functools.cached_property
    def horizon(self) -> tuple[Estimate, float]:
        """The exponent in tokens at `small_batch`, and its deviation over windows."""
        return self.over_windows(lambda rates: horizon_exponent(self.at_small_batch(rates)))

    @functools.cached_property
    def optimum(self) -> refits.StepLawFit:
        """Laws through each cell's own optimum."""
        return refits.optimum_fit(self.runs)

    @functools.cached_property
    def judged(self) -> pd.DataFrame:
        """Every law on every cell."""
        return judged_laws(self.runs)

    @functools.cached_property
    def exponents(self) -> pd.DataFrame:
        """Exponents by estimator."""
        return refits.estimators(self.runs, self.coefficients, count=RESAMPLES)

    @functools.cached_property
    def by_batch(self) -> pd.DataFrame:
        """Exponents at every fixed batch of ten cells or more."""
        return refits.fixed_batch_exponents(refits.fixed_batch_rates(self.runs))

    @functools.cached_property
    def flip(self) -> refits.SignFlip:
        """The batch at which the exponent in tokens changes its sign."""
        return refits.sign_flip(refits.fixed_batch_rates(self.runs), count=RESAMPLES)


def published_grids() -> Grids:
    """The grids, read once a process; NotFetched where a file of theirs is missing."""
    return _read(os.environ.get("ETASTAR_MIRROR"), str(cache_folder()))


@functools.lru_cache(maxsize=1)
def _read(mirror, cache) -> Grids:
    try:
        return Grids(archive(ARCHIVE), bootstrap(ARCHIVE))
    except FileNotFoundError as one_of_two:
        raise NotFetched(ARCHIVE, "one of its files is missing") from one_of_two


def _best_rates(runs: pd.DataFrame, window: float) -> pd.DataFrame:
    """Best rates at points with three rates or more within the window of the best run: through fewer there is no parabola."""
    def enough(of):
        return (np.log2(of["peak_lr"] / of["peak_lr"][of["smooth_loss"].idxmin()]).abs() <= window + 0.05).sum() >= 3

    return refits.fixed_batch_rates(runs.groupby(["batch_tokens", "cell"]).filter(enough), window, least_cells=1)


# -- what the claims are judged by -------------------------------------------------------------------------------------
# One estimand a claim, chosen by what the claim asks for. The horizon: the smallest batch of the grids, for the logs of WSD at a
# fixed batch span too few tokens. The batch: all batches of a cell, where these span the range that the claim asks for.


def horizon_exponent(rates: pd.DataFrame) -> Estimate:
    """The exponent of the best rate in tokens, at one size: slope of log rate on log tokens beside log params, over cells.

    ValueError for horizons that span less than the range that the claims ask for.
    """
    horizons = rates["horizon_tokens"]
    if not horizons.max() >= RANGE * horizons.min():
        raise ValueError(f"horizons from {horizons.min():.3g} to {horizons.max():.3g} tokens span less than {RANGE}-fold; add longer runs")
    coefficients, covariance, _, df = _law(rates)
    return Estimate(float(coefficients[2]), math.sqrt(covariance[2, 2]), df, len(rates), "exponent")


def batch_slopes(rates: pd.DataFrame) -> pd.DataFrame:
    """The slope of log best rate over log batch in every cell whose batches span 16-fold: cell, params, horizon_tokens, batches, fold,
    slope, and slope_small and slope_large up to and from `FLAT_TOKENS` (NaN below three batches)."""
    rows = []
    for (params, tokens, cell), of in rates.groupby(["params", "horizon_tokens", "cell"]):
        fold = of["batch_tokens"].max() / of["batch_tokens"].min()
        if len(of) >= 3 and fold >= RANGE:
            small, large = of[of["batch_tokens"] <= FLAT_TOKENS], of[of["batch_tokens"] >= FLAT_TOKENS]
            rows.append({"cell": cell, "params": params, "horizon_tokens": tokens, "batches": len(of), "fold": fold,
                         "slope": _slope(of), "slope_small": _slope(small), "slope_large": _slope(large)})
    if not rows:
        raise ValueError(f"no cell has best rates at three batches that span {RANGE}-fold; add batches")
    return pd.DataFrame(rows)


def batch_exponent(rates: pd.DataFrame) -> Estimate:
    """The mean of `batch_slopes`, errors clustered by size."""
    slopes = batch_slopes(rates)
    return dataclasses.replace(clustered_mean(slopes["slope"], slopes["params"]), unit="exponent")


def predicted(rates: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Best rates at one batch, those up to a quarter of their size's longest horizon, and those at it where there are such."""
    longest = rates.groupby("params")["horizon_tokens"].transform("max")
    short = rates["horizon_tokens"] <= longest / 4
    reached = short.groupby(rates["params"]).transform("any")
    return rates[short], rates[reached & (rates["horizon_tokens"] == longest)]


def prediction_error(rates: pd.DataFrame) -> Estimate:
    """Octaves by which a law in size and tokens, fitted to horizons up to a quarter of a size's longest, misses the best rate there:
    the mean over sizes, with the error of the law and of the targets, from the scatter about the law."""
    fitted, target = predicted(rates)
    coefficients, covariance, scatter, df = _law(fitted)
    design = refits.log_design(target, ["params", "horizon_tokens"])
    missed = design @ coefficients - np.log(target["peak_lr"].to_numpy(float))
    middle = design.mean(0)
    se = math.sqrt(float(middle @ covariance @ middle) + scatter / len(target))
    return Estimate(float(missed.mean()), se, df, len(target), "octaves").scaled(1 / math.log(2), "octaves")


def wsd_exponent(logs) -> Estimate:
    """The exponent in tokens of the 124M cooldowns over 10 % of the run, with the error of reruns; `logs` of the cooldown study."""
    return from_reruns(_wsd_slope, logs.table[logs.table["arm"] == SHORT], logs.noise, "exponent")


def _wsd_slope(losses: pd.Series) -> float:
    best = {steps: vertex(of.droplevel(["steps", "arm"]))[0] for steps, of in losses.groupby("steps")}
    return float(np.polyfit(np.log2(list(best)), list(best.values()), 1)[0])


def rule_sum(rates: pd.DataFrame) -> float:
    """Exponent in tokens + that of the printed batch rule · exponent in the batch, of one law in size, tokens and batch."""
    design = refits.log_design(rates, ["params", "horizon_tokens", "batch_tokens"])
    (_, _, tokens, batch), *_ = np.linalg.lstsq(design, np.log(rates["peak_lr"].to_numpy(float)), rcond=None)
    return float(tokens + refits.PUBLISHED["batch_tokens_exponent"] * batch)


def _law(rates: pd.DataFrame):
    """(coefficients, their covariance, variance about the law, df) of log rate on 1, log params, log tokens; one row a cell."""
    design, df = refits.log_design(rates, ["params", "horizon_tokens"]), len(rates) - 3
    if df < 1 or np.linalg.matrix_rank(design) < 3:
        raise ValueError(f"{len(rates)} cells do not determine a law in size and tokens and its scatter; add sizes and horizons")
    coefficients, *_ = np.linalg.lstsq(design, y := np.log(rates["peak_lr"].to_numpy(float)), rcond=None)
    scatter = float(((y - design @ coefficients) ** 2).sum()) / df
    return coefficients, scatter * np.linalg.inv(design.T @ design), scatter, df


def _slope(of: pd.DataFrame) -> float:
    return float(np.polyfit(np.log2(of["batch_tokens"]), np.log2(of["peak_lr"]), 1)[0]) if len(of) >= 3 else math.nan


# -- verdicts ----------------------------------------------------------------------------------------------------------


def published_findings() -> list[Finding]:
    """A finding of kind archive for every claim of the study that the grids speak of; untested where they are not on this machine."""
    try:
        grids = published_grids()
    except NotFetched as missing:
        return [untested(c, "archive", f"the released runs of archive {ARCHIVE} are not on this machine; `{missing.command}`")
                for c in _claims()]
    return [_judge(claim, grids) for claim in _claims()]


def _claims() -> list[Claim]:
    return [c for c in load_claims(STUDY).values() if c.id in MEASURES]


def _judge(claim: Claim, grids: Grids) -> Finding:
    estimate, runs, caveat = MEASURES[claim.id](grids)
    # The least of the runs: a contradiction needs all of them to be of the claim's scale.
    scale = {"params": runs["params"].min(), "horizon_tokens": runs["horizon_tokens"].min()}
    own = claim.paper in grids.runs.attrs.get("paper", "")
    finding = judge(claim, estimate, evidence="archive", scale=scale, matching=own)
    whose = "the authors' own released runs" if own else "cosines to a fixed 1e-5 without μP (arXiv 2503.04715)"
    return dataclasses.replace(finding, reason=f"{finding.reason}; {whose}, one run a point; {caveat}")


def _of_horizon(grids: Grids):
    (estimate, spread), rates, flip = grids.horizon, grids.at_small_batch(), grids.flip
    caveat = (f"{_k(grids.small_batch)} tokens a step, the smallest batch with a best rate in {100 * INTERIOR:g} % of the cells: "
              f"{_cells(rates)}; the error is that over cells and {spread:.2g} for the window of the bowls; the exponent rises with the "
              f"batch, through 0 at {_k(flip.batch_tokens)} [{_k(flip.batch_tokens_low)}, {_k(flip.batch_tokens_high)}]; {_of_wsd()}; "
              f"{KNOWN}")
    return estimate, rates, caveat


def _of_wsd() -> str:
    try:
        logs = published_logs()
    except NotFetched as missing:
        return f"logs of WSD at a fixed batch are not on this machine, `{missing.command}`"
    found, steps = wsd_exponent(logs), logs.table.loc[logs.table["arm"] == SHORT, "steps"]
    return (f"WSD with a 10 % cooldown at 124M has {found.value:+.2f} ± {found.se:.2f} (reruns), but over a "
            f"{steps.max() / steps.min():.2g}-fold range of tokens, short of the {RANGE}-fold that the claim asks for")


def _of_batch(grids: Grids):
    (estimate, spread), slopes = grids.over_windows(batch_exponent), batch_slopes(grids.rates[WINDOWS[1]])
    caveat = (f"{_cells(slopes)}, batches over {slopes['fold'].min():.0f}- to {slopes['fold'].max():.0f}-fold; the error is that over "
              f"sizes and {spread:.2g} for the window of the bowls; {slopes['slope_small'].mean():+.2f} up to {_k(FLAT_TOKENS)} tokens a "
              f"step, {slopes['slope_large'].mean():+.2f} from there on, where runs have as few as {grids.runs['steps'].min()} steps")
    return estimate, slopes, caveat


def _of_rule(grids: Grids):
    fit, rates = grids.optimum, grids.rates[WINDOWS[1]]
    low, high, df = fit.lr_tokens_exponent_low, fit.lr_tokens_exponent_high, fit.cells - 3
    estimate = Estimate(fit.lr_tokens_exponent, float((high - low) / 2 / stats.t.ppf(0.975, df)), df, fit.cells, "exponent")
    printed = refits.PUBLISHED["lr_tokens_exponent"]
    caveat = (f"the exponent at each cell's best batch, which grows as D^{fit.batch_tokens_exponent:.3f}; the printed {printed:+.3f} lies "
              f"{'inside' if low <= printed <= high else 'outside'} its 95 % interval [{low:.2f}, {high:.2f}]; of one law in size, tokens "
              f"and batch the sum of exponents is {rule_sum(rates):+.2f}, that in tokens at {_k(grids.small_batch)} tokens a step alone "
              f"{grids.horizon[0].value:+.2f}; {_cells(grids.runs)}; {KNOWN}")
    return estimate, grids.runs, caveat


def _of_prediction(grids: Grids):
    estimate, spread = grids.over_windows(lambda rates: prediction_error(grids.at_small_batch(rates)))
    fitted, target = predicted(grids.at_small_batch())
    kept = fitted.sort_values("horizon_tokens").groupby("params")["peak_lr"].last() / target.set_index("params")["peak_lr"]
    caveat = (f"{_k(grids.small_batch)} tokens a step; a law in size and tokens fitted to {len(fitted)} cells of at most a quarter of "
              f"their size's longest horizon, read at the longest of {len(target)} sizes, where the short runs' rate kept would be off "
              f"by {np.log2(kept).mean():+.2f}; the error is that of such a prediction and {spread:.2g} for the window of the bowls")
    return estimate, pd.concat([fitted, target]), caveat


KNOWN = "numbers of these runs were known when the claim was registered"
MEASURES = {"horizon_exponent": _of_horizon, "horizon_exponent_bjorck": _of_horizon, "horizon_moves_lr": _of_horizon,
            "batch_exponent": _of_batch, "batch_rule_turns_the_sign": _of_rule, "exponent_predicts": _of_prediction}


def _cells(rows: pd.DataFrame) -> str:
    horizons = rows["horizon_tokens"] / 1e9
    return f"{rows['cell'].nunique()} cells of {rows['params'].nunique()} sizes, {horizons.min():.3g}B to {horizons.max():.3g}B tokens"


def _k(tokens: float) -> str:
    return f"{tokens / 1e3:.0f}k"


# -- what the notebook shows -------------------------------------------------------------------------------------------


def published_note() -> str:
    """Where the published numbers come from and the chief of them, in one paragraph; or the command that brings the files."""
    try:
        grids = published_grids()
    except NotFetched as missing:
        return f"Released runs are not on this machine; `{missing.command}` brings 0.4 MB."
    about, fit, means = grids.runs.attrs, grids.optimum, summary(grids.judged).set_index(["law", "how"])["mean"]
    horizon, batch = grids.horizon[0].value, batch_exponent(grids.rates[WINDOWS[1]]).value
    return (f"{len(grids.runs)} released runs ({about['paper']}; {about['source']} at {about['commit'][:7]}, licence: {about['licence']}), "
            f"{_cells(grids.runs)}, one run a point. At {_k(grids.small_batch)} tokens a step the best rate goes as D^{horizon:.2f}; at "
            f"each cell's best batch, itself ∝ D^{fit.batch_tokens_exponent:.2f}, as D^{fit.lr_tokens_exponent:.2f}; the sign changes at "
            f"{_k(grids.flip.batch_tokens)} tokens a step. At fixed tokens the mean slope over the batch is {batch:.2f}. Step Law costs "
            f"{means['steplaw', HOWS[0]]:.2f} permil as published, on the runs it was fitted to, and {means['steplaw', HOWS[1]]:.2f} "
            f"refitted without the cell it is judged on. Judged by them: {', '.join(c.id for c in _claims())}.")


def published_tables() -> dict[str, pd.DataFrame]:
    """Name → table of what the released runs say; {} where the grids are not on this machine."""
    try:
        grids = published_grids()
    except NotFetched:
        return {}
    tables = {"published_excess": summary(grids.judged), "published_exponents": grids.exponents,
              "published_by_batch": grids.by_batch, "published_batch_slopes": batch_slopes(grids.rates[WINDOWS[1]]),
              "published_horizons": horizons(grids), "published_search": search(grids.runs)}
    with contextlib.suppress(NotFetched):
        tables["published_loss_law"] = loss_law_table()
    return tables


def published_figures() -> dict:
    """Name → matplotlib Figure of what the released runs say; {} where they are not on this machine."""
    try:
        grids = published_grids()
    except NotFetched:
        return {}
    own = law_excess(grids.runs, {"own optimum": own_optimum(optima(grids.runs))})
    points = pd.concat([grids.judged[grids.judged["how"] == HOWS[0]], own])
    lines = {name: load_claims(STUDY)[claim].published for name, claim in PRINTED_EXPONENTS.items()}
    return {"published_map": plots.law_map(grids.runs, points, cells=[c for c in MAPPED if c in set(grids.runs["cell"])]),
            "published_costs": plots.law_costs(grids.judged, own["excess_permil"].mean()),
            "published_exponents": plots.exponent_estimates(grids.exponents),
            "published_by_batch": plots.batch_exponents(grids.by_batch, grids.flip, lines)}


def horizons(grids: Grids) -> pd.DataFrame:
    """The exponent in tokens at a fixed batch and in its shorter and longer half of horizons: source, fold, exponent, low, high (95 %),
    shorter, longer, n; one row a source that is on this machine."""
    def row(source, horizon, estimate, slope):
        (low, high), middle = estimate.interval(), np.median(np.unique(horizon))
        return {"source": source, "fold": horizon.max() / horizon.min(), "exponent": estimate.value, "low": low, "high": high,
                "shorter": slope(horizon <= middle), "longer": slope(horizon >= middle), "n": estimate.n}

    rates = grids.at_small_batch()
    rows = [row(f"{ARCHIVE}, {_k(grids.small_batch)} tokens a step", rates["horizon_tokens"].to_numpy(float), grids.horizon[0],
                lambda half: _law(rates[half])[0][2])]
    with contextlib.suppress(NotFetched):
        logs = published_logs()
        short = logs.losses[logs.losses.index.get_level_values("arm") == SHORT]
        rows.append(row(f"{COOLDOWN_ARCHIVE}, WSD, {SHORT}", short.index.get_level_values("steps").to_numpy(float), wsd_exponent(logs),
                        lambda half: _wsd_slope(short[half])))
    return pd.DataFrame(rows)


def search(runs: pd.DataFrame) -> pd.DataFrame:
    """What short searches cost and lose on the grids of the smaller sizes at one batch: `search_factor`, compute as 6·N·D."""
    below, batch = SEARCHED
    chosen = runs[(runs["params"] < below) & (runs["batch_tokens"] == batch)]
    grid = chosen[["params", "horizon_tokens"]].astype(float).assign(lr=chosen["peak_lr"], loss=chosen["smooth_loss"])
    return search_factor(grid.assign(compute=6 * grid["params"] * grid["horizon_tokens"]), spacing_octaves=(1.0,))


def loss_law_table() -> pd.DataFrame:
    """The loss law refitted to the digitised runs of arXiv 2203.15556, beside what arXiv 2404.10102 prints of its refit: coefficient,
    estimate, low, high (95 %, bootstrap), printed, printed_low, printed_high, first_printed. NotFetched where they are not here."""
    runs = archive(LOSS_ARCHIVE).query("~outlier")
    corners = [(0.0, *term) for term in itertools.product((0, 20), (0.5, 1.5), (0, 20), (0.5, 1.5))]
    law = fit_loss_law(runs["params"], runs["tokens"], runs["loss"], starts=corners, bootstrap=RESAMPLES)
    rows = [{"coefficient": name, "estimate": getattr(law, name), "low": getattr(law, f"{name}_low"), "high": getattr(law, f"{name}_high")}
            for name in PRINTED.index]
    return pd.DataFrame(rows).join(PRINTED, on="coefficient")
