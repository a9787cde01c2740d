"""Runs of arXiv 2405.18392 and 2501.18965 (fabian-sp/lr-scheduling): cosine, constant, cooldowns, averages; 33M to 360M.

Two losses that must never be mixed: on the full validation set (`final_loss`, at a few points of a run) and on its first
32 batches (every 200 steps), which lies about 0.036 nats lower. All runs have one seed; runs of one `group` differ by
rerun noise alone. Rates are as logged, after the scheduler's step: at step n that of the step to come.
"""

import json
import re
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from etastar.schedules import WSD, Cosine

COSINE_FLOOR = 0.1  # torch's OneCycleLR(div_factor=100, final_div_factor=0.1), which the paper's runs use
SHAPES = {"linear": "linear", "sqrt": "1-sqrt", "cosine": "cosine", "miror_cosine": "mirror-cosine", "square": "square",
          "exp": "exponential"}
RECIPE = ["dataset", "model", "params", "batch_tokens", "steps", "schedule", "cooldown_fraction", "shape", "floor", "peak_lr",
          "warmup_steps", "seed", "data_seed"]

_NAME = re.compile(
    r"(?:(?P<series>[^_]+)_)??(?P<dataset>slimpajama(?:_chunk\d+)?|[a-z0-9]+)_(?P<model>llama(?:_[a-z]+)?)_nlayers(?P<n_layer>\d+)"
    r"_nhead(?P<n_head>\d+)_lr(?P<lr>[\d.e+-]+)_sched_(?P<scheduler>[a-z_]+?)_warmup(?P<warmup_steps>\d+)"
    r"(?:_decay_(?P<decay_type>[a-z_]+)_(?P<wsd_fract_decay>[\d.]+))?_iter(?P<iterations>\d+)_bs(?P<batch_size>\d+)x(?P<acc_steps>\d+)"
    r"_ws(?P<world_size>\d+)_seed(?P<seed>\d+)_data_seed(?P<data_seed>\d+)")
_NUMBERS = {"lr": float, "wsd_fract_decay": float} | dict.fromkeys(
    ("n_layer", "n_head", "warmup_steps", "iterations", "batch_size", "acc_steps", "world_size", "seed", "data_seed"), int)


def is_data(path: str) -> bool:
    """Whether a file of the repository is a run."""
    return path.startswith("data/") and path.endswith(".json")


def read(paths: dict) -> pd.DataFrame:
    """One row a run: run, series, dataset, model, params, depth, batch_tokens, steps, tokens, schedule, cooldown_fraction, shape,
    floor, peak_lr, warmup_steps, final_loss, last_loss_32_batches, last_step_32_batches, swa_loss, swa_window_steps, seed,
    data_seed, group, replicate_of.

    Losses are nats per token. `floor` is the last rate over the peak (1 for constant runs); a cosine's cooldown_fraction and a
    constant's shape are missing. `swa_loss` is that of the best of up to ten averaging windows, picked on the very set it is
    told on. Diverged runs are kept. `group` names the recipe, `replicate_of` the first run of the same one.
    """
    rows = [_row(path, _load(at)) for path, at in sorted(paths.items())]
    frame = pd.DataFrame(rows)
    frame["group"] = [" ".join(map(str, recipe)) for recipe in frame[RECIPE].itertuples(index=False)]
    first = frame.groupby("group")["run"].transform("first")
    frame["replicate_of"] = first.where(first != frame["run"], None)
    return frame


def read_evaluations(paths: dict) -> pd.DataFrame:
    """Every evaluation on the full validation set: run, step, tokens, loss, swa_loss (nats), in order of steps."""
    rows = []
    for path, at in sorted(paths.items()):
        body = _load(at)
        fields, logged = _fields(path, body), body["history"].get("final-val", {})
        found = _table(logged, {"loss": "final_val_loss", "swa_loss": "final_val_best_loss_wa"})
        if fields["iterations"] not in set(found["step"]) and (last := body["summary"].get("final-val/loss")) is not None:
            end = {"step": fields["iterations"], "loss": last, "swa_loss": body["summary"].get("final-val/best_loss_wa", np.nan)}
            found = pd.concat([found, pd.DataFrame([end])], ignore_index=True)
        rows.append(found.assign(run=_run(path), tokens=found["step"] * _batch_tokens(fields)))
    return pd.concat(rows, ignore_index=True)[["run", "step", "tokens", "loss", "swa_loss"]]


