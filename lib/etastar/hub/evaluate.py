"""Checkpoints through lm-evaluation-harness (extra `eval`): the papers' benchmarks, task data pinned, every item kept."""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from etastar.cache import cache_folder
from etastar.engine.checkpoint import write_json
from etastar.hub.checkpoints import find_fetched
from etastar.hub.evaluation import Evaluation, checkpoint_identity, read_evaluation, score_of
from etastar.hub.scores import benchmarks, find_published, published

SEED = 1234  # the harness's own; it draws the examples in a prompt
AGREEMENT = 1e-9  # relative, between the harness's score and ours from its items


def evaluate(folder, tasks=None, limit: int | None = None, *, dtype: str = "float32", batch_size: int = 8, device: str | None = None,
             task_folder=None, revisions: Mapping[str, str] | None = None, run_code: bool = False) -> Evaluation:
    """A checkpoint's scores on benchmarks, by lm-evaluation-harness through transformers.

    `folder` is a transformers folder with safetensors. `tasks` are the papers' benchmarks (default: all of data/published_scores.toml
    that run no generated program) or the harness's own tasks and groups, whose shots stay their own; `task_folder` holds further ones in
    its YAML format. `limit` takes the first so many items of each task. Task data of the hub are pinned at the commit they were first
    loaded at, or at that in `revisions` (by task), and need no network after. `run_code` runs programs the model wrote, on this machine.
    Raises ValueError where the harness is not installed, for a folder without weights, unknown tasks, a commit that is not the pinned
    one, and generated programs without `run_code`.
    """
    folder = Path(folder).expanduser()
    asked = _asked(tasks)
    _check(folder, asked, limit, batch_size, run_code)
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    _seed()
    manager = _manager(asked, task_folder)
    loaded = {name: _load(manager, name, shots, revisions or {}) for name, shots in asked.items()}
    leaves = {leaf: task for group in loaded.values() for leaf, task in group.items()}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = HFLM(pretrained=str(folder), dtype=dtype, batch_size=batch_size, device=device, use_safetensors=True)
    found = lm_eval.evaluate(lm=model, task_dict={"tasks": leaves}, limit=limit, bootstrap_iters=0, log_samples=True,
                             confirm_run_unsafe_code=run_code)
    items = _items(found["samples"])
    settings = {"checkpoint": checkpoint_identity(folder), "limit": limit, "dtype": dtype, "batch_size": batch_size, "device": device,
                "seed": SEED, "versions": _versions(), "groups": _groups(loaded),
                "tasks": {leaf: _told(task, items[items["task"] == leaf]) for leaf, task in leaves.items()}}
    return Evaluation(_scores(items, found["results"], loaded), items, settings)


def _asked(tasks) -> dict[str, int | None]:
    """Tasks of the harness with their shots, None for its own."""
    known = benchmarks()
    names = [name for name, b in known.items() if not b.runs_code] if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    asked = {}
    for name in names:
        asked |= {task: known[name].shots for task in known[name].tasks} if name in known else {name: None}
    return asked


def _check(folder: Path, asked: Mapping, limit, batch_size, run_code: bool) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("evaluation needs lm-evaluation-harness, which is not installed: pip install 'etastar[eval]'")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is no folder of a transformers checkpoint with safetensors (config.json and *.safetensors)")
    if not asked:
        raise ValueError("no task to evaluate; name one, or leave tasks out for the papers' benchmarks")
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} is a whole number from 1; got {number!r}")
    runs = sorted(task for b in benchmarks().values() if b.runs_code for task in b.tasks if task in asked)
    if runs and not (run_code and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"):
        raise ValueError(f"{', '.join(runs)} runs programs that the model wrote, on this machine; where that is safe (a container without "
                         "network), say run_code=True (--run-code) and set HF_ALLOW_CODE_EVAL=1")


def _seed() -> None:
    import random

    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _manager(asked: Mapping, task_folder):
    """The harness's index of tasks: of `task_folder` alone where it has all that is asked, since its own takes seconds to read."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None:
        if not Path(task_folder).is_dir():
            raise ValueError(f"there is no folder {task_folder} of tasks")
        own = TaskManager(include_path=str(task_folder), include_defaults=False)
        if set(asked) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    if unknown := [name for name in asked if name not in {*manager.all_subtasks, *manager.all_groups}]:
        near = [name for name in manager.match_tasks([f"{unknown[0]}*"])][:5]
        raise ValueError(f"lm-evaluation-harness has no task or group {', '.join(unknown)}"
                         f"{'; there are ' + ', '.join(near) if near else ''}; benchmarks of the papers: {', '.join(benchmarks())}")
    return manager


def _load(manager, name: str, shots: int | None, revisions: Mapping[str, str]) -> dict:
    """The harness's tasks of a task or group, at the commit of their data that is pinned; pinned now where none was."""
    pin = _pins().get(name)
    if name in revisions:
        pin = (pin or {"options": {}, "tasks": _leaves(manager, name)}) | {"revision": revisions[name]}
    spec = name
    if pin:  # each task on its own: the harness loses the names of a group's tasks where the group is changed
        changed = {"dataset_kwargs": pin["options"] | {"revision": pin["revision"]}}
        spec = {"group": "pinned", "task": [{"task": leaf} | changed for leaf in pin["tasks"]]}
    tasks = manager.load([spec])["tasks"]
    here = {commit for task in tasks.values() if (commit := data_revision(task.dataset))}
    if pin and here - {pin["revision"]}:
        raise ValueError(f"the data of {name} are at {', '.join(sorted(here))} and pinned at {pin['revision']}; with the network on they "
                         f"are fetched again at the pinned commit, or remove {name} from {_pins_file()} to pin another")
    if not pin and len(here) == 1:
        options = next(iter(tasks.values())).config.dataset_kwargs or {}
        _pins_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_pins_file(), _pins() | {name: {"revision": here.pop(), "options": options, "tasks": list(tasks)}})
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return tasks


