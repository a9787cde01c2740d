"""What the runs of study 06 say beside the target: drifts of the best rate, exponents, decay, modules, steadiness, the Power schedule."""

import math

import numpy as np
import pandas as pd

from etastar.analysis.paired import mean_estimate
from etastar.analysis.stability import divergence_boundary, summary
from etastar.analysis.valley import fit_valley
from etastar.studies import layer_groups
from etastar.studies import measured as common
from etastar.studies.measured import Contrast
from etastar.studies.mup_vs_fitting_grids import Bowls, Grid, shared_rows
from etastar.studies.power_law_measures import bend

LEAST_RANGE = 16.0  # of tokens or parameters, for an exponent that counts
LEAST_WIDTH = 128  # where token tables are half the parameters no exponent in them counts
GRANULARITY = 0.25  # octaves of drift that are none
TIME = 3.0  # η·λ·T at which decay is compared: below 1 it does nothing
ALONG = {"width": ["mup", "sp"], "depth": ["completep", "sp", "alpha 0.5", "alpha 0"]}


# -- drifts ------------------------------------------------------------------------------------------------------------


def ends(grid: Grid, along: str, scaling: str, mixture: bool = False) -> tuple[str, str] | None:
    """The arms at the largest and at the base's width or depth under a scaling, at the widths' horizon; None for the base alone."""
    cells, other = grid.cells, "depth" if along == "width" else "width"
    base = grid.base[0 if along == "width" else 1]
    kind = base_mixture(grid) if mixture else ""
    cells = cells[(cells.kind == kind) & (cells.horizon_tokens == grid.width_tokens) & (cells[other] == grid.base[along == "width"])]
    own = cells[(cells.scaling == scaling) | ((cells.scaling == "sp") & (cells[along] == base) & (scaling == "mup"))].sort_values(along)
    own = own[own[along] >= base]
    return (own.arm.iloc[-1], own.arm.iloc[0]) if len(own) > 1 and own[along].iloc[0] == base else None


def base_mixture(grid: Grid) -> str:
    """The kind of the mixture that most widths have; "none", which no cell has, where there is no mixture."""
    cells = grid.cells[grid.cells.kind.str.fullmatch(r"\d+ experts top \d+")]
    return cells.groupby("kind").width.nunique().idxmax() if len(cells) else "none"


def drifts(grid: Grid, bowls: Bowls) -> dict[str, Contrast]:
    """Octaves of the best rate from the base to the largest width, depth, number of experts and fineness; and differences of scalings."""
    made, tokens = {}, grid.width_tokens
    for mixture in (False, True):
        for along, scalings in ALONG.items():
            for scaling in scalings if not mixture or along == "width" else ():
                pair = ends(grid, along, scaling, mixture)
                if pair and (found := bowls.drift(*pair, tokens)):
                    made[f"{'mixture, ' * mixture}{scaling}: drift over {along}"] = found
    for name, (scaling, than, along) in {"sp − mup": ("sp", "mup", "width"), "sp − completep": ("sp", "completep", "depth"),
                                         "alpha 0.5 − completep": ("alpha 0.5", "completep", "depth")}.items():
        for before in ("", "mixture, "):
            pair = [made.get(f"{before}{each}: drift over {along}") for each in (scaling, than)]
            if all(pair) and len(pair[0].per_seed) == len(pair[1].per_seed):
                made[f"{before}{name}: drift over {along}"] = Contrast(
                    pair[0].per_seed - pair[1].per_seed, "octaves", "drifts", tokens, pair[0].short or pair[1].short)
    return made | _of_experts(grid, bowls)


def _of_experts(grid: Grid, bowls: Bowls) -> dict[str, Contrast]:
    cells, kind, made = grid.cells, base_mixture(grid), {}
    base = cells[(cells.kind == kind) & (cells.width == grid.base[0]) & (cells.horizon_tokens == grid.width_tokens)]
    if base.empty:
        return {}
    own = base.iloc[0]
    at = cells[(cells.horizon_tokens == grid.width_tokens) & cells.kind.str.fullmatch(r"\d+ experts top \d+")]
    more = at[(at.width == own.width) & (at.experts_per_token == own.experts_per_token) & (at.experts > own.experts)]
    if len(more) and (found := bowls.drift(more.sort_values("experts").arm.iloc[-1], own.arm, grid.width_tokens)):
        made["mixture, mup: drift over experts"] = found
    for finer in at[at.experts_per_token > own.experts_per_token].itertuples():
        plain = at[(at.kind == kind) & (at.width == finer.width) & at.scaling.isin([finer.scaling, "sp"])].sort_values("scaling")
        if len(plain) and (found := bowls.drift(finer.arm, plain.arm.iloc[0], grid.width_tokens)):
            side = math.copysign(1.0, float(found.per_seed.mean()))  # how far, whichever way the mean lies
            made["mixture, mup: drift over fineness"] = found
            made["mixture, mup: fineness beyond none"] = Contrast(side * found.per_seed - GRANULARITY, "octaves", "fineness",
                                                                 found.horizon_tokens, found.short)
    return made


