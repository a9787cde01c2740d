"""The runs of study 06 as a table: how each was scaled, what else differs from the base, and the bowls of its cells."""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd

from etastar.analysis.bowl import Bowl
from etastar.analysis.valley import Valley, fit_valley
from etastar.model.shapes import count_parameters, flops_per_token
from etastar.recipe import SP, AdamW, CompleteP, Recipe
from etastar.schedules import Power
from etastar.studies import measured as common
from etastar.studies.measured import LEAST_STEPS, Contrast, Measurements
from etastar.studies.mup_vs_fitting_design import ALPHAS, GROUPS
from etastar.studies.power_law_measures import LEAST_FOR_SKEW


def scaling_of(recipe: Recipe) -> str:
    """"sp", "mup", or the name of a depth rule."""
    by = recipe.parametrization
    if isinstance(by, CompleteP):
        return next(name for name, alpha in ALPHAS.items() if alpha == by.alpha)
    return "sp" if isinstance(by, SP) else "mup"


def kind_of(recipe: Recipe) -> str:
    """What differs from the plain model: experts, decay, what steadies it, layer-group rates, schedule; "" for nothing."""
    model, by, decay = recipe.model, recipe.parametrization, recipe.optimizer.weight_decay
    parts = [f"{model.mixture.experts} experts top {model.mixture.experts_per_token}"] if model.mixture else []
    parts += [f"decay {decay:g}"] * (decay != AdamW().weight_decay) + ["coupled"] * (getattr(by, "decay", "") == "coupled")
    parts += ["QK-norm"] * model.qk_norm + ["z-loss"] * bool(recipe.z_loss)
    parts += [f"{group} 2^{math.log2(ratio):g}" for group, ratio in zip(GROUPS, recipe.lr_ratios, strict=True) if ratio != 1]
    return ", ".join(parts + ["power"] * isinstance(recipe.schedule, Power))


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to: how it is scaled, its width and depth, and its kind."""
    return name_of(scaling_of(recipe), recipe.model.width, recipe.model.depth, kind_of(recipe))


def name_of(scaling: str, width: int, depth: int, kind: str = "") -> str:
    """The name of an arm."""
    return f"{scaling}, {width}×{depth}" + f", {kind}" * bool(kind)


def told(run) -> dict:
    """What a run is."""
    r = run.recipe
    mixture = r.model.mixture
    return {"run_id": run.run_id, "scaling": scaling_of(r), "kind": kind_of(r), "width": r.model.width, "depth": r.model.depth,
            "experts": mixture.experts if mixture else 0, "experts_per_token": mixture.experts_per_token if mixture else 0,
            "params": count_parameters(r.model, r.corpus.vocab)["total"], "steps": r.total_steps, "log2_lr": math.log2(r.peak_lr),
            "flops": flops_per_token(r.model, r.corpus.vocab)["exact"] * r.horizon_tokens, "batch_tokens": r.batch_tokens,
            "optimizer": "adamw", "normalization": "QK-norm" if r.model.qk_norm else "plain",
            "varied": "" if _is_of_modules(r) else "varied",
            **{f"ratio_{group}": math.log2(ratio) for group, ratio in zip(GROUPS, r.lr_ratios, strict=True)}}


def _is_of_modules(recipe: Recipe) -> bool:
    """Whether a run differs from plain SP by QK-norm and layer-group rates alone, so that these can be told apart in it."""
    equal = recipe.replace(lr_ratios=(1.0, 1.0, 1.0), model=dataclasses.replace(recipe.model, qk_norm=False))
    return scaling_of(recipe) == "sp" and kind_of(equal) == ""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """All runs; `base` is the (width, depth) at which every way of scaling starts and μP is SP."""

    frame: pd.DataFrame
    base: tuple[int, int]

    @staticmethod
    def of(runs) -> "Grid":
        """Of all runs of a preset."""
        frame = common.losses(runs, arm_of).merge(pd.DataFrame([told(r) for r in {r.run_id: r for r in runs}.values()]), on="run_id")
        by = next((r.recipe for r in runs if scaling_of(r.recipe) == "mup"), None)
        width = by.parametrization.base_width if by else int(frame.width.min())
        return Grid(frame, (width, int(frame[frame.kind == ""].depth.mode().iloc[0])))

    def arm(self, scaling: str, width: int | None = None, depth: int | None = None, kind: str = "") -> str:
        """The name of an arm; μP at the base is SP unless its decay is coupled."""
        width, depth = width or self.base[0], depth or self.base[1]
        return name_of("sp" if scaling == "mup" and width == self.base[0] else scaling, width, depth, kind)

    @functools.cached_property
    def gridded(self) -> pd.DataFrame:
        """The runs of bowls: at the rates of a cell that most seeds have; those above, run with fewer, are for steadiness."""
        by = ["arm", "horizon_tokens"]
        seeds = self.frame.groupby([*by, "peak_lr"]).seed.transform("nunique")
        return self.frame[seeds == seeds.groupby([self.frame[name] for name in by]).transform("max")]

    @functools.cached_property
    def cells(self) -> pd.DataFrame:
        """One row an arm and horizon with a bowl (three rates or more): what the arm is, steps, parameters, rates, seeds."""
        rows = []
        for (arm, tokens), own in self.gridded.groupby(["arm", "horizon_tokens"]):
            own = common.with_bowl(own)
            if own.peak_lr.nunique() >= 3:
                rows.append(own.iloc[0][["scaling", "kind", "width", "depth", "experts", "experts_per_token", "params", "steps"]].to_dict()
                            | {"arm": arm, "horizon_tokens": int(tokens), "rates": own.peak_lr.nunique(), "seeds": own.seed.nunique(),
                               "flops": float(own.flops.sum())})
        return pd.DataFrame(rows)

    def plain(self, scaling: str = "sp") -> pd.DataFrame:
        """The cells of a scaling that differ in width and horizon alone; μP's hold the base."""
        cells = self.cells[(self.cells.kind == "") & (self.cells.depth == self.base[1])]
        at_base = (cells.scaling == "sp") & (cells.width == self.base[0])
        return cells[(cells.scaling == scaling) | (at_base & (scaling == "mup"))]

    @property
    def width_tokens(self) -> int:
        """The horizon that most widths have."""
        return int(self.plain().groupby("horizon_tokens").width.nunique().idxmax())

    @property
    def target(self) -> tuple[int, int]:
        """(width, tokens) of the μP cell with most tokens; of SP's where there is no μP."""
        cells = self.cells[(self.cells.scaling == "mup") & (self.cells.kind == "")]
        cells = cells if len(cells) else self.plain()
        last = cells.sort_values(["horizon_tokens", "width"]).iloc[-1]
        return int(last.width), int(last.horizon_tokens)