def _leaves(manager, name: str) -> list[str]:
    return list(manager.load([name])["tasks"]) if name in manager.all_groups else [name]


def data_revision(dataset) -> str | None:
    """The commit that a task's data were loaded at, which names the folder the `datasets` library keeps them in; None for local files."""
    for split in (dataset or {}).values():
        for file in getattr(split, "cache_files", ()):
            if re.fullmatch(r"[0-9a-f]{40}", folder := Path(file["filename"]).parent.name):
                return folder
    return None


def _pins_file() -> Path:
    return cache_folder() / "evaluation_data.json"


def _pins() -> dict:
    return json.loads(_pins_file().read_text()) if _pins_file().exists() else {}


def _items(samples: Mapping[str, list[dict]]) -> pd.DataFrame:
    """One row an item, metric and filter, from what the harness logs."""
    rows = [(task, metric, sample["filter"], sample["doc_id"], *parts, sample["doc_hash"])
            for task, logged in samples.items() for sample in logged for metric in sample["metrics"]
            if (parts := _parts(sample[metric]))]
    return pd.DataFrame(rows, columns=["task", "metric", "filter", "item", "above", "below", "doc_hash"])


def _parts(value) -> tuple[float, float] | None:
    """What an item adds to a score's numerator and denominator: 1 below for a mean; of a (log-likelihood, size) the nats and the size."""
    if isinstance(value, tuple | list):
        return (-float(value[0]), float(value[1])) if len(value) == 2 and all(hasattr(v, "__float__") for v in value) else None
    return (float(value), 1.0) if hasattr(value, "__float__") else None


def _scores(items: pd.DataFrame, results: Mapping, loaded: Mapping[str, Mapping]) -> pd.DataFrame:
    rows, agreeing = [], set()
    for (task, metric, filter_), some in items.groupby(["task", "metric", "filter"], sort=False):
        told = results[task].get(f"{metric},{filter_}")
        if not isinstance(told, float | int):
            continue
        value, se = score_of(metric, some)
        if math.isclose(value, told, rel_tol=AGREEMENT, abs_tol=AGREEMENT):
            agreeing.add((task, metric, filter_))
        else:
            se = math.nan
        rows.append((task, metric, filter_, float(told), se, len(some)))
    for name, leaves in _groups(loaded).items():
        for (metric, filter_), some in items[items["task"].isin(leaves)].groupby(["metric", "filter"], sort=False):
            if {(leaf, metric, filter_) for leaf in leaves} <= agreeing:
                rows.append((name, metric, filter_, *score_of(metric, some), len(some)))
    return pd.DataFrame(rows, columns=["task", "metric", "filter", "value", "se", "items"])


def _groups(loaded: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """The harness's tasks of each group that was asked for."""
    return {name: list(leaves) for name, leaves in loaded.items() if list(leaves) != [name]}


def _told(task, items: pd.DataFrame) -> dict:
    """What has to be known of a task to run it again; the hash is of its items, in order."""
    hashes = items.drop_duplicates("item").sort_values("item")["doc_hash"]
    return {"dataset": task.config.dataset_path, "subset": task.config.dataset_name, "revision": data_revision(task.dataset),
            "version": task.VERSION, "shots": task.get_config("num_fewshot"), "items": len(hashes),
            "items_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "transformers", "datasets", "torch", "etastar")}


def eval_command(options) -> dict:
    """What `etastar eval` shows, by name: scores, the published ones beside them, settings, and where the evaluation is kept.

    The checkpoint is a folder or what was fetched by name. An evaluation is kept in RESULTS/NAME, and replaces one there only where it
    covers it (same checkpoint, all its tasks and items): else it is kept in RESULTS/NAME-2, and so on.
    """
    folder, results = find_fetched(options.checkpoint), Path(options.results).expanduser()
    results.mkdir(parents=True, exist_ok=True)  # or it is told now, and not after hours
    name = _name(folder)
    printed = find_published(options.published or name).name if options.published or name in published() else ""
    found = evaluate(folder, options.tasks or None, options.limit, dtype=options.dtype, batch_size=options.batch_size,
                     device=options.device, task_folder=options.task_folder, run_code=options.run_code)
    shown = {"scores": found.scores}
    if printed:
        shown[f"beside the published scores of {printed} (points)"] = found.beside(printed)
    return shown | {"settings": found.settings, "kept in": str(found.write(_free(results, name, found)))}


def _name(folder: Path) -> str:
    """What to call a checkpoint: as its printed scores do, else by its repository, else by its folder."""
    repo = checkpoint_identity(folder).get("repo", "")
    for model in published().values():
        if repo and repo.lower() == model.repo.lower():
            return model.name
    return repo.rpartition("/")[2] or folder.resolve().name


def _free(results: Path, name: str, found: Evaluation) -> Path:
    """The first of NAME, NAME-2, … where nothing is that the evaluation does not cover."""
    places = itertools.chain([results / name], (results / f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in places if not folder.exists() or _covers(found, folder))


def _covers(found: Evaluation, folder: Path) -> bool:
    try:
        return found.covers(read_evaluation(folder))
    except ValueError:  # something else is there, which is left alone
        return False
