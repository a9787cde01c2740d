"""What studies with learning-rate bowls share: arms at their tuned rates, paired differences, and the verdicts on them.

All arms of a study share seeds (the same initial parameters and data order) and one grid of rates, so that differences are
paired. A tuned arm has a bowl over seeds; a seed is judged at the vertex of the other seeds' bowls, read off its own bowl.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from etastar import plots
from etastar.analysis.board import Board
from etastar.analysis.bowl import Bowl, EdgeOptimum, cross_fitted, fit_bowl
from etastar.analysis.claims import Finding, load_claims, untested
from etastar.analysis.claims import judge as judge_claim
from etastar.analysis.controls import PLANTED, TRUTH, Control, aa_control, not_run, planted_control, truth_control
from etastar.analysis.paired import Estimate, PooledVariance, mean_estimate, pool_variance, token_equivalent, token_slope
from etastar.model.shapes import count_parameters
from etastar.recipe import Recipe
from etastar.studies.cooldown_published import published_findings
from etastar.studies.designs import Design

LEAST_STEPS = 256  # shorter runs count for nothing
LEAST_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A difference over paired seeds in nats, octaves or a share; variances are pooled within a `family` of like contrasts.

    `horizon_tokens` is that of the runs compared, where it is not the study's own. `short` says why these runs are too small to decide
    anything: what they show is told, and the verdict is inconclusive whatever it is. `spread` is a deviation over ways to fit, which is
    added to the standard error.
    """

    per_seed: np.ndarray
    unit: str = "nats"
    family: str = "tuned"
    horizon_tokens: int | None = None
    short: str = ""
    spread: float = 0.0


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Final losses of all runs and what follows from them.

    `frame` has one row a run: arm, peak_lr, seed, horizon_tokens, loss (nats, NaN diverged), status, run_id. `bowls` and `tuned` are by
    arm, `refused` says of an arm without a bowl why; `halving` has an arm's loss by seed at half the horizon and at the whole;
    `tables` are what a study adds for its figures.
    """

    frame: pd.DataFrame
    horizon_tokens: int
    params: int
    steps: int
    bowls: dict[str, Bowl]
    refused: dict[str, str]
    tuned: dict[str, dict]
    halving: pd.DataFrame
    contrasts: dict[str, Contrast]
    pooled: dict[str, PooledVariance]
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether the runs are long and many enough for a verdict."""
        return self.steps >= LEAST_STEPS and self.frame.seed.nunique() >= LEAST_SEEDS

    @property
    def slope(self) -> np.ndarray:
        """dL/d log D by seed, in nats per e-fold of tokens; empty where no arm has both horizons."""
        return token_slope(self.halving["half"], self.halving["whole"], 2.0)

    @property
    def arms(self) -> pd.DataFrame:
        """One row an arm with a bowl: best rate with interval, loss there, curvature, how the fit was made."""
        return pd.DataFrame([{
            "arm": arm, "best_lr": b.best_lr, "low": b.best_lr_low, "high": b.best_lr_high, "log2_best_lr": b.best_log2_lr,
            "best_loss": b.best_loss, "nats_per_octave2": b.curvature, "degree": b.degree, "seeds": len(b.seeds),
        } for arm, b in self.bowls.items()])

    def at(self, arm: str, peak_lr: float | None = None, horizon_tokens: int | None = None) -> pd.Series:
        """Loss by seed of an arm at a rate (None: it has one only) and a horizon (None: the study's)."""
        rows = self.frame[(self.frame.arm == arm) & (self.frame.horizon_tokens == (horizon_tokens or self.horizon_tokens))]
        rows = rows if peak_lr is None else rows[rows.peak_lr == peak_lr]
        return rows.set_index("seed").loss.sort_index()

    def judged(self, arm: str, horizon_tokens: int | None = None, name: str | None = None) -> pd.Series:
        """Loss by seed of an arm at a rate that other seeds chose.

        Where more seeds than those of the bowl were trained at one rate, which pilot seeds chose, it is the loss there; else that of
        the seed's bowl at the vertex of the others' (`name` is the bowl's, where it is not the arm's). Empty where there is neither.
        """
        rows = self.frame[(self.frame.arm == arm) & (self.frame.horizon_tokens == (horizon_tokens or self.horizon_tokens))]
        seeds = rows.groupby("peak_lr").seed.nunique()
        if len(seeds) and (len(seeds) == 1 or (seeds == seeds.max()).sum() == 1):
            return self.at(arm, float(seeds.idxmax()), horizon_tokens)
        tuned = self.tuned.get(name or arm, {})
        return pd.Series({seed: loss for seed, (_, loss) in tuned.items()}, dtype=float).rename_axis("seed").sort_index()

    def rates(self, arm: str) -> list[float]:
        """The rates an arm was run at over the study's horizon, rising."""
        return sorted(self.frame[(self.frame.arm == arm) & (self.frame.horizon_tokens == self.horizon_tokens)].peak_lr.unique())

    def rate_of(self, arm: str) -> float:
        """The rate an arm was run at, the first where there are several."""
        return float(self.frame[self.frame.arm == arm].peak_lr.iloc[0])

    def estimate(self, name: str, unit: str) -> Estimate:
        """Mean over seeds of a contrast in a claim's unit: nats with the family's pooled variance, and as a share of tokens if asked.

        Raises ValueError where a seed is not finite or, for tokens, where the loss does not fall with them.
        """
        contrast = self.contrasts[name]
        if contrast.unit != "nats":
            estimate = mean_estimate(contrast.per_seed, contrast.unit)
            return dataclasses.replace(estimate, se=math.hypot(estimate.se, contrast.spread))
        estimate = mean_estimate(contrast.per_seed, pooled=self.pooled[contrast.family])
        return token_equivalent(estimate, self.slope) if unit == "token_fraction" else estimate


