"""Study 05, norm transfer: is the output layer's operator norm what stays at the best learning rate and batch, and what follows from it?

Papers: 2510.03871 (norm transfer), Pethick et al. 2502.07529 (Scion), Li et al. 2503.04715 (Step Law, for contrast).

Constant rates, no warm-up, normalization everywhere, initialization by dual norm; horizons of one rate, batch and seed share a trunk.
At every horizon the optimum is that of a surface over log rate and log batch, never the best cell of the grid; the seed is the unit.
"""

import functools
import math

import numpy as np
import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding, load_claims
from etastar.analysis.controls import PLANTED, TRUTH, Control, aa_control, not_run, planted_control, truth_control
from etastar.analysis.lr_batch_grid import AXES
from etastar.analysis.power import power_table
from etastar.analysis.surface_truth import SurfaceTruth, norm_slope_uncertainty
from etastar.model.shapes import count_parameters
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.studies import layer_groups
from etastar.studies import measured as common
from etastar.studies import norm_transfer_measures as measures
from etastar.studies import norm_transfer_published as published
from etastar.studies.measured import Measurements
from etastar.studies.norm_transfer_design import NORM_TRANSFER, Arm, Cell, NormDesign
from etastar.studies.norm_transfer_grids import ADAMW, SCION, Grids, arm_of
from etastar.studies.norm_transfer_measures import PUBLISHED_GROWTH

