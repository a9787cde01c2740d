"""Study 03, averages instead of a cooldown: SWA, LAWA and EMA of a constant rate's weights, and Schedule-Free AdamW.

Papers: Hägele et al. 2405.18392 (SWA over windows, Schedule-Free), Sanyal et al. 2306.03241 (LAWA), Defazio et al. 2405.15682.

Trunks, cosines and cooldowns are study 02's own runs. Windows and horizons of averages are chosen on one half of the validation
documents (A) and every loss is reported on the other (B). Schedule-Free AdamW has the rates that pilot seeds chose.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding
from etastar.analysis.controls import Control
from etastar.analysis.power import power_table
from etastar.engine.read_outs import read_averages
from etastar.observe import Observe
from etastar.recipe import Recipe, ScheduleFreeAdamW
from etastar.schedules import Constant
from etastar.studies import cooldown
from etastar.studies import measured as common
from etastar.studies.cooldown import Cell
from etastar.studies.designs import COOLDOWN, CooldownDesign
from etastar.studies.measured import Contrast, Measurements, chosen_on_others, minus

STUDY = "03_averaging"
achieved_power = common.achieved_power
BOWL_ARMS = ("constant", "cos10", "linear 20 %", "swa")  # where there are runs at several rates
COUNTS = (1, 2, 4, 8)  # windows that SWA and LAWA may span
READ_OUTS = ("swa", "lawa", "ema")
WORSE, BETTER = (0.9, 0.95), (0.95, 0.99)  # betas of 2405.18392 §4.2
NO_WARMUP = ", no warm-up"
design = cooldown.design


# -- recipes -----------------------------------------------------------------------------------------------------------


def schedule_free(plan: CooldownDesign, betas: tuple[float, float], peak_lr: float, seed: int, warmup: bool = True) -> Recipe:
    """A Schedule-Free run over the horizon at a constant rate."""
    decay, clip = plan.optimizer.weight_decay, plan.optimizer.clip_norm
    optimizer = ScheduleFreeAdamW(beta1=betas[0], beta2=betas[1], weight_decay=decay, clip_norm=clip)
    return plan.recipe(Constant(warmup_steps=plan.warmup_steps if warmup else 0), peak_lr, plan.horizon_tokens, seed, optimizer=optimizer)


def schedule_free_recipes(plan: CooldownDesign) -> list[Recipe]:
    """All Schedule-Free runs: every pair of betas at its rates, and the better pair without a warm-up at the middle one of its."""
    made = [schedule_free(plan, betas, 2.0**rate, seed)
            for betas, rates in plan.schedule_free for rate in rates for seed in plan.some_seeds]
    rates = dict(plan.schedule_free)[BETTER]
    return made + [schedule_free(plan, BETTER, 2.0 ** rates[len(rates) // 2], seed, warmup=False) for seed in plan.some_seeds]


def cooldown_cells(plan: CooldownDesign) -> list[Cell]:
    """Cosine and the cooled-down: a bowl each, more seeds at the chosen rates, and half the horizon for the slope in tokens."""
    full, every, few = plan.horizon_tokens, tuple(plan.all_seeds), tuple(plan.seeds)
    return [Cell("cos10", (plan.cosine_rate,), full, every), Cell("linear 20 %", (plan.middle,), full, every),
            Cell("linear 20 %", (plan.middle,), full // 2, every),
            *(Cell(arm, tuple(plan.grid), full, few) for arm in ("cos10", "linear 20 %") if plan.full)]


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to; ValueError for a recipe of another study."""
    if not isinstance(recipe.optimizer, ScheduleFreeAdamW):
        return cooldown.arm_of(recipe)
    return named(recipe.optimizer.beta1, recipe.optimizer.beta2) + ("" if recipe.schedule.warmup_steps else NO_WARMUP)


