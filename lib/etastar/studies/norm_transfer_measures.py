"""What the runs of study 05 say: optima over rate and batch and the norms there, rules, rivals of the norm, growth, sensitivities."""

import math

import numpy as np
import pandas as pd

from etastar.analysis.fixed_batch import FixedBatch, fixed_batch
from etastar.analysis.joint_surface import fit_joint_surface
from etastar.analysis.lr_batch_surface import Surfaces, fit_surfaces
from etastar.analysis.norm_parabola import PAPER_FIT, norm_optima
from etastar.analysis.norm_rivals import horizon_optimum, rivals
from etastar.studies.measured import LEAST_STEPS, Contrast, minus
from etastar.studies.norm_transfer_grids import ADAMW, SCION, Grids

LEAST_RANGE = 16.0  # of tokens, for a slope or an exponent that counts
PUBLISHED_GROWTH = {0: 0.88, 1: 1.49, 2: 2.25, 3: 3.11, 4: 3.94, 5: 4.76, 6: 5.4}  # log2 (LR · steps) → log2 norm, arXiv 2510.03871 Fig. 5
PUBLISHED = {"best rate over tokens": -0.28, "best batch over tokens": 0.45, "rate at a batch, over batch": 0.62,
             "rate at a batch, over tokens": -0.56, "norm at the optimum": -0.02, "norm at a fixed batch": 0.155,
             "first reach, over batch": 1.32, "first reach, over tokens": -0.96}
CANDIDATES = {"log2_norm": "output RMS→∞", "log2_output_rms": "output RMS→RMS", "log2_hidden": "hidden RMS→RMS",
              "log2_input": "input 1→RMS", "log2_lr_steps": "LR · steps", "log2_lr": "LR"}


# -- surfaces ----------------------------------------------------------------------------------------------------------


def surfaces(grids: Grids, arms) -> tuple[dict[tuple[str, str], Surfaces], dict[str, str]]:
    """(arm, method) → fit, for arms with two horizons, and why there is none."""
    found, refused = {}, {}
    for arm in arms:
        for method, fit in (("two-step", fit_surfaces), ("joint", fit_joint_surface)):
            try:
                found[arm, method] = fit(grids.surface(arm))
            except ValueError as error:
                refused[f"{arm}, {method}"] = str(error)
    return found, refused


def fixed(grids: Grids, arms) -> dict[str, FixedBatch]:
    """Bowls at every batch by arm, where they determine the rule."""
    found = {}
    for arm in arms:
        try:
            found[arm] = fixed_batch(grids.surface(arm))
        except ValueError:
            continue
    return found


def optima(grids: Grids) -> pd.DataFrame:
    """The optimum of every arm at every horizon by itself: what `Surfaces.cells` has, with arm, optimizer, shape, steps and basin.

    Columns named per_seed hold tuples; `basin` is the half-width in log2 norm at which the loss is 0.01 nats above its best.
    """
    rows = []
    for arm in grids.frame[grids.frame.main].arm.unique():
        for _, at in grids.surface(arm).groupby("horizon_tokens"):
            try:
                row = horizon_optimum(at)
            except ValueError:
                continue
            first = at.iloc[0]
            row |= dict.fromkeys(PLACES, math.nan) if _far(row, at) else {}
            rows.append({"arm": arm, "optimizer": first.optimizer, "width": first.width, "depth": first.depth,
                         "varied": first.varied, "normalization": first.normalization,
                         "steps": first.horizon_tokens / row["best_batch_tokens"], **row})
    return pd.DataFrame(rows)


PLACES = [f"{name}{side}" for name in ("best_lr", "best_batch_tokens", "best_loss", "log2_norm") for side in ("", "_low", "_high")]


def _far(row: dict, at: pd.DataFrame) -> bool:
    """Whether an optimum lies over an octave beyond the grid, where a quadratic knows nothing of it."""
    return any(not grid.min() / 2 <= row[name] <= grid.max() * 2
               for name, grid in (("best_lr", at.peak_lr), ("best_batch_tokens", at.batch_tokens)))