STUDY = "05_norm_transfer"
achieved_power = common.achieved_power


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, each once, the primary claims' first."""
    plan = design(preset, minutes)
    return list(dict.fromkeys(recipe for cell in plan.cells for recipe in plan.recipes(cell)))


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks: first the runs whose norms are logged on the way, then the grids."""
    from etastar.engine.execute import run

    plan = design(preset, minutes)
    grown = [r for cell in plan.cells if cell.role == "growth" for r in plan.recipes(cell)]
    every = min(plan.growth_batches) * round(2.0 ** -max(plan.growth_rates))  # LR · steps = 1 at the largest rate and smallest batch
    made = run(grown, store=store, observe=Observe(norms_every_tokens=every), **options)
    return made + run([r for r in recipes(preset, minutes) if r not in set(grown)], store=store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs) -> Measurements:
    """What the runs say; `tables` has surface rows, optima, rules, fixed batches, rivals, growth, layer gains and ratios."""
    grids = Grids.of(runs)
    arms = [grids.arm(SCION), grids.arm(ADAMW)]
    fits, refused = measures.surfaces(grids, arms)
    bowls, best, rivals = measures.fixed(grids, arms), measures.optima(grids), measures.rival_table(grids, arms)
    grown, moved = measures.growth(runs), layer_groups.conditions(grids.frame)
    short = measures.too_short(best, arms[0])
    contrasts = (measures.growth_contrast(grown) | measures.slope_contrasts(grids, fits, bowls, best)
                 | measures.shape_contrasts(grids, best) | measures.sufficiency(grids, best) | measures.sensitivity(grids, best)
                 | measures.rival_contrasts(grids, rivals, short) | layer_groups.contrasts(moved))
    surface = pd.concat([grids.surface(arm) for arm in best.arm.unique()]) if len(best) else grids.frame.iloc[:0]
    by_paper = measures.by_paper(grids, arms, runs[0].recipe.corpus.vocab)
    tables = {"optima": best, "by_paper": by_paper, "rules": measures.rules(fits, bowls), "rivals": rivals, "growth": grown,
              "surfaces": surface, "fixed_batch": _fixed_rows(bowls), "layer_gains": layer_groups.gains(moved),
              "layer_ratios": layer_groups.ratios(moved)}
    longest = max((r.recipe for r in runs if arm_of(r.recipe) == arms[0]), key=lambda r: r.horizon_tokens)
    steps = int(grids.frame[grids.frame.arm == arms[0]].steps.max())
    params = count_parameters(longest.model, longest.corpus.vocab)["total"]
    no_halves, full = pd.DataFrame(columns=["half", "whole"]), {name: table for name, table in tables.items() if len(table)}
    return Measurements(grids.frame, longest.horizon_tokens, params, steps, {}, refused, {}, no_halves, contrasts,
                        common.pool_families(contrasts), full)


def _fixed_rows(bowls) -> pd.DataFrame:
    rows = [fit.cells[fit.cells.edge == ""].assign(arm=arm, optimizer=arm.split(",")[0]) for arm, fit in bowls.items()]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    "norm_invariant_scion": "scion: norm slope", "norm_invariant_adamw": "adamw: norm slope", "norm_growth_offset": "growth: offset",
    "norm_slope_fixed_batch": "scion: norm slope, fixed batch", "norm_invariant_width_scion": "scion: norm over width",
    "norm_invariant_depth_scion": "scion: norm over depth", "norm_invariant_width_adamw": "adamw: norm over width",
    "norm_invariant_depth_adamw": "adamw: norm over depth", "norm_not_sufficient": "far batch − best, at the best norm",
    "lr_exponent_scion": "scion: lr exponent", "batch_exponent_scion": "scion: batch exponent", "lr_rule_batch": "scion: rule, batch",
    "lr_rule_tokens": "scion: rule, tokens", "first_reach_batch": "scion: first reach, batch",
    "first_reach_tokens": "scion: first reach, tokens", "momentum_lowers_loss": "momentum: loss", "decay_flattens_norm": "decayed: basin",
    "scion_adamw_lr_exponents": "scion − adamw: lr exponent", "scion_adamw_batch_exponents": "scion − adamw: batch exponent",
    "layer_gain_large_batch": "layers: gain, large batch", "layer_gain_best_batch": "layers: gain, best batch",
    "layer_hidden_eighth": "layers: hidden ratio", "layer_output_most_sensitive": "layers: output − input",
    "normalization_removes_need": "layers: pre-norm − everywhere", "norm_beats_lr_steps": "drift: norm − LR · steps",
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the published table's."""
    return common.judge(STUDY, CONTRASTS, measured, NORM_TRANSFER, lambda study: published.published_findings())


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths on these very runs."""
    if not measured.counts:
        return []
    frame = measured.frame[measured.frame.main]
    longest = frame[frame.horizon_tokens == frame.horizon_tokens.max()]
    cells = {f"{arm}, batch {batch}, at {lr:.3g}": rows.sort_values("seed").loss.to_numpy()
             for (arm, batch, lr), rows in longest.groupby(["arm", "batch_tokens", "peak_lr"])}
    return [aa_control(cells), _truth(measured), _planted(measured)]


def _truth(measured: Measurements) -> Control:
    """Losses of one rate and batch at the longest horizon and at a quarter of it."""
    frame = measured.frame[measured.frame.main & (measured.frame.optimizer == SCION)]
    whole = frame[frame.horizon_tokens == frame.horizon_tokens.max()]
    keys = ["arm", "batch_tokens", "peak_lr", "seed"]
    both = whole.merge(frame[frame.horizon_tokens == whole.horizon_tokens.max() // 4], on=keys, suffixes=("", "_short"))
    if both.empty:
        return not_run(TRUTH, "no run was read at a quarter of its tokens")
    _, at = max(both.groupby(keys[:3]), key=lambda cell: len(cell[1]))
    gap = float((at.loss_short - at.loss).mean())
    return truth_control(at.loss_short, at.loss, abs(gap) / 4, fewer="a quarter of the tokens")


def _planted(measured: Measurements) -> Control:
    name, claim = CONTRASTS["norm_invariant_scion"], load_claims(STUDY)["norm_invariant_scion"]
    if name not in measured.contrasts:
        return not_run(PLANTED, f"no run speaks of {name}")
    per_seed = measured.contrasts[name].per_seed
    return planted_control(claim, float(np.std(per_seed, ddof=1)), len(per_seed), seed=0)


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: loss by norm, optimal norms, surfaces, rules, growth, invariants, layer groups, shapes, verdicts."""
    tables, made = measured.tables, {}
    best, rows = tables.get("optima"), tables.get("surfaces")
    if best is not None:
        main = best[best.arm.isin(_main_arms(measured))]
        for optimizer, own in main.groupby("optimizer"):
            grid = rows[rows.arm.isin(own.arm)]
            made[f"loss_by_norm_{optimizer}"] = plots.loss_by_norm(grid, own)
            made[f"surfaces_{optimizer}"] = plots.surfaces(grid, own, own)
        fixed = tables.get("fixed_batch", pd.DataFrame(columns=["optimizer", "horizon_tokens", "batch_tokens", "log2_norm"]))
        told = main[main.groupby("optimizer").log2_norm.transform("count") > 0]
        if len(told):
            made["optimal_norm"] = plots.optimal_norm(told, fixed[fixed.optimizer.isin(told.optimizer)])
        shapes = _shapes(measured, best)
        if len(shapes):
            made["norm_by_shape"] = plots.norm_locations(shapes)
    if "rules" in tables:
        made["rules"] = plots.rule_exponents(tables["rules"])
    if "growth" in tables:
        known = pd.DataFrame(measures.PUBLISHED_GROWTH.items(), columns=["log2_lr_steps", "log2_norm"])
        made["norm_growth"] = plots.norm_growth(tables["growth"], known)
    if "rivals" in tables:
        told = tables["rivals"].rename(columns={"drift": "octaves", "drift_in_widths": "drift", "drift_in_widths_low": "low",
                                                "drift_in_widths_high": "high"})
        made["invariants"] = plots.invariants(told)
    if "layer_gains" in tables and "layer_ratios" in tables:
        made["layer_groups"] = plots.layer_groups(tables["layer_gains"], tables["layer_ratios"])
    return common.with_verdicts(made, board)


