"""Study 01, cosine against WSD: same loss at equal tokens? which floor? which learning rate? which cycle length?

Papers: Hägele et al. 2405.18392 (WSD against cosine to 10 %, LR ratio, floor), Hoffmann et al. 2203.15556 App. D (cosine
cycle length), Hu et al. 2404.06395 (MiniCPM: branches of one trunk against a fresh cosine each).

Arms share seeds: the same initial parameters and the same data order, so that every difference is paired. Each arm has
its own LR bowl per seed; a seed is judged at the vertex of the other seeds' bowls, read off its own bowl.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.bowl import Bowl, EdgeOptimum, cross_fitted, fit_bowl
from etastar.analysis.claims import Finding, load_claims, untested
from etastar.analysis.claims import judge as judge_claim
from etastar.analysis.controls import PLANTED, TRUTH, Control, aa_control, not_run, planted_control, truth_control
from etastar.analysis.paired import Estimate, PooledVariance, mean_estimate, pool_variance, token_equivalent, token_slope
from etastar.analysis.power import power_table, seeds_needed
from etastar.model.parametrization import count_parameters
from etastar.recipe import Recipe
from etastar.schedules import WSD, Cosine
from etastar.studies.designs import COSINE_VS_WSD, Design, scaled

STUDY = "01_cosine_vs_wsd"
BOWL_ARMS = ("cos10", "cos0", "wsd20")
CYCLES = {  # cosine cycle length as a multiple of the run, and what follows a cycle that ends early
    "cycle_0.50_hold": (0.5, "hold"), "cycle_0.50_loop": (0.5, "loop"),
    "cycle_0.75_hold": (0.75, "hold"), "cycle_0.75_loop": (0.75, "loop"),
    "cycle_1.25": (1.25, "hold"), "cycle_2.00": (2.0, "hold"),
}
LEAST_STEPS = 256  # shorter runs count for nothing
LEAST_SEEDS = 3


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
    matched = plan.grid[len(plan.offsets) // 2]
    made += [plan.recipe(schedule_of(arm, full, plan.warmup_steps), matched, full, seed)
             for arm in plan.cycles for seed in plan.seeds]
    for ratio in plan.branch_tokens_per_param:
        horizon = plan.tokens_per_param(ratio)
        made += [plan.recipe(schedule_of(arm, horizon, plan.warmup_steps), lr, horizon, seed)
                 for arm in ("cos10", "wsd20") for lr in plan.branch_grid for seed in plan.branch_seeds]
    return made


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks; where an arm's best rate is at the edge of its grid, the grid is extended, twice at most."""
    from etastar.engine.execute import run as train

    wanted = recipes(preset, minutes)
    for _ in range(3):  # the grid as planned, and two extensions
        runs = train(wanted, store=store, **options)
        more = _extension(runs)
        if not more:
            break
        wanted += more
    return runs


def _extension(runs) -> list[Recipe]:
    """Recipes one grid step beyond the edge, for every arm whose mean bowl has its best rate there."""
    frame, more = _frame(runs), []
    for _, rows in frame[frame.arm.isin(BOWL_ARMS)].groupby(["arm", "horizon_tokens"]):
        mean = rows.groupby("peak_lr").loss.mean()  # NaN where a seed diverged: no extension beyond that
        if len(mean) < 3 or mean.isna().all() or mean.idxmin() not in (mean.index[0], mean.index[-1]):
            continue
        step = mean.index[1] / mean.index[0]
        beyond = mean.index[0] / step if mean.idxmin() == mean.index[0] else mean.index[-1] * step
        by_id = {r.recipe.run_id: r.recipe for r in runs}
        more += [by_id[i].replace(peak_lr=float(beyond)) for i in rows[rows.peak_lr == mean.idxmin()].run_id]
    return more


