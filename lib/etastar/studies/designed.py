"""The law-designed schedule put to the test (arXiv 2503.12811): a law from two pilot curves, its design, and rivals at tuned peaks.

Pilot seeds give the curves, cosine to 10 % and WSD at the rate they found best for cooldowns; the multi-power law fitted to these designs
a schedule for each peak. Verdict seeds train it beside WSD (linear 20 %), a line to zero, the Power schedule under the same cooldown and
1/√s with an average of its weights. Losses are those of validation half B, averages are chosen on half A, and a seed is judged at the
peak that the other seeds chose. No registered claim hangs on it: the law has two curves at one peak, and speaks of others unasked.
"""

import dataclasses

import pandas as pd

from etastar.analysis.designed_schedule import DesignedSchedule, curve_of, design_schedule
from etastar.analysis.paired import compare
from etastar.analysis.schedule_laws import MultiPowerLaw, fit_multi_power_law
from etastar.engine.read_outs import read_averages
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.schedules import WSD, Cosine, InverseSqrt, LinearToZero, Power, Schedule, Table
from etastar.studies import measured as common
from etastar.studies.averaging import COUNTS, choose_spans
from etastar.studies.designs import COOLDOWN, CooldownDesign
from etastar.studies.power_law_design import POWER_B

DESIGNED, REFERENCE, LINE, POWER, AVERAGED = ARMS = ("designed", "linear 20 %", "linear to zero", "power", "1/√s averaged")
ARM_OF = {Table: DESIGNED, WSD: REFERENCE, LinearToZero: LINE, Power: POWER, InverseSqrt: AVERAGED}
PILOTS, FIRST_SEED = (1, 2, 3), 7000
OFFSETS = (-0.75, 0.0, 0.75)  # octaves about the pilots' best cooldown rate
EVALUATIONS, APART = 32, 8  # of a pilot run, and the least steps between two
SKIPPED = 0.09  # of a curve: the paper's begin with the end of warm-up, step 2160 of 24,000 in the shorter ones
CAPPED = 0.2  # of the tokens: what a Power schedule spends at its cap
HIGHER = 1.5  # octaves: 1/√s falls from its first steps on and is two octaves below its peak and more half-way


def _plan(preset: str, seed_count: int, minutes: float) -> CooldownDesign:
    return dataclasses.replace(COOLDOWN[preset], first_seed=FIRST_SEED, seed_count=seed_count, more_seeds=0, offsets=OFFSETS,
                               ema_shares=(1 / 8, 1 / 4), minutes=minutes)


