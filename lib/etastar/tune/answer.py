"""From the small runs' losses to the rate of the large one: a bowl a cell, a power law through the vertices, an honest interval."""

import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.bowl import LEAST_CUBIC_POINTS, Bowl, EdgeOptimum, fit_bowl
from etastar.analysis.power_law import PowerLaw, curvature, fit_power_law
from etastar.analysis.units import UnitWarning
from etastar.tune.plan import LEAST_DRIFT, Plan
from etastar.tune.question import Question

LEVEL = 0.95
LOCAL_HORIZONS = 3  # at most, and never all: the longest, whose slope is the local one
FEW_HORIZONS, FAR = 4, 16.0  # fewer horizons, a longer way than this many times beyond the runs: a warning
FEW_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Answer:
    """The peak rate asked for, with its 95 % interval, and what it stands on.

    `fit_low` … `fit_high` is the interval of the fitted law alone (Student's over seeds), `peak_lr_low` … `peak_lr_high` has the
    extrapolation's share as well. `exponents`: one row a regressor, exponent, low, high. `slope` is the local exponent in tokens over the
    longest horizons. `extrapolation` is how many times the asked run's horizon, batch and width are those trained. `cells`: one row a
    bowl; `runs`: one row a run (arm, peak_lr, seed, horizon_tokens, loss, status, run_id).
    """

    peak_lr: float
    peak_lr_low: float
    peak_lr_high: float
    fit_low: float
    fit_high: float
    exponents: pd.DataFrame
    slope: float
    slope_low: float
    slope_high: float
    drift: dict[str, float]
    extrapolation: dict[str, float]
    warnings: tuple[str, ...]
    cells: pd.DataFrame
    runs: pd.DataFrame = dataclasses.field(repr=False)
    bowls: dict[tuple[str, int], Bowl] = dataclasses.field(repr=False)
    law: PowerLaw = dataclasses.field(repr=False)
    question: Question = dataclasses.field(repr=False)
    plan: Plan = dataclasses.field(repr=False)

    def as_dict(self) -> dict:
        """The numbers and tables, for JSON."""
        left_out = ("runs", "bowls", "law", "question", "plan")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return plain | {name: plain[name].to_dict("records") for name in ("exponents", "cells")}

    def __str__(self):
        asked, times = self.question, self.extrapolation
        lines = [f"peak LR {self.peak_lr:.3g}, 95 % interval {self.peak_lr_low:.3g} … {self.peak_lr_high:.3g} (of the fit alone "
                 f"{self.fit_low:.3g} … {self.fit_high:.3g}) for {asked.horizon_tokens:.3g} tokens, batch {asked.batch_tokens}, width "
                 f"{asked.model.width}{_base(self)}"]
        lines += [f"exponent in {row.regressor} {row.exponent:+.3f} ({row.low:+.3f} … {row.high:+.3f})"
                  for row in self.exponents.itertuples()]
        lines += [f"local slope in tokens {self.slope:+.3f} ({self.slope_low:+.3f} … {self.slope_high:+.3f})",
                  "extrapolated " + ", ".join(f"{name.removesuffix('_tokens')} × {times[name]:.3g}" for name in times)]
        return "\n".join([*lines, *(f"warning: {said}" for said in self.warnings)])


def answer(plan: Plan, runs: pd.DataFrame, epoch_tokens: int | None = None) -> Answer:
    """The answer that a frame of runs gives: columns arm (a ladder's name), peak_lr, seed, horizon_tokens, loss (NaN: diverged).

    The interval is that of the fitted law and, in octaves, z · √Σ(drift · doublings beyond the runs)² at right angles: the exponent
    beyond the runs is taken to differ from the fitted one by `drift` (an sd), the larger of `LEAST_DRIFT` and, in tokens, of the gap
    between the fitted and the local slope. `epoch_tokens` is the corpus's, for a warning. Raises ValueError naming what was refused
    where the bowls that remain determine no law.
    """
    bowls, refused = _bowls(plan, runs)
    cells = _cells(plan.ladders, bowls)
    law, question = _law(cells, bowls, refused), plan.question
    asked = {"horizon_tokens": question.horizon_tokens, "batch_tokens": question.batch_tokens, "width": question.model.width}
    slope, slope_low, slope_high = _local_slope(cells, bowls)
    gap = abs(slope - law.exponents[law.names.index("horizon_tokens")])
    drift = {"horizon_tokens": max(LEAST_DRIFT, 0.0 if math.isnan(gap) else gap), "batch_tokens": LEAST_DRIFT, "width": LEAST_DRIFT}
    told = extrapolated(law, cells, asked, drift)
    exponents = pd.DataFrame({"regressor": law.names, "exponent": law.exponents, "low": law.exponents_low, "high": law.exponents_high})
    times = {name: max(1.0, asked[name] / cells[name].max()) for name in asked}
    said = _warnings(plan, runs, cells, bowls, refused, times, epoch_tokens, told["peak_lr"])
    return Answer(**told, exponents=exponents, slope=slope, slope_low=slope_low, slope_high=slope_high, drift=drift, extrapolation=times,
                  warnings=tuple(said), cells=cells, runs=runs, bowls=bowls, law=law, question=question, plan=plan)


