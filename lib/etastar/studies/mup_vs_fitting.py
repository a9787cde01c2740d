"""Study 06, μP against fitting: two ways to get the learning rate of a big model, dense and with a mixture of experts.

Papers: 2601.05049 (Fitting), 2203.03466 and 2404.05728 (μP, μTransfer), 2505.01618 (CompleteP), 2405.13698 and 2510.19093 (weight decay),
2409.19913 (token horizon), 2508.09752 (mixtures of experts), 2606.29158 (curvature), 2408.13359 (Power).

Every cell has a bowl over rates; WSD cools down over a fifth of the tokens, so that horizons at one rate and seed share a trunk. At the
base μP is standard parametrization and is trained once. The seed is the unit; drifts are differences of a seed's own vertices.
"""

import dataclasses
import math

import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding
from etastar.analysis.controls import Control
from etastar.analysis.power import power_table
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.studies import head_to_head
from etastar.studies import measured as common
from etastar.studies import mup_vs_fitting_measures as measures
from etastar.studies import mup_vs_fitting_published as published
from etastar.studies.measured import Measurements
from etastar.studies.mup_vs_fitting_design import MUP_VS_FITTING, TransferDesign
from etastar.studies.mup_vs_fitting_grids import Bowls, Grid, arm_of
from etastar.studies.power_law_measures import bowl_name

STUDY = "06_mup_vs_fitting"
OBSERVED = ("width", "steady")  # roles whose stability and features are logged
LOGS = 8  # of them a run
achieved_power = common.achieved_power


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, each once, the primary claims' first."""
    plan = design(preset, minutes)
    return list(dict.fromkeys(recipe for cell in plan.cells for recipe in plan.recipes(cell)))


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks, first what is looked at on the way; a bowl that is best at its edge is extended, twice at most."""
    from etastar.engine.execute import run

    plan, wanted = design(preset, minutes), recipes(preset, minutes)
    looked_at = dict.fromkeys(r for cell in plan.cells if cell.role in OBSERVED for r in plan.recipes(cell))
    run(list(looked_at), store=store, observe=Observe(features_every_tokens=plan.width_tokens // LOGS), **options)
    return common.train(wanted, arm_of, {arm_of(r) for r in wanted}, store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs) -> Measurements:
    """What the runs say; `tables` has vertices, drifts, exponents, target, methods, ratios, steadiness, boundaries, module gains."""
    grid = Grid.of(runs)
    width, longest = grid.target
    main = grid.arm("sp", width)
    names = {bowl_name(cell.arm, cell.horizon_tokens, main, longest): (cell.arm, cell.horizon_tokens) for cell in grid.cells.itertuples()}
    first = next(r.recipe for r in runs if (arm_of(r.recipe), r.recipe.horizon_tokens) == (main, longest))
    m = common.measure(grid.gridded, first, names, (main, longest), lambda m: {})
    bowls = Bowls.of(m, names, grid.gridded)
    slopes = measures.slopes(grid, bowls)
    here = slopes.get(grid.width_tokens, math.nan)
    target, ratios = head_to_head.target_table(grid, bowls), head_to_head.ratio_table(grid, bowls)
    of_exponents, exponents = measures.exponents(grid)
    of_modules, gains, moves = measures.modules(grid)
    found = (measures.drifts(grid, bowls) | of_exponents | head_to_head.contrasts(target, ratios, here, longest)
             | measures.decay(grid, bowls, here) | of_modules | measures.mended(grid, bowls, here)
             | measures.power(grid, bowls, slopes))
    tables = {"vertices": measures.vertices(bowls, grid), "drifts": measures.drift_table(found), "exponents": exponents,
              "methods": head_to_head.summary(target), "target": target, "ratios": ratios, "module_gains": gains, "module_moves": moves,
              "boundaries": measures.boundaries(grid, first.corpus.vocab), "runs": grid.frame,
              "steadiness": measures.steadiness(grid, runs)}
    return dataclasses.replace(m, contrasts=found, pooled=common.pool_families(found), tables={k: t for k, t in tables.items() if len(t)})


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    "mup_lr_constant_over_width": "mup: drift over width", "sp_lr_drifts_over_width": "sp − mup: drift over width",
    "fitting_beats_transfer": "fitted − transferred", "fitting_regret_below_transfer": "fitted − transferred: regret",
    "gap_grows_with_scale": "gap over the ratio", "fitting_predicts_lr": "fitted: octaves", "transfer_predicts_lr": "transferred: octaves",
    "fitting_horizon_exponent": "sp: horizon exponent", "fitting_size_exponent": "sp: size exponent",
    "steplaw_size_exponent": "sp: size exponent, best batch", "three_rates_suffice": "three rates: excess",
    "loss_law_finds_rate": "fitted by losses: octaves", "fitted_rule_beats_kept_rate": "fitted − kept",
    "rate_bends_over_size": "sp: size curvature", "dense_rule_holds_for_moe": "mixture: share of the total",
    "mup_moves_with_tokens": "mup: horizon exponent", "best_lr_curves_upward": "sp: horizon curvature",
    "decay_must_be_independent": "coupled − independent", "independent_decay_lowers_loss": "independent − coupled, loss",
    "completep_lr_constant_over_depth": "completep: drift over depth", "sp_lr_drifts_over_depth": "sp − completep: drift over depth",
    "alpha_half_drifts_over_depth": "alpha 0.5 − completep: drift over depth",
    "moe_mup_constant_over_width": "mixture, mup: drift over width", "moe_sp_drifts_over_width": "mixture, sp − mup: drift over width",
    "moe_mup_constant_over_experts": "mixture, mup: drift over experts", "moe_granularity_moves_lr": "mixture, mup: fineness beyond none",
    "modules_gain_less_with_qk_norm": "modules: plain − QK-norm",
    "mup_gap_closes_when_steady": "mup − sp, QK-norm − plain", "power_on_mixture": "power − wsd, tuned: worst horizon",
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the logs' findings."""
    return common.judge(STUDY, CONTRASTS, measured, MUP_VS_FITTING, lambda study: published.published_findings())


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths on these very runs."""
    return common.controls(measured, STUDY, "power_on_mixture", "mup_lr_constant_over_width", CONTRASTS["mup_lr_constant_over_width"])


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: bowls, best rates by width, depth and tokens, drifts, the target, ratios, steadiness, verdicts."""
    tables, made = measured.tables, {}
    cells, rows = tables.get("vertices"), tables["runs"]
    if cells is not None:
        for scaling in ("sp", "mup"):
            made[f"bowls_{scaling}"] = plots.scaling_bowls(rows, cells, scaling)
        made["best_lr"] = plots.best_rates(cells)
    if "drifts" in tables:
        made["drifts"] = plots.drift_forest(tables["drifts"])
    if "target" in tables:
        made["target"] = plots.head_to_head(rows, cells, tables["target"])
    if "ratios" in tables:
        made["ratios"] = plots.regret_by_ratio(tables["ratios"])
    if "steadiness" in tables:
        made["steadiness"] = plots.steadiness(tables["steadiness"])
    if "module_gains" in tables and "module_moves" in tables:
        made["modules"] = plots.layer_groups(tables["module_gains"], tables["module_moves"])
    return common.with_verdicts(made, board)