def by_paper(grids: Grids, arms, vocab: int) -> pd.DataFrame:
    """The same runs, means over seeds, put through the paper's own fit: a parabola of loss over log2 norm at every batch and horizon.

    `best` marks the batch of the grid that it takes at a horizon. The loss at norm 1 is that of logits with the variance of cosines.
    """
    rows = []
    for arm in arms:
        cells = grids.surface(arm).groupby(["horizon_tokens", "batch_tokens", "peak_lr", "width"], as_index=False)
        points = cells[["loss", "log2_norm"]].mean()
        if points.empty:
            continue
        start = math.log(vocab) + 1 / (2 * points.width.iloc[0])
        try:
            found = norm_optima(points.assign(model=arm), initial_loss=start, **PAPER_FIT)
        except ValueError:  # no batch has three runs
            continue
        rows.append(found.assign(best=found.loss == found.groupby("horizon_tokens").loss.transform("min")))
    columns = ["model", "horizon_tokens", "batch_tokens", "peak_lr", "log2_norm", "loss", "inside", "best"]
    return pd.concat(rows, ignore_index=True)[columns].rename(columns={"model": "arm"}) if rows else pd.DataFrame()


def plain(best: pd.DataFrame) -> pd.DataFrame:
    """The optima of arms that differ in optimizer and shape alone."""
    return best[(best.varied == "") & (best.normalization == "everywhere")] if len(best) else best


def rules(found, fixed_found) -> pd.DataFrame:
    """One row a rule, arm and method: value, low, high, published."""
    rows = []
    for (arm, method), fit in found.items():
        rows += [_rule_row("best rate over tokens", arm, method, fit, "lr_exponent"),
                 _rule_row("best batch over tokens", arm, method, fit, "batch_exponent"),
                 _rule_row("norm at the optimum", arm, method, fit, "norm_slope")]
        if method == "joint":
            rows += [_rule_row("rate at a batch, over batch", arm, method, fit, "lr_batch_exponent"),
                     _rule_row("rate at a batch, over tokens", arm, method, fit, "lr_horizon_exponent")]
    for arm, fit in fixed_found.items():
        rows += [_rule_row("rate at a batch, over batch", arm, "bowls", fit, "lr_batch_exponent"),
                 _rule_row("rate at a batch, over tokens", arm, "bowls", fit, "lr_horizon_exponent"),
                 _rule_row("norm at a fixed batch", arm, "bowls", fit, "norm_slope")]
    return pd.DataFrame(rows)


def _rule_row(rule: str, arm: str, method: str, fit, name: str) -> dict:
    return {"rule": rule, "arm": arm, "optimizer": arm.split(",")[0], "method": method, "value": getattr(fit, name),
            "low": getattr(fit, f"{name}_low"), "high": getattr(fit, f"{name}_high"), "published": PUBLISHED.get(rule, math.nan),
            "per_seed": getattr(fit, f"{name}_per_seed")}


def rival_table(grids: Grids, arms) -> pd.DataFrame:
    """Candidates for what stays, by arm: drift over the horizons in half-widths of the basin, with interval."""
    made = []
    for arm in arms:
        try:
            table = rivals(grids.surface(arm), tuple(CANDIDATES)).table
        except ValueError:
            continue
        made.append(table.assign(arm=arm, optimizer=arm.split(",")[0], candidate=table.candidate.map(CANDIDATES)))
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame()


# -- reaching the norm -------------------------------------------------------------------------------------------------


def first_reach(grids: Grids, arm: str, log2_norm: float) -> pd.DataFrame:
    """By seed the exponents of batch and tokens in the rate that has `log2_norm` at a horizon: seed, batch, tokens, points.

    The rate is interpolated between neighbouring rates of a batch and horizon whose norms lie on either side.
    """
    rows = []
    for (seed, batch, tokens), at in grids.frame[(grids.frame.arm == arm)].groupby(["seed", "batch_tokens", "horizon_tokens"]):
        at = at.dropna(subset="log2_norm").sort_values("log2_lr")
        if len(at) >= 2 and at.log2_norm.is_monotonic_increasing and at.log2_norm.iloc[0] <= log2_norm <= at.log2_norm.iloc[-1]:
            rows.append((seed, math.log2(batch), math.log2(tokens), np.interp(log2_norm, at.log2_norm, at.log2_lr)))
    points, found = pd.DataFrame(rows, columns=["seed", "batch", "tokens", "rate"]), []
    for seed, own in points.groupby("seed"):
        design = np.column_stack([np.ones(len(own)), own.batch, own.tokens])
        if len(own) >= 4 and np.linalg.matrix_rank(design - design.mean(0) * [0, 1, 1]) == 3:
            fit = np.linalg.lstsq(design, own.rate, rcond=None)[0]
            found.append({"seed": seed, "batch": fit[1], "tokens": fit[2], "points": len(own)})
    return pd.DataFrame(found)