# -- measurements ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Final losses of all runs and what follows from them; differences are arrays over seeds, in nats or octaves."""

    frame: pd.DataFrame
    horizon_tokens: int
    params: int
    steps: int
    bowls: dict[str, Bowl]
    refused: dict[str, str]
    tuned: dict[str, dict]
    slope: np.ndarray
    differences: dict[str, np.ndarray]
    pooled: PooledVariance

    @property
    def counts(self) -> bool:
        """Whether the runs are long and many enough for a verdict."""
        return self.steps >= LEAST_STEPS and self.frame.seed.nunique() >= LEAST_SEEDS

    @property
    def arms(self) -> pd.DataFrame:
        """One row an arm with a bowl: best rate with interval, loss there, curvature, how the fit was made."""
        return pd.DataFrame([{
            "arm": arm, "best_lr": b.best_lr, "low": b.best_lr_low, "high": b.best_lr_high, "log2_best_lr": b.best_log2_lr,
            "best_loss": b.best_loss, "nats_per_octave2": b.curvature, "degree": b.degree, "seeds": len(b.seeds),
        } for arm, b in self.bowls.items()])


def measure(runs) -> Measurements:
    """What the runs say: bowls, losses at cross-fitted rates, differences by seed."""
    frame = _frame(runs)
    main = frame[frame.arm.isin(["cos0"])]
    horizon = int(main.horizon_tokens.max())
    first = next(r.recipe for r in runs if r.recipe.horizon_tokens == horizon)
    params = count_parameters(first.model, first.corpus.vocab)["total"]
    bowls, refused, tuned = {}, {}, {}
    for name, arm, tokens in (*((a, a, horizon) for a in BOWL_ARMS), ("wsd20 at half", "wsd20", horizon // 2)):
        rows = frame[(frame.arm == arm) & (frame.horizon_tokens == tokens)]
        rows = rows[rows.groupby("peak_lr").seed.transform("nunique") == rows.seed.nunique()]
        try:
            bowls[name] = fit_bowl(rows.peak_lr, rows.loss, rows.seed)
            tuned[name] = cross_fitted(rows.peak_lr, rows.loss, rows.seed)
        except (EdgeOptimum, ValueError) as error:
            refused[name] = str(error)
    slope = _slope(tuned)
    differences = _differences(frame, horizon, bowls, tuned) | _branch_differences(frame, params)
    in_nats = [d for name, d in differences.items() if not name.startswith("lr:")]
    return Measurements(frame, horizon, params, first.total_steps, bowls, refused, tuned, slope, differences,
                        pool_variance(in_nats))


def _frame(runs) -> pd.DataFrame:
    return pd.DataFrame([{
        "arm": arm_of(r.recipe), "peak_lr": r.recipe.peak_lr, "seed": r.recipe.seed, "horizon_tokens": r.recipe.horizon_tokens,
        "loss": r.val_loss, "status": r.status, "run_id": r.run_id,
    } for r in runs]).drop_duplicates("run_id")


def _slope(tuned) -> np.ndarray:
    if "wsd20" not in tuned or "wsd20 at half" not in tuned:
        return np.array([])
    seeds = [s for s in tuned["wsd20"] if s in tuned["wsd20 at half"]]
    return token_slope([tuned["wsd20 at half"][s][1] for s in seeds], [tuned["wsd20"][s][1] for s in seeds], 2.0)


def _differences(frame, horizon, bowls, tuned) -> dict[str, np.ndarray]:
    found = {}
    for a, b in (("wsd20", "cos10"), ("cos0", "cos10"), ("wsd20", "cos0")):
        if a in tuned and b in tuned:
            found[f"{a} − {b}"] = np.array([tuned[a][s][1] - tuned[b][s][1] for s in tuned[a]])
            found[f"lr: {a} − {b}"] = np.array(bowls[a].vertices) - np.array(bowls[b].vertices)
    at = frame[frame.horizon_tokens == horizon]
    for arm in CYCLES:
        cycle = at[at.arm == arm].set_index("seed")
        if len(cycle):
            matched = at[(at.arm == "cos10") & (at.peak_lr == cycle.peak_lr.iloc[0])].set_index("seed")
            found[f"{arm} − cos10"] = (cycle.loss - matched.loss).to_numpy()
    return found


def _branch_differences(frame, params) -> dict[str, np.ndarray]:
    """WSD branch minus fresh cosine at each horizon in tokens a parameter, each at its own cross-fitted or only rate."""
    found = {}
    for horizon, rows in frame.groupby("horizon_tokens"):
        ratio = round(horizon / params)
        if ratio not in (20, 40, 80) or abs(horizon / params - ratio) > 0.5:
            continue
        tuned = {arm: _at_best(rows[rows.arm == arm]) for arm in ("wsd20", "cos10")}
        seeds = [s for s in tuned["wsd20"] if s in tuned["cos10"]]
        if len(seeds) >= 2:
            found[f"branch {ratio}: wsd20 − cos10"] = np.array([tuned["wsd20"][s] - tuned["cos10"][s] for s in seeds])
    return found


def _at_best(rows) -> dict:
    if rows.peak_lr.nunique() < 3:
        return dict(zip(rows.seed, rows.loss, strict=True)) if rows.peak_lr.nunique() == 1 else {}
    try:
        return {s: loss for s, (_, loss) in cross_fitted(rows.peak_lr, rows.loss, rows.seed).items()}
    except ValueError:
        return {}


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the difference it is judged by
    "wsd20_matches_cos10": "wsd20 − cos10", "cos0_beats_cos10": "cos0 − cos10",
    "wsd_lr_half_of_cos0": "lr: wsd20 − cos0", "wsd_lr_half_of_cos10": "lr: wsd20 − cos10",
    **{f"{arm}_worse": f"{arm} − cos10" for arm in CYCLES},
    **{f"wsd_branch_no_worse_{ratio}": f"branch {ratio}: wsd20 − cos10" for ratio in (20, 40, 80)},
}


def judge(measured: Measurements) -> list[Finding]:
    """A finding for every registered claim of the study; what these runs do not speak of is untested."""
    return [_judge_one(claim, measured) for claim in load_claims(STUDY).values()]


def _judge_one(claim, measured: Measurements) -> Finding:
    command = _command("night")
    name = CONTRASTS[claim.id]
    if not measured.counts:
        return untested(claim, "live", f"runs of {measured.steps} steps and {measured.frame.seed.nunique()} seeds are too small to count "
                                       f"(at least {LEAST_STEPS} and {LEAST_SEEDS}); {_command('cpu')}")
    if name not in measured.differences:
        why = [said for arm, said in measured.refused.items() if arm in claim.arms]
        return untested(claim, "live", f"{why[0] if why else 'no runs of this preset speak of it'}; {command}")
    per_seed = measured.differences[name]
    if not np.isfinite(per_seed).all():
        return untested(claim, "live", f"{int((~np.isfinite(per_seed)).sum())} of {len(per_seed)} pairs have a diverged run; {command} "
                                       "at other rates")
    try:
        estimate = estimate_of(claim.unit, per_seed, measured)
    except ValueError as error:
        return untested(claim, "live", f"{error}; {command}")
    tokens = int(claim.id.rsplit("_", 1)[1]) * measured.params if name.startswith("branch") else measured.horizon_tokens
    scale = {"params": measured.params, "horizon_tokens": tokens, "tokens_per_param": tokens / measured.params}
    return judge_claim(claim, estimate, evidence="live", scale=scale, matching=False)


def _command(preset: str) -> str:
    return f"`make reproduce PRESET={preset} STUDY={STUDY}` tests it ({COSINE_VS_WSD[preset].minutes:.0f} minutes on two cores)"


def estimate_of(unit: str, per_seed: np.ndarray, measured: Measurements) -> Estimate:
    """Mean over seeds in a claim's unit: octaves as they are, nats with the pooled variance and then as a share of tokens."""
    if unit == "octaves":
        return mean_estimate(per_seed, unit)
    return token_equivalent(mean_estimate(per_seed, pooled=measured.pooled), measured.slope)


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths, on these very runs; none where the runs are too small to count."""
    if not measured.counts:
        return []
    at = measured.frame[measured.frame.horizon_tokens == measured.horizon_tokens]
    cells = {f"{arm} at {lr:.3g}": rows.sort_values("seed").loss.to_numpy() for (arm, lr), rows in at.groupby(["arm", "peak_lr"])}
    made = [aa_control(cells)]
    if len(measured.slope):
        short, long = ([loss for _, loss in measured.tuned[name].values()] for name in ("wsd20 at half", "wsd20"))
        margin = load_claims(STUDY)["wsd20_matches_cos10"].margin * abs(float(measured.slope.mean()))
        made.append(truth_control(short, long, margin))
    else:
        made.append(not_run(TRUTH, "an arm has no bowl at half the horizon or at the whole"))
    if measured.pooled.sd:
        claim = load_claims(STUDY)["cos0_beats_cos10"]
        made.append(planted_control(claim, measured.pooled.sd, measured.frame.seed.nunique(), seed=0))
    else:
        made.append(not_run(PLANTED, measured.pooled.reason))
    return made


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
    rows = [{"contrast": name, "seed": i, "difference": d} for name, values in measured.differences.items()
            if not name.startswith("lr:") for i, d in enumerate(values)]
    if rows:
        made["differences"] = plots.paired_differences(pd.DataFrame(rows))
    if board is not None and board.frame.estimate.notna().any():
        made["verdicts"] = plots.verdict_forest(board.frame)
    return made


# -- what the notebook shows -------------------------------------------------------------------------------------------


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return [folder / f"{name}.{suffix}" for name in ("schedules", "bowls") for suffix in ("png", "svg")]


def design(preset: str, minutes: float | None = None) -> Design:
    """The design of a preset, scaled to minutes where they are given."""
    return scaled(COSINE_VS_WSD[preset], minutes)


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


def achieved_power(measured: Measurements) -> pd.DataFrame:
    """What the runs could have seen: deviation of a seed, smallest detectable effect and provable margin, in nats and tokens."""
    rows = []
    for name, per_seed in measured.differences.items():
        per_seed = per_seed[np.isfinite(per_seed)]
        octaves = name.startswith("lr:")
        if len(per_seed) < 2:
            continue
        e = mean_estimate(per_seed, pooled=None if octaves else measured.pooled)
        slope = abs(float(np.mean(measured.slope))) if len(measured.slope) and not octaves else np.nan
        rows.append({"contrast": name, "seeds": len(per_seed), "unit": "octaves" if octaves else "nats",
                     "sd": float(np.std(per_seed, ddof=1)), "detectable": e.detectable(),
                     "provable_margin": e.provable_margin(), "detectable_tokens": e.detectable() / slope,
                     "provable_margin_tokens": e.provable_margin() / slope})
    return pd.DataFrame(rows)


def resolve(preset: str, effect_nats: float) -> dict:
    """Seeds that resolve an effect in nats with 80 % power at the pilot's deviation, and the minutes they take."""
    plan = COSINE_VS_WSD[preset]
    seeds = seeds_needed(plan.sd_nats, effect_nats)
    return {"effect_nats": effect_nats, "effect_tokens": effect_nats / plan.slope_nats, "sd_nats": plan.sd_nats, "seeds": seeds,
            "minutes": plan.minutes * seeds / plan.seed_count}


def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return (f"These {len(measured.frame)} runs of {measured.steps} steps only show that the machinery works; "
                f"a verdict needs at least {LEAST_STEPS} steps and {LEAST_SEEDS} seeds.")
    said = [f"{len(measured.frame)} runs of up to {measured.frame.horizon_tokens.max() / 1e6:.2f}M tokens, models of {measured.params:,} "
            f"parameters, {measured.frame.seed.nunique()} seeds; {int((measured.frame.status == 'diverged').sum())} runs diverged."]
    for arm in BOWL_ARMS:
        if arm in measured.bowls:
            b = measured.bowls[arm]
            said.append(f"*{arm}* is best at a peak rate of {b.best_lr:.4f} (95 %: {b.best_lr_low:.4f} … {b.best_lr_high:.4f}) with "
                        f"{b.best_loss:.4f} nats; an octave off costs about {b.curvature / 2:.3f} nats.")
    said += [f"*{arm}*: {why}." for arm, why in measured.refused.items()]
    if len(measured.slope):
        said.append(f"An e-fold of tokens is worth {abs(measured.slope.mean()):.3f} nats here, so that 0.01 nats are "
                    f"{0.01 / abs(measured.slope.mean()):.1%} of tokens.")
    for name in ("wsd20 − cos10", "cos0 − cos10"):
        if name in measured.differences:
            e = mean_estimate(measured.differences[name], pooled=measured.pooled)
            low, high = e.interval()
            said.append(f"{name}: {e.value:+.4f} nats (95 %: {low:+.4f} … {high:+.4f}) at tuned rates.")
    said.append(f"Variance over seeds: {measured.pooled.reason}.")
    return "\n\n".join(said)
