"""Study 01, cosine against WSD: same loss at equal tokens? which floor? which learning rate? which cycle length?

Papers: Hägele et al. 2405.18392 (WSD against cosine to 10 %, LR ratio, floor), Hoffmann et al. 2203.15556 App. D (cosine
cycle length), Hu et al. 2404.06395 (MiniCPM: branches of one trunk against a fresh cosine each).

Arms share seeds: the same initial parameters and the same data order, so that every difference is paired. Each arm has
its own LR bowl per seed; a seed is judged at the vertex of the other seeds' bowls, read off its own bowl.
"""

import numpy as np
import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.bowl import cross_fitted
from etastar.analysis.claims import Finding
from etastar.analysis.controls import Control
from etastar.analysis.power import power_table
from etastar.recipe import Recipe
from etastar.schedules import WSD, Cosine
from etastar.studies import measured as common
from etastar.studies.designs import COSINE_VS_WSD, CycleDesign
from etastar.studies.measured import Contrast, Measurements, minus

STUDY = "01_cosine_vs_wsd"
achieved_power = common.achieved_power
BOWL_ARMS = ("cos10", "cos0", "wsd20")
CYCLES = {  # cosine cycle length as a multiple of the run, and what follows a cycle that ends early
    "cycle_0.50_hold": (0.5, "hold"), "cycle_0.50_loop": (0.5, "loop"),
    "cycle_0.75_hold": (0.75, "hold"), "cycle_0.75_loop": (0.75, "loop"),
    "cycle_1.25": (1.25, "hold"), "cycle_2.00": (2.0, "hold"),
}


# -- recipes -----------------------------------------------------------------------------------------------------------


