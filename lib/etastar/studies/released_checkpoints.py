"""Study 07, released checkpoints: download, verify, evaluate, measure; and the kit's own exported the same way.

Paper: Shen et al. 2408.13359 (PowerLM-3B, PowerMoE-3B). Live runs are small models of the same form: exported, they have to come back
with the same bits, be read by transformers to the same logits, and be scored by lm-evaluation-harness as our own decoder scores them.
The claims are about the released weights; they are judged where an evaluation of them is kept (`etastar eval`), and untested elsewhere.
"""

import dataclasses
import math

import pandas as pd
from scipy import stats

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding, load_claims, untested
from etastar.analysis.claims import judge as judge_claim
from etastar.analysis.controls import Control, not_run
from etastar.hub.released import load_released
from etastar.hub.scores import average, best_beside
from etastar.recipe import Recipe
from etastar.studies import measured as common
from etastar.studies.released_design import ARMS, RELEASED, ReleasedDesign
from etastar.studies.released_measures import CHANCE, Checkpoints, commands, downloads, measure_exports, printed_scores

STUDY = "07_released_checkpoints"
HAND = 1e-3  # points of accuracy: an item in the harness and by hand is the same item
FALSE_ALARM = 0.001  # chance that the control of chance fails although all is well
__all__ = ["STUDY", "achieved_power", "arm_of", "commands", "controls", "design", "downloads", "figures", "interpretation", "judge",
           "measure", "power", "promised", "recipes", "run"]


# -- recipes -----------------------------------------------------------------------------------------------------------


def design(preset: str, minutes: float | None = None) -> ReleasedDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return RELEASED[preset].scaled(minutes)


def arm_of(recipe: Recipe) -> str:
    """"dense" or "mixture"."""
    return "mixture" if recipe.model.mixture else "dense"


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset: both forms at every seed."""
    plan = design(preset, minutes)
    return [plan.run_of(arm, seed) for arm in ARMS for seed in plan.seeds]


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks."""
    from etastar.engine.execute import run as train

    return train(recipes(preset, minutes), store=store, **options)


def measure(runs, folder, preset: str, minutes: float | None = None, evaluations=None, checkpoint: str = "") -> Checkpoints:
    """Export the runs below `folder` and measure the exports; see `measure_exports`."""
    return measure_exports(runs, design(preset, minutes), arm_of, folder, evaluations, checkpoint)


# -- verdicts and controls ---------------------------------------------------------------------------------------------


def judge(measured: Checkpoints) -> list[Finding]:
    """A finding for every claim: from a kept evaluation of all items of the released weights, untested without one."""
    return [judge_claim_of(claim, measured) for claim in load_claims(STUDY).values()]


def judge_claim_of(claim, measured: Checkpoints) -> Finding:
    """The finding for one claim about the released model that its first arm names."""
    model = claim.arms[0]
    told, kept = load_released()[model], measured.evaluations.get(model)
    if kept is None:
        return untested(claim, "live", f"no evaluation of {model} is kept here; `{told.command}` ({told.bytes_about / 1e9:.1f} GB) and "
                                       f"`etastar eval {model}` make it")
    if kept.settings["limit"] is not None:
        return untested(claim, "live", f"the evaluation kept is of the first {kept.settings['limit']} items of each task; "
                                       f"`etastar eval {model}` takes all")
    scored = average(kept.scores, model)
    if scored is None:
        return untested(claim, "live", f"the evaluation kept lacks one of the five benchmarks; `etastar eval {model}` takes all")
    if claim.kind == "no_worse":
        scored = dataclasses.replace(scored, value=best_beside(model)[1] - scored.value)
    return judge_claim(claim, scored, evidence="live", scale={}, matching=True)


def controls(measured: Checkpoints) -> list[Control]:
    """What has to hold of every export, whatever it scores; and a task without information is scored chance."""
    table = measured.table
    lost = float((table.val_loss_read_back - table.val_loss).abs().max())
    made = [Control("an export comes back with the run's bits", bool(table.bits_equal.all()),
                    f"{int(table.bits_equal.sum())} of {len(table)} exports, all weights"),
            Control("its validation loss is the run's", lost < 1e-6, f"largest difference {lost:.2g} nats per token")]
    if table.logits_gap.isna().any():
        made.append(not_run("transformers has our logits", "transformers is not installed"))
    else:
        made.append(Control("transformers has our logits", bool(table.readers_agree.all()),
                            f"largest difference {table.logits_gap.max():.2g}, of logits up to {table.largest_logit.max():.3g}"))
    return [*made, _harness_control(measured.cloze), _chance_control(measured.cloze)]


def _harness_control(cloze: pd.DataFrame) -> Control:
    name = "lm-evaluation-harness scores as our decoder does"
    wide = cloze.pivot_table(index=["arm", "seed"], columns="reader", values="accuracy")
    if "harness" not in wide:
        return not_run(name, "lm-evaluation-harness is not installed (extra `eval`)")
    gap = float((wide.harness - wide.hand).abs().max())
    return Control(name, gap < HAND, f"largest difference {gap:.2g} points of accuracy, {int(wide.harness.notna().sum())} exports")


