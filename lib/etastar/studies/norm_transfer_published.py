"""Archive evidence for study 05: what the runs of arXiv 2510.03871 say of norm transfer, and what its printed numbers say by themselves.

The authors' run tables are in no public repository. Where a user has exported them (environment variable ETASTAR_NORM_TRANSFER), claims
are judged on them; elsewhere each is `untested`. The numbers that the paper prints (data/published) go through the same functions for
the notebook: a table of questions, never a verdict. The base model has one seed: horizons are the unit, and the spread over ways to
fit is added to the error; what another seed would have done is left out.
"""

import dataclasses
import functools
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis import norm_parabola as norms
from etastar.analysis.claims import Claim, Finding, judge, load_claims, untested
from etastar.analysis.paired import Estimate
from etastar.archives.norm_transfer import CONTEXT, read_tables
from etastar.plots.norm_published import norm_choices, printed_norms

STUDY, VARIABLE = "05_norm_transfer", "ETASTAR_NORM_TRANSFER"
PUBLISHED = Path(__file__).resolve().parents[3] / "data" / "published"
HORIZONS = tuple(2**k for k in range(31, 38))  # of the scale that the claims ask for; every optimum has 256 steps or more
SEQUENCES = (32, 2048)  # batches of the paper's fits
FAR_OCTAVES = 2  # of the batch, in the answer on sufficiency
COMMAND = f"{VARIABLE}=FOLDER make reproduce STUDY={STUDY}"
EXPORT = ("export the runs as CSV with the authors' scripts (SDLAML/norm-transfer) or `etastar.archives.norm_transfer.from_tracker` and "
          f"`write_table`, then `{COMMAND}`")


# -- what the paper prints ---------------------------------------------------------------------------------------------


@functools.lru_cache
def _printed(name: str) -> pd.DataFrame:
    return pd.read_csv(PUBLISHED / f"norm_transfer_{name}.csv")


def number(name: str) -> Estimate:
    """A printed number with its printed error as se (NaN where none is printed); KeyError for a name that is not in the table."""
    row = _printed("numbers").set_index("name").loc[name]
    return Estimate(float(row["value"]), float(row["se"]), math.inf, 1, "exponent")


def minima() -> pd.DataFrame:
    """The printed minima as `norm_parabola.norm_optima` gives them: model, horizon_tokens, batch_tokens, log2_norm, loss, params, width,
    depth, batch_sequences, and a, b, c of the parabola that has this minimum and the printed loss at initialisation."""
    table = _printed("minima")
    start = number("initial_loss").value
    a = (start - table["loss"]) / table["log2_norm"] ** 2
    return table.assign(horizon_tokens=2 ** table["log2_horizon_tokens"].astype("int64"), batch_tokens=table["batch_sequences"] * CONTEXT,
                        a=a, b=-2 * a * table["log2_norm"], c=start)


def base_minima() -> pd.DataFrame:
    """The printed minima of the base model over four horizons."""
    return minima().query("model == 'base'").reset_index(drop=True)


# -- verdicts on exported runs -----------------------------------------------------------------------------------------


def published_findings(folder=None) -> list[Finding]:
    """A finding of kind archive for every registered claim that the paper's runs speak of; untested, with the command, without them.

    `folder` of exported tables, by default that of ETASTAR_NORM_TRANSFER. ValueError where the tables are there and not readable.
    """
    folder = folder or os.environ.get(VARIABLE)
    claims = [claim for claim in load_claims(STUDY).values() if claim.id in MEASURES]
    if not folder:
        return [untested(c, "archive", f"the authors' run tables are in no public repository; {EXPORT}") for c in claims]
    points = scan_points(read_tables(folder))
    optima = optima_by_fit(points)
    return [_judge(claim, points, optima) for claim in claims]


