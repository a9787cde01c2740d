"""Anybody's table of runs in our layout: one row a run, our column names, our units, diverged runs kept as NaN.

Which of their columns is meant, and in which unit, is read from its name; what a name leaves open is asked for, never guessed.
"""

import math
import re
import warnings

import numpy as np
import pandas as pd

from etastar.analysis.run_tables import read_table
from etastar.analysis.run_units import LETTERS, THOUSANDS, check, refuse_units, to_our_units

SYNONYMS = {  # ours → theirs, in lower case with _ between words; single letters are capital
    "run": "run run_id run_name exp_name experiment dir_name display_name name id",
    "params": "params n_params num_params params_total total_params n_parameters num_parameters parameters param_count model_params N",
    "width": "width d_model hidden_size n_embd model_dim embed_dim",
    "depth": "depth n_layer n_layers num_layers num_hidden_layers layers",
    "horizon_tokens": "horizon_tokens tokens train_tokens training_tokens n_tokens num_tokens total_tokens tokens_seen token_budget "
                      "max_tokens D",
    "batch_tokens": "batch_tokens batch_size_tokens global_batch_tokens tokens_per_batch tokens_per_step global_batch_size_tokens "
                    "global_batch_size total_batch_size train_batch_size batch_size bs B",
    "steps": "steps max_steps total_steps train_steps num_steps n_steps num_train_steps iterations train_iters max_iters",
    "peak_lr": "peak_lr lr learning_rate max_lr base_lr lr_max lr_peak peak_learning_rate max_learning_rate train_lr "
               "train_learning_rate eta",
    "schedule": "schedule lr_schedule scheduler lr_scheduler lr_scheduler_type lr_decay_style schedule_type",
    "weight_decay": "weight_decay wd",
    "seed": "seed random_seed",
    "loss": "loss val_loss final_loss valid_loss validation_loss eval_loss test_loss final_val_loss final_eval_loss "
            "final_validation_loss ppl perplexity val_ppl eval_ppl valid_ppl test_ppl val_perplexity eval_perplexity",
    "status": "status state",
}
SYNONYMS = {ours: theirs.split() for ours, theirs in SYNONYMS.items()}
NEEDED = ("peak_lr", "loss")
WORDS = ("run", "schedule", "status")
WHOLE = ("params", "width", "depth", "horizon_tokens", "batch_tokens", "steps", "seed")
HINTS = {"peak_lr": ("lr", "rate", "eta"), "loss": ("loss", "ppl", "nll", "perplexity")}
STEP = ("step", "_step", "global_step", "iter", "iteration")
DONE = ("finished", "done", "completed", "success", "ok")


def read_runs(path, columns: dict | None = None, units: dict | None = None) -> pd.DataFrame:
    """Runs of a csv, tsv, parquet, json or jsonl file, a tracker's export, a folder of json summaries, a store, or a DataFrame.

    Columns, where there are any: run, params, width, depth, horizon_tokens, batch_tokens, steps, peak_lr, schedule, weight_decay, seed,
    loss (nats per token), status; then theirs. `columns` maps their names to ours where these are not recognised. `units` says of ours
    what theirs are in: "thousands" … "trillions", "log2", "log10", "ln", a factor (1e-3), "sequences of 2048" (batch_tokens), "steps"
    (horizon_tokens), "bits" or "perplexity" (loss). A loss that is nan, inf, empty or "diverged" is NaN with status "diverged". A table
    of steps gives each run's last loss and highest rate. Raises one ValueError that names what is missing or ambiguous and the
    `columns` to write, ValueError for rates ≤ 0 and unknown units; UnitWarning where values speak for another unit than the name.
    """
    raw = read_table(path)
    units, chosen = dict(units or {}), _match(raw, columns or {})
    refuse_units(units, [ours for ours in chosen if ours not in WORDS])
    for ours, (theirs, unit) in chosen.items():
        if unit and ours not in units:
            units[ours] = unit
        raw = raw if theirs == ours else raw.drop(columns=ours, errors="ignore").rename(columns={theirs: ours})
    table = _last_steps(raw)
    frame = pd.DataFrame(index=table.index)
    for ours in [name for name in SYNONYMS if name in chosen]:
        frame[ours] = table[ours].astype(str) if ours in WORDS else _numbers(table[ours], ours)
    if "run" not in frame:
        frame.insert(0, "run", [str(i) for i in range(len(frame))])
    frame["status"] = _status(table, frame)
    to_our_units(frame, units)
    check(frame, {ours: theirs for ours, (theirs, _) in chosen.items()})
    for name in [n for n in WHOLE if n in frame and np.isfinite(frame[n]).all()]:
        frame[name] = frame[name].round().astype("int64")
    others = {c: _plain(table[c]) for c in table if c not in frame}
    return pd.concat([frame, pd.DataFrame(others, index=table.index)], axis=1).reset_index(drop=True)


