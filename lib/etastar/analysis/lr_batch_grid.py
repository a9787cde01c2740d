"""Runs over horizons, batches, rates and seeds as arrays: checked once, with the window of cells about each horizon's best.

A cell is one (horizon, batch, rate). Every seed has every cell, so that a fit of the mean over seeds is a fit of all, and what
a seed says for itself is linear in its own losses: seeds are the unit of every interval here, never horizons or cells.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from etastar.analysis.log_points import refuse_not_positive

LEAST = 3  # batches, and rates, that bracket an optimum at a horizon
AXES = ("horizon_tokens", "batch_tokens", "peak_lr")


@dataclasses.dataclass(frozen=True)
class LrBatchGrid:
    """Cells (C,) at horizons (H,) in tokens: `horizon` numbers a cell's horizon, losses (S, C) in nats are NaN where diverged.

    `fields` are further columns (S, C) by name, such as log2 norms, each finite wherever no seed diverged.
    """

    horizons: np.ndarray
    seeds: tuple
    horizon: np.ndarray
    log2_batch: np.ndarray
    log2_lr: np.ndarray
    loss: np.ndarray
    fields: dict

    @functools.cached_property
    def octaves(self) -> np.ndarray:
        """log2 horizons about their mean: (H,)."""
        return np.log2(self.horizons) - np.log2(self.horizons).mean()

    @functools.cached_property
    def mean_loss(self) -> np.ndarray:
        """Mean over seeds: (C,), infinite where a seed diverged."""
        mean = self.loss.mean(0)
        return np.where(np.isfinite(mean), mean, np.inf)

    def window(self, h: int, worst_excess: float) -> np.ndarray:
        """Cells of horizon number h that a fit may use: within `worst_excess` nats of the best, and three by three about it.

        The three by three are the best batch and its neighbours (the three nearest, at an end), each with its own best rate and
        the two beside it. Numbers of cells, without those at which a seed diverged.
        """
        here = np.flatnonzero((self.horizon == h) & np.isfinite(self.mean_loss))
        best = here[self.mean_loss[here].argmin()]
        kept = set(here[self.mean_loss[here] <= self.mean_loss[best] + worst_excess].tolist())
        batches = np.unique(self.log2_batch[here])
        for batch in batches[three_about(int(np.searchsorted(batches, self.log2_batch[best])), len(batches))]:
            row = here[self.log2_batch[here] == batch]  # rates rise within a batch
            kept |= set(row[three_about(int(self.mean_loss[row].argmin()), len(row))].tolist())
        return np.array(sorted(kept))

    def edge(self, h: int, cells: np.ndarray, log2_lr: float, log2_batch: float) -> str:
        """Where a point lies outside `cells`: "" within, else "lr low", "lr high", "batch low", "batch high" or two of them."""
        lr, batch = self.log2_lr[cells], self.log2_batch[cells]
        batches = np.unique(batch)
        lowest, highest = (np.interp(log2_batch, batches, [f(lr[batch == b]) for b in batches]) for f in (np.min, np.max))
        sides = (("lr low", log2_lr < lowest), ("lr high", log2_lr > highest),
                 ("batch low", log2_batch < batches[0]), ("batch high", log2_batch > batches[-1]))
        return ", ".join(name for name, outside in sides if outside)


def three_about(i: int, n: int) -> slice:
    """Place i of n and its neighbours, the three nearest at an end."""
    first = max(0, min(i - 1, n - LEAST))
    return slice(first, first + LEAST)


def lr_batch_grid(frame: pd.DataFrame, columns=("log2_norm",), least_horizons: int = 2) -> LrBatchGrid:
    """The grid of rows horizon_tokens, batch_tokens, peak_lr, seed, loss (NaN diverged) and `columns`, one row a run and horizon.

    Raises ValueError for missing columns, values that are not positive, a `columns` value missing where no seed diverged, a
    seed without a cell or with two of it, fewer than `least_horizons`, and fewer than three batches or rates without divergence
    at a horizon.
    """
    missing = [c for c in (*AXES, "seed", "loss", *columns) if c not in frame]
    if missing:
        raise ValueError(f"the frame lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}: rename or add columns")
    for name in AXES:
        refuse_not_positive(name, frame[name].to_numpy(float))
    logs = np.round(np.log2(frame[list(AXES)].to_numpy(float)), 9)
    cells, cell = np.unique(logs, axis=0, return_inverse=True)
    seeds, seed = np.unique(frame["seed"], return_inverse=True)
    _refuse_holes(cells, cell.ravel(), seeds, seed)
    table = np.full((len(columns) + 1, len(seeds), len(cells)), np.nan)
    table[:, seed, cell.ravel()] = frame[["loss", *columns]].to_numpy(float).T
    loss = np.where(np.isfinite(table[0]), table[0], np.nan)
    horizons, horizon = np.unique(cells[:, 0], return_inverse=True)
    grid = LrBatchGrid(2.0**horizons, tuple(seeds.tolist()), horizon, cells[:, 1], cells[:, 2], loss,
                       dict(zip(columns, table[1:], strict=True)))
    _refuse_few(grid, least_horizons)
    for name, values in grid.fields.items():
        bad = ~np.isfinite(values) & np.isfinite(grid.mean_loss)
        if bad.any():
            s, c = np.argwhere(bad)[0]
            raise ValueError(f"{name} is missing or infinite in {int(bad.sum())} runs that did not diverge, seed {seeds[s]} at "
                             f"{said(cells[c])} for example; give it, or set their loss to NaN")
    return grid


def said(cell) -> str:
    """A cell of log2 (horizon, batch, rate) in words."""
    return ", ".join(f"{name} 2^{value:g}" for name, value in zip(AXES, cell, strict=True))


def refuse_excess(worst_excess: float) -> None:
    """ValueError for a window that is no number of nats above zero."""
    if not worst_excess > 0 or not math.isfinite(worst_excess):
        raise ValueError(f"worst_excess is a number of nats above the best loss, positive and finite; got {worst_excess}")


def _refuse_holes(cells, cell, seeds, seed) -> None:
    counts = np.zeros((len(seeds), len(cells)), dtype=int)
    np.add.at(counts, (seed, cell), 1)
    if (counts != 1).any():
        s, c = np.argwhere(counts != 1)[0]
        mend = "a diverged run is a row with loss NaN" if counts[s, c] == 0 else "keep one run of a seed"
        raise ValueError(f"every seed needs one row at every cell; seed {seeds[s]} has {counts[s, c]} at {said(cells[c])} "
                         f"({int((counts != 1).sum())} such in all); {mend}")


def _refuse_few(grid: LrBatchGrid, least_horizons: int) -> None:
    if len(grid.horizons) < least_horizons:
        raise ValueError(f"{len(grid.horizons)} horizon ({', '.join(f'{h:.4g} tokens' for h in grid.horizons)}) has no exponent; "
                         "add the same runs read at another horizon")
    few = []
    for h, horizon in enumerate(grid.horizons):
        here = (grid.horizon == h) & np.isfinite(grid.mean_loss)
        counts = {"batches": len(np.unique(grid.log2_batch[here])), "rates": len(np.unique(grid.log2_lr[here]))}
        few += [f"{count} {what} at horizon_tokens {horizon:.4g}" for what, count in counts.items() if count < LEAST]
    if few:
        raise ValueError(f"a horizon needs at least {LEAST} batches and {LEAST} rates at which no seed diverged; got {', '.join(few)}; "
                         "add runs there or leave the horizon out")


# -- what seeds say ----------------------------------------------------------------------------------------------------


def slopes(octaves: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least-squares slopes (S,) of values (S, H) per octave of the horizons (H,)."""
    centred = octaves - octaves.mean()
    return values @ centred / (centred**2).sum()