def train(recipes: list[Recipe], arm_of, bowl_arms, store="runs", **options) -> list:
    """Runs of all recipes; where an arm of `bowl_arms` is best at the edge of its grid, the grid is extended, twice at most."""
    from etastar.engine.execute import run

    wanted = list(recipes)
    for _ in range(3):  # the grid as planned, and two extensions
        runs = run(wanted, store=store, **options)
        more = beyond_edges(runs, losses(runs, arm_of), bowl_arms)
        if not more:
            break
        wanted += more
    return runs


def measure(frame: pd.DataFrame, first: Recipe, bowl_arms: Mapping[str, tuple[str, int]], slope_arm: tuple[str, int],
            contrasts) -> Measurements:
    """Bowls of `bowl_arms` (name → arm and horizon), the slope of `slope_arm` between half its horizon and the whole, and contrasts.

    `first` is a run of the study's horizon. `contrasts` is a function from the Measurements so far to {name: Contrast}. The bowl at half
    the horizon, where there is one, is named as the arm with " at half".
    """
    params = count_parameters(first.model, first.corpus.vocab)["total"]
    bowls, refused, tuned = {}, {}, {}
    for name, (arm, tokens) in bowl_arms.items():
        rows = with_bowl(frame[(frame.arm == arm) & (frame.horizon_tokens == tokens)])
        try:
            bowls[name] = fit_bowl(rows.peak_lr, rows.loss, rows.seed)
            tuned[name] = cross_fitted(rows.peak_lr, rows.loss, rows.seed)
        except (EdgeOptimum, ValueError) as error:
            refused[name] = str(error)
    so_far = Measurements(frame, first.horizon_tokens, params, first.total_steps, bowls, refused, tuned,
                          pd.DataFrame(columns=["half", "whole"]), {}, {})
    arm, whole = slope_arm
    pair = {"half": so_far.judged(arm, whole // 2, f"{arm} at half"), "whole": so_far.judged(arm, whole)}
    so_far = dataclasses.replace(so_far, halving=pd.concat(pair, axis=1, join="inner"))
    found = contrasts(so_far)
    return dataclasses.replace(so_far, contrasts=found, pooled=pool_families(found))


def pool_families(contrasts: Mapping[str, Contrast]) -> dict[str, PooledVariance]:
    """The variance of a seed, pooled over the contrasts in nats of each family."""
    families: dict[str, list[np.ndarray]] = {}
    for contrast in contrasts.values():
        if contrast.unit == "nats":
            families.setdefault(contrast.family, []).append(contrast.per_seed)
    return {family: pool_variance(cells) for family, cells in families.items()}


def losses(runs, arm_of, loss_of=lambda run: run.val_loss) -> pd.DataFrame:
    """The frame of Measurements from runs; `arm_of` names the arm of a recipe, `loss_of` is the loss a run is judged by (nats)."""
    return pd.DataFrame([{
        "arm": arm_of(r.recipe), "peak_lr": r.recipe.peak_lr, "seed": r.recipe.seed, "horizon_tokens": r.recipe.horizon_tokens,
        "loss": loss_of(r), "status": r.status, "run_id": r.run_id,
    } for r in runs]).drop_duplicates("run_id")


def beyond_edges(runs, frame: pd.DataFrame, bowl_arms) -> list[Recipe]:
    """Recipes one grid step beyond the edge, for every arm and horizon whose mean bowl has its best rate there."""
    more, by_id = [], {r.recipe.run_id: r.recipe for r in runs}
    for _, rows in frame[frame.arm.isin(list(bowl_arms))].groupby(["arm", "horizon_tokens"]):
        rows = with_bowl(rows)
        mean = rows.groupby("peak_lr").loss.mean()  # NaN where a seed diverged: no extension beyond that
        if len(mean) < 3 or mean.isna().all() or mean.idxmin() not in (mean.index[0], mean.index[-1]):
            continue
        step = mean.index[1] / mean.index[0]
        beyond = mean.index[0] / step if mean.idxmin() == mean.index[0] else mean.index[-1] * step
        more += [by_id[i].replace(peak_lr=float(beyond)) for i in rows[rows.peak_lr == mean.idxmin()].run_id]
    return more


def minus(a: pd.Series, b: pd.Series) -> pd.Series:
    """a − b over the seeds that both were trained with; NaN where either diverged."""
    seeds = a.index.intersection(b.index)
    return a[seeds] - b[seeds]


def chosen_on_others(loss: pd.DataFrame) -> pd.Series:
    """Loss of each seed (row) at the column that is best on the other seeds; NaN where that one diverged."""
    if loss.shape[1] == 1:
        return loss.iloc[:, 0]
    return pd.Series({seed: row[loss.drop(index=seed).mean(skipna=False).idxmin()] for seed, row in loss.iterrows()}).rename_axis("seed")


def between_tuned(m: Measurements, a: str, b: str) -> dict[str, Contrast]:
    """a − b, each at a rate that other seeds chose, and the distance of their best rates in octaves where both have a bowl."""
    difference, found = minus(m.judged(a), m.judged(b)).to_numpy(), {}
    if len(difference) >= 2:
        found[f"{a} − {b}"] = Contrast(difference)
    if a in m.bowls and b in m.bowls:
        found[f"lr: {a} − {b}"] = Contrast(np.array(m.bowls[a].vertices) - np.array(m.bowls[b].vertices), "octaves")
    return found


def with_bowl(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of the seeds that have most rates, at the rates that all of them have."""
    rates = rows.groupby("seed").peak_lr.transform("nunique")
    rows = rows[rates == rates.max()]
    return rows[rows.groupby("peak_lr").seed.transform("nunique") == rows.seed.nunique()]


# -- verdicts and controls ---------------------------------------------------------------------------------------------


def judge(study: str, contrast_of: Mapping[str, str], m: Measurements, presets: Mapping[str, Design],
          published=published_findings) -> list[Finding]:
    """A live finding for every registered claim of a study, untested where these runs do not speak of it; then the logs' findings.

    `contrast_of` names the contrast a claim is judged by, `published` gives the findings of the study's published logs. What is too
    small to count names the cpu preset as the mend, what these runs do not speak of the night preset.
    """
    too_small, elsewhere = (f"`make reproduce PRESET={preset} STUDY={study}` tests it ({presets[preset].minutes:.0f} minutes on two cores)"
                            for preset in ("cpu", "night"))
    live = [_judge_one(claim, contrast_of[claim.id], m, too_small, elsewhere) for claim in load_claims(study).values()]
    return live + published(study)


def _judge_one(claim, name: str, m: Measurements, too_small: str, elsewhere: str) -> Finding:
    if not m.counts:
        return untested(claim, "live", f"runs of {m.steps} steps and {m.frame.seed.nunique()} seeds are too small to count "
                                       f"(at least {LEAST_STEPS} and {LEAST_SEEDS}); {too_small}")
    if name not in m.contrasts:
        why = [said for arm, said in m.refused.items() if arm in claim.arms]
        return untested(claim, "live", f"{why[0] if why else 'no runs of this preset speak of it'}; {elsewhere}")
    contrast = m.contrasts[name]
    lost = int((~np.isfinite(contrast.per_seed)).sum())
    if lost:
        return untested(claim, "live", f"{lost} of {len(contrast.per_seed)} pairs have a diverged run; {elsewhere} at other rates")
    try:
        estimate = m.estimate(name, claim.unit)
    except ValueError as error:
        return untested(claim, "live", f"{error}; {elsewhere}")
    tokens = contrast.horizon_tokens or m.horizon_tokens
    scale = {"params": m.params, "horizon_tokens": tokens, "tokens_per_param": tokens / m.params}
    found = judge_claim(claim, estimate, evidence="live", scale=scale, matching=False)
    if contrast.short and found.verdict != "inconclusive":
        return dataclasses.replace(found, verdict="inconclusive", p=1.0, reason=f"{contrast.short}; {found.reason}")
    return found


def controls(m: Measurements, study: str, margin_claim: str, planted_claim: str, contrast: str) -> list[Control]:
    """A/A, known truth and planted truths, on these very runs; none where the runs are too small to count.

    Truths are planted for `planted_claim` at the noise of its `contrast`, pooled where its family is.
    """
    if not m.counts:
        return []
    at = m.frame[m.frame.horizon_tokens == m.horizon_tokens]
    cells = {f"{arm} at {lr:.3g}": rows.sort_values("seed").loss.to_numpy() for (arm, lr), rows in at.groupby(["arm", "peak_lr"])}
    made, claims = [aa_control(cells)], load_claims(study)
    if len(m.slope):
        made.append(truth_control(m.halving["half"], m.halving["whole"], claims[margin_claim].margin * abs(float(m.slope.mean()))))
    else:
        made.append(not_run(TRUTH, "no arm was judged at half the horizon and at the whole"))
    if contrast not in m.contrasts:
        made.append(not_run(PLANTED, f"no run speaks of {contrast}"))
    else:
        pooled = m.pooled.get(m.contrasts[contrast].family)
        sd = (pooled and pooled.sd) or float(np.std(m.contrasts[contrast].per_seed, ddof=1))
        made.append(planted_control(claims[planted_claim], sd, len(m.contrasts[contrast].per_seed), seed=0))
    return made


def achieved_power(m: Measurements) -> pd.DataFrame:
    """What the runs could have seen: deviation of a seed, smallest detectable effect and provable margin, in the unit and in tokens."""
    rows, slope = [], abs(float(np.mean(m.slope))) if len(m.slope) else np.nan
    for name, contrast in m.contrasts.items():
        per_seed = contrast.per_seed[np.isfinite(contrast.per_seed)]
        if len(per_seed) < 2:
            continue
        in_nats = contrast.unit == "nats"
        e = mean_estimate(per_seed, pooled=m.pooled[contrast.family] if in_nats else None)
        e = dataclasses.replace(e, se=math.hypot(e.se, contrast.spread))
        tokens = slope if in_nats else np.nan
        rows.append({"contrast": name, "seeds": len(per_seed), "unit": contrast.unit, "sd": float(np.std(per_seed, ddof=1)),
                     "detectable": e.detectable(), "provable_margin": e.provable_margin(),
                     "detectable_tokens": e.detectable() / tokens, "provable_margin_tokens": e.provable_margin() / tokens})
    return pd.DataFrame(rows)


def difference_rows(m: Measurements, families=None) -> pd.DataFrame:
    """Differences in nats for a figure: contrast, seed, difference."""
    return pd.DataFrame([{"contrast": name, "seed": i, "difference": d} for name, c in m.contrasts.items()
                         if c.unit == "nats" and (families is None or c.family in families) for i, d in enumerate(c.per_seed)])


# -- figures and words -------------------------------------------------------------------------------------------------


def with_verdicts(figures: dict, board: Board | None) -> dict:
    """The figures, and the verdicts where a board has estimates."""
    if board is not None and board.frame.estimate.notna().any():
        return figures | {"verdicts": plots.verdict_forest(board.frame)}
    return figures


def files_of(folder, names) -> list:
    """The files of figures in a results folder."""
    return [folder / f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]


def machinery_only(m: Measurements) -> str:
    """What is to be said of runs too small to count."""
    return (f"These {len(m.frame)} runs of {m.steps} steps only show that the machinery works; "
            f"a verdict needs at least {LEAST_STEPS} steps and {LEAST_SEEDS} seeds.")


def runs_told(m: Measurements) -> str:
    """How many runs of what size there are, what diverged, and what tokens are worth."""
    said = (f"{len(m.frame)} runs of up to {m.frame.horizon_tokens.max() / 1e6:.2f}M tokens, models of {m.params:,} parameters, "
            f"{m.frame.seed.nunique()} seeds; {int((m.frame.status == 'diverged').sum())} runs diverged.")
    if len(m.slope):
        said += (f" An e-fold of tokens is worth {abs(m.slope.mean()):.3f} nats here, so that 0.01 nats are "
                 f"{0.01 / abs(m.slope.mean()):.1%} of tokens.")
    return said


def bowls_told(m: Measurements) -> list[str]:
    """The best rate of every arm with a bowl, and why an arm has none."""
    return [f"*{arm}* is best at a peak rate of {b.best_lr:.4f} (95 %: {b.best_lr_low:.4f} … {b.best_lr_high:.4f}) with "
            f"{b.best_loss:.4f} nats; an octave off costs about {b.curvature / 2:.3f} nats." for arm, b in m.bowls.items()] + [
            f"*{arm}*: {why}." for arm, why in m.refused.items()]


def contrast_told(m: Measurements, name: str) -> str:
    """A contrast with its 95 % interval, in its own unit."""
    contrast = m.contrasts[name]
    if not np.isfinite(contrast.per_seed).all():
        return f"{name}: a run of a pair diverged."
    e = m.estimate(name, contrast.unit)
    low, high = e.interval()
    return f"{name}: {e.value:+.4f} {contrast.unit} (95 %: {low:+.4f} … {high:+.4f}, {e.n} seeds)."