def named(beta1: float, beta2: float) -> str:
    """The arm of a pair of betas."""
    return f"schedule-free {beta1:g}/{beta2:g}"


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, each once."""
    plan = design(preset, minutes)
    cells = [*cooldown.observed_cells(plan), *cooldown_cells(plan)]
    return cooldown.recipes_of(plan, cells) + schedule_free_recipes(plan)


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks; runs whose averages are read out come first, and tuned arms at an edge are extended."""
    from etastar.engine.execute import run as train

    plan = design(preset, minutes)
    made = cooldown.train_observed(plan, store, **options)
    evaluated = [r for r in schedule_free_recipes(plan) if arm_of(r) in (named(*WORSE), named(*BETTER))]
    made += train(evaluated, store=store, observe=Observe(val_every_tokens=plan.evaluation_tokens), **options)
    made += train(schedule_free_recipes(plan), store=store, **options)
    return made + common.train(cooldown.recipes_of(plan, cooldown_cells(plan)), arm_of, ("cos10", "linear 20 %"), store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs, read=read_averages) -> Measurements:
    """What the runs say, on half B of validation; `tables` has read_outs, chosen (on half A) and curves.

    The averages of a run are arms of their own: "swa", "lawa" and "ema" of the constant rate, "cos10 swa", "linear 20 % swa".
    """
    runs = list({r.run_id: r for r in reversed(runs)}.values())[::-1]  # a run given twice is the one observed first
    frame = common.losses(runs, arm_of, _half_b)
    averages = read_outs(runs, read)
    chosen = choose_spans(averages)
    frame = pd.concat([frame, _averaged_rows(averages, chosen)], ignore_index=True)
    horizon = int(frame[frame.arm == "constant"].horizon_tokens.max())
    first = next(r.recipe for r in runs if r.recipe.horizon_tokens == horizon)
    several = frame[frame.horizon_tokens == horizon].groupby("arm").peak_lr.nunique()
    bowls = {arm: (arm, horizon) for arm in BOWL_ARMS if several[arm] >= 3}
    curves = evaluation_curves(runs)
    m = common.measure(frame, first, bowls, ("linear 20 %", horizon), lambda m: (
        _averages(m, averages) | _schedule_free(m) | _curves(curves)))
    return dataclasses.replace(m, tables={"read_outs": averages, "chosen": chosen, "curves": curves})


def _half_b(r) -> float:
    return r.halves()["val_loss_b"] if r.status == "done" else float("nan")


def read_outs(runs, read=read_averages) -> pd.DataFrame:
    """Every average of every observed run: arm, peak_lr, seed, read_out, span (share of the run), windows, val_loss_a, val_loss_b, …"""
    observed = {r.run_id: r for r in runs if r.status == "done" and r.observed.averages}
    found = read(list(observed.values()), COUNTS)
    recipes = [observed[run_id].recipe for run_id in found.run_id]
    span = found.horizon_tokens.astype(float).fillna(found.to_tokens - found.from_tokens + [r.batch_tokens for r in recipes])
    told = found.assign(arm=[arm_of(r) for r in recipes], peak_lr=[r.peak_lr for r in recipes], seed=[r.seed for r in recipes],
                        run_tokens=[r.horizon_tokens for r in recipes], span=span / [r.horizon_tokens for r in recipes])
    return told[told.read_out != "final"].reset_index(drop=True)


def choose_spans(read: pd.DataFrame) -> pd.DataFrame:
    """The span of each kind of average that is best on half A, by arm and rate, over all seeds: arm, peak_lr, read_out, span."""
    mean = read.groupby(["arm", "peak_lr", "read_out", "span"], as_index=False).val_loss_a.mean()
    return mean.loc[mean.groupby(["arm", "peak_lr", "read_out"]).val_loss_a.idxmin(), ["arm", "peak_lr", "read_out", "span"]]