def scan_points(runs: pd.DataFrame) -> pd.DataFrame:
    """The points of the base model's scan without momentum and decay, one rate for all layers, smoothed as in the paper.

    ValueError where the tables hold no such runs.
    """
    chosen = runs[(runs["model"] == "base") & (runs["momentum"] == 1) & ~runs["decayed"] & runs["peak_lr"].notna()
                  & runs["batch_sequences"].between(*SEQUENCES)]
    if chosen.empty:
        held = [", ".join(map(str, sorted(runs[name].unique()))) for name in ("model", "momentum", "decayed")]
        raise ValueError("no runs of the base model without momentum and decay, one rate for all layers; the tables hold models "
                         f"{held[0]}, momenta {held[1]}, decayed {held[2]}")
    return norms.points_at(chosen, HORIZONS)


def _judge(claim: Claim, points: pd.DataFrame, optima: dict[str, pd.DataFrame]) -> Finding:
    measure, what, fits = MEASURES[claim.id]
    try:
        estimate, spread = over_fits({fit: optima[fit] for fit in fits}, measure)
    except ValueError as why:  # a best batch at the edge of the grid, too few horizons
        return untested(claim, "archive", f"{why}; {EXPORT}")
    scale = {"params": base_minima()["params"].min(), "horizon_tokens": points["horizon_tokens"].min()}
    unit = estimate.unit if estimate.unit == "nats" else claim.unit  # slopes and exponents are pure numbers
    finding = judge(claim, dataclasses.replace(estimate, unit=unit), evidence="archive", scale=scale, matching=True)
    caveat = (f"the authors' own runs, {points['run'].nunique()} of the 69M model, {what}; one seed: the error is the scatter about "
              f"the fits and {spread:.2g} for the way of fitting")
    return dataclasses.replace(finding, reason=f"{finding.reason}; {caveat}")


