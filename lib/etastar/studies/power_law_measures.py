"""What the runs of study 04 say: valleys of the best rate over tokens, batch and width; regrets of schedules at one setting; knobs."""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.analysis.valley import Valley, fit_valley
from etastar.recipe import Recipe
from etastar.schedules import Cosine, Power
from etastar.studies import measured as common
from etastar.studies.measured import LEAST_STEPS, Contrast, Measurements, chosen_on_others
from etastar.studies.power_law_design import FIXED_FLOOR

CELL = ["horizon_tokens", "batch_tokens", "width"]
AXES = {"horizon": "horizon_tokens", "batch": "batch_tokens", "width": "width"}
STEP_LAW_BATCH = 0.571  # exponent of arXiv 2503.04715's batch in tokens
LAW_OVER_POWER = 4.6 / 4  # arXiv 2408.13359: a of the law for a planned horizon over a of the schedule
A_RANGE = math.log2(5 / 3) / 2  # octaves from the middle of its range of a, 3 … 5, to an end
LEAST_FOR_SKEW = 7  # rates beyond the first of each cell: level, exponent, curvature and two for the skew leave two over
LEAST_RANGE = 16.0  # of tokens or batches, for an exponent that counts
FIXED, LAW, POWER, COSINE = "wsd, one LR", "wsd, the law's LR", "power", "cosine, one LR"


def kind_of(recipe: Recipe) -> str:
    """"wsd" and how it differs from that, "cosine", or "power" with its b and a."""
    schedule = recipe.schedule
    if isinstance(schedule, Cosine):
        return "cosine"
    if isinstance(schedule, Power):
        return f"power b {schedule.b:g} a {schedule.a:.3g}"
    if schedule.floor:
        return "wsd to a fixed rate" if math.isclose(schedule.floor * recipe.peak_lr, FIXED_FLOOR) else f"wsd to {100 * schedule.floor:g} %"
    return "wsd, warm-up 5 %" if schedule.warmup_tokens else "wsd, no decay" if not recipe.optimizer.weight_decay else "wsd"


def arm_of(recipe: Recipe) -> str:
    """The arm a recipe belongs to: its kind, batch and width."""
    return f"{kind_of(recipe)}, batch {recipe.batch_tokens}, width {recipe.model.width}"


# -- the grid ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs by cell (horizon, batch, width): `main` is the batch and width that most horizons have, `power` the Power schedule
    that is run in most cells, `schedules` those of all kinds.
    """

    frame: pd.DataFrame
    main: tuple[int, int]
    power: Power | None
    schedules: dict

    @staticmethod
    def of(runs) -> "Grid":
        """Of all runs of a preset."""
        told = [{"run_id": r.run_id, "kind": kind_of(r.recipe), "batch_tokens": r.recipe.batch_tokens, "width": r.recipe.model.width,
                 "steps": r.recipe.total_steps} for r in runs]
        frame = common.losses(runs, arm_of).merge(pd.DataFrame(told).drop_duplicates("run_id"), on="run_id")
        schedules = {kind_of(r.recipe): r.recipe.schedule for r in runs}
        main = frame[frame.kind == "wsd"].groupby(["batch_tokens", "width"]).horizon_tokens.nunique().idxmax()
        cells = frame[frame.kind.str.startswith("power")][["kind", *CELL]].drop_duplicates().kind.value_counts()
        return Grid(frame, main, schedules[cells.idxmax()] if len(cells) else None, schedules)

    def bowl(self, horizon_tokens: int, batch_tokens: int, width: int, kind: str = "wsd") -> pd.DataFrame:
        """The runs of a cell at the rates that all seeds of its bowl have."""
        at = self.frame[(self.frame[["kind", *CELL]] == [kind, horizon_tokens, batch_tokens, width]).all(axis=1)]
        return common.with_bowl(at)

    def along(self, axis: str, kind: str = "wsd") -> pd.DataFrame:
        """The bowls over the horizon, the batch or the width, all else as in the main cells, of the seeds that are in every cell."""
        cells = self.frame[self.frame.kind == kind][CELL].drop_duplicates()
        batch, width = self.main
        at = {"horizon": (cells.batch_tokens == batch) & (cells.width == width),
              "batch": (cells.width == width) & (cells.horizon_tokens == self._horizon_of(cells.batch_tokens != batch, cells)),
              "width": (cells.batch_tokens == batch) & (cells.horizon_tokens == self._horizon_of(cells.width != width, cells))}[axis]
        bowls = [rows for cell in cells[at].itertuples(index=False) if (rows := self.bowl(*cell, kind)).peak_lr.nunique() >= 3]
        if not bowls:
            return self.frame.iloc[:0]
        seeds = set.intersection(*(set(rows.seed) for rows in bowls))
        return pd.concat(rows[rows.seed.isin(seeds)] for rows in bowls).sort_values([AXES[axis], "peak_lr", "seed"])

    @staticmethod
    def _horizon_of(others, cells) -> int:
        return int(cells[others].horizon_tokens.mode().iloc[0]) if others.any() else -1

    @property
    def knob_tokens(self) -> int:
        """The horizon at which the Power schedule's knobs are moved."""
        return int(self.frame[self.frame.kind.str.startswith("power")].groupby("horizon_tokens").kind.nunique().idxmax())


