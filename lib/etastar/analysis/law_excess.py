"""What following a law of rate and batch costs on measured grids: loss above the best run of each cell, in permil of the loss.

A law is a function of a `Cell` that returns (peak rate, batch in tokens); either may be None where the law has none, and the rate may
be a function of the batch. Without a batch a law is read at its best batch, picked on the reported grid, which flatters it. The best
run of a cell is low by selection, so that even the true optimum costs something: `own_optimum` shows how much.

A law that was fitted on the very grid it is judged on has an advantage. So every form is also refitted and judged with each
cell left out of its own fit.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from etastar.analysis.cooldown_archive import clustered_mean
from etastar.analysis.laws import laws as registry
from etastar.analysis.laws import lr_and_batch
from etastar.analysis.lr_grids import LOSS, LossGrid, near_best
from etastar.analysis.paired import Estimate
from etastar.analysis.steplaw_refit import log_design

HEAD_VOCAB = 65_536  # rows of the head that arXiv 2406.19146's parameters include, as arXiv 2503.04715 counts it on this grid
SEQUENCE_TOKENS = 2048
HOWS = ("as published", "refitted, cell left out", "constant refitted, cell left out")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A size at a horizon, what laws ask about; `params` without embedding and head."""

    name: str
    params: float
    horizon_tokens: float
    width: int
    depth: int
    ffn_width: int

    @property
    def flops_per_token(self) -> float:
        """M of arXiv 2401.02954 for a gated feed-forward layer, attention over 2048 tokens counted, embedding and head not."""
        return 6 * (4 * self.width + 3 * self.ffn_width + 2 * SEQUENCE_TOKENS) * self.depth * self.width

    @property
    def compute(self) -> float:
        """C = M·D in FLOPs."""
        return self.flops_per_token * self.horizon_tokens

    @property
    def params_with_head(self) -> float:
        """Parameters with a head of 65,536 rows."""
        return self.params + HEAD_VOCAB * self.width


Law = Callable[[Cell], tuple]


def cells_of(runs: pd.DataFrame) -> dict[str, Cell]:
    """The cells of a grid by name; ValueError names the columns a frame lacks."""
    fields = [f.name for f in dataclasses.fields(Cell) if f.name != "name"]
    if lacking := [name for name in ("cell", *fields) if name not in runs]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, runs))}")
    first = runs.groupby("cell", sort=False)[fields].first()
    return {name: Cell(name, **row) for name, row in zip(first.index, first.to_dict("records"), strict=True)}


def law_excess(runs: pd.DataFrame, laws: Mapping[str, Law], loss: str = LOSS) -> pd.DataFrame:
    """Every law on every cell: law, cell, params, horizon_tokens, peak_lr, batch_tokens, loss, excess_permil, clipped, batch_from.

    The loss is that of the runs, straight between them in log rate and log batch; `clipped` says that the law's point lies beyond the
    runs and was read at their edge, so that its true excess may be larger. `batch_from` is "law" or "best on this grid".
    """
    cells, rows = cells_of(runs), []
    for name, of in runs.groupby("cell", sort=False):
        grid = LossGrid.of(of, loss)
        rows += [{"law": law, "cell": name, "params": cells[name].params, "horizon_tokens": cells[name].horizon_tokens}
                 | _judged(grid, *rule(cells[name])) for law, rule in laws.items()]
    return pd.DataFrame(rows)


def summary(excess: pd.DataFrame) -> pd.DataFrame:
    """One row a law (and `how` its constants came about, where there is such a column): mean with low and high (95 %, clustered by
    size), median, largest, n cells, clipped, batch_from; least mean first."""
    rows, keys = [], [name for name in ("law", "how", "in_sample") if name in excess]
    for names, of in excess.groupby(keys, sort=False):
        low, high = _mean(of["excess_permil"], of["params"]).interval()
        rows.append(dict(zip(keys, names, strict=True)) | {
            "mean": of["excess_permil"].mean(), "low": low, "high": high, "median": of["excess_permil"].median(),
            "largest": of["excess_permil"].max(), "n": len(of), "clipped": int(of["clipped"].sum()),
            "batch_from": of["batch_from"].iloc[0]})
    return pd.DataFrame(rows).sort_values("mean", ignore_index=True)