def optima_by_fit(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The optima of the points by every one of `norm_parabola.FITS`, the paper's first."""
    start = number("initial_loss").value
    return {fit: norms.norm_optima(points, initial_loss=start, **(norms.PAPER_FIT | change)) for fit, change in norms.FITS.items()}


def over_fits(optima: dict[str, pd.DataFrame], measure) -> tuple[Estimate, float]:
    """(what a measure makes of the optima of the first fit, the deviation over all fits, which is in the error)."""
    found = [measure(of) for of in optima.values()]
    spread = float(np.std([estimate.value for estimate in found]))
    return dataclasses.replace(found[0], se=math.hypot(found[0].se, spread)), spread


def invariant(optima: pd.DataFrame) -> Estimate:
    """Slope of log2 norm at the optimum over rate and batch, per octave of tokens."""
    profiled = norms.batch_profiles(optima)
    return norms.norm_slope(profiled["horizon_tokens"], profiled["log2_norm"])


def rate_exponent(optima: pd.DataFrame) -> Estimate:
    """The exponent in tokens of the rate at the optimum over rate and batch, fitted to these rates and not derived from other laws."""
    profiled = norms.batch_profiles(optima)
    return norms.exponent(norms.tokens_rule(profiled["horizon_tokens"], profiled["peak_lr"]), "horizon_tokens")


def batch_exponent(optima: pd.DataFrame) -> Estimate:
    """The exponent in tokens of the best batch, of a continuous one."""
    profiled = norms.batch_profiles(optima)
    return norms.exponent(norms.tokens_rule(profiled["horizon_tokens"], profiled["batch_tokens"]), "horizon_tokens")


def picked_exponent(optima: pd.DataFrame) -> Estimate:
    """The exponent in tokens of the best batch of the grid, as the paper has it."""
    best = norms.best_batches(optima)
    return norms.exponent(norms.tokens_rule(best["horizon_tokens"], best["batch_tokens"]), "horizon_tokens")


def not_sufficient(optima: pd.DataFrame) -> Estimate:
    """What the batch farthest from the best loses at the optimum's norm at the longest horizon (nats), with the errors of both minima."""
    excess = norms.same_norm_excess(optima)
    last = excess[excess["horizon_tokens"] == excess["horizon_tokens"].max()]
    far = last.loc[last["octaves"].abs().idxmax()]
    return Estimate(float(far["excess"]), float(far["excess_se"]), float(optima["n"].min() - 2), len(last) + 1)


def _rule(name: str):
    def measure(optima):
        return norms.exponent(norms.rate_rule(optima["batch_tokens"] / CONTEXT, optima["horizon_tokens"], optima["peak_lr"]), name)

    return measure


ALL_FITS = tuple(norms.FITS)
LOSS_FITS = ("as the paper", "5 nearest", "all points", "free level")  # those that are parabolas of the loss itself
MEASURES = {
    "norm_invariant_scion": (invariant, "optimum over a continuous batch", ALL_FITS),
    "lr_exponent_scion": (rate_exponent, "rates at the best continuous batch", ALL_FITS),
    "batch_exponent_scion": (batch_exponent, "best continuous batches", ALL_FITS),
    "lr_rule_batch": (_rule("batch"), "best rates of all batches and horizons", ALL_FITS),
    "lr_rule_tokens": (_rule("horizon_tokens"), "best rates of all batches and horizons", ALL_FITS),
    "norm_not_sufficient": (not_sufficient, "the farthest batch at the longest horizon", LOSS_FITS),
}


# -- what the notebook shows -------------------------------------------------------------------------------------------


def printed_tables() -> dict[str, pd.DataFrame]:
    """Name → table of what the paper's printed numbers say by themselves: minima, constancy at each fixed batch, ways to choose the
    batch, exponents beside Step Law's, and the questions with their answers."""
    base = base_minima()
    ways = norms.constancy(base).fixed.assign(batch_sequences=lambda t: (t["batch_tokens"] / CONTEXT).astype(int))
    return {
        "printed_minima": minima()[["model", "horizon_tokens", "batch_sequences", "log2_norm", "loss", "place"]],
        "printed_constancy": ways[["batch_sequences", "sd", "slope", "slope_low", "slope_high"]],
        "printed_choices": norms.batch_choices(base, "as printed"),
        "printed_exponents": exponents(),
        "printed_questions": questions(),
    }


def figures() -> dict:
    """Name → matplotlib Figure of the printed optimum norms, and of how their slope depends on how the batch is chosen."""
    base = base_minima()
    band = number("band_centre")
    return {"printed_norms": printed_norms(base, norms.batch_profiles(base), (band.value - band.se, band.value + band.se)),
            "printed_choices": norm_choices(pd.concat([norms.batch_choices(base, "as printed"), _fixed_choices(base)], ignore_index=True))}


def _fixed_choices(base: pd.DataFrame) -> pd.DataFrame:
    """The rows of `batch_choices` for a fixed batch."""
    rows = []
    for row in norms.constancy(base).fixed.itertuples():
        of = base[base["batch_tokens"] == row.batch_tokens]
        rows.append({"batch": f"fixed, {row.batch_tokens / CONTEXT:.0f} sequences", "fit": "as printed", "sd": row.sd, "slope": row.slope,
                     "slope_low": row.slope_low, "slope_high": row.slope_high,
                     **{f"2^{math.log2(h):g}": v for h, v in zip(of["horizon_tokens"], of["log2_norm"], strict=True)}})
    return pd.DataFrame(rows)


def exponents() -> pd.DataFrame:
    """The printed exponents in tokens at the best batch beside Step Law's: quantity, scion, scion_se, from_minima (recomputed from the
    printed minima where they suffice), steplaw, steplaw_se, difference, in_errors (the difference over its error)."""
    base = base_minima()
    told = {"best batch": ("batch_exponent", "steplaw_batch_tokens_exponent", picked_exponent(base).value),
            "rate at the best batch": ("lr_exponent", "steplaw_lr_tokens_exponent", math.nan)}
    rows = []
    for quantity, (ours, theirs, again) in told.items():
        scion, step_law = number(ours), number(theirs)
        gap = scion.value - step_law.value
        rows.append({"quantity": quantity, "scion": scion.value, "scion_se": scion.se, "from_minima": again, "steplaw": step_law.value,
                     "steplaw_se": step_law.se, "difference": gap, "in_errors": gap / math.hypot(scion.se, step_law.se)})
    return pd.DataFrame(rows)


def questions() -> pd.DataFrame:
    """What a reader of the paper should ask, each answered with numbers from what it prints: question, answer."""
    base = base_minima()
    found = norms.constancy(base)
    asked = [*_of_constancy(base, found), *_of_bands(base), *_of_sufficiency(base), *_of_rules(base), *_of_series()]
    return pd.DataFrame(asked, columns=["question", "answer"])


def _of_constancy(base, found):
    slopes, sds = found.fixed["slope"], found.fixed["sd"]
    yield ("Is the optimum norm constant at a fixed batch?",
           f"No: it rises by {slopes.min():.2f} to {slopes.max():.2f} octaves per octave of tokens at each of {len(slopes)} batches (sd "
           f"{sds.min():.2f} to {sds.max():.2f}); at the best batch of each horizon the slope is {found.slope:+.2f}, sd {found.sd:.2f}.")
    yield ("Would a batch chosen at random at each horizon do as well?",
           f"Hardly: {100 * found.random_share:.1f} % of all choices are as constant; half have an sd above {found.random_sd[1]:.2f}.")
    yield ("What can the factor 2 between batches do to the norm?",
           f"With each best batch moved by up to one step the sd is {found.wander_sd[1]:.2f} ({found.wander_sd[0]:.2f} to "
           f"{found.wander_sd[2]:.2f} in 90 % of cases) and the slope {found.wander_slope[0]:+.2f} to {found.wander_slope[2]:+.2f}: "
           "the printed spread says as much of the grid as of the norm.")
    ways = norms.batch_choices(base)
    ways = ways[ways["batch"].str.startswith("profiled")]
    profiled = norms.batch_profiles(base)
    slope = norms.norm_slope(profiled["horizon_tokens"], profiled["log2_norm"])
    low, high = slope.interval(0.9)
    yield ("And at the optimum over a continuous batch?",
           f"The norms are {_list(profiled['log2_norm'])} (sd {profiled['log2_norm'].std():.2f}), more constant than printed. The slope is "
           f"{slope.value:+.3f}, 90 % interval {low:+.3f} to {high:+.3f}; with fewer or more batches in the parabola "
           f"{ways['slope'].min():+.3f} to {ways['slope'].max():+.3f}. With this scatter {len(profiled)} horizons show, four times "
           f"in five, a slope within ±{slope.provable_margin():.2f}.")


def _of_bands(base):
    best = norms.best_batches(base)["log2_norm"]
    band = number("band_centre")
    outside = best[(best - band.value).abs() > band.se + 1e-9]
    yield (f"Do the optima lie in the printed band {band.value:g} ± {band.se:g}?",
           f"{len(best) - len(outside)} of {len(best)} do; outside: {_list(outside)}. Mean {best.mean():.2f}, sd {best.std():.2f}.")
    at = norms.best_batches(minima().query("horizon_tokens == 2**33")).set_index("model")["log2_norm"]
    horizons, models = best[~np.isclose(best, at["base"])], at.drop("base")
    test = stats.ttest_ind(models, horizons, equal_var=False).confidence_interval()
    yield ("Are 7.0 over horizons and 7.4 over models two constants?",
           f"Both contain the base model's {at['base']:.2f} at 2^33 tokens. Without it the means are {horizons.mean():.2f} and "
           f"{models.mean():.2f}, {models.mean() - horizons.mean():.2f} apart (95 % interval {test.low:.2f} to {test.high:.2f}).")
    gaps = [_nearest_rival(of) for _, of in base.groupby("horizon_tokens")]
    yield ("One seed: how much loss decides between neighbouring batches?",
           f"Best and second batch differ by {_list([g for g, _ in gaps])} nats at the four horizons, and by "
           f"{_list([d for _, d in gaps])} octaves in norm. The losses are printed to 0.01; no seed noise is given.")


def _nearest_rival(of):
    first, second = of.sort_values("loss").head(2).itertuples()
    return second.loss - first.loss, abs(second.log2_norm - first.log2_norm)


def _of_sufficiency(base):
    excess = norms.same_norm_excess(base)
    near, far = (excess.loc[excess["octaves"].abs() == n, "excess"] for n in (1, FAR_OCTAVES))
    yield ("Is it enough to reach the norm?",
           f"No: at the optimum's norm, batches one step off lose {near.mean():.3f} nats on average ({near.min():.3f} to "
           f"{near.max():.3f}), {2**FAR_OCTAVES}-fold off {far.mean():.2f} ({far.min():.2f} to {far.max():.2f}), by parabolas rebuilt "
           "from the minima.")
    first, start, printed = base.iloc[0], number("initial_loss").value, number("parabola_a").value
    plain, logs = ((f(start) - f(first["loss"])) / first["log2_norm"] ** 2 for f in (float, math.log))
    yield ("Was log loss fitted, as the text says?",
           f"No: the first printed minimum and c = {start:g} give a = {plain:.3f} for the loss and {logs:.3f} for its log; printed is "
           f"{printed:g}.")


def _of_rules(base):
    batch, tokens, best, derived = (number(n) for n in ("lr_batch_exponent", "lr_tokens_exponent", "batch_exponent", "lr_exponent"))
    value = batch.value * best.value + tokens.value
    se = math.sqrt((batch.se * best.value) ** 2 + (batch.value * best.se) ** 2 + tokens.se**2)
    yield ("Was the exponent of the best rate in tokens measured?",
           f"No: the printed {derived.value:.2f} ± {derived.se:.2f} is {batch.value:g}·{best.value:g} − {abs(tokens.value):g} = "
           f"{value:.3f} ± {se:.3f}, as if the three had independent errors.")
    table = exponents().set_index("quantity")
    rate, batches = table.loc["rate at the best batch"], table.loc["best batch"]
    yield ("Is the rate's exponent consistent with Step Law, as the paper says?",
           f"In size, not in sign: {rate['scion']:+.2f} against {rate['steplaw']:+.3f}, {abs(rate['in_errors']):.1f} errors apart. The "
           f"batch's: {batches['scion']:.2f} against {batches['steplaw']:.3f}, {abs(batches['in_errors']):.1f} errors apart.")
    nine = number("lr_batch_exponent_nine")
    yield ("Does the rate go as the square root of the batch?",
           f"Nearly: {batch.value:g} ± {batch.se:g} on four horizons, {(batch.value - 0.5) / batch.se:.1f} errors from 0.5; "
           f"{nine.value:g} ± {nine.se:g} on nine, {(nine.value - 0.5) / nine.se:.1f} errors.")
    again = batch_exponent(base)
    yield ("Does the best batch's exponent hold on the four printed horizons?",
           f"{picked_exponent(base).value:.2f} with the grid's batches, {again.value:.2f} ± {again.se:.2f} over a continuous batch; "
           f"printed, on nine horizons: {best.value:.2f} ± {best.se:.2f}.")
    reach = number("first_reach_tokens_exponent").value
    yield ("Which sign has the exponent of the first reach in tokens?",
           f"Printed is +{reach:g}, and beside it the rule of thumb B^1.5/D. A norm that grows with rate · steps is reached at a horizon "
           f"4 times as long by a smaller rate: {4**-reach:.2f} of it with −{reach:g}, but {4**reach:.1f} times with +{reach:g}. It must "
           f"be −{reach:g}.")


def _of_series():
    for name, of in _printed("series").groupby("series", sort=False):
        slope = norms.norm_slope(2.0 ** of["log2_horizon_tokens"], of["log2_norm"])
        low, high = slope.interval()
        yield (f"Is it constant for {name} ({of['place'].iloc[0]})?",
               f"Best points {_list(of['log2_norm'])}: sd {of['log2_norm'].std():.2f}, slope {slope.value:+.2f} (95 % interval {low:+.2f} "
               f"to {high:+.2f}) over {len(of)} horizons.")


def _list(values) -> str:
    return ", ".join(f"{v:.2f}" for v in values)
