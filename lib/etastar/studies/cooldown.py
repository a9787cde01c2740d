"""Study 02, the cooldown: how long, what shape, to what floor, at which learning rate, and what a trunk is worth afterwards.

Papers: Hägele et al. 2405.18392 (length, shape, LR), Tissue et al. 2408.11029 and Dremov et al. 2508.01483 (shape, β2), Hu et al.
2404.06395 (MiniCPM: 10 % and 2.5 %), Wen et al. 2410.05192 (WSD-S), Bergsma et al. 2502.15938 (to zero).

Everything branches off shared trunks at a constant rate, one a rate and seed, so that two cooldowns of a trunk differ by nothing
but themselves. Linear cooldowns of some lengths have a bowl each and meet cosine to 10 % at tuned rates; shapes, floors, β2 and
continuations are compared at one rate.
"""

import dataclasses
import re

import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.claims import Finding
from etastar.analysis.controls import Control
from etastar.analysis.paired import mean_estimate
from etastar.analysis.power import power_table
from etastar.engine.between import loss_between
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.schedules import WSD, Branch, Constant, Cosine
from etastar.studies import measured as common
from etastar.studies.designs import COOLDOWN, CooldownDesign
from etastar.studies.measured import Contrast, Measurements, chosen_on_others, minus

STUDY = "02_cooldown"
achieved_power = common.achieved_power
SHAPES = {"linear": {}, "1-sqrt": {}, "cosine": {}, "mirror-cosine": {}, "square": {}, "exponential": {},
          "lowered-linear": {"shape_parameter": 0.7}, "1-x^0.3": {"shape": "1-x^p", "shape_parameter": 0.3}}
LENGTHS = (2.5, 5, 10, 20, 40, 50, 60, 100)  # per cent of the steps
REWARMED = (0.1, 0.3, 1.0)  # of the peak
RAISED = ", β2 0.999"
EXTRA = 0.25  # of the horizon, trained after its end
LINE = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # shares of the way from before the cooldown to after it


# -- recipes -----------------------------------------------------------------------------------------------------------