def _chance_control(cloze: pd.DataFrame) -> Control:
    """Where the context is of another text, nothing tells the true continuation from the others, whatever the model has learned."""
    rows = cloze[cloze.reader == "placebo"]
    worst = float(((rows.accuracy - CHANCE).abs() / rows.se).max())
    bound = float(stats.norm.isf(FALSE_ALARM / 2 / len(rows)))
    return Control("after another text's start every model scores chance", worst < bound,
                   f"{len(rows)} exports, the farthest {worst:.2f} standard errors from {CHANCE:g} %, {bound:.2f} allowed")


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(measured: Checkpoints, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: norms by layer, accuracy and windows of the exports, printed scores with ours, verdicts."""
    ours = {model: kept.beside(model) for model, kept in measured.evaluations.items()}
    made = {"norms": plots.norms_by_layer(measured.norms), "cloze": plots.cloze_accuracy(measured.cloze, CHANCE),
            "windows": plots.window_losses(measured.windows), "printed_scores": plots.printed_scores(printed_scores(), ours)}
    return common.with_verdicts(made, board)


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("norms", "cloze", "windows", "printed_scores"))


# -- what the notebook shows -------------------------------------------------------------------------------------------


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """What the cloze task can show: runs, tokens, items, the standard error at chance and the smallest difference it could see."""
    plan = design(preset, minutes)
    se = 100 * math.sqrt(CHANCE / 100 * (1 - CHANCE / 100) / plan.items)
    rows = [{"contrast": f"{arm}: trained − untrained", "runs": plan.seed_count, "tokens": plan.seed_count * plan.horizon_tokens,
             "items": plan.items, "se_points": se, "detectable_points": 2.8 * math.sqrt(2) * se} for arm in ARMS]
    return pd.DataFrame(rows)


def achieved_power(measured: Checkpoints) -> pd.DataFrame:
    """Of the cloze scores: the standard error over items beside that over seeds, which the items know nothing of."""
    rows = []
    for arm in ARMS:
        own = measured.cloze[(measured.cloze.arm == arm) & (measured.cloze.reader == "hand")]
        rows.append({"arm": arm, "seeds": len(own), "accuracy": own.accuracy.mean(), "se_over_items": own.se.mean(),
                     "sd_over_seeds": own.accuracy.std(ddof=1)})
    return pd.DataFrame(rows)


def interpretation(measured: Checkpoints, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    said = [_export_told(measured), *(_arm_told(measured, arm) for arm in ARMS), _rates_told(measured)]
    return "\n\n".join([*said, *(_released_told(measured, model) for model in ARMS.values())])


def _export_told(m: Checkpoints) -> str:
    return (f"{len(m.table)} runs were exported and read back; {int(m.table.bits_equal.sum())} have the run's own bits. transformers "
            f"differs from our decoder by {m.table.logits_gap.max():.2g} at most, in logits of up to {m.table.largest_logit.max():.3g}.")


def _arm_told(m: Checkpoints, arm: str) -> str:
    own, windows = m.first(arm), m.windows[m.windows.arm == arm]
    cloze = m.cloze[(m.cloze.arm == arm) & (m.cloze.seed == own.seed)].set_index("reader")
    gain = windows.nats_per_token.iloc[0] - windows.nats_per_token.iloc[-1]
    head = m.norms[(m.norms.checkpoint == arm) & (m.norms.role == "output")].iloc[0]
    return (f"*{arm}*, of {ARMS[arm]}'s form: {own.params:,} parameters ({own.active:,} active), {own.tokens / 1e6:.3g}M tokens, "
            f"{own.val_loss:.3f} nats per token. It picks the true continuation of four in {cloze.accuracy['hand']:.1f} % of "
            f"{cloze['items']['hand']:.0f} items (± {cloze.se['hand']:.1f}), its untrained start in {cloze.accuracy['untrained']:.1f} %. "
            f"Windows that move by a quarter of the context change its perplexity by {math.expm1(-gain):+.1%} against windows side by "
            f"side. Its output layer ends with a norm of {head.norm:.3g} (RMS→∞), {head.norm / head.at_start:.2g} times that at its start.")


def _rates_told(m: Checkpoints) -> str:
    rows = m.rates.set_index("checkpoint").loc[list(ARMS.values())]
    return "The Power law for a WSD run of the same batch and tokens: " + "; ".join(
        f"{name} {row.wsd_peak_lr:.2g} ({row.low:.2g} … {row.high:.2g}), where its own schedule stands at {row.schedule_lr:.2g} when the "
        f"cooldown begins" for name, row in rows.iterrows()) + " (μP base rates)."


def _released_told(m: Checkpoints, model: str) -> str:
    if model not in m.evaluations:
        told = load_released()[model]
        return (f"*{model}* was not evaluated here. `{told.command}` brings about {told.bytes_about / 1e9:.2f} GB "
                f"({told.minutes_about(100):.0f} minutes at 100 Mbit/s), `etastar eval {model}` the scores.")
    rows = m.evaluations[model].beside(model)
    return f"*{model}*, evaluated here: " + "; ".join(
        f"{row.benchmark} {row.score:.1f} (printed {row.published:.1f}, {row.verdict})" for row in rows.itertuples()) + "."