PRESETS = {"smoke": _plan("smoke", 2, 1.0), "cpu": _plan("cpu", 4, 7.0), "night": _plan("night", 12, 60.0)}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was fitted, designed, trained and found.

    `curves` are the pilots' (curve, step, lr, val_loss in nats, a mean over seeds), `designs` the law's schedules by peak, `frame` the
    runs (arm, peak_lr, seed, loss in nats on half B, status, predicted, average), `table` what `summarize` makes of them.
    """

    designs: dict[float, DesignedSchedule]
    curves: pd.DataFrame
    frame: pd.DataFrame
    table: pd.DataFrame

    @property
    def design(self) -> DesignedSchedule:
        """The design at the peak that was best for it."""
        return self.designs[float(self.table.set_index("arm").best_peak_lr[DESIGNED])]


def trial(preset: str, store="runs", **options) -> Trial:
    """Fit, design, train what `store` lacks, and compare; `options` are those of `es.run`.

    An arm that is best at the edge of its peaks gets another, twice at most; the designed arm is designed anew for it.
    Raises ValueError for a preset without a plan and for a pilot run that diverged.
    """
    if preset not in PRESETS:
        raise ValueError(f"the trial of the designed schedule has no preset {preset!r}; known: {', '.join(PRESETS)}")
    plan = PRESETS[preset]
    curves = pilot_curves(plan, store, **options)
    law = fit(curves)
    designs, runs, wanted = {}, [], [(arm, lr) for arm in ARMS for lr in peaks(plan, arm)]
    for _ in range(3):  # the peaks as planned, and two extensions
        designs |= {lr: design_schedule(law, plan.horizon_steps, lr, plan.warmup_steps) for arm, lr in wanted if arm == DESIGNED}
        runs += _train(plan, [recipe(plan, arm, lr, seed, designs) for arm, lr in wanted for seed in plan.seeds], store, **options)
        frame = frame_of(runs, law)
        wanted = sorted({(arm_of(r), r.peak_lr) for r in common.beyond_edges(runs, frame, ARMS)})
        if not wanted:
            break
    return Trial(designs, curves, frame, summarize(frame))


def pilot_curves(plan: CooldownDesign, store="runs", **options) -> pd.DataFrame:
    """Validation curves of the two pilot schedules at the plan's middle rate, means over seeds: curve, step, lr, val_loss.

    Raises ValueError where one diverged.
    """
    from etastar.engine.execute import run

    schedules = {"cosine to 10 %": Cosine(floor=0.1, warmup_steps=plan.warmup_steps), REFERENCE: _rival(plan, REFERENCE, plan.middle)}
    recipes = [plan.recipe(s, plan.middle, plan.horizon_tokens, seed) for s in schedules.values() for seed in PILOTS]
    every = max(APART, plan.horizon_steps // EVALUATIONS) * plan.batch_tokens
    made = run(recipes, store=store, observe=Observe(val_every_tokens=every), **options)
    if lost := [r.run_id for r in made if r.status != "done"]:
        raise ValueError(f"pilot runs {', '.join(lost)} diverged at a peak rate of {plan.middle:.3g}: no law to fit; take a lower one")
    parts = pd.concat([r.curve.assign(curve=list(schedules)[n // len(PILOTS)]) for n, r in enumerate(made)])
    return parts.groupby(["curve", "step"], as_index=False, sort=False).agg({"lr": "first", "val_loss": "mean"})


def fit(curves: pd.DataFrame) -> MultiPowerLaw:
    """The law of the curves (curve, step, lr, val_loss), their first part left out."""
    triples = []
    for _, curve in curves.groupby("curve", sort=False):
        rates, steps, losses = curve_of(curve)
        kept = steps >= SKIPPED * len(rates)
        triples.append((rates, steps[kept], losses[kept]))
    return fit_multi_power_law(triples, block=max(1, int(curves.step.max()) // 128), every=1)


def peaks(plan: CooldownDesign, arm: str) -> list[float]:
    """Peak rates of an arm: the plan's grid, for Power its caps above that grid, for 1/√s the grid moved up."""
    return [lr * {POWER: CAPPED**POWER_B, AVERAGED: 2.0**HIGHER}.get(arm, 1.0) for lr in plan.grid]


def recipe(plan: CooldownDesign, arm: str, peak_lr: float, seed: int, designs) -> Recipe:
    """One run of an arm; `designs` has each peak's, rounded to 1e-5 of it: threads of the algebra move a design by some 1e-10."""
    schedule = Table(tuple((designs[peak_lr].rates / peak_lr).round(5).tolist())) if arm == DESIGNED else _rival(plan, arm, peak_lr)
    return plan.recipe(schedule, peak_lr, plan.horizon_tokens, seed)