def shared_rows(rows: pd.DataFrame, axes: list[str], seeds=None) -> pd.DataFrame:
    """The bowls of some cells, told apart by `axes`, of the seeds that are in all of them (and among `seeds`, if given)."""
    cells = [common.with_bowl(own) for _, own in rows.groupby(axes)]
    if not cells:
        return rows
    shared = set.intersection(*(set(own.seed) for own in cells)) & (set(rows.seed) if seeds is None else set(seeds))
    return pd.concat([own[own.seed.isin(shared)] for own in cells])


def joint_valley(rows: pd.DataFrame, axes: list[str], seeds=None) -> Valley:
    """One valley through the bowls of some cells, told apart by `axes`, over the seeds that all have (of `seeds` alone, if given).

    A skew is fitted where the rates leave enough to tell it. Raises ValueError as `fit_valley` does, and for cells without a common seed.
    """
    table = shared_rows(rows, axes, seeds)
    count = table.seed.nunique()
    if count < (2 if seeds is None else 1):
        raise ValueError(f"cells by {', '.join(axes)} share {count} seeds; a valley needs two, or those it is asked for")
    skew = bool((table.groupby(axes).peak_lr.nunique() - 1).sum() >= LEAST_FOR_SKEW)
    return fit_valley({axis: table[axis].to_numpy(float) for axis in axes}, table.peak_lr, table.loss,
                      table.seed if count > 1 else None, skew=skew)