def excess_difference(excess: pd.DataFrame, law: str, against: str) -> Estimate:
    """Mean excess of a law less that of another over the same cells (permil), errors clustered by size; ValueError for other names."""
    wide = excess.pivot(index="cell", columns="law", values="excess_permil")
    if unknown := sorted({law, against} - set(wide)):
        raise ValueError(f"no law {', '.join(unknown)} here; there are {', '.join(wide)}")
    sizes = excess.groupby("cell")["params"].first().loc[wide.index]
    return _mean(wide[law] - wide[against], sizes)


def own_optimum(optima: pd.DataFrame) -> Law:
    """Each cell's own fitted optimum (`lr_grids.optima`) as a law: what is left of the excess is the selection of the best run."""
    points = optima.set_index("cell")[["peak_lr", "batch_tokens"]]
    return lambda cell: tuple(points.loc[cell.name])


@dataclasses.dataclass(frozen=True)
class Form:
    """How a law is written: log rate and log batch are straight in the logs of these fields of a `Cell`.

    `lr` may hold "batch_tokens". Without `batch` the form has no rule of batch. `lr_exponents` keeps published exponents, so that
    the constant alone is refitted; `log_lr` False makes the rate itself straight in the logs, as arXiv 2001.08361 has it.
    """

    lr: tuple[str, ...]
    batch: tuple[str, ...] = ()
    lr_exponents: tuple[float, ...] | None = None
    log_lr: bool = True


def _kept(law: str, *fields: str) -> Form:
    """A law's rate with its published exponents: they are known where its constant is not, or is not of this grid."""
    exponents = registry[law].formulas["lr"].exponents
    return Form(fields, lr_exponents=tuple(exponents[field.replace("batch_tokens", "batch_sequences")] for field in fields))


# With its exponents free the form of bjorck and fitting is that of steplaw.
FORMS = {
    "steplaw": Form(("params", "horizon_tokens"), ("horizon_tokens",)),
    "deepseek": Form(("compute",), ("compute",)),
    "porian": Form(("params_with_head",), ("params_with_head",)),
    "kaplan": Form(("params",), log_lr=False),
    "bjorck": _kept("bjorck", "params", "horizon_tokens"),
    "fitting": _kept("fitting", "params", "horizon_tokens"),
    "power": _kept("power", "batch_tokens", "horizon_tokens"),
}


def with_batch_rule(forms: Mapping[str, Form] = FORMS) -> dict[str, Form]:
    """The same forms, those without a rule of batch given one in the horizon, so that all are judged alike."""
    return {name: form if form.batch else dataclasses.replace(form, batch=("horizon_tokens",)) for name, form in forms.items()}


def published_laws() -> dict[str, Law]:
    """The published laws whose constants are known in units that this grid has, each with its own count of parameters.

    The grid is that of arXiv 2503.04715, which fitted its law to it: `steplaw` alone is judged in-sample. The constants of
    arXiv 2409.19913 and 2601.05049 have no verified units, rates of μP are not those of this grid: see FORMS for these.
    """
    asked = {"steplaw": lambda cell: {"params": cell.params, "horizon_tokens": cell.horizon_tokens},
             "deepseek": lambda cell: {"compute": cell.compute},
             "kaplan": lambda cell: {"params": cell.params},
             "porian": lambda cell: {"params": cell.params_with_head}}
    return {name: lambda cell, name=name, known=known: lr_and_batch(name, **known(cell)) for name, known in asked.items()}


def refit(targets: pd.DataFrame, form: Form) -> Law:
    """A law of this form by least squares through targets: rows of a grid with the rates and batches that are good there."""
    cells = cells_of(targets)
    for field in {*form.lr, *form.batch} - {"batch_tokens"}:
        targets = targets.assign(**{field: [getattr(cells[name], field) for name in targets["cell"]]})
    lr = targets["peak_lr"].to_numpy(float)
    lr = _solved(log_design(targets, form.lr), np.log(lr) if form.log_lr else lr, form.lr_exponents)
    batch = _solved(log_design(targets, form.batch), np.log(targets["batch_tokens"].to_numpy(float))) if form.batch else None
    return functools.partial(_refitted, form=form, lr=lr, batch=batch)