# -- which column is which ---------------------------------------------------------------------------------------------


def _match(raw: pd.DataFrame, columns: dict) -> dict[str, tuple[str, str | None]]:
    """Ours → (theirs, unit in the name or None); ValueError for what is missing, ambiguous or not there."""
    names = [str(c) for c in raw.columns]
    raw.columns = names
    for theirs, ours in columns.items():
        if theirs not in names or ours not in SYNONYMS:
            turned = " (it maps their names to ours: turn it round)" if theirs in SYNONYMS and ours in names else ""
            raise ValueError(f"columns={{{theirs!r}: {ours!r}}}: the table has {', '.join(names)}; our names are "
                             f"{', '.join(SYNONYMS)}{turned}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns names one of ours twice: {columns}")
    chosen, problems = {ours: (theirs, None) for theirs, ours in columns.items()}, []
    for ours in [o for o in SYNONYMS if o not in chosen]:
        found = _candidates(raw, ours, taken=set(columns))
        if len(found) > 1 and ours != "run":
            told = " and ".join(repr(theirs) for theirs, _ in found)
            problems.append((found[0][0], ours, f"{told} differ and may each be {ours}"))
        elif found:
            chosen[ours] = found[0]
        elif ours in NEEDED:
            like = [n for n in names if any(h in n.lower() for h in HINTS[ours])]
            problems.append((like[0] if like else "THEIR NAME", ours, f"no column is known for {ours}"))
    if problems:
        write = ", ".join(f"{theirs!r}: {ours!r}" for theirs, ours, _ in problems)
        raise ValueError(f"{'; '.join(said for *_, said in problems)}. Found: {', '.join(names)}. Needed: {', '.join(NEEDED)}. "
                         f"Say which is meant, as in es.read_runs(path, columns={{{write}}})")
    return chosen


def _candidates(raw: pd.DataFrame, ours: str, taken: set) -> list[tuple[str, str | None]]:
    """Their columns that may be ours, best first: our own name alone but for the loss, which trackers also call the training loss."""
    plain, in_units = [], []
    for theirs in [c for c in raw.columns if c not in taken]:
        if theirs == ours and ours != "loss":
            return [(theirs, None)]
        rank, unit = _recognise(theirs, ours)
        if rank is not None:
            (in_units if unit else plain).append((rank, theirs, unit))
    found = [(theirs, unit) for _, theirs, unit in sorted(plain or in_units, key=lambda c: c[0])]
    return found[:1] if found and all(_same(raw[found[0][0]], raw[theirs]) for theirs, _ in found) else found


def _recognise(theirs: str, ours: str) -> tuple[int | None, str | None]:
    """(place among the synonyms, unit in the name) of their name, (None, None) where it is none of ours."""
    if len(theirs) == 1:
        return (SYNONYMS[ours].index(theirs), None) if theirs in SYNONYMS[ours] else (None, None)
    words = [w for w in re.split(r"[^a-z0-9]+", theirs.lower()) if w]
    while len(words) > 1 and words[0] in ("config", "summary", "hparams", "args", "optimizer", "optim", "trainer", "metrics", "model"):
        words = words[1:]
    words = words[:-1] if len(words) > 1 and words[-1] == "value" else words
    unit = None
    if len(words) > 1 and words[0] in ("log2", "log10", "ln"):
        unit, words = words[0], words[1:]
    elif len(words) > 1 and words[-1] in ("log2", "log10", *LETTERS, *THOUSANDS):
        unit, words = LETTERS.get(words[-1], words[-1]), words[:-1]
    if words[-1] in ("ppl", "perplexity"):
        unit = "perplexity"
    name = "_".join(words)
    return (SYNONYMS[ours].index(name), unit) if name in SYNONYMS[ours] else (None, None)


