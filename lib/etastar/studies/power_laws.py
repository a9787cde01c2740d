"""Study 04, power laws: how the best learning rate goes with tokens, batch and width, and what the Power schedule makes of it.

Papers: Shen et al. 2408.13359 (Power scheduler), Bjorck et al. 2409.19913 (token horizon), Li et al. 2503.04715 (Step Law), Hu et al.
2404.06395 (MiniCPM).

All runs are μP; WSD cools down over a tenth of the tokens to 0, and horizons at one rate, batch and seed share a trunk. The valley of
the best rate is fitted in one piece per question (horizons at the main batch; batches at one horizon; widths), the seed being the
unit. Schedules at one setting are compared with WSD tuned, on other seeds, for each cell.
"""

import dataclasses
import math

import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding
from etastar.analysis.controls import Control
from etastar.analysis.known_truth import spine_recovers
from etastar.analysis.power import power_table
from etastar.recipe import Recipe
from etastar.studies import measured as common
from etastar.studies import power_law_measures as measures
from etastar.studies import power_laws_published as published
from etastar.studies.measured import Measurements
from etastar.studies.power_law_design import POWER_LAWS, PowerLawDesign
from etastar.studies.power_law_measures import AXES, COSINE, FIXED, LAW, POWER, Grid, arm_of, bowl_name, kind_of

STUDY = "04_power_laws"
achieved_power = common.achieved_power
PUBLISHED = {"horizon": {"Power scheduler": -0.51, "Bjorck et al.": -0.32, "no change": 0.0, "Step Law": 0.307},
             "batch": {"proportional": 1.0, "square root": 0.5}}


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, each once, the primary claims' first."""
    plan = design(preset, minutes)
    return list(dict.fromkeys(recipe for cell in plan.cells for recipe in plan.recipes(cell)))


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks; a bowl that is best at the edge of its grid is extended, twice at most."""
    wanted = recipes(preset, minutes)
    return common.train(wanted, arm_of, {arm_of(r) for r in wanted if kind_of(r).startswith("wsd")}, store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs) -> Measurements:
    """What the runs say; `tables` has vertices, exponents, local_slopes, predicted, regrets and sensitivity."""
    grid = Grid.of(runs)
    main, longest = f"wsd, batch {grid.main[0]}, width {grid.main[1]}", int(grid.along("horizon").horizon_tokens.max())

    def name_of(arm, tokens):
        return bowl_name(arm, tokens, main, longest)

    wsd = grid.frame[grid.frame.kind.str.startswith("wsd")]
    bowls = {name_of(arm, tokens): (arm, int(tokens)) for (arm, tokens), rows in wsd.groupby(["arm", "horizon_tokens"])
             if common.with_bowl(rows).peak_lr.nunique() >= 3}
    first = next(r.recipe for r in runs if (arm_of(r.recipe), r.recipe.horizon_tokens) == (main, longest))
    m = common.measure(grid.frame, first, bowls, (main, longest), lambda m: {})
    found, refused = measures.valleys(grid)
    slopes, ahead, turned = measures.token_slopes(m, main, longest), measures.predicted(grid), measures.sensitivity(grid)
    regret = measures.regrets(grid, m, slopes, name_of)
    contrasts = (measures.exponent_contrasts(grid, found, ahead) | measures.regret_contrasts(regret)
                 | measures.knob_contrasts(turned, abs(slopes.get(grid.knob_tokens, math.nan))))
    tables = {"vertices": measures.vertices(found), "exponents": measures.exponents(grid, found),
              "local_slopes": measures.local_slopes(grid), "predicted": ahead, "regrets": regret, "sensitivity": turned}
    tables |= {f"bowls_{axis}": grid.along(axis)[[AXES[axis], "peak_lr", "seed", "loss"]] for axis in found}
    return dataclasses.replace(m, contrasts=contrasts, refused=m.refused | refused, tables={k: t for k, t in tables.items() if len(t)})


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    **dict.fromkeys(("horizon_exponent", "horizon_exponent_bjorck", "horizon_moves_lr"), "horizon exponent"),
    "batch_exponent": "batch exponent", "lr_transfers_over_width": "lr: widest − narrowest",
    "exponent_predicts": "predicted − best at the longest", "batch_rule_turns_the_sign": "horizon exponent, batch growing",
    "power_beats_fixed_wsd": f"{POWER} − {FIXED}", "fixed_wsd_beats_fixed_cosine": f"{FIXED} − {COSINE}",
    "power_no_worse_than_law": f"{POWER} − {LAW}", "power_agnostic": "power − wsd, tuned: worst cell",
    "power_best_b": "best b", "power_flat_in_a": "a at the ends of 3 … 5", "power_b_matters_more_than_a": "b − a, an octave each",
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the logs' findings."""
    return common.judge(STUDY, CONTRASTS, measured, POWER_LAWS, lambda study: published.published_findings())


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths on these very runs, and simulated sweeps with a closed-form truth through the whole chain."""
    made = common.controls(measured, STUDY, "power_agnostic", "power_beats_fixed_wsd", CONTRASTS["power_beats_fixed_wsd"])
    return [*made, spine_recovers(seed=0)] if made else made


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: bowls and valleys by axis, local slopes, the prediction, regrets, knobs, verdicts."""
    tables, made = measured.tables, {}
    for axis in [a for a in AXES if f"bowls_{a}" in tables]:
        column = AXES[axis]
        cells = tables["vertices"].query("axis == @axis").rename(columns={"value": column})
        made[f"bowls_by_{axis}"] = plots.valley_bowls(tables[f"bowls_{axis}"], cells, column)
        made[f"best_lr_by_{axis}"] = plots.valley_lines(cells, _lines(tables["exponents"], axis), column)
    if "local_slopes" in tables:
        slopes = tables["local_slopes"][tables["local_slopes"].along.isin(list(PUBLISHED))]
        if len(slopes):
            named = {AXES[axis]: known for axis, known in PUBLISHED.items()}
            made["local_slopes"] = plots.local_slopes(slopes.assign(along=slopes.along.map(AXES)), named)
    if "regrets" in tables:
        made["regrets"] = plots.regrets(tables["regrets"])
    if "sensitivity" in tables:
        made["sensitivity"] = plots.power_sensitivity(tables["sensitivity"])
    return common.with_verdicts(made, board)


