"""Run tables of arXiv 2510.03871 in the CSV layout of its toolkit (SDLAML/norm-transfer): read, fetched from its tracker, written.

The authors' tables are in no public repository; their runs are on a public tracking server. A user exports them, with the authors'
own scripts or with `from_tracker`, and names the folder. `write_table` writes our runs in the same layout, for their toolkit.
One row is one logged step of one run. Their momentum is the weight of the new gradient: 1 is none, 0.1 is a β of 0.9.
"""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd

CONTEXT = 4096
PROJECT = "sdlaml-llm/norm-transfer"
COLUMNS = {"step": "steps", "output_norm": "log2_norm", "train_loss": "loss", "run_name": "run", "bs": "batch_sequences", "seed": "seed",
           "momentum": "momentum", "lr": "peak_lr", "lr_hidden": "lr_hidden", "lr_in": "lr_input", "lr_out": "lr_output",
           "horizon": "horizon_tokens"}
GROUP_RATES = ["lr_input", "lr_hidden", "lr_output"]
WHOLE = ["steps", "batch_sequences", "seed", "horizon_tokens"]
ORDER = ["model", "scan", "run", "steps", "horizon_tokens", "batch_tokens", "batch_sequences", "peak_lr", *GROUP_RATES, "momentum",
         "decayed", "seed", "log2_norm", "loss"]
NORM, LOSS = "track_param_rms_to_l1/model_part_0/output", "loss_metrics/global_avg_loss"  # the norm is RMS→∞, whatever its name
RATES = {"lr_hidden": "lr/opt_0/group_0", "lr_input": "lr/opt_0/group_1", "lr_output": "lr/opt_0/group_2"}
_FILE = re.compile(r"(?:(?P<scan>lr-bs-scan-per-layer|lr-bs-scan|mass-scan-per-layer)-)?(?P<model>.+?)-momentum-[\d.]+(?:-decayed)?"
                   r"-preprocessed.*")
_INSTALL = ("the package wandb is not installed; run `pip install wandb` and `wandb login`, or export the runs with the authors' scripts "
            "(SDLAML/norm-transfer: extract_wandb_data.py, preprocess_data.py) and name the folder of their CSV files")