def _main_arms(measured: Measurements) -> list[str]:
    frame = measured.frame[measured.frame.main]
    counts = frame.groupby(["optimizer", "arm"]).horizon_tokens.nunique()
    return [counts[optimizer].idxmax() for optimizer in counts.index.get_level_values(0).unique()]


def _shapes(measured: Measurements, best: pd.DataFrame) -> pd.DataFrame:
    """Optimal norms by width and depth at the horizon where other shapes were run: kind, value, optimizer, log2_norm …, edge."""
    plain = measures.plain(best)
    main = plain[plain.arm.isin(_main_arms(measured))]
    made = []
    for kind, other in (("width", "depth"), ("depth", "width")):
        for optimizer, own in plain.groupby("optimizer"):
            here = own[own[other].isin(main[main.optimizer == optimizer][other])]
            for _, at in here.groupby("horizon_tokens"):
                if at[kind].nunique() > 1:
                    made.append(at.assign(kind=kind, value=at[kind], optimizer=optimizer))
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame()


# -- what the notebook shows -------------------------------------------------------------------------------------------


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("norm_growth", "optimal_norm"))


def design(preset: str, minutes: float | None = None) -> NormDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return NORM_TRANSFER[preset].scaled(minutes)


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)

    def row(name: str, cells: list[Cell], sd: float) -> dict:
        rising = sorted(cells, key=lambda c: c.horizon_tokens)
        trunks = {(c.arm.name, c.arm.lr_ratios, c.batch_tokens, rate): c.horizon_tokens for c in rising for rate in c.rates}
        seeds = len(cells[0].seeds)
        return {"contrast": name, "runs": sum(len(c.rates) for c in cells) * seeds, "seeds": seeds, "tokens": sum(trunks.values()) * seeds,
                "sd": sd, "slope": math.nan}

    rows = []
    for name in (SCION, ADAMW):
        cells = [c for c in plan.cells if c.role == "surface" and c.arm == plan.arm(name)]
        if len({c.horizon_tokens for c in cells}) > 1 and math.isfinite(sd := slope_sd(plan, plan.arm(name))):
            rows.append(row(f"{name}: norm slope", cells, sd))
    rows.append(row("growth: offset", [c for c in plan.cells if c.role == "growth"], 0.05))
    layers = [c for c in plan.cells if c.role == "layers"]
    return power_table(rows + ([row("layers: gain, best batch", layers, 0.004)] if layers else []))