def half_widths(per_seed: np.ndarray, level: float) -> np.ndarray:
    """Student's half-widths over the first axis, the seeds; NaN for one seed, which has no spread."""
    n = len(per_seed)
    if n < 2:
        return np.full(np.shape(per_seed)[1:], np.nan)
    return stats.t.ppf(0.5 + level / 2, n - 1) * np.std(per_seed, axis=0, ddof=1) / math.sqrt(n)


def interval_columns(name: str, per_seed: np.ndarray, level: float, base: float | None = None) -> dict:
    """The mean of (S,) with its interval over seeds under `name`, `name`_low and `name`_high; as powers of `base` where one is given."""
    mean, half = per_seed.mean(), half_widths(per_seed, level)
    three = np.array([mean, mean - half, mean + half])
    with np.errstate(over="ignore"):
        return dict(zip((name, f"{name}_low", f"{name}_high"), (base**three if base else three).tolist(), strict=True))


def window_spread(per_window) -> float:
    """Sd over windows of an estimate (windows, S), less what the seeds' own noise makes of it."""
    away = np.asarray(per_window) - np.mean(per_window, axis=0)
    noise = away.var(1, ddof=1) / away.shape[1] if away.shape[1] > 1 else 0.0
    return math.sqrt(max(0.0, float(np.mean(away.mean(1) ** 2 - noise))))


def bounds(name: str, per_seed: np.ndarray, level: float, others=()) -> dict:
    """The mean of (S,) with its interval under `name`, `name`_low and `name`_high, widened by the spread over `others` (windows, S)."""
    mean, spread = float(np.mean(per_seed)), window_spread([per_seed, *others])
    half = math.hypot(float(half_widths(per_seed, level)), float(stats.norm.ppf(0.5 + level / 2)) * spread)
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def fitted(found: dict, others: list[dict], level: float) -> dict:
    """Fields of a fit from its estimates by name (S,) and those of other windows: the mean, _low, _high and _per_seed of each, and
    `window_sd`, by name the deviation over windows that is in the interval."""
    fields = {"window_sd": {name: window_spread([per_seed, *(o[name] for o in others)]) for name, per_seed in found.items()}}
    for name, per_seed in found.items():
        fields |= bounds(name, per_seed, level, [o[name] for o in others]) | {f"{name}_per_seed": tuple(per_seed.tolist())}
    return fields