def _rival(plan: CooldownDesign, arm: str, peak_lr: float) -> Schedule:
    warmup, cooldown = {"warmup_steps": plan.warmup_steps}, {"cooldown_fraction": 0.2, "shape": "linear"}
    if arm == POWER:  # at its cap for CAPPED of the tokens, and so down to the plan's own grid at the horizon, but for the cooldown
        sequence, capped = plan.model.context, CAPPED * plan.horizon_tokens
        return Power(a=peak_lr * sequence / plan.batch_tokens * capped**-POWER_B, b=POWER_B, sequence_tokens=sequence, **warmup, **cooldown)
    return {REFERENCE: WSD(**warmup, **cooldown), LINE: LinearToZero(**warmup), AVERAGED: InverseSqrt(**warmup)}[arm]


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to, by its schedule."""
    return ARM_OF[type(recipe.schedule)]


def _train(plan: CooldownDesign, recipes, store, **options) -> list:
    from etastar.engine.execute import run

    horizons = tuple(round(share * plan.horizon_tokens) for share in plan.ema_shares)
    averages = Observe(average_every_tokens=plan.window_tokens, ema_horizon_tokens=horizons)
    parts = ([r for r in recipes if arm_of(r) != AVERAGED], None), ([r for r in recipes if arm_of(r) == AVERAGED], averages)
    return [made for part, observe in parts if part for made in run(part, store=store, observe=observe, **options)]


def frame_of(runs, law: MultiPowerLaw, read=read_averages) -> pd.DataFrame:
    """One row a run: arm, peak_lr, seed, loss (nats, half B; NaN diverged), status, predicted (nats), average (what was read out).

    The law's prediction is of a run's last loss on all of validation at the pilots' seeds, and of no average.
    """
    done = [r for r in runs if r.status == "done"]
    chosen = averages_chosen([r for r in done if arm_of(r.recipe) == AVERAGED], read)
    losses = {r.run_id: r.halves()["val_loss_b"] for r in done} | chosen.val_loss_b.to_dict()
    predicted = {r.run_id: law.predict(r.recipe.lr(), [r.recipe.total_steps - 1])[0] for r in runs if arm_of(r.recipe) != AVERAGED}
    frame = common.losses(runs, arm_of, lambda r: losses.get(r.run_id, float("nan")))
    return frame.assign(predicted=frame.run_id.map(predicted).astype(float), average=frame.run_id.map(chosen.span.to_dict()))


def averages_chosen(runs, read=read_averages) -> pd.DataFrame:
    """Of all averages of runs, the kind and span best on half A over the seeds of a peak: run_id → span (as "swa 4"), val_loss_b."""
    if not runs:
        raise ValueError(f"no run of {AVERAGED} was trained to the end: there is nothing to average; give lower peaks")
    found, rates = read(list(runs), COUNTS).query("read_out != 'final'"), {r.run_id: r.recipe.peak_lr for r in runs}
    named = found.read_out + " " + found.windows.fillna(found.horizon_tokens).astype(str)
    told = found.assign(arm=AVERAGED, peak_lr=found.run_id.map(rates), span=named, read_out="average")
    return told.merge(choose_spans(told), on=["arm", "peak_lr", "read_out", "span"]).set_index("run_id")[["span", "val_loss_b"]]


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """By arm: best_peak_lr over all seeds and whether it is an edge, then losses at the peak the other seeds chose.

    `loss` is their mean (nats), `difference` that to WSD's paired over seeds with Student's 95 % interval (low, high) and `verdict`;
    `predicted` is the law's at best_peak_lr. Raises ValueError for an arm without a peak at which every seed was trained to the end.
    """
    tables = {arm: rows.pivot(index="seed", columns="peak_lr", values="loss") for arm, rows in frame.groupby("arm", sort=False)}
    if lost := [arm for arm, loss in tables.items() if loss.isna().any().all()]:
        raise ValueError(f"{', '.join(lost)}: some seed is missing or diverged at every peak; give lower ones")
    tuned = {arm: common.chosen_on_others(loss) for arm, loss in tables.items()}
    rows = []
    for arm, loss in tables.items():
        best = loss.mean(skipna=False).idxmin()
        row = {"arm": arm, "best_peak_lr": best, "edge": best in (loss.columns[0], loss.columns[-1]), "seeds": len(loss),
               "loss": tuned[arm].mean(skipna=False), "predicted": frame[(frame.arm == arm) & (frame.peak_lr == best)].predicted.mean()}
        rows.append(row | (_against(tuned[REFERENCE], tuned[arm]) if arm != REFERENCE else {}))
    table = pd.DataFrame(rows)
    return table.assign(predicted_difference=table.predicted - table.predicted[table.arm == REFERENCE].item())


def at_equal_peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """Differences to WSD over the same seeds at the same peak: arm, peak_lr, difference, low, high, verdict, predicted_difference (nats).

    Closer to the paper, which has one peak for all, and quieter than `summarize`, but no arm is tuned. Peaks that WSD lacks are left out.
    """
    pairs = frame.merge(frame[frame.arm == REFERENCE], on=["peak_lr", "seed"], suffixes=("", "_of_wsd"))
    return pd.DataFrame([{"arm": arm, "peak_lr": lr, **_against(rows.loss_of_wsd, rows.loss),
                          "predicted_difference": (rows.predicted - rows.predicted_of_wsd).mean()}
                         for (arm, lr), rows in pairs[pairs.arm != REFERENCE].groupby(["arm", "peak_lr"], sort=False)])


def _against(reference: pd.Series, loss: pd.Series) -> dict:
    found = compare(loss.to_numpy(), reference[loss.index].to_numpy())
    return {"difference": found.difference, "low": found.difference_low, "high": found.difference_high, "verdict": found.verdict}