# -- what the notebook shows -------------------------------------------------------------------------------------------


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("bowls_sp", "bowls_mup", "best_lr"))


def design(preset: str, minutes: float | None = None) -> TransferDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return MUP_VS_FITTING[preset].scaled(minutes)


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)
    by_role = {role: [c for c in plan.cells if c.role == role] for role in dict.fromkeys(c.role for c in plan.cells)}
    target = [c for c in by_role["target"] if c.horizon_tokens == plan.target_tokens]
    asked = {"mup: drift over width": (by_role["width"], plan.drift_sd, math.nan),
             "fitted − transferred": (target + by_role["proxy"], plan.sd_nats, plan.slope_nats),
             "sp: horizon exponent": (by_role.get("horizon", []), plan.exponent_sd, math.nan),
             "mixture, mup: drift over width": (by_role.get("mixture", []), plan.drift_sd, math.nan),
             "completep: drift over depth": (by_role.get("depth", []), plan.drift_sd, math.nan),
             "coupled − independent": (by_role.get("decay", []), plan.drift_sd, math.nan)}
    return power_table([{"contrast": name, "runs": sum(len(c.rates) * len(c.seeds) for c in cells), "seeds": len(cells[0].seeds),
                         "tokens": sum(len(c.rates) * len(c.seeds) * c.horizon_tokens for c in cells), "sd": sd, "slope": slope}
                        for name, (cells, sd, slope) in asked.items() if cells])


def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return common.machinery_only(measured)
    said = [common.runs_told(measured)]
    said += [_method_told(row) for row in measured.tables.get("methods", pd.DataFrame()).itertuples()]
    said += [common.contrast_told(measured, name) + (f" *{contrast.short}*" if contrast.short else "")
             for name, contrast in measured.contrasts.items()]
    said += [_steady_told(measured.tables["steadiness"])] if "steadiness" in measured.tables else []
    said += [f"*{name}*: {why}." for name, why in measured.refused.items()]
    return "\n\n".join(said)


def _method_told(row) -> str:
    return (f"*{row.method}* ({row.parametrization.replace('mup', 'μP').replace('sp', 'SP')}) predicts a rate of {row.best_guess:.4f} for "
            f"the target, {row.octaves:+.2f} octaves from its best (sd {row.octaves_sd:.2f}), and loses {row.regret:.4f} nats by it; its "
            f"search took {row.search_flops:.2e} FLOPs.")


def _steady_told(table: pd.DataFrame) -> str:
    widest = table[(table.kind == "") & (table.width == table.width.max())]
    parts = [f"{scaling}: {own.spikes.mean():.1f} spikes, a largest attention logit of {own.attention_logit_max.mean():.1f} and an "
             f"effective rank of {own.feature_rank.mean():.1f}" for scaling, own in widest.groupby("scaling")]
    return f"At width {int(table.width.max())}, over all rates, a run has on average – " + "; ".join(parts) + "."


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table without what its other columns say."""
    return table[[c for c in table if c not in ("run_id", "arm", "flops", "rates")]]