def extrapolated(law: PowerLaw, cells: pd.DataFrame, asked: dict[str, float], drift: dict[str, float]) -> dict[str, float]:
    """The law at the asked horizon, batch and width: peak_lr, fit_low, fit_high, and peak_lr_low, peak_lr_high with the drift beyond."""
    told = law.interval({name: [float(asked[name])] for name in law.names}).iloc[0]
    beyond = math.hypot(*(sd * max(0.0, math.log2(asked[name] / cells[name].max())) for name, sd in drift.items()))
    half = math.hypot(math.log2(told["high"] / told["predicted"]), stats.norm.ppf(0.5 + LEVEL / 2) * beyond)
    return {"peak_lr": float(told["predicted"]), "fit_low": float(told["low"]), "fit_high": float(told["high"]),
            "peak_lr_low": float(told["predicted"] * 2**-half), "peak_lr_high": float(told["predicted"] * 2**half)}


def law_lines(found: Answer, points: int = 60) -> pd.DataFrame:
    """The fitted law along the horizons: arm (a ladder's name, or "asked"), horizon_tokens, lr, low, high (the answer's interval)."""
    question, rows = found.question, []
    at = {c.arm: (c.batch_tokens, c.width) for c in found.cells.itertuples()} | {"asked": (question.batch_tokens, question.model.width)}
    for arm, (batch, width) in at.items():
        mine = found.cells[found.cells.arm == arm].horizon_tokens if arm != "asked" else found.cells.horizon_tokens
        for horizon in np.geomspace(mine.min(), question.horizon_tokens if arm == "asked" else mine.max(), points):
            told = extrapolated(found.law, found.cells, {"horizon_tokens": horizon, "batch_tokens": batch, "width": width}, found.drift)
            rows.append({"arm": arm, "horizon_tokens": horizon, "lr": told["peak_lr"], "low": told["peak_lr_low"],
                         "high": told["peak_lr_high"]})
    return pd.DataFrame(rows)


def _bowls(plan: Plan, runs: pd.DataFrame) -> tuple[dict[tuple[str, int], Bowl], dict[tuple[str, int], str]]:
    """(bowls, why there is none) by ladder and horizon."""
    found, refused = {}, {}
    for ladder in plan.ladders:
        for horizon in ladder.horizons:
            rows = window(runs[(runs.arm == ladder.name) & (runs.horizon_tokens == horizon)])
            try:
                found[ladder.name, horizon] = fit_bowl(rows.peak_lr, rows.loss, rows.seed)
            except (EdgeOptimum, ValueError) as error:
                refused[ladder.name, horizon] = str(error)
    return found, refused