def _same(a: pd.Series, b: pd.Series) -> bool:
    return a is b or bool((a.map(_number) == b.map(_number)).all())


# -- rows and cells ----------------------------------------------------------------------------------------------------


def _last_steps(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run of a table of steps: what was logged last, and the highest rate; any other table as it is."""
    step = next((c for c in STEP if c in table), None)
    if step is None or "run" not in table or table["run"].nunique() == len(table):
        return table
    at = table[step].map(_number)
    rows = table.assign(peak_lr=table["peak_lr"].map(_number)).iloc[np.argsort(at.to_numpy(), kind="stable")]
    runs = rows.groupby("run", sort=False)
    return runs.last().assign(peak_lr=runs["peak_lr"].max()).loc[table["run"].unique()].reset_index()


def _numbers(column: pd.Series, ours: str) -> pd.Series:
    """float64, NaN for a loss that is no number; ValueError naming cells that are none where there must be one."""
    found = column.map(_number).astype(float)
    meant = _DIVERGED if ours == "loss" else ("nan", "none", "null", "na")
    wrong = column[found.isna() & column.map(lambda cell: isinstance(cell, str) and cell.strip().lower() not in meant)]
    if len(wrong):
        raise ValueError(f"{ours}: {len(wrong)} of {len(column)} cells are no number, {wrong.iloc[0]!r} in row {wrong.index[0]} for "
                         "example; mend them, or map another column with columns=")
    return found.where(np.isfinite(found)) if ours == "loss" else found


_DIVERGED = ("nan", "inf", "-inf", "+inf", "infinity", "diverged", "none", "null", "na", "n/a", "-")
_POWER = re.compile(r"2(?:\^|\*\*)\(?(-?[\d.]+)\)?")
_COUNT = re.compile(r"([\d.,]+)\s*([kmbt])", re.IGNORECASE)


def _number(cell) -> float:
    """A number as it is or as it is written: 3e-4, 2^-7, 124M, 1.3B; NaN for anything else."""
    if not isinstance(cell, str):
        return float(cell) if isinstance(cell, int | float | np.number) and not isinstance(cell, bool) else math.nan
    text = cell.strip()
    if power := _POWER.fullmatch(text):
        return 2.0 ** float(power[1])
    if count := _COUNT.fullmatch(text):
        return float(count[1].replace(",", "")) * THOUSANDS[LETTERS[count[2].lower()]]
    try:
        return float(text)
    except ValueError:
        return math.nan


def _status(table: pd.DataFrame, frame: pd.DataFrame) -> pd.Series:
    """"done", "diverged" where there is no finite loss, or what a tracker says of a run that has not finished."""
    said = table["status"].map(lambda s: str(s).strip().lower()) if "status" in table else pd.Series("done", index=table.index)
    said = said.where(~said.isin([*DONE, "none", "nan", ""]), "done")
    lost = frame["loss"].isna() | (said == "diverged")
    explicit = table["loss"].map(lambda cell: isinstance(cell, str) or _infinite(cell))
    status = said.mask(lost & (said.isin(("done", "diverged")) | explicit), "diverged")
    frame.loc[status == "diverged", "loss"] = np.nan
    unfinished = status[~status.isin(("done", "diverged"))].value_counts()
    if len(unfinished):
        told = ", ".join(f"{n} {word}" for word, n in unfinished.items())
        warnings.warn(f"{unfinished.sum()} of {len(status)} runs have not finished ({told}), so their losses may not be final; "
                      'runs[runs.status.isin(["done", "diverged"])] leaves them out', UserWarning, stacklevel=3)
    return status


def _infinite(cell) -> bool:
    return isinstance(cell, float) and math.isinf(cell)


def _plain(column: pd.Series) -> pd.Series:
    """A column of theirs as numbers where every cell is one."""
    if column.dtype != object and not pd.api.types.is_string_dtype(column):
        return column
    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError):
        return column