def _averaged_rows(read: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """The chosen averages as runs of a frame of Measurements, with their losses on half B."""
    best = read.merge(chosen, on=["arm", "peak_lr", "read_out", "span"])
    names = np.where(best.arm == "constant", best.read_out, best.arm + " " + best.read_out)
    return pd.DataFrame({"arm": names, "peak_lr": best.peak_lr, "seed": best.seed, "horizon_tokens": best.run_tokens,
                         "loss": best.val_loss_b, "status": "done", "run_id": best.run_id + "/" + best.read_out})


def _averages(m: Measurements, read: pd.DataFrame) -> dict[str, Contrast]:
    trunk, cosine = m.rate_of("linear 20 % swa"), m.rate_of("cos10 swa")
    constant, swa, cooled = (m.at(arm, trunk) for arm in ("constant", "swa", "linear 20 %"))
    last = read[(read.arm == "linear 20 %") & (read.read_out == "swa") & (read.windows == 1)].set_index("seed").val_loss_b.sort_index()
    averages = {"cos10 swa − cos10": minus(m.at("cos10 swa", cosine), m.at("cos10", cosine)), "ema − swa": minus(m.at("ema", trunk), swa),
                "lawa − swa": minus(m.at("lawa", trunk), swa), "linear 20 % averaged − linear 20 %": minus(last, cooled)}
    tuned = {"swa − linear 20 %": minus(swa, cooled), "swa − cos10": minus(swa, m.at("cos10", cosine))}
    share = minus(constant, swa) / minus(constant, cooled)
    return {name: Contrast(d.to_numpy()) for name, d in tuned.items()} | {
        name: Contrast(d.to_numpy(), family="averages") for name, d in averages.items()} | {
        "share recovered": Contrast(share.to_numpy(), "share")}


def _schedule_free(m: Measurements) -> dict[str, Contrast]:
    arms = [arm for arm in dict.fromkeys(m.frame.arm) if arm.startswith("schedule-free") and not arm.endswith(NO_WARMUP)]
    tuned = pd.DataFrame({arm: chosen_on_others(m.frame[m.frame.arm == arm].pivot_table(index="seed", columns="peak_lr", values="loss"))
                          for arm in arms})
    found = {f"{named(*WORSE)} − {named(*BETTER)}": tuned[named(*WORSE)] - tuned[named(*BETTER)]}
    found["linear 20 % − schedule-free"] = minus(m.judged("linear 20 %"), chosen_on_others(tuned))
    without = m.frame[m.frame.arm == named(*BETTER) + NO_WARMUP]
    found["schedule-free: warm-up − none"] = m.at(named(*BETTER), without.peak_lr.iloc[0]) - m.at(named(*BETTER) + NO_WARMUP)
    square = {(b1, b2): tuned.get(named(b1, b2)) for b1 in (0.9, 0.95) for b2 in (0.95, 0.99)}
    if all(column is not None for column in square.values()):
        found["schedule-free: β1 0.95 − 0.9"] = (square[0.95, 0.95] + square[0.95, 0.99] - square[0.9, 0.95] - square[0.9, 0.99]) / 2
        found["schedule-free: β2 0.99 − 0.95"] = (square[0.9, 0.99] + square[0.95, 0.99] - square[0.9, 0.95] - square[0.95, 0.95]) / 2
    return {name: Contrast(d.to_numpy(), family="schedule-free") for name, d in found.items()}


def evaluation_curves(runs) -> pd.DataFrame:
    """Losses on all validation documents along runs that were evaluated on the way: arm, peak_lr, seed, tokens, val_loss (nats)."""
    parts = [r.curve.dropna(subset="val_loss")[["tokens", "val_loss"]].assign(
        arm=arm_of(r.recipe), peak_lr=r.recipe.peak_lr, seed=r.recipe.seed)
        for r in runs if r.status == "done" and r.observed.val_every_tokens]
    return pd.concat(parts, ignore_index=True)


def _curves(curves: pd.DataFrame) -> dict[str, Contrast]:
    """The rise at the end and the unsteadiness of evaluation curves, an arm with several rates at the one amid them."""
    worse, better, constant = (_wide(curves, arm) for arm in (named(*WORSE), named(*BETTER), "constant"))
    rise = worse.iloc[:, -1] - worse.iloc[:, -2]
    steadier = np.log2(scatter(better) / scatter(constant)).dropna()
    return {"schedule-free 0.9/0.95: rise at the end": Contrast(rise.to_numpy(), family="curve"),
            "scatter: schedule-free over constant": Contrast(steadier.to_numpy(), "octaves")}


def _wide(curves: pd.DataFrame, arm: str) -> pd.DataFrame:
    rows = curves[curves.arm == arm]
    rates = sorted(rows.peak_lr.unique())
    return rows[rows.peak_lr == rates[len(rates) // 2]].pivot_table(index="seed", columns="tokens", values="val_loss")


def scatter(wide: pd.DataFrame, last: int = 4) -> pd.Series:
    """Root mean square about a straight line of the last evaluations of each seed (nats)."""
    tail = wide.iloc[:, -last:]
    x = tail.columns.to_numpy(dtype=float)
    x = (x - x.mean()) / x.max()
    return tail.apply(lambda y: float(np.sqrt(np.mean((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2))), axis=1)


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    "averaging_recovers_share": "share recovered", "swa_short_of_cooldown": "swa − linear 20 %", "swa_short_of_cos10": "swa − cos10",
    "schedule_free_short_of_cooldown": "linear 20 % − schedule-free", "cosine_averaged_gains": "cos10 swa − cos10",
    "averaging_after_cooldown_hurts": "linear 20 % averaged − linear 20 %", "ema_worse_than_swa": "ema − swa",
    "lawa_beats_swa": "lawa − swa", "schedule_free_betas_matter": f"{named(*WORSE)} − {named(*BETTER)}",
    "schedule_free_rises_at_the_end": "schedule-free 0.9/0.95: rise at the end",
    "schedule_free_wants_warmup": "schedule-free: warm-up − none",
    "schedule_free_is_steadier": "scatter: schedule-free over constant",
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the logs' findings."""
    return common.judge(STUDY, CONTRASTS, measured, COOLDOWN)


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths, on these very runs; none where the runs are too small to count."""
    return common.controls(measured, STUDY, "schedule_free_short_of_cooldown", "swa_short_of_cooldown", CONTRASTS["swa_short_of_cooldown"])


# -- figures and words -------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: bowls, averages by span, evaluation curves, differences by seed, and the verdicts where there are any."""
    m = measured
    at, read, made = m.frame[m.frame.horizon_tokens == m.horizon_tokens], m.tables["read_outs"], {}
    if bowls := [*m.bowls, *m.refused]:
        made["bowls"] = plots.lr_bowls(at[at.arm.isin(bowls)], m.bowls)
    trunk = m.rate_of("linear 20 % swa")
    here = read[(read.arm == "constant") & (read.peak_lr == trunk)].rename(columns={"val_loss_b": "loss"})
    here = here[~((here.read_out == "lawa") & (here.windows == 1)).fillna(False)]  # one checkpoint is no average
    rates = {"constant": trunk, "cos10": m.rate_of("cos10 swa"), "linear 20 %": trunk}
    references = {arm: float(m.at(arm, lr).mean()) for arm, lr in rates.items()}
    made["averages"] = plots.averaging_spans(here, references)
    made["evaluation_curves"] = plots.loss_curves(m.tables["curves"])
    made["differences"] = plots.paired_differences(common.difference_rows(m))
    return common.with_verdicts(made, board)


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("averages", "evaluation_curves", "differences"))


def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return common.machinery_only(measured)
    said = [common.runs_told(measured), *common.bowls_told(measured)]
    chosen = measured.tables["chosen"]
    here = chosen[(chosen.arm == "constant") & (chosen.peak_lr == measured.rate_of("linear 20 % swa"))]
    said.append("Best on half A at the middle rate: "
                + ", ".join(f"{row.read_out} over {row.span:.1%} of the run" for row in here.itertuples()) + ".")
    said += [common.contrast_told(measured, name) for name in measured.contrasts if not name.startswith("lr:")]
    return "\n\n".join(said)


# -- what a preset spends ----------------------------------------------------------------------------------------------


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)
    every, some = len(plan.all_seeds), len(plan.some_seeds)
    rows = [("swa − linear 20 %", every, 2, 1.2, plan.branch_sd_nats), ("swa − cos10", every, 2, 2.0, plan.sd_nats),
            ("linear 20 % − schedule-free", some, len(plan.schedule_free) + 1, len(plan.schedule_free) + 1.0, plan.sd_nats),
            ("lawa − swa", every, 1, 1.0, plan.branch_sd_nats)]
    return power_table([{"contrast": name, "runs": runs * seeds, "seeds": seeds, "tokens": round(seeds * share * plan.horizon_tokens),
                         "sd": sd, "slope": plan.slope_nats} for name, seeds, runs, share, sd in rows])