def window(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs at the rates about the best: a skewed bowl's vertex is pulled aside by rates far from it."""
    seeds = rows.groupby("peak_lr").seed.nunique()
    mean = rows.groupby("peak_lr").loss.mean().where(rows.groupby("peak_lr").loss.count() == seeds)[seeds == seeds.max()]
    if mean.isna().all():
        return rows
    first = int(np.clip(np.nanargmin(mean) - LEAST_CUBIC_POINTS // 2, 0, max(0, len(mean) - LEAST_CUBIC_POINTS)))
    return rows[rows.peak_lr.isin(mean.index[first : first + LEAST_CUBIC_POINTS])]


def _cells(ladders, bowls) -> pd.DataFrame:
    rows = [{"width": c.width, "batch_tokens": c.batch_tokens, "horizon_tokens": h, "arm": c.name, "best_lr": b.best_lr,
             "low": b.best_lr_low, "high": b.best_lr_high, "best_loss": b.best_loss, "nats_per_octave2": b.curvature, "seeds": len(b.seeds)}
            for c in ladders for h in c.horizons if (b := bowls.get((c.name, h)))]
    columns = ("width", "batch_tokens", "horizon_tokens", "arm", "best_lr", "low", "high", "best_loss", "nats_per_octave2", "seeds")
    return pd.DataFrame(rows, columns=list(columns))


def _vertices(cells: pd.DataFrame, bowls) -> pd.DataFrame:
    """One row a cell and seed: the seed's own best rate."""
    rows = [(c.Index, seed, 2.0**vertex) for c in cells.itertuples()
            for b in [bowls[c.arm, c.horizon_tokens]] for seed, vertex in zip(b.seeds, b.vertices, strict=True)]
    return cells.join(pd.DataFrame(rows, columns=["cell", "seed", "lr"]).set_index("cell"), how="right")


def _law(cells: pd.DataFrame, bowls, refused) -> PowerLaw:
    points = _vertices(cells, bowls)
    names = ["horizon_tokens", *(name for name in ("batch_tokens", "width") if cells[name].nunique() > 1)]
    try:
        return _fitted(points, *names)
    except ValueError as error:
        why = "; ".join(f"{arm} at {horizon} tokens: {said}" for (arm, horizon), said in refused.items())
        raise ValueError(f"the {len(cells)} bowls there are determine no law ({error}); refused: {why or 'none'}. Nothing is lost: a "
                         "larger --budget goes on from these runs") from None


def _fitted(points: pd.DataFrame, *names: str) -> PowerLaw:
    """The law of the seeds' own best rates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnitWarning)  # tiny horizons are meant so: these tokens are counted, not read
        return fit_power_law({name: points[name].astype(float) for name in names}, points["lr"], seed=points["seed"], level=LEVEL)


def _local_slope(cells: pd.DataFrame, bowls) -> tuple[float, float, float]:
    """Exponent in tokens over the longest horizons of the first ladder, with its interval over seeds."""
    main = cells[cells.arm == cells.arm.iloc[0]]
    if len(main) < 2:
        return math.nan, math.nan, math.nan
    main = main.nlargest(max(2, min(LOCAL_HORIZONS, len(main) - 1)), "horizon_tokens")
    law = _fitted(_vertices(main, bowls), "horizon_tokens")
    return law.exponents[0], law.exponents_low[0], law.exponents_high[0]


def _warnings(plan: Plan, runs, cells, bowls, refused, times, epoch_tokens, peak_lr) -> list[str]:
    question, main = plan.question, cells[cells.arm == plan.ladders[0].name]
    said = [f"no bowl for {arm} at {horizon:,} tokens: {why}" for (arm, horizon), why in refused.items()]
    if len(main) < FEW_HORIZONS:
        said.append(f"{len(main)} horizons have a bowl; fewer than {FEW_HORIZONS} tell little of how straight the law is")
    if plan.seed_count < FEW_SEEDS:
        said.append(f"{plan.seed_count} seeds leave the noise of a vertex poorly known, hence wide intervals")
    said += [f"the asked {name.removesuffix('_tokens')} is {factor:.3g} times the largest trained: beyond {FAR:g} × the interval rests on "
             "the law holding" for name, factor in times.items() if factor > FAR]
    said += _bend(main, bowls)
    if lost := int(runs.loss.isna().sum()):
        said.append(f"{lost} of {len(runs)} runs diverged; they wall off their bowls on the right")
    if epoch_tokens is not None and question.horizon_tokens > epoch_tokens:
        said.append(f"the asked horizon is {question.horizon_tokens / epoch_tokens:.3g} epochs of this corpus; the answer is for data that "
                    "does not repeat")
    decayed = peak_lr * question.optimizer.weight_decay * question.horizon_tokens / question.batch_tokens
    small = float((main.best_lr * question.optimizer.weight_decay * main.horizon_tokens / main.batch_tokens).max())
    if decayed > 1 > small:
        said.append(f"η·λ·steps is {decayed:.2g} in the asked run but at most {small:.2g} in the small ones: weight decay will matter "
                    "there as it did not here")
    return said


def _bend(main: pd.DataFrame, bowls) -> list[str]:
    """A warning where the local exponent is seen to change over the horizons, and by more than the drift that is allowed for anyway."""
    if len(main) < LOCAL_HORIZONS:
        return []
    points = _vertices(main, bowls)
    bend = curvature(points["horizon_tokens"].to_numpy(dtype=float), points["lr"], seed=points["seed"], level=LEVEL)
    doublings = math.log2(main.horizon_tokens.max() / main.horizon_tokens.min())
    if bend.slope_per_octave_low <= 0 <= bend.slope_per_octave_high or abs(bend.slope_per_octave) * doublings < LEAST_DRIFT:
        return []
    return [f"the exponent itself changes by {bend.slope_per_octave:+.3f} a doubling of tokens ({bend.slope_per_octave_low:+.3f} … "
            f"{bend.slope_per_octave_high:+.3f}): read the local slope"]


def _base(found: Answer) -> str:
    return f" (μP, base width {found.plan.base_width})" if found.question.parametrization == "mup" else ""