def vertices(bowls: Bowls, grid: Grid) -> pd.DataFrame:
    """One row a cell: what it is, its best rate with interval, loss there, curvature."""
    rows = []
    for cell in grid.cells.itertuples(index=False):
        if (cell.arm, cell.horizon_tokens) in bowls:
            b = bowls.by_cell[cell.arm, cell.horizon_tokens]
            rows.append(cell._asdict() | {"best_lr": b.best_lr, "low": b.best_lr_low, "high": b.best_lr_high, "best_loss": b.best_loss,
                                          "nats_per_octave2": b.curvature, "octaves_sd": b.window_sd})
    return pd.DataFrame(rows)


# -- exponents ---------------------------------------------------------------------------------------------------------


def exponents(grid: Grid) -> tuple[dict[str, Contrast], pd.DataFrame]:
    """Exponents of the best rate in tokens (base; μP at the target's width) and parameters (SP widths), and a table of them."""
    width, made, rows = grid.target[0], {}, []
    axes = {"sp: horizon exponent": (grid.arm("sp"), "horizon_tokens"), "mup: horizon exponent": (grid.arm("mup", width), "horizon_tokens"),
            "sp: size exponent": (None, "params")}
    for name, (arm, axis) in axes.items():
        frame = _along(grid, arm, axis)
        try:
            valley = fit_valley({axis: frame[axis].to_numpy(float)}, frame.peak_lr, frame.loss, frame.seed)
        except ValueError:  # fewer than two cells
            continue
        made[name] = Contrast(np.array([e[0] for e in valley.exponents_per_seed]), "exponent", name, int(frame.horizon_tokens.max()),
                              _too_small(frame, axis))
        rows.append({"exponent of": name, "value": valley.exponents[0], "low": valley.exponents_low[0], "high": valley.exponents_high[0],
                     "least": frame[axis].min(), "most": frame[axis].max(), "seeds": len(valley.seeds)})
        if axis == "horizon_tokens" and (bent := bend(frame, axis)):
            made[name.replace("exponent", "curvature")] = Contrast(bent[0], "exponent", "bend", int(frame.horizon_tokens.max()),
                                                                   _too_small(frame, axis))
    return made, pd.DataFrame(rows)


def _along(grid: Grid, arm: str | None, axis: str) -> pd.DataFrame:
    frame = grid.gridded[grid.gridded.arm == arm] if arm else grid.gridded[grid.gridded.arm.isin(grid.plain().arm)]
    frame = frame if arm else frame[frame.horizon_tokens == grid.width_tokens]
    return shared_rows(frame[frame.groupby(axis).peak_lr.transform("nunique") >= 3], [axis])


def _too_small(frame: pd.DataFrame, axis: str) -> str:
    said, fold = [], frame[axis].max() / frame[axis].min()
    if frame.steps.min() < common.LEAST_STEPS:
        said.append(f"runs of {frame.steps.min()} steps, fewer than {common.LEAST_STEPS}")
    if fold < LEAST_RANGE:
        said.append(f"a {fold:.3g}-fold range of {axis}, less than {LEAST_RANGE:g}-fold")
    if axis == "params" and frame.width.max() <= LEAST_WIDTH:
        said.append(f"widths up to {frame.width.max()}, where token tables are half the parameters")
    return "; ".join(said)


# -- decay, modules, steadiness, Power ---------------------------------------------------------------------------------


def decay(grid: Grid, bowls: Bowls, slope: float) -> dict[str, Contrast]:
    """Coupled against independent decay at the wider model: octaves of the best rate, and the tuned losses over |dL/d log D|.

    Of several strengths the one whose η·λ·T is nearest to TIME at the base's best rate is told without its λ.
    """
    made, cells, tokens = {}, grid.cells, grid.width_tokens
    times = {}
    for kind in cells[cells.kind.str.fullmatch(r"decay [\d.e+-]+") & (cells.width == grid.base[0])].kind:
        if (cell := (grid.arm("sp", kind=kind), tokens)) in bowls:
            best, steps = bowls.by_cell[cell].best_lr, bowls.rows[cell].steps.iloc[0]
            times[kind] = abs(math.log(best * float(kind.split()[1]) * steps / TIME))
    for kind in times:
        wide = cells[(cells.kind == f"{kind}, coupled") & (cells.width > grid.base[0])]
        pair = [(grid.arm("mup", w, kind=k), tokens) for w in wide.width.head(1) for k in (f"{kind}, coupled", kind)]
        if pair and (found := bowls.drift(pair[0][0], pair[1][0], tokens, "decay")):
            said = "" if times[kind] == min(times.values()) else f", {kind}"
            made[f"coupled − independent{said}"] = found
            loss = common.minus(*(bowls.tuned_loss(*cell) for cell in reversed(pair))).to_numpy() / slope
            made[f"independent − coupled, loss{said}"] = Contrast(loss, "token_fraction", "decay loss", tokens, found.short)
    return made


