"""Eq. 2 and Eq. 4 of arXiv 2601.05049 on grids that were run in full: is the bowl a parabola, do three rates find its floor, and does
the loss at each rate extrapolate over the horizon?

`runs` is `es.archive("steplaw")` or any frame of `analysis.lr_grids`: cell, params, horizon_tokens, peak_lr, batch_tokens and the loss.
Every line (a cell at a batch) is judged by itself. Where three sparse rates begin is chance, so all beginnings are rows.
"""

import math

import numpy as np
import pandas as pd

from etastar.analysis.lr_grids import LOSS, best_rate
from etastar.analysis.search_factor import fit_horizon_law, fit_parabola

KEYS = ["cell", "params", "horizon_tokens", "batch_tokens"]
ROUNDED = 0.05  # octaves that published rates are off their grid by


def bowl_shapes(runs: pd.DataFrame, octaves: float = 2.0, loss: str = LOSS) -> pd.DataFrame:
    """Parabola and cubic in log rate through the runs within ±`octaves` of each line's best run: KEYS, parabola_r2, cubic_r2,
    shift_octaves (parabola's vertex − cubic's), rates.

    Lines with fewer than five such rates, or with a best run at an edge, are left out; shift_octaves is NaN where one of the curves has
    no vertex among the rates used. ValueError where no line is left.
    """
    rows = []
    for key, line in _lines(runs, loss):
        near = line[np.abs(np.log2(line.index / line.idxmin())) <= octaves + ROUNDED]
        if len(near) < 5 or line.idxmin() in (line.index[0], line.index[-1]):
            continue
        x, y = np.log2(near.index.to_numpy(float) / line.idxmin()), near.to_numpy()
        (parabola, r2), (cubic, cubic_r2) = (_vertex(x, y, degree) for degree in (2, 3))
        rows.append(key | {"parabola_r2": r2, "cubic_r2": cubic_r2, "shift_octaves": parabola - cubic, "rates": len(near)})
    return _table(rows, f"line has five rates within {octaves:g} octaves of a best run inside its grid")


def few_rates(runs: pd.DataFrame, count: int = 3, spacing_octaves: float = 2.0, loss: str = LOSS) -> pd.DataFrame:
    """What a search by `count` rates loses: the parabola (Eq. 2) through those about the best of the sparse ones, every beginning a row.

    Columns: KEYS, begin, best_lr, error_octaves (log2 over the `best_rate` of the whole line), excess (loss there above that at the
    whole line's best rate, as a share, both straight between runs in log rate), rates (those of the whole line). Searches whose best is
    the first or last of their rates would go on: they are left out and counted in .attrs["refused"], as are lines without a best rate.
    """
    rows, refused = [], 0
    for key, line in _lines(runs, loss):
        number = _numbers(line.index)
        step = _step(number, line.index, spacing_octaves)
        truth = best_rate(line.rename_axis("peak_lr").reset_index(name=loss), loss=loss)
        for begin in range(step):
            found = _sparse_vertex(line[number % step == begin], count)
            if found is None or math.isnan(truth) or not line.index[0] <= found <= line.index[-1]:
                refused += 1
                continue
            at, least = np.interp(np.log2([found, truth]), np.log2(line.index.to_numpy(float)), line.to_numpy())
            rows.append(key | {"begin": begin, "best_lr": found, "error_octaves": math.log2(found / truth), "excess": at / least - 1,
                               "rates": len(line)})
    table = _table(rows, f"line lets {count} rates {spacing_octaves:g} octaves apart bracket a best one")
    table.attrs["refused"] = refused
    return table


def extrapolated_bowls(runs: pd.DataFrame, horizons: int = 3, loss: str = LOSS) -> pd.DataFrame:
    """Eq. 4, L(D) = L0 + A·D^−gamma, at each rate and batch of a size through its `horizons` shortest, read at the longest; the
    bowl of these losses against the one that was run.

    Columns: params, horizon_tokens (the longest), batch_tokens, fold (longest over the longest fitted), predicted_lr, best_lr,
    error_octaves (predicted over run), kept_octaves (the longest fitted horizon's own best rate over the run one's), loss_error (mean
    over the rates within an octave of the best of predicted over run loss − 1), rates. Sizes with no more than `horizons` horizons are
    left out, as are batches where one of the bowls has no vertex inside.
    """
    rows = []
    for (params, batch), of in runs.groupby(["params", "batch_tokens"]):
        wide = of.assign(number=_numbers(of["peak_lr"])).pivot_table(index="number", columns="horizon_tokens", values=loss)
        if wide.shape[1] > horizons:
            chosen = wide.columns[[*range(horizons), -1]]
            row = _extrapolated(wide[chosen].dropna())
            key = {"params": params, "horizon_tokens": chosen[-1], "batch_tokens": batch, "fold": chosen[-1] / chosen[-2]}
            rows += [key | row] if row else []
    return _table(rows, f"size has bowls at more than {horizons} horizons at one batch")


