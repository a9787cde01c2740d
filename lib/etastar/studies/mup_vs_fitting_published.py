"""Archive evidence for study 06: what released grids say of Fitting, a law of the rate in size and tokens; nothing is trained.

The grids of arXiv 2503.04715 are cosines to a fixed rate of 1e-5 in the standard parametrization: they know no μP, so that "transfer"
here is the small model's rate kept, and a claim of another paper is judged as under other settings. Every point is one run: cells (a
size at a horizon), sizes or targets are the unit, as each measure says, and the spread over windows of the fitted bowls is in the
errors. What another seed would have done is left out. Numbers of the dense grid were known when the claims were registered, those of
mixtures not.
"""

import contextlib
import dataclasses
import functools
import math
import os

import numpy as np
import pandas as pd

from etastar.analysis import mixture_rates, size_horizon
from etastar.analysis import proxy_target as ways
from etastar.analysis.claims import Claim, Finding, judge, load_claims, untested
from etastar.analysis.cooldown_archive import clustered_mean, from_reruns, vertex
from etastar.analysis.lean_bowls import bowl_shapes, extrapolated_bowls, few_rates
from etastar.analysis.lr_grids import optima
from etastar.analysis.paired import Estimate
from etastar.analysis.search_factor import fit_horizon_law
from etastar.analysis.steplaw_refit import WINDOWS as WITHINS
from etastar.analysis.steplaw_refit import fixed_batch_rates
from etastar.archives import NotFetched, archive
from etastar.cache import cache_folder
from etastar.plots.mup_published import rates_and_rules, ratio_lines
from etastar.studies.cooldown_published import SHORT, published_logs
from etastar.studies.power_laws_published import FLAT_TOKENS, INTERIOR, WINDOWS, Grids, published_grids, wsd_exponent

STUDY, ARCHIVE, MIXTURES = "06_mup_vs_fitting", "steplaw", "steplaw_moe"
WINDOW, WITHIN = WINDOWS[1], WITHINS[1]  # those that give the estimates
OWN_PAPER = "2503.04715"


@dataclasses.dataclass(frozen=True)
class Released:
    """The dense grids with what several measures ask of them.

    Fixed batches run from the smallest with a best rate in most cells up to `FLAT_TOKENS`; the best batches of the cells lie about there.
    """

    grids: Grids

    @property
    def runs(self) -> pd.DataFrame:
        """The released runs."""
        return self.grids.runs

    @functools.cached_property
    def batches(self) -> list[int]:
        """Fixed batches, in tokens, at which most cells have a best rate."""
        cells = self.grids.rates[WINDOW].groupby("batch_tokens").size()
        enough = cells.index[cells >= INTERIOR * self.runs["cell"].nunique()]
        return [int(b) for b in enough if self.grids.small_batch <= b <= FLAT_TOKENS]

    @functools.cached_property
    def lines(self) -> pd.DataFrame:
        """The runs at these batches."""
        return self.runs[self.runs["batch_tokens"].isin(self.batches)]

    @functools.cached_property
    def optima(self) -> dict[float, pd.DataFrame]:
        """Each cell's best rate and batch, by share above the least loss that a run in the fit may have."""
        return {within: optima(self.runs, within) for within in WITHINS}

    @functools.cached_property
    def targets(self) -> dict[float, pd.DataFrame]:
        """`proxy_target.head_to_head` at the fixed batches, by window of the bowls."""
        return {window: ways.head_to_head(rates[rates["batch_tokens"].isin(self.batches)], self.runs)
                for window, rates in self.grids.rates.items()}

    @functools.cached_property
    def targets_at_best_batch(self) -> pd.DataFrame:
        """`proxy_target.head_to_head` with each cell at its own best batch."""
        return ways.head_to_head(self.optima[WITHIN], self.runs)

    @functools.cached_property
    def exponents(self) -> pd.DataFrame:
        """Both exponents at every fixed batch and, with batch_tokens NaN, at each cell's best: `size_horizon.exponents_by_batch`."""
        best = size_horizon.exponent_columns(size_horizon.fit_size_horizon(self.optima[WITHIN]))
        return pd.concat([size_horizon.exponents_by_batch(self.grids.rates[WINDOW]), pd.DataFrame([{"batch_tokens": math.nan} | best])],
                         ignore_index=True)

    def over_optima(self, measure) -> Estimate:
        """What a measure makes of the cells' optima, with its deviation over windows in the error."""
        return _with_spread([measure(self.optima[within]) for within in WITHINS])

    def over_targets(self, measure) -> Estimate:
        """What a measure makes of the head-to-head at fixed batches, with its deviation over windows in the error."""
        return _with_spread([measure(self.targets[window]) for window in WINDOWS])

    def at_fixed_batch(self, measure) -> Estimate:
        """What a measure makes of the best rates at the smallest fixed batch, with its deviation over windows in the error."""
        return self.grids.over_windows(lambda rates: measure(self.grids.at_small_batch(rates)))[0]