def read_curves(paths: dict, runs=None, whole: bool = True) -> pd.DataFrame:
    """Logged curves of `runs` (all by default): run, step, tokens, lr, train_loss, loss_32_batches, swa_loss_32_batches, logged_by.

    A cooldown's file begins where it left its trunk; with `whole` the trunk's steps up to there are put before it, logged_by
    naming the trunk. Steps that neither file has stay missing, and runs whose trunk is not here are in .attrs["without_trunk"].
    Raises ValueError for runs that are not here.
    """
    by_run = {_run(path): (path, at) for path, at in paths.items()}
    unknown = sorted(set(runs or ()) - set(by_run))
    if unknown:
        raise ValueError(f"no run {', '.join(unknown)} among the {len(by_run)} here")
    parts, without = [], []
    for run in runs or sorted(by_run):
        body = _load(by_run[run][1])
        fields, own = _fields(by_run[run][0], body), _curve(body).assign(logged_by=run)
        branch = min(own["step"].min(), _branch_step(fields))
        if whole and fields["scheduler"].startswith("wsd") and branch > fields["warmup_steps"]:
            trunk = _trunk(run, fields, by_run)
            if trunk is None:
                without.append(run)
            else:
                before = _curve(_load(by_run[trunk][1])).assign(logged_by=trunk)
                own = pd.concat([before[before["step"] < branch], own], ignore_index=True)
        parts.append(own.assign(run=run, tokens=own["step"] * _batch_tokens(fields)))
    columns = ["run", "step", "tokens", "lr", "train_loss", "loss_32_batches", "swa_loss_32_batches", "logged_by"]
    frame = pd.concat(parts, ignore_index=True)[columns]
    frame.attrs["without_trunk"] = without
    return frame


def learning_rates(run) -> np.ndarray:
    """The rate applied at each step of a row of `read`, by the paper's own convention: float64 (steps,)."""
    if run["schedule"] == "cosine":
        schedule = Cosine(warmup_steps=run["warmup_steps"], floor=run["floor"], convention="epfml")
    elif run["schedule"] == "constant":
        schedule = WSD(warmup_steps=run["warmup_steps"], cooldown_steps=0, convention="epfml")
    elif run["schedule"] == "wsd":
        schedule = WSD(warmup_steps=run["warmup_steps"], cooldown_steps=int(run["cooldown_fraction"] * run["steps"]), shape=run["shape"],
                       floor=run["floor"], convention="epfml")
    else:
        raise ValueError(f"{run['run']}: the rates of schedule {run['schedule']!r} are only in its log (read_curves)")
    return schedule.lr(int(run["steps"]), peak_lr=run["peak_lr"], batch_tokens=int(run["batch_tokens"]))


def _load(at) -> dict:
    with open(at) as file:
        return json.load(file)


def _run(path: str) -> str:
    """Path without data/ and .json: sixteen file names occur twice, under data/ and data/grad_norm/."""
    return path.removeprefix("data/").removesuffix(".json")


def _fields(path: str, body: dict) -> dict:
    """What a run was: its logged configuration, filled in from its name where that says nothing; ValueError where they disagree."""
    name = _NAME.fullmatch(PurePosixPath(path).stem)
    named = {k: _NUMBERS.get(k, str)(v) for k, v in (name.groupdict() if name else {}).items() if v is not None}
    config = {k: v for k, v in body["config"].items() if v is not None}
    for key in ("iterations", "n_layer", "n_head", "lr", "seed", "data_seed"):
        if key in named and key in config and named[key] != config[key]:
            raise ValueError(f"{path}: the name says {key} {named[key]}, the logged configuration {config[key]}")
    missing = sorted({"iterations", "lr", "scheduler", "dataset"} - set(named | config))
    if missing:
        raise ValueError(f"{path}: neither its name nor its configuration tells {', '.join(missing)}")
    # The series is the name's alone: configurations say "none" where the name has nothing.
    return {"warmup_steps": 0, "wsd_fract_decay": 0.0} | named | config | {"series": named.get("series", "")}


def _batch_tokens(fields: dict) -> int:
    """Tokens a step: names and logs hold accumulation steps after division by the number of devices."""
    return fields["batch_size"] * fields["acc_steps"] * fields["world_size"] * fields.get("sequence_length", 512)