def read_tables(folder) -> pd.DataFrame:
    """All run tables of a folder (`*.csv`; aggregates and saved minima aside), or one file, as one frame.

    Columns: model and scan (from the file's name), run, steps, horizon_tokens, batch_tokens, batch_sequences, peak_lr (NaN where the
    layer groups differ), lr_input, lr_hidden, lr_output, momentum (1 is none), decayed, seed, log2_norm (of the head, RMS→∞), loss
    (training, nats per token; not finite is NaN). ValueError names the file and what is wrong: lacking columns, norms or rates that
    are not positive, horizons that are no whole number of tokens a sequence, and tables of several contexts.
    """
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(p for p in folder.glob("*.csv")
                                                     if not p.stem.endswith("-agg") and not p.stem.lstrip("_").startswith("minima"))
    if not paths:
        raise ValueError(f"{folder}: no run table (*.csv) there; export one with the authors' scripts or `from_tracker`")
    frame = pd.concat([_read(path) for path in paths], ignore_index=True)
    contexts = sorted(set((frame["batch_tokens"] // frame["batch_sequences"]).tolist()))
    if len(contexts) > 1:
        raise ValueError(f"{folder}: tables of several contexts, {', '.join(map(str, contexts))} tokens a sequence; read them one by one")
    return frame


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if lacking := [name for name in COLUMNS if name not in table]:
        raise ValueError(f"{path.name}: no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, table))}")
    if table.empty:
        raise ValueError(f"{path.name}: no rows")
    frame = table.rename(columns=COLUMNS)[list(COLUMNS.values())]
    for name in [n for n in frame if n != "run"]:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    named = _FILE.fullmatch(path.stem)
    model, scan = (named["model"], named["scan"] or "") if named else (path.stem, "")
    return _checked(frame.assign(model=model, scan=scan, decayed=frame["run"].str.contains("-decayed")), path.name)


def _checked(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The frame in our units (log2_norm holds their norm until here); ValueError for what no run can have logged."""
    lost, norm = ~np.isfinite(frame["loss"]), frame["log2_norm"]
    bad = {name: ~(frame[name] > 0) for name in [*GROUP_RATES, "batch_sequences"]} | {
        "log2_norm": ~(np.isfinite(norm) & (norm > 0)) & ~(lost & norm.isna()),
        "peak_lr": frame["peak_lr"].notna() & ~(frame["peak_lr"] > 0), "momentum": ~frame["momentum"].between(0, 1, inclusive="right")}
    for name in WHOLE:
        bad[name] = bad.get(name, False) | ~np.isfinite(frame[name]) | (frame[name] % 1 != 0)
    theirs = {ours: name for name, ours in COLUMNS.items()}
    wrong = [f"{theirs[name]} {', '.join(f'{v:g}' for v in frame.loc[rows, name].unique()[:3])} in {int(rows.sum())} rows"
             for name, rows in bad.items() if rows.any()]
    if wrong:
        raise ValueError(f"{source}: {'; '.join(wrong)}; norms, rates and batches must be positive, momenta in (0, 1], counts whole")
    frame = frame.astype({name: "int64" for name in WHOLE})
    frame = frame.assign(batch_tokens=frame["batch_sequences"] * _context(frame, source), log2_norm=np.log2(frame["log2_norm"]),
                         loss=frame["loss"].where(~lost))
    return frame[ORDER].sort_values(["model", "run", "seed", "steps"], ignore_index=True)


def _context(frame: pd.DataFrame, source: str) -> int:
    """Tokens a sequence, from horizon = batch · steps · context."""
    moved = frame[frame["steps"] > 0]
    contexts = (moved["horizon_tokens"] / (moved["batch_sequences"] * moved["steps"])).unique()
    if len(contexts) != 1 or contexts[0] % 1 or contexts[0] < 1:
        told = ", ".join(f"{c:g}" for c in sorted(contexts)[:4]) or "none, for no row is past step 0"
        raise ValueError(f"{source}: horizon must be bs · step · context with one whole context; contexts found: {told}")
    return int(contexts[0])


# -- the tracking server -----------------------------------------------------------------------------------------------


def from_tracker(model: str, group: str, project: str = PROJECT, context: int = CONTEXT, client=None) -> pd.DataFrame:
    """The runs of one group of the authors' public project, as `read_tables` gives them; `client` is a `wandb.Api()` by default.

    `model` and `group` name what the group holds ("base", as its page tells). Runs without the arguments they were started with are
    left out and named in .attrs["left_out"]. The address is that of the authors' README; it was not reachable when this was written.
    ImportError, saying how to go on, where the client's package is not installed; ValueError where the group has no runs.
    """
    client = _client() if client is None else client
    found, left_out = [], []
    for run in client.runs(project, filters={"group": group}):
        rows = _tracked(run, context)
        if rows is None:
            left_out.append(run.name)
        else:
            found.append(rows)
    if not found:
        raise ValueError(f"{project}: group {group!r} has no run with logged norms; {len(left_out)} runs left out")
    frame = _checked(pd.concat(found, ignore_index=True).assign(model=model, scan=""), f"{project}, group {group}")
    frame.attrs["left_out"] = left_out
    return frame


def _client():
    try:
        return importlib.import_module("wandb").Api(timeout=120)
    except ImportError as missing:
        raise ImportError(_INSTALL) from missing


def _tracked(run, context: int) -> pd.DataFrame | None:
    """The logged rows of one run with what its command line tells; None where it tells nothing or nothing was logged."""
    words = (run.metadata or {}).get("args", [])
    told = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    asked = {"batch_sequences": "training.global_batch_size", "seed": "training.seed", "momentum": "optimizer.momentum"}
    history = pd.DataFrame(list(run.scan_history(keys=["_step", NORM, LOSS, *RATES.values()])))
    if history.empty or any(name not in told for name in asked.values()):
        return None
    rows = history.rename(columns={"_step": "steps", NORM: "log2_norm", LOSS: "loss"} | {v: k for k, v in RATES.items()}).astype(float)
    peaks = rows[GROUP_RATES].max()  # a decayed run's rate falls; the highest is the one it is named after
    rows = rows.assign(run=run.name, decayed="decayed" in run.name, peak_lr=peaks.iloc[0] if peaks.nunique() == 1 else math.nan,
                       **peaks.to_dict(), **{ours: float(told[theirs]) for ours, theirs in asked.items()})
    return rows.assign(horizon_tokens=rows["batch_sequences"] * rows["steps"] * context)


# -- the way back ------------------------------------------------------------------------------------------------------


def write_table(frame: pd.DataFrame, path) -> Path:
    """Write our runs as one table of the toolkit's layout, so that it can read them; returns the path.

    `frame`: steps, batch_sequences, horizon_tokens, peak_lr, seed, log2_norm, loss, and where they are not the same for all, lr_input,
    lr_hidden, lr_output, momentum, decayed. Runs are named `lr-<rate>-bs-<n>[-momentum-<m>]-seed-<s>[-decayed]`; where layer groups
    differ the rate is `i<k>h<k>o<k>`, the places of the rates among the table's (the columns hold them). Their scripts mix what one
    file holds, so ValueError for several models, momenta or contexts, for decayed beside other runs, and for two rows of one name and step.
    """
    frame = frame.assign(**{n: frame["peak_lr"] for n in GROUP_RATES if n not in frame and "peak_lr" in frame},
                         **{n: v for n, v in {"momentum": 1.0, "decayed": False}.items() if n not in frame})
    if lacking := [name for name in COLUMNS.values() if name not in frame and name != "run"]:
        raise ValueError(f"no column {', '.join(map(repr, lacking))}; the frame has {', '.join(map(str, frame))}")
    for name in [n for n in ("model", "momentum", "decayed") if n in frame]:
        if frame[name].nunique() > 1:
            raise ValueError(f"one file holds one {name}, got {', '.join(map(str, frame[name].unique()))}; write one file each")
    frame = frame.assign(run=_names(frame))
    twice = frame.duplicated(["run", "steps"])
    if twice.any():
        raise ValueError(f"{int(twice.sum())} rows have the name and step of another, {frame.loc[twice, 'run'].iloc[0]} for example; "
                         "runs that differ in more than rate, batch, momentum, decay and seed go into files of their own")
    _context(frame, "write_table")
    same = frame[GROUP_RATES].min(axis=1) == frame[GROUP_RATES].max(axis=1)
    theirs = frame.assign(log2_norm=2.0 ** frame["log2_norm"], peak_lr=frame["peak_lr"].where(same))
    theirs = theirs.rename(columns={ours: name for name, ours in COLUMNS.items()})[list(COLUMNS)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    theirs.to_csv(path, index=False)
    return path


def table_name(model: str, momentum: float = 1.0, decayed: bool = False, seed: int | None = None) -> str:
    """The name that the toolkit's notebooks look for: `lr-bs-scan-<model>-momentum-<m>[-decayed]-preprocessed-seed(s)[-<seed>].csv`."""
    seeds = "seeds" if seed is None else f"seed-{seed}"
    return f"lr-bs-scan-{model}-momentum-{float(momentum)}{'-decayed' if decayed else ''}-preprocessed-{seeds}.csv"


def _names(frame: pd.DataFrame) -> list[str]:
    places = {name: {lr: k for k, lr in enumerate(sorted(frame[name].unique()))} for name in GROUP_RATES}
    found = []
    for row in frame.itertuples():
        rates = [getattr(row, name) for name in GROUP_RATES]
        rate = repr(float(rates[0])) if len(set(rates)) == 1 else "".join(
            f"{letter}{places[name][lr]}" for letter, name, lr in zip("iho", GROUP_RATES, rates, strict=True))
        momentum = "" if row.momentum == 1 else f"-momentum-{float(row.momentum)!r}"
        found.append(f"lr-{rate}-bs-{int(row.batch_sequences)}{momentum}-seed-{int(row.seed)}{'-decayed' if row.decayed else ''}")
    return found