def released() -> Released:
    """The dense grids, read once a process; NotFetched where they are not here."""
    return _released(os.environ.get("ETASTAR_MIRROR"), str(cache_folder()))


@functools.lru_cache(maxsize=1)
def _released(mirror, cache) -> Released:
    return Released(published_grids())


def _with_spread(found: list[Estimate]) -> Estimate:
    middle = found[len(found) // 2]
    return dataclasses.replace(middle, se=math.hypot(middle.se, float(np.std([e.value for e in found]))))


# -- what the claims are judged by: (estimate, the rows behind it, what should be known with it) -----------------------


def _of_horizon(of: Released):
    estimate = of.at_fixed_batch(lambda rates: size_horizon.fit_size_horizon(rates).horizon)
    return estimate, of.grids.at_small_batch(), (
        f"{_k(of.grids.small_batch)} tokens a step; the unit is the cell; the exponent is {_by_batch(of, 'horizon')}; {_wsd_text()}")


def _of_size(of: Released):
    estimate = of.at_fixed_batch(lambda rates: size_horizon.fit_size_horizon(rates, "params").size)
    return estimate, of.grids.at_small_batch(), (
        f"{_k(of.grids.small_batch)} tokens a step; the unit is the size; the exponent is {_by_batch(of, 'size')}")


def _of_best_size(of: Released):
    estimate = of.over_optima(lambda rates: size_horizon.fit_size_horizon(rates, "params").size)
    return estimate, of.runs, f"each cell at its own best batch and rate; the unit is the size, {of.runs['params'].nunique()} of them"


def _of_few_rates(of: Released):
    found, shapes = few_rates(of.lines), bowl_shapes(of.lines)
    estimate = dataclasses.replace(clustered_mean(found["excess"], found["cell"]), unit="loss_fraction")
    return estimate, of.lines, (
        f"{len(found)} searches of 3 rates 2 octaves apart at {_batches(of)}; the unit is the cell; {found.attrs['refused']} more had "
        f"their best at an end; the vertex is {found['error_octaves'].mean():+.2f} octaves off (median size "
        f"{found['error_octaves'].abs().median():.2f}), for bowls are steeper on the right: within 2 octaves of the best a parabola has a "
        f"median r² of {shapes['parabola_r2'].median():.3f}, a cubic of {shapes['cubic_r2'].median():.3f}, whose vertex lies "
        f"{-shapes['shift_octaves'].median():.2f} octaves higher")


def _of_loss_law(of: Released):
    found = extrapolated_bowls(of.lines)
    estimate = dataclasses.replace(clustered_mean(found["error_octaves"], found["params"]), unit="octaves")
    return estimate, of.lines, (
        f"{len(found)} bowls of losses at the longest horizon, {found['fold'].min():.3g} to {found['fold'].max():.3g} times the longest of "
        f"three fitted, at {_batches(of)}; the unit is the size; off by up to {found['error_octaves'].abs().max():.1f} octaves, the last "
        f"fitted horizon's own rate by up to {found['kept_octaves'].abs().max():.1f}; the losses themselves by "
        f"{100 * found['loss_error'].abs().mean():.2f} % on average; each horizon is its own cosine; {_wsd_law_text()}")


def _of_target(of: Released):
    estimate = of.over_targets(lambda table: ways.difference(table, ways.FITTED, ways.KEPT))
    table = ways.nearest(of.targets[WINDOW], (ways.FITTED, ways.KEPT), 2.0).groupby("way").mean(numeric_only=True)
    anchored = ways.difference(of.targets[WINDOW], ways.BY_FITTING, ways.FITTED)
    return estimate, of.runs, (
        f"{_batches(of)}; targets of twice the proxy's size, proxies' cells of all their horizons; the unit is the target, of which "
        f"{estimate.n} share their proxies; the fitted rule misses by {table.loc[ways.FITTED, 'miss_octaves']:.2f} octaves, the kept rate "
        f"by {table.loc[ways.KEPT, 'miss_octaves']:.2f}, but its search cost as much as {table.loc[ways.FITTED, 'target_runs']:.0f} runs "
        f"of the target against {table.loc[ways.KEPT, 'target_runs']:.1f}; the Fitting paper's exponents from the one proxy, at no more "
        f"cost than that, end {_pm(anchored.scaled(1000, 'permil'))} permil from the fitted rule's loss")


def _of_bend(of: Released):
    estimate = of.over_optima(lambda rates: size_horizon.curvature(rates, "params").size)
    best = size_horizon.curvature(of.optima[WITHIN], "params")
    small = size_horizon.curvature(of.grids.at_small_batch(), "params")
    return estimate, of.runs, (
        f"each cell at its own best batch; the unit is the size, of which {of.runs['params'].nunique()} span "
        f"{np.log2(of.runs['params'].max() / of.runs['params'].min()):.1f} octaves; over tokens the bend is {_pm(best.horizon)}, of both "
        f"{_pm(best.mixed)} (F test against a straight law p = {best.p:.2g}); at {_k(of.grids.small_batch)} tokens a step "
        f"{_pm(small.size)} over size and {_pm(small.horizon)} over tokens (p = {small.p:.2g})")


def _of_mixtures(of: Released):
    released_mixtures = archive(MIXTURES)
    found = {within: _mixture_optima(released_mixtures, within) for within in WITHINS}
    by_count = {count: _with_spread([mixture_rates.rule_error(of.optima[w], found[w], count) for w in WITHINS])
                for count in mixture_rates.COUNTS}
    return _with_spread([mixture_rates.total_share(of.optima[w], found[w]) for w in WITHINS]), released_mixtures, (
        f"{len(found[WITHIN])} cells of mixtures against the law refitted to {len(of.optima[WITHIN])} dense ones; errors over active sizes "
        f"and of the dense law, read beyond its largest size; with the total as N it is {_pm(by_count['total'])} octaves off, with "
        f"the active parameters {_pm(by_count['active'])}")


def _mixture_optima(runs: pd.DataFrame, within: float) -> pd.DataFrame:
    """Each mixture's best rate and batch; cells whose few runs determine none are left out."""
    found = []
    for _, of in runs.groupby("cell", sort=False):
        with contextlib.suppress(ValueError):
            found.append(optima(of, within))
    if not (found := [cells for cells in found if len(cells)]):
        raise ValueError(f"no cell of mixtures has a best rate inside its grid within {within:g} of the best loss")
    return pd.concat(found, ignore_index=True)


MEASURES = {"fitting_horizon_exponent": _of_horizon, "fitting_size_exponent": _of_size, "steplaw_size_exponent": _of_best_size,
            "three_rates_suffice": _of_few_rates, "loss_law_finds_rate": _of_loss_law, "fitted_rule_beats_kept_rate": _of_target,
            "rate_bends_over_size": _of_bend, "dense_rule_holds_for_moe": _of_mixtures}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def published_findings() -> list[Finding]:
    """A finding of kind archive for every claim of the study that the grids speak of; untested where they are not on this machine."""
    try:
        of = released()
    except NotFetched as missing:
        return [_not_here(claim, ARCHIVE, missing) for claim in _claims()]
    return [_judge(claim, of) for claim in _claims()]


def _claims() -> list[Claim]:
    return [c for c in load_claims(STUDY).values() if c.id in MEASURES]


def _not_here(claim: Claim, name: str, missing: NotFetched) -> Finding:
    return untested(claim, "archive", f"the released runs of archive {name} are not on this machine; `{missing.command}`")


def _judge(claim: Claim, of: Released) -> Finding:
    try:
        estimate, rows, caveat = MEASURES[claim.id](of)
    except NotFetched as missing:  # of the mixtures
        return _not_here(claim, MIXTURES, missing)
    except ValueError as why:  # too few best rates inside their grids
        return untested(claim, "archive", f"the released runs do not tell: {why}; train it by `make reproduce STUDY={STUDY}`")
    # The least of the runs: a contradiction needs all of them to be of the claim's scale.
    scale = {"params": rows["params"].min(), "horizon_tokens": rows["horizon_tokens"].min()}
    own = OWN_PAPER in claim.paper.split(",")[0]
    finding = judge(claim, estimate, evidence="archive", scale=scale, matching=own)
    whose = "the authors' own released runs" if own else f"cosines to a fixed 1e-5 without μP (arXiv {OWN_PAPER})"
    return dataclasses.replace(finding, reason=f"{finding.reason}; {whose}, one run a point; {caveat}")


# -- the logs of WSD beside the cosines --------------------------------------------------------------------------------


def wsd_loss_law(logs) -> Estimate:
    """Octaves by which Eq. 4 through the shorter of the 124M cooldowns over 10 % of the run misses the best rate of the longest, with
    the error of reruns; `logs` of the cooldown study."""
    return from_reruns(_wsd_missed, logs.table[logs.table["arm"] == SHORT], logs.noise, "octaves")


def _wsd_missed(losses: pd.Series) -> float:
    wide = losses.droplevel("arm").unstack("steps").dropna()
    *short, longest = wide.columns
    ahead = wide.apply(lambda row: float(fit_horizon_law(short, row[short]).predict(longest)), axis=1)
    return vertex(ahead)[0] - vertex(wide[longest])[0]


def _wsd_text() -> str:
    return _of_logs(wsd_exponent, lambda steps: f"WSD with a 10 % cooldown at 124M, over a {steps[-1] / steps[0]:.2g}-fold range, has")


def _wsd_law_text() -> str:
    return _of_logs(wsd_loss_law, lambda steps: f"WSD with a 10 % cooldown at 124M, {steps[-1] / steps[-2]:.2g}-fold ahead, has")


def _of_logs(measure, told) -> str:
    try:
        logs = published_logs()
    except NotFetched as missing:
        return f"logs of WSD are not on this machine, `{missing.command}`"
    steps = sorted(logs.table.loc[logs.table["arm"] == SHORT, "steps"].unique())
    return f"{told(steps)} {_pm(measure(logs))} (reruns)"


# -- what the notebook shows -------------------------------------------------------------------------------------------


def published_note() -> str:
    """Where the numbers come from and the chief of them, in one paragraph; or the command that brings the files."""
    try:
        of = released()
    except NotFetched as missing:
        return f"Released runs are not on this machine; `{missing.command}` brings 0.4 MB."
    about, found = of.runs.attrs, ways.by_ratio(of.targets[WINDOW])
    last = found[found["ratio"] == found["ratio"].max()].set_index("way")
    return (f"{len(of.runs)} released runs ({about['paper']}; {about['source']} at {about['commit'][:7]}, licence: {about['licence']}), "
            f"one run a point, no μP among them. Fixed batches: {_batches(of)}. At {last['ratio'].iloc[0]:.0f} times the proxy's size its "
            f"kept rate loses {1000 * last.loc[ways.KEPT, 'excess']:.1f} permil at the target, moved by the Fitting paper's exponents "
            f"{1000 * last.loc[ways.BY_FITTING, 'excess']:.1f}. Judged by them: {', '.join(c.id for c in _claims())}.")


def bends(of: Released) -> pd.DataFrame:
    """The bends of the best rate at each fixed batch and (NaN) at each cell's best: batch_tokens, direction, bend, low, high (95 %),
    p (F test of all three against a straight law), n; the unit is the size."""
    cells = {float(b): of.grids.rates[WINDOW].query("batch_tokens == @b") for b in of.batches} | {math.nan: of.optima[WITHIN]}
    rows = []
    for batch, rates in cells.items():
        found = size_horizon.curvature(rates, "params")
        for direction in ("size", "horizon", "mixed"):
            bend = getattr(found, direction)
            rows.append({"batch_tokens": batch, "direction": direction, "bend": bend.value, "low": bend.interval()[0],
                         "high": bend.interval()[1], "p": found.p, "n": found.n})
    return pd.DataFrame(rows)


def mixtures(of: Released) -> dict[str, pd.DataFrame]:
    """Tables of the mixtures: the dense rule with either count at every cell, and the exponent in tokens at every fixed batch.

    NotFetched where their grid is not here.
    """
    runs = archive(MIXTURES)
    active = runs.groupby("cell")["params_active"].first()
    rates = fixed_batch_rates(runs).assign(params_active=lambda frame: frame["cell"].map(active))
    rows = [{"batch_tokens": batch, "horizon": (found := mixture_rates.horizon_exponent(at)).value, "low": found.interval()[0],
             "high": found.interval()[1], "n": found.n} for batch, at in rates.groupby("batch_tokens") if len(at) >= INTERIOR * len(active)]
    cells = mixture_rates.rule_errors(size_horizon.fit_size_horizon(of.optima[WITHIN]), _mixture_optima(runs, WITHIN))
    return {"published_mixtures": cells[["cell", "params", "params_active", "horizon_tokens", "peak_lr", "total_octaves", "active_octaves",
                                         "effective_params", "share_of_total"]],
            "published_mixture_horizons": pd.DataFrame(rows, columns=["batch_tokens", "horizon", "low", "high", "n"])}


def published_tables() -> dict[str, pd.DataFrame]:
    """Name → table of what the released runs say; {} where the dense grids are not on this machine."""
    try:
        of = released()
    except NotFetched:
        return {}
    tables = {"published_exponents": of.exponents, "published_bends": bends(of), "published_by_ratio": ways.by_ratio(of.targets[WINDOW]),
              "published_ratio_slopes": ways.ratio_slopes(of.targets[WINDOW]),
              "published_by_ratio_best_batch": ways.by_ratio(of.targets_at_best_batch), "published_bowls": bowl_shapes(of.lines),
              "published_few_rates": few_rates(of.lines), "published_loss_law": extrapolated_bowls(of.lines)}
    with contextlib.suppress(NotFetched):
        tables |= mixtures(of)
    return tables


def published_figures() -> dict:
    """Name → matplotlib Figure of what the released runs say; {} where they are not on this machine."""
    try:
        of = released()
    except NotFetched:
        return {}
    held = {f"{_k(of.grids.small_batch)} tokens a step": of.grids.at_small_batch(), "each cell at its best batch": of.optima[WITHIN]}
    return {"published_rates": rates_and_rules(held, size_horizon.published_exponents()),
            "published_ratios": ratio_lines(of.targets[WINDOW])}


def _batches(of: Released) -> str:
    return f"batches of {', '.join(map(_k, of.batches))} tokens"


def _by_batch(of: Released, name: str) -> str:
    """An exponent at each fixed batch and at the cells' best ones, in words."""
    table = of.exponents.set_index("batch_tokens")[name]
    fixed = ", ".join(f"{table[float(batch)]:+.2f} at {_k(batch)}" for batch in of.batches)
    return f"{fixed} tokens a step, {table.iloc[-1]:+.2f} where each cell has its best batch"


def _pm(e: Estimate) -> str:
    return f"{e.value:+.2f} ± {e.se:.2f}"


def _k(tokens: float) -> str:
    return f"{tokens / 1e3:.0f}k"