def _row(path: str, body: dict) -> dict:
    fields, summary = _fields(path, body), body["summary"]
    tokens, steps = _batch_tokens(fields), fields["iterations"]
    last = _table(body["history"].get("val", {}), {"loss": "val_loss"}).dropna().tail(1)
    return {"run": _run(path), "series": fields["series"], "dataset": fields["dataset"], "model": fields.get("model"),
            "params": summary.get("parameters", np.nan), "depth": fields.get("n_layer"), "batch_tokens": tokens, "steps": steps,
            "tokens": tokens * steps, **_schedule(fields), "peak_lr": fields["lr"], "warmup_steps": fields["warmup_steps"],
            "final_loss": summary.get("final-val/loss", np.nan),
            "last_loss_32_batches": last["loss"].iloc[0] if len(last) else np.nan,
            "last_step_32_batches": int(last["step"].iloc[0]) if len(last) else 0,
            "swa_loss": summary.get("final-val/best_loss_wa", np.nan), "swa_window_steps": summary.get("wa_best_horizon", np.nan),
            "seed": fields.get("seed"), "data_seed": fields.get("data_seed")}


def _schedule(fields: dict) -> dict:
    if fields["scheduler"] == "cos":
        # Cosines to 10 % and to 0 share one name; `cos_final_lr` is absolute, and −1 or nothing means OneCycleLR's own 10 %.
        last = fields.get("cos_final_lr", -1)
        floor = COSINE_FLOOR if last < 0 else last / fields["lr"]
        return {"schedule": "cosine", "cooldown_fraction": np.nan, "shape": "cosine", "floor": floor}
    if fields["scheduler"] == "wsd" and not fields["wsd_fract_decay"]:
        return {"schedule": "constant", "cooldown_fraction": 0.0, "shape": None, "floor": 1.0}
    kind = fields.get("decay_type", "linear")
    return {"schedule": fields["scheduler"], "cooldown_fraction": float(fields["wsd_fract_decay"]), "shape": SHAPES.get(kind, kind),
            "floor": float(fields.get("wsd_final_lr_scale", 0.0))}


def _table(logged: dict, columns: dict) -> pd.DataFrame:
    """A logged history by rising step: restarted runs logged out of order and twice, duplicates are averaged."""
    step = logged.get("iter") or []
    data = {name: logged.get(key) or [] for name, key in columns.items()}
    frame = pd.DataFrame({"step": np.array(step, dtype=int)} | {
        name: pd.to_numeric(pd.Series(values), errors="coerce") if len(values) == len(step) else np.full(len(step), np.nan)
        for name, values in data.items()})
    return frame.groupby("step", as_index=False).mean()


def _curve(body: dict) -> pd.DataFrame:
    history = body["history"]
    train = _table(history.get("train", {}), {"lr": "train_lr", "train_loss": "train_loss"})
    validation = _table(history.get("val", {}), {"loss_32_batches": "val_loss"})
    averaged = _table(history.get("wa", {}), {"swa_loss_32_batches": "val_loss_wa"})
    return train.merge(validation, on="step", how="outer").merge(averaged, on="step", how="outer").sort_values("step", ignore_index=True)


def _branch_step(fields: dict) -> int:
    """The step at which a cooldown leaves its trunk; logs may begin later or, resumed from an earlier checkpoint, before it."""
    return fields["iterations"] - int(fields["wsd_fract_decay"] * fields["iterations"])


def _trunk(run: str, fields: dict, by_run: dict) -> str | None:
    """The run a cooldown was resumed from: by the recorded name, else the longest constant run of its size, data and rate."""
    folder = run.rpartition("/")[0]
    prefix = folder + "/" if folder else ""
    recorded = str(fields.get("resume_from", "")).split("/")
    named = prefix + recorded[-3] if len(recorded) >= 3 else None
    if named in by_run and named != run:
        return named
    alike = []
    for other, (path, _) in by_run.items():
        if other == run or not (name := _NAME.fullmatch(PurePosixPath(path).stem)):
            continue
        same = all(name[k] is not None and _NUMBERS.get(k, str)(name[k]) == fields.get(k) for k in ("dataset", "model", "n_layer",
                                                                                                   "n_head", "lr"))
        if same and name["scheduler"] == "wsd" and not float(name["wsd_fract_decay"] or 0) and not (name["series"] or "").startswith("ann"):
            alike.append((other.rpartition("/")[0] == folder, int(name["iterations"]), other))
    return max(alike)[2] if alike else None