def arm_recipe(plan: CooldownDesign, arm: str, peak_lr: float, horizon_tokens: int, seed: int) -> Recipe:
    """The run of an arm: "cos10", "constant", "SHAPE LENGTH %" perhaps followed by " to 10 %" or ", β2 0.999", "rewarm R", "wsd-s".

    Re-warmed runs and WSD-S train the last fifth of `horizon_tokens` after a run that was finished before.
    """
    schedule = _schedule(arm, horizon_tokens // plan.batch_tokens, plan.batch_tokens, plan.warmup_steps, peak_lr)
    changes = {"beta2_changes": ((_before(horizon_tokens, plan.batch_tokens), 0.999),)} if arm.endswith(RAISED) else {}
    return plan.recipe(schedule, peak_lr, horizon_tokens, seed, **changes)


def _schedule(arm: str, steps: int, batch_tokens: int, warmup: int, peak_lr: float):
    if arm == "cos10":
        return Cosine(floor=0.1, warmup_steps=warmup)
    if arm == "constant":
        return Constant(warmup_steps=warmup)
    if arm == "wsd-s" or arm.startswith("rewarm"):
        finished = steps * 4 // 5
        before = WSD(warmup_steps=warmup, cooldown_fraction=0.2) if arm == "wsd-s" else Cosine(floor=0.1, warmup_steps=warmup)
        share, length = (1.0, 0.5) if arm == "wsd-s" else (float(arm.split()[1]), 1.0)
        return Branch(trunk=before, trunk_horizon_tokens=finished * batch_tokens, at_tokens=finished * batch_tokens,
                      then=WSD(warmup_steps=max(1, (steps - finished) // 20), cooldown_fraction=length), then_peak_lr=share * peak_lr)
    shape, length, floor = re.fullmatch(r"(.+?) ([\d.]+) %( to 10 %)?", arm.removesuffix(RAISED)).groups()
    return WSD(**{"shape": shape} | SHAPES[shape], warmup_steps=warmup, cooldown_fraction=float(length) / 100, floor=0.1 if floor else 0.0)


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to; ValueError for a recipe of another study."""
    schedule = recipe.schedule
    if isinstance(schedule, Cosine | Constant):
        return "cos10" if isinstance(schedule, Cosine) else "constant"
    if isinstance(schedule, Branch):
        share = (schedule.then_peak_lr or 0.0) / recipe.peak_lr
        return "wsd-s" if isinstance(schedule.trunk, WSD) else f"rewarm {round(share, 6):g}"
    if isinstance(schedule, WSD) and schedule.cooldown_fraction is not None:
        for name, fields in SHAPES.items():
            if {"shape": name, "shape_parameter": None} | fields == {"shape": schedule.shape, "shape_parameter": schedule.shape_parameter}:
                floor = " to 10 %" if schedule.floor else ""
                return f"{name} {round(100 * schedule.cooldown_fraction, 6):g} %{floor}{RAISED if recipe.beta2_changes else ''}"
    raise ValueError(f"a recipe with this schedule is no arm of study {STUDY}: {schedule}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm at some rates and seeds over a horizon in tokens."""

    arm: str
    rates: tuple[float, ...]
    horizon_tokens: int
    seeds: tuple[int, ...]


def cells(plan: CooldownDesign) -> list[Cell]:
    """All of a preset, the primary claims' arms first."""
    full, half = plan.horizon_tokens, plan.horizon_tokens // 2
    longer = full + round(plan.horizon_steps * EXTRA) * plan.batch_tokens
    few, some, every = tuple(plan.seeds), tuple(plan.some_seeds), tuple(plan.all_seeds)
    grid, middle = tuple(plan.grid), (plan.middle,)
    lines = [f"linear {length} %" for length in plan.tuned]
    made = [Cell("cos10", (plan.cosine_rate,), full, every), *(Cell(arm, middle, full, every) for arm in (*lines, "1-sqrt 20 %"))]
    made += [Cell("linear 20 %", middle, half, every), *(Cell(arm, grid, full, few) for arm in lines)]
    if plan.cosine_bowl:
        made += [Cell("cos10", grid, full, few)]
    made += [Cell("1-sqrt 20 %", (grid[0], grid[-1]), full, few)]
    made += [Cell(arm, middle, full, every) for arm in ("1-sqrt 10 %", "cosine 10 %", "linear 20 % to 10 %", f"linear 20 %{RAISED}")]
    arms = [f"{shape} 20 %" for shape in ("cosine", "mirror-cosine", "square", "lowered-linear", "exponential")]
    arms += ["exponential 2.5 %", "exponential 10 %", "linear 5 %", "1-sqrt 50 %", "cosine 50 %"]
    made += [Cell(arm, middle, full, some) for arm in arms]
    made += [Cell("linear 5 %", middle, half, some), Cell("constant", middle, _before(full, plan.batch_tokens), some)]
    made += [Cell(arm, middle, longer, some) for arm in ("linear 20 %", "wsd-s")]
    made += [Cell(f"rewarm {share:g}", (plan.cosine_rate,), longer, some) for share in REWARMED]
    if plan.full:
        made += [Cell(f"{shape} {length:g} %", grid, full, few) for shape in SHAPES for length in LENGTHS]
        made += [Cell(f"linear {length:g} % to 10 %", grid, full, few) for length in LENGTHS]
    if plan.long_horizons:
        made += [Cell(arm, grid, full * plan.long_horizons, few) for arm in ("cos10", "1-sqrt 5 %")]
    return made


def _before(horizon_tokens: int, batch_tokens: int) -> int:
    """Tokens before a cooldown of 20 %."""
    steps = horizon_tokens // batch_tokens
    return (steps - round(0.2 * steps)) * batch_tokens


def observed_cells(plan: CooldownDesign) -> list[Cell]:
    """The runs whose averages study 03 reads out: trunks to their end, cosine and the cooled-down at their chosen rates.

    With the full factorial the trunks of the other rates too, for a bowl of the averages.
    """
    full, some = plan.horizon_tokens, tuple(plan.some_seeds)
    made = [Cell("constant", (plan.middle,), full, tuple(plan.all_seeds)), Cell("cos10", (plan.cosine_rate,), full, some),
            Cell("linear 20 %", (plan.middle,), full, some)]
    return [*made, Cell("constant", tuple(plan.grid), full, tuple(plan.seeds))] if plan.full else made


def recipes_of(plan: CooldownDesign, wanted: list[Cell]) -> list[Recipe]:
    """The runs of some cells, each once."""
    return list(dict.fromkeys(arm_recipe(plan, c.arm, lr, c.horizon_tokens, seed) for c in wanted for lr in c.rates for seed in c.seeds))


def train_observed(plan: CooldownDesign, store="runs", **options) -> list:
    """These runs with windows of their averages and EMAs, some trunks evaluated on the way; states stay where the others leave them."""
    from etastar.engine.execute import run

    averages = Observe(average_every_tokens=plan.window_tokens,
                       ema_horizon_tokens=tuple(round(share * plan.horizon_tokens) for share in plan.ema_shares))
    evaluated = dataclasses.replace(averages, val_every_tokens=plan.evaluation_tokens)
    wanted = recipes_of(plan, observed_cells(plan))
    curves = [r for r in wanted if arm_of(r) == "constant" and r.peak_lr == plan.middle and r.seed in plan.some_seeds]
    others = [r for r in wanted if r not in curves]
    options |= {"store": store, "later": recipes_of(plan, [*cells(plan), *observed_cells(plan)])}
    return run(curves, observe=evaluated, **options) + run(others, observe=averages, **options)


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset, each once, the primary claims' first."""
    plan = design(preset, minutes)
    return recipes_of(plan, [*cells(plan), *observed_cells(plan)])


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks, the trunks first; a tuned arm that is best at the edge of its grid is extended, twice at most."""
    plan = design(preset, minutes)
    train_observed(plan, store, **options)
    return common.train(recipes(preset, minutes), arm_of, _bowl_arms(plan.tuned), store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(runs, between=loss_between) -> Measurements:
    """What the runs say: bowls, losses at cross-fitted rates, differences by seed; `tables` has the loss on the line between weights."""
    frame = common.losses(runs, arm_of)
    horizon = int(frame[frame.arm == "square 20 %"].horizon_tokens.iloc[0])
    first = next(r.recipe for r in runs if r.recipe.horizon_tokens == horizon)
    tuned = [arm for arm, rows in frame[frame.horizon_tokens == horizon].groupby("arm", sort=False)
             if rows.peak_lr.nunique() >= 3 and (arm == "cos10" or re.fullmatch(r"linear [\d.]+ %", arm))]
    bowls = {arm: (arm, horizon) for arm in tuned}
    if (longest := int(frame[frame.arm == "cos10"].horizon_tokens.max())) > horizon:
        bowls |= {f"{arm} long": (arm, longest) for arm in ("cos10", "1-sqrt 5 %")}
    line = line_losses(runs, horizon, between)
    m = common.measure(frame, first, bowls, ("linear 20 %", horizon), lambda m: (
        _contrasts(m) | _branch_contrasts(m) | _continued(m) | _rise(line)))
    return dataclasses.replace(m, tables={"line": line})


def _bowl_arms(tuned) -> tuple[str, ...]:
    return ("cos10", *(f"linear {length} %" for length in tuned))


def _contrasts(m: Measurements) -> dict[str, Contrast]:
    """Between tuned arms."""
    found = {}
    for a, b in (("linear 20 %", "cos10"), ("linear 40 %", "linear 20 %"), ("linear 10 %", "cos10"), ("linear 40 %", "linear 10 %")):
        found |= common.between_tuned(m, a, b)
    long = common.between_tuned(m, "1-sqrt 5 % long", "cos10 long")
    tokens = int(m.frame[m.frame.arm == "cos10"].horizon_tokens.max())
    return found | {name: dataclasses.replace(c, family="long", horizon_tokens=tokens) for name, c in long.items()}


def _branch_contrasts(m: Measurements) -> dict[str, Contrast]:
    """Between branches of one trunk at one rate."""
    middle, rates = m.rate_of("square 20 %"), m.rates("linear 40 %")
    at, tried = rates.index(middle), m.rates("1-sqrt 20 %")

    def off(a, b, lr=middle, tokens=None):
        return minus(m.at(a, lr, tokens), m.at(b, lr, tokens))

    shape = {r: off("1-sqrt 20 %", "linear 20 %", r) for r in tried}
    length = {r: off("linear 40 %", "linear 10 %", r) for r in rates}
    short = {tokens: off("linear 5 %", "linear 20 %", middle, tokens) for tokens in (m.horizon_tokens, m.horizon_tokens // 2)}
    others = sum(m.at(f"{name} 20 %", middle) for name in ("cosine", "mirror-cosine", "square")) / 3
    pairs = [("1-sqrt 20 %", "linear 20 %"), ("1-sqrt 10 %", "cosine 10 %"), ("1-sqrt 50 %", "cosine 50 %"),
             ("exponential 10 %", "exponential 20 %"), ("exponential 2.5 %", "exponential 10 %"), ("lowered-linear 20 %", "linear 20 %"),
             (f"linear 20 %{RAISED}", "linear 20 %"), ("linear 20 %", "linear 20 % to 10 %")]
    found = {f"{a} − {b}": off(a, b) for a, b in pairs} | {
        "1-sqrt 20 % − other shapes": minus(m.at("1-sqrt 20 %", middle), others),
        "1-sqrt 20 % − linear 20 %, highest − lowest rate": minus(shape[tried[-1]], shape[tried[0]]),
        "linear 40 % − 10 %, a higher − a lower rate": minus(length[rates[min(at + 1, len(rates) - 1)]], length[rates[max(at - 1, 0)]]),
        "linear 5 % − 20 %, whole − half horizon": minus(*short.values()),
    }
    return {name: Contrast(d.to_numpy(), family="branches") for name, d in found.items()}


def _continued(m: Measurements) -> dict[str, Contrast]:
    """After the extra quarter; how far to re-warm is chosen on the other seeds."""
    longer = int(m.frame[m.frame.arm == "wsd-s"].horizon_tokens.iloc[0])
    trunk, again = (m.at(arm, horizon_tokens=longer) for arm in ("linear 20 %", "wsd-s"))
    rewarmed = chosen_on_others(pd.DataFrame({share: m.at(f"rewarm {share:g}", horizon_tokens=longer) for share in REWARMED}))
    found = {"continued trunk − re-warmed cosine": minus(trunk, rewarmed), "wsd-s − continued trunk": minus(again, trunk)}
    return {name: Contrast(d.to_numpy(), family="continued", horizon_tokens=longer) for name, d in found.items()}


def line_losses(runs, horizon_tokens: int, between) -> pd.DataFrame:
    """Loss on the straight line from before a linear 20 % cooldown to after it: seed, share, loss (nats)."""
    before = {r.recipe.seed: r for r in runs if (arm_of(r.recipe), r.recipe.horizon_tokens) == (
        "constant", _before(horizon_tokens, r.recipe.batch_tokens))}
    parts = []
    for r in runs:
        at_start = before.get(r.recipe.seed)
        if (arm_of(r.recipe), r.recipe.horizon_tokens) == ("linear 20 %", horizon_tokens) and at_start and (
                r.recipe.peak_lr == at_start.recipe.peak_lr and "diverged" not in (at_start.status, r.status)):
            parts.append(between(at_start, r, LINE).rename(columns={"val_loss": "loss"}).assign(seed=r.recipe.seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["share", "loss", "seed"])


def _rise(line: pd.DataFrame) -> dict[str, Contrast]:
    """The largest rise of the loss from one point of the line to a later one."""
    inside = line[line.share.between(0, 1)].pivot_table(index="seed", columns="share", values="loss")
    if inside.empty:
        return {}
    rise = inside.sub(inside.cummin(axis=1)).max(axis=1)
    return {"rise between the weights": Contrast(rise.to_numpy(), family="line")}


# -- verdicts ----------------------------------------------------------------------------------------------------------

CONTRASTS = {  # claim → the contrast it is judged by
    "cooldown_20_passes_cos10": "linear 20 % − cos10", "plateau_after_20": "linear 40 % − linear 20 %",
    "sqrt_beats_linear": "1-sqrt 20 % − linear 20 %", "cooldown_10_no_worse": "linear 10 % − cos10",
    "sqrt_gain_grows_with_lr": "1-sqrt 20 % − linear 20 %, highest − lowest rate",
    "lr_transfers_over_lengths": "lr: linear 40 % − linear 10 %",
    "best_length_grows_with_lr": "linear 40 % − 10 %, a higher − a lower rate",
    "short_cooldown_gains_with_horizon": "linear 5 % − 20 %, whole − half horizon",
    "five_percent_on_the_long_run": "1-sqrt 5 % long − cos10 long", "sqrt_below_other_shapes": "1-sqrt 20 % − other shapes",
    "sqrt_beats_cosine_shape_10": "1-sqrt 10 % − cosine 10 %", "cosine_shape_beats_sqrt_50": "1-sqrt 50 % − cosine 50 %",
    "minicpm_10_enough": "exponential 10 % − exponential 20 %", "minicpm_2.5_falls_short": "exponential 2.5 % − exponential 10 %",
    "beta2_raised_helps": f"linear 20 %{RAISED} − linear 20 %", "lowered_linear_beats_linear": "lowered-linear 20 % − linear 20 %",
    "zero_beats_floor": "linear 20 % − linear 20 % to 10 %", "between_falls_smoothly": "rise between the weights",
    "wsd_beats_rewarmed_cosine": "continued trunk − re-warmed cosine", "wsds_no_worse_than_wsd": "wsd-s − continued trunk",
}


def judge(measured: Measurements) -> list[Finding]:
    """A live finding for every registered claim of the study, untested where these runs do not speak of it; then the logs' findings."""
    return common.judge(STUDY, CONTRASTS, measured, COOLDOWN)


def controls(measured: Measurements) -> list[Control]:
    """A/A, known truth and planted truths, on these very runs; none where the runs are too small to count."""
    return common.controls(measured, STUDY, "plateau_after_20", "cooldown_20_passes_cos10", CONTRASTS["cooldown_20_passes_cos10"])


# -- figures and words -------------------------------------------------------------------------------------------------


def figures(measured: Measurements, board: Board | None = None) -> dict:
    """Name → matplotlib Figure: bowls and length by rate, shapes and the like off one trunk, the line between weights, continuations."""
    at = measured.frame[measured.frame.horizon_tokens == measured.horizon_tokens]
    tuned = [arm for arm in (*measured.bowls, *measured.refused) if arm in set(at.arm)]
    made = {"bowls": plots.lr_bowls(at[at.arm.isin(tuned)], {a: b for a, b in measured.bowls.items() if a in tuned}),
            "length_by_rate": plots.length_lines(lengths(measured), "loss less that of 20 %, same rate (nats per token)"),
            "shapes": plots.paired_differences(common.difference_rows(measured, ("branches",)))}
    if len(measured.tables["line"]):
        made["line_between_weights"] = plots.loss_on_line(measured.tables["line"])
    made["continued"] = plots.paired_differences(common.difference_rows(measured, ("continued",)))
    return common.with_verdicts(made, board)


def lengths(measured: Measurements) -> pd.DataFrame:
    """Linear cooldowns by length and rate: fraction, peak_lr, difference from 20 % at equal rate (nats), low, high (95 % t)."""
    rows = []
    for arm in dict.fromkeys(measured.frame.arm):
        found = re.fullmatch(r"linear ([\d.]+) %", arm)
        for lr in sorted(measured.frame[measured.frame.arm == arm].peak_lr.unique()) if found else ():
            d = minus(measured.at(arm, lr), measured.at("linear 20 %", lr)).dropna()
            if len(d) >= 2 and arm != "linear 20 %":
                low, high = mean_estimate(d).interval()
                rows.append({"fraction": float(found[1]) / 100, "peak_lr": lr, "difference": d.mean(), "low": low, "high": high})
    rates = {row["peak_lr"] for row in rows}
    rows += [{"fraction": 0.2, "peak_lr": lr, "difference": 0.0, "low": 0.0, "high": 0.0} for lr in rates]
    return pd.DataFrame(rows).sort_values(["peak_lr", "fraction"], ignore_index=True)


def promised(folder) -> list:
    """Files the notebook leaves behind in its results folder."""
    return common.files_of(folder, ("bowls", "length_by_rate", "shapes"))


def interpretation(measured: Measurements, findings: list[Finding]) -> str:
    """What the figures show, in sentences whose every number is computed."""
    if not measured.counts:
        return common.machinery_only(measured)
    said = [common.runs_told(measured), *common.bowls_told(measured)]
    by_rate = lengths(measured)
    best = by_rate.loc[by_rate.groupby("peak_lr").difference.idxmin()]
    tried = by_rate.groupby("peak_lr").fraction.nunique().max()
    said.append(f"Of the up to {tried} lengths tried at a rate, the best is " + ", ".join(
        f"{row.fraction:.0%} at {row.peak_lr:.4f}" for row in best.itertuples()) + ".")
    said += [common.contrast_told(measured, name) for name in (
        "linear 20 % − cos10", "linear 40 % − linear 20 %", "1-sqrt 20 % − linear 20 %", f"linear 20 %{RAISED} − linear 20 %",
        "continued trunk − re-warmed cosine") if name in measured.contrasts]
    return "\n\n".join(said)


# -- what a preset spends ----------------------------------------------------------------------------------------------


def design(preset: str, minutes: float | None = None) -> CooldownDesign:
    """The design of a preset, scaled to minutes where they are given."""
    return COOLDOWN[preset].scaled(minutes)


def power(preset: str, minutes: float | None = None) -> pd.DataFrame:
    """Planned token and power table: contrast → runs, seeds, tokens and the smallest effect it can show."""
    plan = design(preset, minutes)
    every, some = len(plan.all_seeds), len(plan.some_seeds)
    rows = [("linear 20 % − cos10", every, 2.0, plan.sd_nats), ("linear 40 % − linear 20 %", every, 1.4, plan.branch_sd_nats),
            ("1-sqrt 20 % − linear 20 %", every, 1.2, plan.branch_sd_nats), ("linear 10 % − cos10", every, 2.0, plan.sd_nats),
            ("1-sqrt 50 % − cosine 50 %", some, 1.5, plan.branch_sd_nats), ("continued trunk − re-warmed cosine", some, 3.0, plan.sd_nats)]
    return power_table([{"contrast": name, "runs": 2 * seeds, "seeds": seeds, "tokens": round(seeds * share * plan.horizon_tokens),
                         "sd": sd, "slope": plan.slope_nats} for name, seeds, share, sd in rows])