def _lines(exponents: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The fitted exponent of an axis and the published ones."""
    own = exponents[(exponents.along == axis) & (exponents.kind == "wsd")].iloc[0]
    rows = [{"name": "fitted", "exponent": own.exponent, "low": own.low, "high": own.high, "fitted": True, "published": False}]
    return pd.DataFrame(rows + [{"name": name, "exponent": e, "fitted": False, "published": True}
                                for name, e in PUBLISHED.get(axis, {}).items()])


# -- what the notebook shows -------------------------------------------------------------------------------------------


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("bowls_by_horizon", "best_lr_by_horizon"))


def design(preset: str, minutes: float | None = None) -> PowerLawDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return POWER_LAWS[preset].scaled(minutes)


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)
    cells = plan.cells
    bowls = [c for c in cells if c.kind == "wsd" and len(c.rates) > 2 and c.width == plan.model.width]
    horizons, batches = ([c for c in bowls if (c.batch_tokens == plan.batch_tokens) == main] for main in (True, False))
    one = [c for c in cells if c.kind in ("power", "cosine")]
    rows = [{"contrast": name, "runs": sum(len(c.rates) * len(c.seeds) for c in chosen), "seeds": len(chosen[-1].seeds),
             "tokens": sum(len(c.rates) * len(c.seeds) * c.horizon_tokens for c in chosen), "sd": sd, "slope": slope}
            for name, chosen, sd, slope in (("horizon exponent", horizons, plan.exponent_sd, math.nan),
                                            ("batch exponent", batches, plan.exponent_sd, math.nan),
                                            (f"{POWER} − {FIXED}", one, plan.sd_nats, plan.slope_nats)) if chosen]
    return power_table(rows)



def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return common.machinery_only(measured)
    said = [common.runs_told(measured)]
    for row in measured.tables["exponents"].itertuples():
        fold = f"{row.least:,.0f} … {row.most:,.0f}"
        said.append(f"Along the {row.along} ({AXES[row.along]} {fold}, *{row.kind}*) the best rate has exponent {row.exponent:+.3f} "
                    f"(95 %: {row.low:+.3f} … {row.high:+.3f}, {row.seeds} seeds, {row.cells} cells)."
                    + (f" Its slope changes by {row.slope_an_octave:+.3f} an octave (95 %: {row.slope_low:+.3f} … {row.slope_high:+.3f})."
                       if math.isfinite(getattr(row, "slope_an_octave", math.nan)) else ""))
    said += [common.contrast_told(measured, name) for name in measured.contrasts if name not in ("horizon exponent", "batch exponent")]
    said += [f"*{name}*: {why}." for name, why in measured.refused.items()]
    return "\n\n".join(said)