def growth(runs) -> pd.DataFrame:
    """Log2 output norm where LR · steps passes powers of two: peak_lr, batch_tokens, seed, log2_lr_steps, log2_norm, offset.

    Of the runs whose norms were logged; `offset` is from the published curve.
    """
    rows = []
    for run in {r.run_id: r for r in runs if r.observed.norms_every_tokens}.values():
        curve = run.curve.dropna(subset="norm_output")
        for power, published in PUBLISHED_GROWTH.items():
            at = curve[curve.step == round(2.0**power / run.recipe.peak_lr)]
            if len(at):
                norm = math.log2(float(at.norm_output.iloc[0]))
                rows.append({"peak_lr": run.recipe.peak_lr, "batch_tokens": run.recipe.batch_tokens, "seed": run.recipe.seed,
                             "log2_lr_steps": power, "log2_norm": norm, "offset": norm - published})
    columns = ["peak_lr", "batch_tokens", "seed", "log2_lr_steps", "log2_norm", "offset"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:4])


# -- contrasts ---------------------------------------------------------------------------------------------------------


def slope_contrasts(grids: Grids, found, fixed_found, best: pd.DataFrame) -> dict[str, Contrast]:
    """Slopes and exponents over a 16-fold range of horizons, by the joint fit; `short` where an optimum has under 256 steps."""
    made = {}
    for optimizer in (SCION, ADAMW):
        arm = grids.arm(optimizer)
        fit, bowls = found.get((arm, "joint")), fixed_found.get(arm)
        horizons = grids.surface(arm).horizon_tokens
        if fit is None or len(fit.seeds) < 2 or horizons.max() / horizons.min() < LEAST_RANGE:
            continue
        short, tokens = too_short(best, arm), int(horizons.max())
        read = {"norm slope": (fit, "norm_slope"), "lr exponent": (fit, "lr_exponent"), "batch exponent": (fit, "batch_exponent"),
                "rule, batch": (fit, "lr_batch_exponent"), "rule, tokens": (fit, "lr_horizon_exponent"),
                "norm slope, fixed batch": (bowls, "norm_slope")}
        made |= {f"{optimizer}: {name}": Contrast(np.array(getattr(of, f"{field}_per_seed")), UNITS[field], "exponents", tokens, short,
                                                  of.window_sd[field]) for name, (of, field) in read.items() if of is not None}
        norm = float(best[(best.arm == arm) & (best.edge == "")].log2_norm.mean())
        reach = first_reach(grids, arm, norm) if math.isfinite(norm) else pd.DataFrame()
        if len(reach) >= 2:
            made |= {f"{optimizer}: first reach, {name}": Contrast(reach[name].to_numpy(), "exponent", "reach", tokens, short)
                     for name in ("batch", "tokens")}
    for name in ("lr exponent", "batch exponent"):
        a, b = (made.get(f"{optimizer}: {name}") for optimizer in (SCION, ADAMW))
        if a is not None and b is not None:
            n = min(len(a.per_seed), len(b.per_seed))  # seeds are shared, the first ones of each
            made[f"scion − adamw: {name}"] = Contrast(a.per_seed[:n] - b.per_seed[:n], "exponent", "exponents", a.horizon_tokens,
                                                      a.short or b.short, math.hypot(a.spread, b.spread))
    return made


UNITS = dict.fromkeys(("lr_exponent", "batch_exponent", "lr_batch_exponent", "lr_horizon_exponent"), "exponent") | {
    "norm_slope": "octaves per octave"}


def too_short(best: pd.DataFrame, *arms: str) -> str:
    """Why optima cannot count: those of fewer than 256 steps; empty where all have them."""
    if best.empty:
        return ""
    few = best[best.arm.isin(arms) & (best.steps < LEAST_STEPS)]
    said = ", ".join(f"{row.steps:.0f} at {row.horizon_tokens:,.0f} tokens" for row in few.itertuples())
    return f"the best batch leaves fewer than {LEAST_STEPS} steps ({said})" if len(few) else ""


