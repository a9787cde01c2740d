"""Tables of runs as others keep them, read as they stand: csv, tsv, parquet, json, jsonl, folders of summaries, trackers' exports.

Numbers in text files stay text here, so that an empty cell (None) is told from a loss of "nan".
"""

import ast
import json
import re
from pathlib import Path

import pandas as pd

SUMMARIES = ("summary.json", "wandb-summary.json", "results.json", "metrics.json")
BESIDE = ("config.json", "args.json", "hparams.json", "params.json")  # what a run was, beside what came of it
NESTED = ("config", "summary", "hparams", "metrics")  # columns that a tracker's export fills with dicts, or with their text
READABLE = (".csv", ".tsv", ".txt", ".parquet", ".jsonl", ".ndjson", ".json")


def read_table(path) -> pd.DataFrame:
    """The rows of a file, a folder of json summaries or a DataFrame; nested dicts become columns with dots in their names.

    A column `run` names each row of a folder by its path there. Raises ValueError for what is not there, empty or unknown.
    """
    if isinstance(path, pd.DataFrame):
        table = path.reset_index(drop=True)
    elif not (path := Path(path)).exists():
        raise ValueError(f"no file or folder {path}")
    elif path.is_dir():
        table = _folder(path)
    else:
        table = _file(path)
    if not len(table):
        raise ValueError(f"{path if isinstance(path, Path) else 'the table'} has no rows")
    return _wide(_unnested(table))


def _file(path: Path) -> pd.DataFrame:
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".bz2", ".xz", ".zst")), "").lower()
    if suffix == ".parquet":
        return pd.read_parquet(path)
    if suffix in (".csv", ".tsv", ".txt"):
        return _delimited(path, "," if suffix == ".csv" else "\t")
    if suffix in (".jsonl", ".ndjson"):
        text = pd.io.common.get_handle(path, "r", compression="infer").handle.read()
        return pd.json_normalize([_json(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()])
    if suffix == ".json":
        return pd.json_normalize(_records(_json(path.read_text(), str(path))))
    raise ValueError(f"{path}: cannot read {suffix or 'files without a suffix'!r}; known: {', '.join(READABLE)} and folders of json "
                     "summaries")


def _delimited(path: Path, separator: str) -> pd.DataFrame:
    """A text table; where the expected separator parts nothing, another one that does."""
    given = {"dtype": str, "keep_default_na": False, "skipinitialspace": True}
    table = pd.read_csv(path, sep=separator, **given)
    other = next((s for s in ("\t", ";", ",", "|") if table.shape[1] == 1 and s in table.columns[0]), None)
    table = pd.read_csv(path, sep=other, **given) if other else table
    return table.astype(object).where(table != "", None)


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _records(body) -> list[dict]:
    """Rows of a JSON body: a list of them, one of them, {id: row}, {column: values}, or any of these under "runs", "rows" or "data"."""
    if isinstance(body, dict):
        inner = next((body[key] for key in ("runs", "rows", "data") if isinstance(body.get(key), list | dict)), None)
        if inner is not None:
            return _records(inner)
        if body and all(isinstance(part, dict) for part in body.values()) and not set(body) & {*NESTED, "recipe"}:
            return [{"run": name} | row for name, row in body.items()]
        if body and all(isinstance(part, list) for part in body.values()) and len({len(part) for part in body.values()}) == 1:
            return [dict(zip(body, row, strict=True)) for row in zip(*body.values(), strict=True)]
        return [body]
    if not isinstance(body, list) or not all(isinstance(row, dict) for row in body):
        raise ValueError(f"a JSON table must be rows of names and values; got {str(body)[:60]}")
    return body


def _folder(path: Path) -> pd.DataFrame:
    """One row a summary file and what stands beside it; where none is called so, one row a json file."""
    files = [f for f in sorted(path.rglob("*.json")) if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    summaries, rows = [f for f in files if f.name in SUMMARIES], []
    for file in summaries or files:
        name = (file.parent if summaries else file.with_suffix("")).relative_to(path).as_posix()
        beside = [f for n in BESIDE if summaries and (f := file.parent / n).exists()]
        merged = {k: v for f in beside for k, v in _json(f.read_text(), str(f)).items()}
        found = _records(_json(file.read_text(), str(file)))
        rows += [{"run": name if len(found) == 1 else f"{name}#{i}"} | merged | row for i, row in enumerate(found)]
    if not rows:
        raise ValueError(f"the folder {path} holds no json file; give a file ({', '.join(READABLE)}) or a folder of json summaries")
    return pd.json_normalize(rows).drop(columns="files", errors="ignore")


def _unnested(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of dicts, or of their text as a tracker's export writes it, taken apart."""
    for name in [c for c in table if str(c).lower() in NESTED]:
        dicts = [_as_dict(cell) for cell in table[name]]
        if any(d is None for d in dicts):
            continue
        parts = pd.json_normalize(dicts).add_prefix(f"{name}.")
        table = pd.concat([table.drop(columns=name), parts.set_index(table.index)], axis=1)
    return table


def _as_dict(cell) -> dict | None:
    if not isinstance(cell, str):
        return cell if isinstance(cell, dict) else None
    try:
        found = json.loads(cell)
    except ValueError:
        try:  # as Python prints a dict, where a bare nan or inf is no literal
            found = ast.literal_eval(re.sub(r"(?<![\w'\"])(nan|-?inf)(?![\w'\"])", r"'\1'", cell))
        except (ValueError, SyntaxError):
            return None
    return found if isinstance(found, dict) else None


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """A long table of scalars (step, tag, value and a run) with one column a tag; any other as it is."""
    low = {str(c).lower(): c for c in table}
    tag, run = (next((low[n] for n in names if n in low), None) for names in (("tag", "metric"), ("run", "dir_name", "run_id", "run_name")))
    if tag is None or run is None or not {"step", "value"} <= set(low):
        return table
    wide = table.pivot_table(index=[run, low["step"]], columns=tag, values=low["value"], aggfunc="last", sort=False)
    return wide.reset_index().rename_axis(columns=None)