@functools.lru_cache
def slope_sd(plan: NormDesign, arm: Arm) -> float:
    """What a seed's norm slope deviates by under a design (octaves per octave of tokens), by surfaces drawn at the pilot's noise.

    The coarseness of batches and rates is in it. Curvatures and deviations are those of pilot seeds. NaN for a design whose grids
    do not hold their optima, batches being no shorter than a sequence: it can show no slope.
    """
    cells = [c for c in plan.cells if c.role == "surface" and c.arm == arm]
    valley, seeds = plan.valley(arm), len(cells[0].seeds)
    grid = pd.DataFrame([(c.horizon_tokens, c.batch_tokens, 2.0**rate) for c in cells for rate in c.rates], columns=list(AXES))
    truth = SurfaceTruth(2.0**valley.rate, valley.batch_tokens, valley.horizon_tokens, batch_exponent=valley.batch_of_tokens,
                         lr_exponent=valley.rate_of_tokens + valley.rate_of_batch * valley.batch_of_tokens,
                         lr_batch_exponent=valley.rate_of_batch, lr_curvature=0.05, batch_curvature=0.05, run_sd=plan.run_sd_nats)
    try:
        return norm_slope_uncertainty(grid, truth, seeds=seeds, draws=20).sd * math.sqrt(seeds)
    except ValueError:  # more than half of the draws have their optimum beyond the grid
        return math.nan


def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    said = [] if measured.counts else [common.machinery_only(measured)]
    if "growth" in measured.tables:
        said.append(_growth_told(measured.tables["growth"]))
    if not measured.counts:
        return "\n\n".join(said)
    said.insert(0, common.runs_told(measured))
    for row in measured.tables.get("optima", pd.DataFrame()).itertuples():
        if row.edge:
            said.append(f"*{row.arm}* at {row.horizon_tokens:,.0f} tokens: the optimum lies beyond the grid ({row.edge}).")
            continue
        said.append(f"*{row.arm}* at {row.horizon_tokens:,.0f} tokens is best at a batch of {row.best_batch_tokens:,.0f} tokens "
                    f"({row.steps:,.0f} steps), a rate of {row.best_lr:.3g} and a log2 norm of {row.log2_norm:.2f} "
                    f"(95 %: {row.log2_norm_low:.2f} … {row.log2_norm_high:.2f}); the loss is 0.01 nats higher {row.basin:.2f} octaves of "
                    "norm from there.")
    said += [common.contrast_told(measured, name) + (f" *{contrast.short}*" if contrast.short else "")
             for name, contrast in measured.contrasts.items()]
    said += [f"*{name}*: {why}." for name, why in measured.refused.items()]
    return "\n\n".join(said)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns that hold a value for every seed."""
    return table[[c for c in table if c != "seeds" and "per_seed" not in c]]


def _growth_told(grown: pd.DataFrame) -> str:
    by = grown.groupby("log2_lr_steps")
    spread = float((by.log2_norm.max() - by.log2_norm.min()).max())
    over = float((grown.log2_norm - np.log2(1 + 2.0**grown.log2_lr_steps)).max())
    met = ", ".join(f"{norm:.2f}" for norm in by.log2_norm.mean())
    return (f"At LR · steps of 2^{grown.log2_lr_steps.min():g} … 2^{grown.log2_lr_steps.max():g} the log2 output norm is {met}; over "
            f"{grown.peak_lr.nunique()} rates, {grown.batch_tokens.nunique()} batches and {grown.seed.nunique()} seeds it differs by "
            f"{spread:.2f} at most, and it stays {-over:.2f} octaves or more below log2(1 + LR · steps). The mean offset from the "
            f"published curve is {grown.offset.mean():+.2f}." + _growth_slope(by.log2_norm.mean()))


def _growth_slope(norm: pd.Series) -> str:
    """The slope of growth from LR · steps of 2^3 to 2^5, beside the published one."""
    if not {3, 5} <= set(norm.index):
        return ""
    published = (PUBLISHED_GROWTH[5] - PUBLISHED_GROWTH[3]) / 2
    return f" From 2^3 to 2^5 it grows by {(norm[5] - norm[3]) / 2:.2f} octaves an octave of LR · steps (published {published:.2f})."