def schedule_of(arm: str, horizon_tokens: int, warmup_steps: int):
    """The schedule of an arm over a horizon."""
    if arm in ("cos10", "cos0"):
        return Cosine(floor=0.1 if arm == "cos10" else 0.0, warmup_steps=warmup_steps)
    if arm == "wsd20":
        return WSD(warmup_steps=warmup_steps, cooldown_fraction=0.2, shape="1-sqrt")
    share, after = CYCLES[arm]
    return Cosine(floor=0.1, warmup_steps=warmup_steps, cycle_tokens=round(share * horizon_tokens), after=after)


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to; ValueError for a recipe of another study."""
    for arm in (*BOWL_ARMS, *CYCLES):
        if schedule_of(arm, recipe.horizon_tokens, recipe.schedule.warmup_steps) == recipe.schedule:
            return arm
    raise ValueError(f"recipe {recipe.run_id} is no arm of study {STUDY}: {recipe.schedule}")


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, the primary claims' first."""
    plan = design(preset, minutes)
    full, half = plan.horizon_tokens, plan.horizon_tokens // 2
    made = [plan.recipe(schedule_of(arm, full, plan.warmup_steps), lr, full, seed)
            for arm in BOWL_ARMS for lr in plan.grid for seed in plan.seeds]
    made += [plan.recipe(schedule_of("wsd20", half, plan.warmup_steps), lr, half, seed)
             for lr in plan.grid for seed in plan.seeds]
    made += [plan.recipe(schedule_of(arm, full, plan.warmup_steps), plan.middle, full, seed)
             for arm in plan.cycles for seed in plan.seeds]
    for ratio in plan.branch_tokens_per_param:
        horizon = plan.tokens_per_param(ratio)
        made += [plan.recipe(schedule_of(arm, horizon, plan.warmup_steps), lr, horizon, seed)
                 for arm in ("cos10", "wsd20") for lr in plan.branch_grid for seed in plan.branch_seeds]
    return made


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks; where an arm's best rate is at the edge of its grid, the grid is extended, twice at most."""
    return common.train(recipes(preset, minutes), arm_of, BOWL_ARMS, store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs) -> Measurements:
    """What the runs say: bowls, losses at cross-fitted rates, differences by seed."""
    frame = common.losses(runs, arm_of)
    horizon = int(frame[frame.arm == "cos0"].horizon_tokens.max())
    first = next(r.recipe for r in runs if r.recipe.horizon_tokens == horizon)
    bowls = {arm: (arm, horizon) for arm in BOWL_ARMS} | {"wsd20 at half": ("wsd20", horizon // 2)}
    return common.measure(frame, first, bowls, ("wsd20", horizon), lambda m: _contrasts(m) | _branch_contrasts(m))


def _contrasts(m: Measurements) -> dict[str, Contrast]:
    found = {}
    for a, b in (("wsd20", "cos10"), ("cos0", "cos10"), ("wsd20", "cos0")):
        found |= common.between_tuned(m, a, b)
    for arm in CYCLES:
        cycle = m.frame[(m.frame.horizon_tokens == m.horizon_tokens) & (m.frame.arm == arm)]
        if len(cycle):
            found[f"{arm} − cos10"] = Contrast(minus(m.at(arm), m.at("cos10", cycle.peak_lr.iloc[0])).to_numpy())
    return found


def _branch_contrasts(m: Measurements) -> dict[str, Contrast]:
    """WSD branch minus fresh cosine at each horizon in tokens a parameter, each at its own cross-fitted or only rate."""
    found = {}
    for horizon, rows in m.frame.groupby("horizon_tokens"):
        ratio = round(horizon / m.params)
        if ratio not in (20, 40, 80) or abs(horizon / m.params - ratio) > 0.5:
            continue
        tuned = {arm: _at_best(rows[rows.arm == arm]) for arm in ("wsd20", "cos10")}
        seeds = [s for s in tuned["wsd20"] if s in tuned["cos10"]]
        if len(seeds) >= 2:
            found[f"branch {ratio}: wsd20 − cos10"] = Contrast(np.array([tuned["wsd20"][s] - tuned["cos10"][s] for s in seeds]),
                                                               horizon_tokens=int(horizon))
    return found


def _at_best(rows) -> dict:
    if rows.peak_lr.nunique() < 3:
        return dict(zip(rows.seed, rows.loss, strict=True)) if rows.peak_lr.nunique() == 1 else {}
    try:
        return {s: loss for s, (_, loss) in cross_fitted(rows.peak_lr, rows.loss, rows.seed).items()}
    except ValueError:
        return {}


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    "wsd20_matches_cos10": "wsd20 − cos10", "cos0_beats_cos10": "cos0 − cos10",
    "wsd_lr_half_of_cos0": "lr: wsd20 − cos0", "wsd_lr_half_of_cos10": "lr: wsd20 − cos10",
    **{f"{arm}_worse": f"{arm} − cos10" for arm in CYCLES},
    **{f"wsd_branch_no_worse_{ratio}": f"branch {ratio}: wsd20 − cos10" for ratio in (20, 40, 80)},
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the logs' findings."""
    return common.judge(STUDY, CONTRASTS, measured, COSINE_VS_WSD)


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths, on these very runs; none where the runs are too small to count."""
    return common.controls(measured, STUDY, "wsd20_matches_cos10", "cos0_beats_cos10", CONTRASTS["cos0_beats_cos10"])


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: the schedules, the bowls, the differences by seed, and the verdicts where there are any."""
    steps, batch = measured.steps, measured.horizon_tokens // measured.steps
    warmup = max(1, steps // 20)
    lines = {arm: schedule_of(arm, measured.horizon_tokens, warmup).lr(steps, peak_lr=1.0, batch_tokens=batch)
             for arm in (*BOWL_ARMS, *(a for a in CYCLES if a in set(measured.frame.arm)))}
    made = {"schedules": plots.schedule_lines(lines, batch, "learning rate, as a share of the peak")}
    at = measured.frame[(measured.frame.horizon_tokens == measured.horizon_tokens) & measured.frame.arm.isin(BOWL_ARMS)]
    made["bowls"] = plots.lr_bowls(at, {a: b for a, b in measured.bowls.items() if a in BOWL_ARMS})
    if len(rows := common.difference_rows(measured)):
        made["differences"] = plots.paired_differences(rows)
    return common.with_verdicts(made, board)


# -- what the notebook shows -------------------------------------------------------------------------------------------


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("schedules", "bowls"))


def design(preset: str, minutes: float | None = None) -> CycleDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return COSINE_VS_WSD[preset].scaled(minutes)


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)
    bowl_runs, seeds, tokens = len(plan.offsets) * plan.seed_count, plan.seed_count, plan.horizon_tokens
    rows = [{"contrast": name, "runs": 2 * bowl_runs, "seeds": seeds, "tokens": 2 * bowl_runs * tokens}
            for name in ("wsd20 − cos10", "cos0 − cos10")]
    rows += [{"contrast": f"{arm} − cos10", "runs": 2 * seeds, "seeds": seeds, "tokens": 2 * seeds * tokens} for arm in plan.cycles]
    branch_runs = 2 * len(plan.branch_offsets) * plan.branch_seed_count
    rows += [{"contrast": f"branch {ratio}: wsd20 − cos10", "runs": branch_runs, "seeds": plan.branch_seed_count,
              "tokens": branch_runs * plan.tokens_per_param(ratio)} for ratio in plan.branch_tokens_per_param]
    return power_table([row | {"sd": plan.sd_nats, "slope": plan.slope_nats} for row in rows])



def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return common.machinery_only(measured)
    said = [common.runs_told(measured), *common.bowls_told(measured)]
    said += [common.contrast_told(measured, name) for name in ("wsd20 − cos10", "cos0 − cos10") if name in measured.contrasts]
    said.append(f"Variance over seeds: {measured.pooled['tuned'].reason}.")
    return "\n\n".join(said)