@dataclasses.dataclass(frozen=True, eq=False)
class Bowls:
    """The bowls of all cells, by arm and horizon, their runs, and by seed what other seeds' rate costs on the seed's own bowl."""

    by_cell: dict[tuple[str, int], Bowl]
    rows: dict[tuple[str, int], pd.DataFrame]
    tuned: dict[tuple[str, int], dict]

    @staticmethod
    def of(m: Measurements, names: dict[str, tuple[str, int]], frame: pd.DataFrame) -> "Bowls":
        """Those that Measurements could fit; `names` maps its names to cells."""
        found = {names[name]: bowl for name, bowl in m.bowls.items()}
        by = {cell: rows for cell, rows in frame.groupby(["arm", "horizon_tokens"])}
        tuned = {names[name]: m.tuned[name] for name in m.bowls if name in m.tuned}
        return Bowls(found, {cell: by[cell] for cell in found}, tuned)

    def __contains__(self, cell) -> bool:
        return cell in self.by_cell

    def vertices(self, arm: str, horizon_tokens: int) -> pd.Series:
        """Log2 best rate by seed."""
        bowl = self.by_cell[arm, horizon_tokens]
        return pd.Series(bowl.vertices, index=list(bowl.seeds)).rename_axis("seed")

    def tuned_loss(self, arm: str, horizon_tokens: int) -> pd.Series:
        """Loss by seed at the rate that other seeds chose; empty without a bowl."""
        return pd.Series({seed: loss for seed, (_, loss) in self.tuned.get((arm, horizon_tokens), {}).items()}, dtype=float)

    def loss_at(self, arm: str, horizon_tokens: int, seed: int, log2_lr: float) -> float:
        """Loss of a seed's bowl; beyond the rates tried it goes on straight, which for a bowl is too low rather than too high."""
        bowl, tried = self.by_cell[arm, horizon_tokens], np.log2(np.sort(self.rows[arm, horizon_tokens].peak_lr.unique()))
        inside = min(max(log2_lr, tried[0]), tried[-1])
        loss = float(bowl.seed_loss_at(seed, 2.0**inside))
        if inside == log2_lr:
            return loss
        slope = np.polyval(np.polyder(bowl.coefficients), inside - bowl.centre)
        return loss + max(0.0, float(slope * (log2_lr - inside)))

    def drift(self, arm: str, than: str, horizon_tokens: int, family: str = "drift") -> Contrast | None:
        """Log2 best rate of an arm − of another, by seed, of one valley through both cells, which shares the shape of their bowls.

        None where either has no bowl or they share fewer than two seeds.
        """
        pair = (than, horizon_tokens), (arm, horizon_tokens)
        if not all(cell in self.by_cell for cell in pair):
            return None
        rows = pd.concat([self.rows[cell].assign(side=2.0**i) for i, cell in enumerate(pair)])
        try:
            valley = joint_valley(rows, ["side"])
        except ValueError:  # fewer than two seeds in both
            return None
        octaves = np.array([exponent for (exponent,) in valley.exponents_per_seed])
        return Contrast(octaves, "octaves", family, horizon_tokens, self.short(*pair))

    def short(self, *cells) -> str:
        """Why cells are too small to count: "" where they are not."""
        steps = min(int(self.rows[cell].steps.iloc[0]) for cell in cells)
        return "" if steps >= LEAST_STEPS else f"runs of {steps} steps, fewer than {LEAST_STEPS}"