def bowl_name(arm: str, horizon_tokens: int, main: str, longest: int) -> str:
    """How Measurements calls the bowl of an arm at a horizon."""
    if arm == main and horizon_tokens in (longest, longest // 2):
        return arm if horizon_tokens == longest else f"{arm} at half"
    return f"{arm}, {horizon_tokens:,} tokens"


# -- valleys -----------------------------------------------------------------------------------------------------------


def valleys(grid: Grid) -> tuple[dict[str, Valley], dict[str, str]]:
    """The valley along each axis, and why there is none."""
    found, refused = {}, {}
    for axis in AXES:
        try:
            found[axis] = valley_of(grid.along(axis), axis)
        except ValueError as error:
            refused[axis] = str(error)
    return found, refused


def valley_of(rows: pd.DataFrame, axis: str, seeds: bool = True) -> Valley:
    """The valley of some bowls; `seeds` False where they are of one seed. A skew is fitted where the rates leave enough to tell it."""
    rates = rows.groupby(CELL).peak_lr.nunique()
    return fit_valley({axis: rows[AXES[axis]].to_numpy(float)}, rows.peak_lr, rows.loss, rows.seed if seeds else None,
                      skew=bool((rates - 1).sum() >= LEAST_FOR_SKEW))


def vertices(found: dict[str, Valley]) -> pd.DataFrame:
    """One row an axis and cell: value, best_lr with its interval, whether it is at an edge."""
    rows = [v.cells.rename(columns={axis: "value"}).assign(axis=axis) for axis, v in found.items()]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def exponents(grid: Grid, found: dict[str, Valley]) -> pd.DataFrame:
    """One row an axis (and, where they were run, a kind of WSD): exponent with interval, its own curvature, range, seeds."""
    rows = [_exponent_row(axis, "wsd", valley, bend(grid.along(axis), AXES[axis])) for axis, valley in found.items()]
    for kind in sorted(set(grid.frame.kind) - {"wsd"}):
        try:
            rows.append(_exponent_row("horizon", kind, valley_of(grid.along("horizon", kind), "horizon"), None))
        except ValueError:  # not a kind with bowls over the horizon
            continue
    return pd.DataFrame(rows)


def _exponent_row(axis: str, kind: str, valley: Valley, bent) -> dict:
    values = valley.cells[axis]
    row = {"along": axis, "kind": kind, "exponent": valley.exponents[0], "low": valley.exponents_low[0], "high": valley.exponents_high[0],
           "least": values.min(), "most": values.max(), "cells": len(values), "seeds": len(valley.seeds), "scatter_nats": valley.scatter}
    return row | (dict(zip(("slope_an_octave", "slope_low", "slope_high"), bent[1], strict=True)) if bent else {})


def bend(rows: pd.DataFrame, column: str) -> tuple[np.ndarray, tuple[float, float, float]] | None:
    """How the slope changes an octave of a column: by seed, and over seeds with its interval; None where the cells do not determine it."""
    log = np.log(rows[column].to_numpy(float))
    if len(np.unique(log)) < 3:
        return None
    log -= (log.min() + log.max()) / 2
    try:
        v = fit_valley({"value": np.exp(log), "bend": np.exp(log**2)}, rows.peak_lr, rows.loss, rows.seed)
    except ValueError:
        return None
    at, octaves = v.names.index("bend"), 2 * math.log(2)
    over_seeds = tuple(octaves * each[at] for each in (v.exponents, v.exponents_low, v.exponents_high))
    return octaves * np.array([e[at] for e in v.exponents_per_seed]), over_seeds


def local_slopes(grid: Grid) -> pd.DataFrame:
    """One row a pair of neighbouring cells of an axis: slope with its interval over seeds."""
    rows = []
    for axis, column in AXES.items():
        bowls = grid.along(axis)
        values = sorted(bowls[column].unique())
        for low, high in zip(values[:-1], values[1:], strict=True):
            try:
                v = valley_of(bowls[bowls[column].isin([low, high])], axis)
            except ValueError:
                continue
            rows.append({"along": axis, "from_value": low, "to_value": high, "slope": v.exponents[0], "low": v.exponents_low[0],
                         "high": v.exponents_high[0]})
    return pd.DataFrame(rows)


def predicted(grid: Grid) -> pd.DataFrame:
    """The rate that horizons up to a quarter of the longest predict for it, and its best rate, by seed: octaves (log2 of the ratio).

    A seed's own bowls make both: the prediction from the shorter horizons alone, the best rate from the joint fit of all.
    """
    rows, longest = grid.along("horizon"), grid.along("horizon").horizon_tokens.max()
    found = []
    for seed, own in rows.groupby("seed"):
        try:
            short = valley_of(own[own.horizon_tokens <= longest / 4], "horizon", seeds=False)
            cells = valley_of(own, "horizon", seeds=False).cells.set_index("horizon")
        except ValueError:
            continue
        guess = float(short.predict([float(longest)])[0])
        best = cells.best_lr[longest]
        found.append({"seed": seed, "predicted": guess, "best_lr": best, "octaves": math.log2(guess / best)})
    return pd.DataFrame(found)


# -- one setting everywhere --------------------------------------------------------------------------------------------


def token_slopes(m: Measurements, main: str, longest: int) -> dict[int, float]:
    """dL/d log D of the main arm's tuned losses by horizon: from half of it, for the shortest to twice of it."""
    best = {tokens: m.bowls[name].best_loss for tokens in sorted(m.frame[m.frame.arm == main].horizon_tokens.unique())
            if (name := bowl_name(main, tokens, main, longest)) in m.bowls}
    pairs = {long: (best[long] - best[long // 2]) / math.log(2) for long in best if long // 2 in best}
    shortest = min(best, default=0)
    return pairs | ({shortest: pairs[2 * shortest]} if 2 * shortest in pairs else {})


def regrets(grid: Grid, m: Measurements, slopes: dict[int, float], name_of) -> pd.DataFrame:
    """Loss of each method over WSD tuned on other seeds, by cell and seed: regret (nats), regret_tokens (share of tokens).

    Seeds without a bowl in a cell have no regret there (`tuned` False), but a loss (`loss_tokens`: over the slope) for differences.
    """
    if grid.power is None:
        return pd.DataFrame()
    kind, rows = kind_of_schedule(grid, grid.power), []
    where = [tuple(cell) for cell in grid.frame[grid.frame.kind == kind][CELL].drop_duplicates().to_numpy().tolist()]
    where = [cell for cell in where if cell[0] in slopes]
    seeds = sorted(grid.frame[grid.frame.kind == kind].groupby(CELL).seed.agg(set).pipe(lambda cells: set.intersection(*cells)))
    fixed = _one_rate(grid, where, seeds)
    for cell in where:
        arm = f"wsd, batch {cell[1]}, width {cell[2]}"
        bowl, tuned = m.bowls.get(name_of(arm, cell[0])), m.tuned.get(name_of(arm, cell[0]), {})
        law = LAW_OVER_POWER * float(grid.power.rate_at(cell[0], batch_tokens=cell[1], eta_max=math.inf))
        losses = {POWER: _at(grid, kind, cell), COSINE: _at(grid, "cosine", cell),
                  FIXED: {s: _at(grid, "wsd", cell, lr)[s] for s, lr in fixed.items()}}
        if bowl is not None:
            rates = grid.bowl(*cell).peak_lr
            losses[LAW] = {s: float(bowl.seed_loss_at(s, law)) for s in bowl.seeds if rates.min() <= law <= rates.max()}
        label = f"2^{math.log2(cell[0]):g} tokens, batch {cell[1]}, width {cell[2]}"
        for method, by_seed in losses.items():
            for seed in [s for s in seeds if s in by_seed]:
                over = by_seed[seed] - tuned[seed][1] if seed in tuned else math.nan
                rows.append({"method": method, "cell": label, "seed": seed, "tuned": seed in tuned, "loss": by_seed[seed], "regret": over,
                             "regret_tokens": over / abs(slopes[cell[0]]), "loss_tokens": by_seed[seed] / abs(slopes[cell[0]])})
    return pd.DataFrame(rows)


def kind_of_schedule(grid: Grid, schedule) -> str:
    """The kind of a schedule of the grid."""
    return next(kind for kind, known in grid.schedules.items() if known == schedule)


def _at(grid: Grid, kind: str, cell, lr: float | None = None) -> dict:
    """Loss by seed of a kind at its only rate, or at `lr`."""
    rows = grid.frame[(grid.frame[["kind", *CELL]] == [kind, *cell]).all(axis=1)]
    rows = rows if lr is None else rows[rows.peak_lr == lr]
    return dict(zip(rows.seed, rows.loss, strict=True))


def _one_rate(grid: Grid, where, seeds) -> dict[int, float]:
    """By seed the one rate of WSD for all cells: of those run by all in every cell, the best of the other seeds at the knobs' horizon."""
    wsd = grid.frame[(grid.frame.kind == "wsd") & grid.frame.seed.isin(seeds)]
    run = [set(zip(rows.seed, rows.peak_lr, strict=True)) for cell, rows in wsd.groupby(CELL) if cell in where]
    rates = [lr for lr in sorted(wsd.peak_lr.unique()) if len(run) == len(where) and all((s, lr) in cell for s in seeds for cell in run)]
    middle = wsd[(wsd[CELL] == [grid.knob_tokens, *grid.main]).all(axis=1) & wsd.peak_lr.isin(rates)]
    losses = middle.pivot_table(index="seed", columns="peak_lr", values="loss", dropna=False)
    if len(losses) < 2 or losses.empty:
        return {}
    return {seed: float(losses.drop(index=seed).mean(skipna=False).idxmin()) for seed in losses.index}


# -- the Power schedule's knobs ----------------------------------------------------------------------------------------


def sensitivity(grid: Grid) -> pd.DataFrame:
    """Loss by knob ("b", "η_p") and how far it is turned: value, octaves of the rate where the cooldown starts, seed, loss.

    Of the seeds that were run at every turn.
    """
    if grid.power is None:
        return pd.DataFrame()
    at, batch = grid.frame[(grid.frame[CELL] == [grid.knob_tokens, *grid.main]).all(axis=1)], grid.main[0]
    at = at[at.kind.str.startswith("power")]
    at = at[at.groupby("seed").kind.transform("nunique") == at.kind.nunique()]
    pivot, end, own = grid.knob_tokens / 4, 0.9 * grid.knob_tokens, grid.power

    def octaves(schedule, tokens):
        return math.log2(float(schedule.rate_at(tokens, batch_tokens=batch, eta_max=math.inf)
                               / own.rate_at(tokens, batch_tokens=batch, eta_max=math.inf)))

    rows = []
    for kind, runs in at.groupby("kind"):
        schedule = grid.schedules[kind]
        moved, last = octaves(schedule, pivot), octaves(schedule, end)
        knobs = ["b", "η_p"] if schedule == own else ["η_p"] if schedule.b == own.b else ["b"] if abs(moved) < 1e-6 else []
        rows += [{"knob": knob, "value": schedule.b if knob == "b" else round(moved, 6), "octaves": last, "seed": s, "loss": loss}
                 for knob in knobs for s, loss in zip(runs.seed, runs.loss, strict=True)]
    return pd.DataFrame(rows)


def parabolas(turned: pd.DataFrame, knob: str, over: str) -> pd.DataFrame:
    """By seed the parabola of the loss over a knob: slope and bend (second derivative) at the setting; empty with under three values."""
    rows = turned[turned.knob == knob]
    table = rows.pivot_table(index="seed", columns=over, values="loss", dropna=False) if len(rows) else pd.DataFrame()
    if table.shape[1] < 3 or not np.isfinite(table.to_numpy()).all():
        return pd.DataFrame()
    fitted = np.polynomial.polynomial.polyfit(table.columns.to_numpy(float), table.to_numpy().T, 2)
    return pd.DataFrame({"linear": fitted[1], "bend": 2 * fitted[2]}, index=table.index)


# -- contrasts ---------------------------------------------------------------------------------------------------------


def exponent_contrasts(grid: Grid, found: dict[str, Valley], ahead: pd.DataFrame) -> dict[str, Contrast]:
    """What the claims on exponents are judged by; an exponent over less than a 16-fold range or from shorter runs is left out."""
    made, by_seed = {}, {}
    for axis, valley in found.items():
        values, rows = valley.cells[axis], grid.along(axis)
        by_seed[axis] = pd.Series([e[0] for e in valley.exponents_per_seed], index=valley.seeds)
        wide, tokens = values.max() / values.min(), int(rows.horizon_tokens.max())
        if rows.steps.min() >= LEAST_STEPS and axis == "width":
            made["lr: widest − narrowest"] = Contrast(by_seed[axis].to_numpy() * math.log2(wide), "octaves", axis, tokens)
        elif rows.steps.min() >= LEAST_STEPS and wide >= LEAST_RANGE:
            made[f"{axis} exponent"] = Contrast(by_seed[axis].to_numpy(), "exponent", axis, tokens)
    if "horizon exponent" in made and "batch exponent" in made:
        both = (by_seed["horizon"] + STEP_LAW_BATCH * by_seed["batch"]).dropna()
        made["horizon exponent, batch growing"] = Contrast(both.to_numpy(), "exponent", "growing", made["batch exponent"].horizon_tokens)
    if len(ahead) >= 2 and "horizon exponent" in made:
        made["predicted − best at the longest"] = Contrast(ahead.octaves.to_numpy(), "octaves", "predicted")
    return made


def regret_contrasts(regret: pd.DataFrame) -> dict[str, Contrast]:
    """Differences of schedules at one setting as shares of tokens: means over the cells that both have, and Power's worst cell."""
    if regret.empty:
        return {}
    by_method = {method: rows.set_index(["cell", "seed"]) for method, rows in regret.groupby("method")}
    made = {}
    for a, b in ((POWER, FIXED), (FIXED, COSINE), (POWER, LAW)):
        if {a, b} <= set(by_method):
            both = by_method[a].index.intersection(by_method[b].index)
            difference = (by_method[a].loss_tokens[both] - by_method[b].loss_tokens[both]).unstack("cell")
            if len(whole := _of_all_cells(difference, both)) >= 2:
                made[f"{a} − {b}"] = Contrast(whole.mean(axis=1, skipna=False).to_numpy(), "token_fraction", "regret")
    tuned = by_method[POWER][by_method[POWER].tuned] if POWER in by_method else pd.DataFrame()
    if len(tuned) and len(table := _of_all_cells(tuned.regret_tokens.unstack("cell"), tuned.index)) >= 2:
        made["power − wsd, tuned: worst cell"] = Contrast((-chosen_on_others(-table)).to_numpy(), "token_fraction", "regret")
    return made


def _of_all_cells(table: pd.DataFrame, run: pd.MultiIndex) -> pd.DataFrame:
    """The seeds that were run in every cell; what is missing then is a run that diverged."""
    cells = run.to_frame(index=False).groupby("seed").cell.nunique()
    return table.loc[sorted(cells[cells == table.shape[1]].index)]


def knob_contrasts(turned: pd.DataFrame, slope: float) -> dict[str, Contrast]:
    """The best b, what the ends of the paper's range of a cost, and how much more b costs than a at equal octaves."""
    if turned.empty or not slope > 0:
        return {}
    over_b, over_rate, over_last = parabolas(turned, "b", "value"), parabolas(turned, "η_p", "octaves"), parabolas(turned, "b", "octaves")
    made = {}
    if len(over_b) >= 2 and (bend := over_b.bend.mean()) > 0:
        middle = -over_b.linear.mean() / bend  # seeds by one Newton step from the mean parabola, as bowls do
        made["best b"] = Contrast((middle - (over_b.linear + over_b.bend * middle) / bend).to_numpy(), "exponent", "knobs")
    if len(over_rate) >= 2:
        made["a at the ends of 3 … 5"] = Contrast((over_rate.bend / 2 * A_RANGE**2 / slope).to_numpy(), "token_fraction", "knobs")
    if len(over_rate) >= 2 and len(over_last) >= 2:
        made["b − a, an octave each"] = Contrast(((over_last.bend - over_rate.bend) / 2 / slope).to_numpy(), "token_fraction", "knobs")
    return made