def shape_contrasts(grids: Grids, best: pd.DataFrame) -> dict[str, Contrast]:
    """Log2 norm at the optimum of the widest less the narrowest, the deepest less the shallowest, at the horizon both have."""
    made, per_seed = {}, _norms_by_seed(best)
    if best.empty:
        return made
    alike = plain(best)
    for optimizer in (SCION, ADAMW):
        for axis, other, at in (("width", "depth", grids.shape[1]), ("depth", "width", grids.shape[0])):
            rows = alike[(alike.optimizer == optimizer) & (alike[other] == at)]
            common_tokens = rows.groupby("horizon_tokens")[axis].nunique()
            if common_tokens.empty or common_tokens.max() < 2:
                continue
            rows = rows[rows.horizon_tokens == common_tokens.idxmax()].sort_values(axis)
            ends = rows.iloc[[0, -1]]
            difference = minus(per_seed[ends.index[1]], per_seed[ends.index[0]])
            edge = "; ".join(f"the optimum of {row.arm} lies beyond its grid ({row.edge})" for row in ends.itertuples() if row.edge)
            if len(difference) >= 2:
                made[f"{optimizer}: norm over {axis}"] = Contrast(difference.to_numpy(), "octaves", axis, int(ends.horizon_tokens.iloc[0]),
                                                                  edge or too_short(ends, *ends.arm))
    return made


def _norms_by_seed(best: pd.DataFrame) -> dict:
    return {i: pd.Series(row.norm_per_seed, index=row.seeds) for i, row in zip(best.index, best.itertuples(), strict=True)}


def at_longest(best: pd.DataFrame, arm: str, tokens: int | None = None) -> pd.Series | None:
    """The optimum of an arm at its longest horizon, or at one; None where there is none."""
    rows = best[(best.arm == arm) & (True if tokens is None else best.horizon_tokens == tokens)] if len(best) else best
    return None if rows.empty else rows.loc[rows.horizon_tokens.idxmax()]


def sufficiency(grids: Grids, best: pd.DataFrame) -> dict[str, Contrast]:
    """What the batch farthest from the best loses at the longest horizon where its norm is the best one's."""
    arm = grids.arm(SCION)
    top = at_longest(best, arm)
    if top is None or top.edge:
        return {}
    rows = grids.surface(arm).query("horizon_tokens == @top.horizon_tokens")
    octaves = np.abs(np.log2(rows.batch_tokens / top.best_batch_tokens))
    far = rows[octaves == octaves.max()]
    lost = {}
    for seed, own in far.groupby("seed"):
        own = own.sort_values("log2_norm")
        if own.log2_norm.iloc[0] <= top.log2_norm <= own.log2_norm.iloc[-1]:
            lost[seed] = float(np.interp(top.log2_norm, own.log2_norm, own.loss))
    difference = minus(pd.Series(lost, dtype=float), pd.Series(top.loss_per_seed, index=top.seeds))
    if len(difference) < 2:
        return {}
    return {"far batch − best, at the best norm": Contrast(difference.to_numpy(), "nats", "sufficiency", int(top.horizon_tokens),
                                                           too_short(best[best.horizon_tokens == top.horizon_tokens], arm))}


def sensitivity(grids: Grids, best: pd.DataFrame) -> dict[str, Contrast]:
    """Momentum's and decay's effect at the horizon where they were run: best loss, and the basin's half-width in the norm."""
    made = {}
    for arm in best.arm.unique() if len(best) else ():
        other = at_longest(best, arm)
        kind = other.varied
        own = at_longest(best, grids.arm(SCION), other.horizon_tokens) if kind else None
        if own is None:
            continue
        short = too_short(pd.DataFrame([own, other]), own.arm, arm)
        for name, column, unit in (("loss", "loss_per_seed", "nats"), ("basin", "basin_per_seed", "octaves")):
            difference = minus(*(pd.Series(row[column], index=row.seeds) for row in (other, own)))
            if len(difference) >= 2:
                made[f"{kind}: {name}"] = Contrast(difference.to_numpy(), unit, kind, int(other.horizon_tokens), short)
    return made


def rival_contrasts(grids: Grids, table: pd.DataFrame, short: str) -> dict[str, Contrast]:
    """How much farther the norm drifts than LR · steps, each in half-widths of its own basin, by seed."""
    rows = table[table.arm == grids.arm(SCION)].set_index("candidate") if len(table) else table
    if rows.empty:
        return {}
    norm, steps = (np.abs(np.array(rows.drift_per_seed[CANDIDATES[name]])) for name in ("log2_norm", "log2_lr_steps"))
    return {"drift: norm − LR · steps": Contrast(norm - steps, "half-widths", "rivals", None, short)} if len(norm) >= 2 else {}


def growth_contrast(grown: pd.DataFrame) -> dict[str, Contrast]:
    """Mean offset from the published growth curve by seed, points of equal LR · steps weighing the same."""
    if grown.empty:
        return {}
    per_seed = grown.groupby(["seed", "log2_lr_steps"]).offset.mean().unstack().mean(axis=1, skipna=False)
    return {"growth: offset": Contrast(per_seed.to_numpy(), "octaves", "growth")} if len(per_seed) >= 2 else {}