def _extrapolated(wide: pd.DataFrame) -> dict | None:
    """One size at one batch: rates as rows in half octaves, horizons as columns, the last one the target."""
    if len(wide) < 3:
        return None
    rates, (*short, target) = 2.0 ** (wide.index.to_numpy(float) / 2), wide.columns
    predicted = np.array([fit_horizon_law(short, row[short]).predict(target) for _, row in wide.iterrows()])
    vertices = [best_rate(pd.DataFrame({"peak_lr": rates, LOSS: losses})) for losses in (predicted, wide[target], wide[short[-1]])]
    if not np.isfinite(vertices).all():
        return None
    ahead, own, last = map(float, vertices)
    near = np.abs(np.log2(rates / own)) <= 1 + ROUNDED
    return {"predicted_lr": ahead, "best_lr": own, "error_octaves": math.log2(ahead / own), "kept_octaves": math.log2(last / own),
            "loss_error": float((predicted[near] / wide[target].to_numpy()[near] - 1).mean()), "rates": len(wide)}


def _lines(runs: pd.DataFrame, loss: str):
    """(key, losses by rising peak rate) of every cell at every batch with three rates or more; diverged runs are left out."""
    if lacking := [name for name in (*KEYS, "peak_lr", loss) if name not in runs]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, runs))}")
    for key, of in runs[np.isfinite(runs[loss])].groupby(KEYS, sort=False):
        line = of.groupby("peak_lr")[loss].mean().sort_index()
        if len(line) >= 3:
            yield dict(zip(KEYS, key, strict=True)), line


def _vertex(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, float]:
    """(minimum of the polynomial within x nearest 0, NaN where there is none; r2)."""
    curve = np.polynomial.Polynomial.fit(x, y, degree, domain=[])
    r2 = 1 - float(((y - curve(x)) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    slope, bend = curve.deriv(), curve.deriv(2)
    level = [root.real for root in slope.roots() if abs(root.imag) < 1e-6]
    for _ in range(3):  # roots of a cubic that is all but a parabola are inexact
        level = [at - slope(at) / bend(at) for at in level if bend(at) > 0]
    inside = [at for at in level if x[0] <= at <= x[-1]]
    return (min(inside, key=abs) if inside else math.nan), r2


def _sparse_vertex(line: pd.Series, count: int) -> float | None:
    """The best rate by the parabola through `count` neighbouring rates about the best; None where that is the first or last."""
    at = int(line.argmin()) if len(line) >= count else 0
    if not 0 < at < len(line) - 1:
        return None
    first = min(max(at - count // 2, 0), len(line) - count)
    chosen = line.iloc[first:first + count]
    return fit_parabola(chosen.index.to_numpy(float), chosen.to_numpy()).best_lr


def _numbers(rates) -> np.ndarray:
    """Rates as whole half octaves: published grids round one and the same rate differently from cell to cell."""
    half_octaves = 2 * np.log2(np.asarray(rates, dtype=float))
    return np.round(half_octaves).astype(int)


def _step(number: np.ndarray, rates, spacing_octaves: float) -> int:
    step = round(2 * spacing_octaves)
    if step < 1 or abs(step - 2 * spacing_octaves) > 1e-9 or len(set(number)) < len(number):
        raise ValueError(f"rates are numbered in half octaves, which {spacing_octaves:g} octaves between them, or the rates "
                         f"{list(rates)[:3]} …, do not fit; take a multiple of half an octave")
    return step


def _table(rows: list[dict], what: str) -> pd.DataFrame:
    if not rows:
        raise ValueError(f"no {what}; add rates or horizons")
    return pd.DataFrame(rows)