def leave_one_cell_out(runs: pd.DataFrame, targets: pd.DataFrame, forms: Mapping[str, Form] = FORMS, loss: str = LOSS) -> pd.DataFrame:
    """`law_excess` of every form on every cell, refitted to the targets of the other cells; no law sees the cell it is judged on."""
    cells = list(runs["cell"].unique())
    return pd.concat([held_out(runs, targets, [cell], forms, loss) for cell in cells], ignore_index=True)


def judged_laws(runs: pd.DataFrame, targets: pd.DataFrame | None = None, loss: str = LOSS) -> pd.DataFrame:
    """The published laws and all forms on the grid of arXiv 2503.04715: `law_excess` with `how` (one of HOWS: as published, or
    refitted with the cell left out, whole or in its constant) and `in_sample`, true of Step Law as published, which was fitted to
    runs of this very grid.

    Refitted forms without a rule of batch get one in the horizon. `targets` are the runs within 0.25 % of the best by default.
    """
    targets = near_best(runs, loss=loss) if targets is None else targets
    published, refitted = law_excess(runs, published_laws(), loss), leave_one_cell_out(runs, targets, with_batch_rule(), loss)
    how = [HOWS[1 if FORMS[law].lr_exponents is None else 2] for law in refitted["law"]]
    return pd.concat([published.assign(how=HOWS[0], in_sample=published["law"] == "steplaw"), refitted.assign(how=how, in_sample=False)],
                     ignore_index=True)


def held_out(runs: pd.DataFrame, targets: pd.DataFrame, cells, forms: Mapping[str, Form] = FORMS, loss: str = LOSS) -> pd.DataFrame:
    """`law_excess` on these cells of forms refitted to the targets of all others; ValueError for cells that are not there."""
    cells = list(cells)
    if unknown := sorted(set(cells) - set(runs["cell"])):
        raise ValueError(f"no cell {', '.join(unknown)} in the grid; there are {', '.join(runs['cell'].unique())}")
    rest = targets[~targets["cell"].isin(cells)]
    return law_excess(runs[runs["cell"].isin(cells)], {name: refit(rest, form) for name, form in forms.items()}, loss)


def _judged(grid: LossGrid, peak_lr, batch_tokens) -> dict:
    if peak_lr is None:
        raise ValueError(f"a law must say a rate; got None beside a batch of {batch_tokens} (join it with another law's rate)")
    if picked := batch_tokens is None:
        batch_tokens, *_ = grid.at_best_batch(peak_lr)
    rate = float(peak_lr(batch_tokens) if callable(peak_lr) else peak_lr)
    loss, clipped = grid.loss_at(rate, batch_tokens)
    return {"peak_lr": rate, "batch_tokens": float(batch_tokens), "loss": loss, "excess_permil": 1000 * (loss / grid.least - 1),
            "clipped": clipped, "batch_from": "best on this grid" if picked else "law"}


def _solved(design: np.ndarray, y: np.ndarray, exponents=None) -> np.ndarray:
    """Constant and exponents by least squares; the constant alone where the exponents are given."""
    if exponents is None:
        return np.linalg.lstsq(design, y, rcond=None)[0]
    return np.array([np.mean(y - design[:, 1:] @ exponents), *exponents])


def _refitted(cell: Cell, form: Form, lr: np.ndarray, batch) -> tuple:
    def straight(coefficients, fields, batch_tokens=None):
        values = [float(batch_tokens if field == "batch_tokens" else getattr(cell, field)) for field in fields]
        return float(coefficients[0] + np.log(values) @ coefficients[1:])

    def rate(batch_tokens):
        found = straight(lr, form.lr, batch_tokens)
        return float(np.exp(found)) if form.log_lr else found

    batch_tokens = None if batch is None else float(np.exp(straight(batch, form.batch)))
    return (rate if "batch_tokens" in form.lr else rate(None)), batch_tokens


def _mean(values: pd.Series, sizes: pd.Series) -> Estimate:
    """Mean over cells, errors clustered by size; by cell where there are fewer than three sizes."""
    clusters = sizes if sizes.nunique() >= 3 else values.index
    return dataclasses.replace(clustered_mean(values.to_numpy(), np.asarray(clusters)), unit="permil")