def modules(grid: Grid) -> tuple[dict[str, Contrast], pd.DataFrame, pd.DataFrame]:
    """What rates of their own for layer groups gain, without QK-norm less with it; tables of gains and of what each move costs."""
    conditions = layer_groups.conditions(grid.frame)
    by = {c.normalization: c for c in conditions}
    gains = {name: layer_groups.gain(by[name]) for name in by}
    made = {}
    if {"plain", "QK-norm"} <= set(gains) and len(gains["plain"]) == len(gains["QK-norm"]) >= 2:
        made["modules: plain − QK-norm"] = Contrast(gains["plain"] - gains["QK-norm"], "loss_fraction", "modules")
    return made, layer_groups.gains(conditions), layer_groups.ratios(conditions)


def steadiness(grid: Grid, runs) -> pd.DataFrame:
    """One row an observed run that did not diverge: arm, rate, seed, and the summary of its curve as analysis.stability has it."""
    by_id = grid.frame.set_index("run_id")
    rows = [{"arm": by_id.arm[r.run_id], "scaling": by_id.scaling[r.run_id], "kind": by_id.kind[r.run_id], "width": by_id.width[r.run_id],
             "log2_lr": by_id.log2_lr[r.run_id], "seed": by_id.seed[r.run_id]} | dict(summary(r.curve))
            for r in {r.run_id: r for r in runs}.values() if r.status == "done" and looked_at(r.curve)]
    return pd.DataFrame(rows)


def looked_at(curve: pd.DataFrame) -> bool:
    """Whether features were logged while a run trained."""
    return "attention_logit_max" in curve and bool(curve.attention_logit_max.notna().any())


def boundaries(grid: Grid, vocab: int) -> pd.DataFrame:
    """One row a cell of the widths' horizon: log2 rates between which runs begin to diverge or to end no better than they began."""
    rows = []
    for arm, own in grid.frame[grid.frame.horizon_tokens == grid.width_tokens].groupby("arm"):
        found = divergence_boundary(own.peak_lr, own.loss, own.status, start_loss=math.log(vocab))
        rows.append(own.iloc[0][["scaling", "kind", "width", "depth"]].to_dict() | {"arm": arm, "safe_log2_lr": found.low,
                                                                                   "unsafe_log2_lr": found.high})
    return pd.DataFrame(rows)


def mended(grid: Grid, bowls: Bowls, slope: float) -> dict[str, Contrast]:
    """How much smaller |tuned μP − SP| is with QK-norm or a z-loss than without, over |dL/d log D|."""
    made, tokens = {}, grid.width_tokens
    for kind in ("QK-norm", "z-loss"):
        for width in grid.cells[grid.cells.kind == kind].width.unique():
            gap = {k: common.minus(*(bowls.tuned_loss(grid.arm(s, width, kind=k), tokens) for s in ("mup", "sp"))) for k in ("", kind)}
            both = common.minus(_toward(gap[kind]), _toward(gap[""]))
            if len(both) >= 2:
                made[f"mup − sp, {kind} − plain"] = Contrast(both.to_numpy() / slope, "token_fraction", "mended", tokens)
    return made


def _toward(gap: pd.Series) -> pd.Series:
    """A gap by seed, turned so that its mean is positive: the size of the mean gap, with the seeds' own noise."""
    return gap * math.copysign(1.0, float(gap.mean())) if len(gap) else gap


def power(grid: Grid, bowls: Bowls, slopes: dict[int, float]) -> dict[str, Contrast]:
    """Power at one setting over WSD tuned on the mixture, over |dL/d log D|, at the horizon where it is worst on the other seeds."""
    at, losses = grid.frame[grid.frame.kind.str.endswith("power")], {}
    for (kind, tokens), own in at.groupby(["kind", "horizon_tokens"]):
        wsd = bowls.tuned_loss(grid.arm("mup", own.width.iloc[0], kind=kind.removesuffix(", power")), int(tokens))
        difference = common.minus(own.set_index("seed").loss, wsd)
        if len(difference) >= 2 and int(tokens) in slopes:
            losses[int(tokens)] = difference / slopes[int(tokens)]
    if not losses:
        return {}
    table = pd.DataFrame(losses).dropna()
    return {"power − wsd, tuned: worst horizon": Contrast((-common.chosen_on_others(-table)).to_numpy(), "token_fraction", "power",
                                                          max(losses))}


def slopes(grid: Grid, bowls: Bowls) -> dict[int, float]:
    """|dL/d log D| of the base's best losses from a horizon to its double, by horizon, where both have a bowl and the loss falls."""
    best = {tokens: bowl.best_loss for (arm, tokens), bowl in bowls.by_cell.items() if arm == grid.arm("sp")}
    found = {tokens: (loss - best[2 * tokens]) / math.log(2) for tokens, loss in best.items() if 2 * tokens in best}
    return {tokens: slope for tokens, slope in found.items() if slope > 0}


def drift_table(contrasts: dict[str, Contrast]) -> pd.DataFrame:
    """One row a drift: what of, octaves with their 95 % interval, seeds."""
    rows = []
    for name, c in contrasts.items():
        if ": drift over " in name:
            low, high = mean_estimate(c.per_seed).interval()
            rows.append({"drift": name, "octaves": float(np.mean(c.per_seed)), "low": low, "high": high, "seeds": len(c.per_seed)})
    return pd.DataFrame(rows)
