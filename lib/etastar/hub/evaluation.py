"""An evaluation of a checkpoint as it is kept: scores, every item, how it was made and of what; and two of them compared item by item."""

import dataclasses
import hashlib
import json
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd

from etastar.analysis.paired import Estimate
from etastar.engine.checkpoint import write_json
from etastar.engine.folders import replace_folder
from etastar.hub.export import MARK
from etastar.hub.perplexity import ratio
from etastar.hub.record import RECORD, read_record
from etastar.hub.scores import beside_published
from etastar.model.stored import json_object

SCORES, ITEMS, SETTINGS = "scores.csv", "items.parquet", "settings.json"
KEY = ["task", "metric", "filter"]
# what a score is of its ratio, and the slope of that
OF_RATIO = {"word_perplexity": (math.exp, math.exp), "byte_perplexity": (math.exp, math.exp),
            "bits_per_byte": (lambda nats: nats / math.log(2), lambda nats: 1 / math.log(2))}
ITSELF = (lambda ratio: ratio, lambda ratio: 1.0)
SAME_TASK = ("version", "shots")  # the data are told apart item by item


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a checkpoint scored: `scores`, one row a task, metric and filter; `items`, one row an item of each; `settings`, how.

    Scores: task, metric, filter, value, se (over items; NaN where the metric is no mean or ratio over them), items. A group of tasks has
    rows of its own over all its items. Items: task, metric, filter, item, above and below (the score is Σ above / Σ below), doc_hash.
    Settings: checkpoint (`checkpoint_identity`), limit, dtype, batch_size, device, seed, versions, tasks, groups.
    """

    scores: pd.DataFrame
    items: pd.DataFrame
    settings: dict

    def beside(self, model: str) -> pd.DataFrame:
        """These scores beside the published ones of `model`, with verdicts: `hub.scores.beside_published`."""
        return beside_published(self.scores, model, whole=self.settings["limit"] is None)

    def against(self, other: "Evaluation", level: float = 0.9) -> pd.DataFrame:
        """This evaluation less another of the same tasks: one row a task or group, metric and filter that both have an error of.

        Columns: task, metric, filter, difference, se, low, high (Student's interval of `level`), items. Items are paired by their
        document's hash, so that what is hard for both cancels; a score that is a ratio (perplexity, bits per byte) has the linearized
        difference. Where one evaluation has a smaller limit the items that both have count, and they have to be all of the smaller one's.
        Raises ValueError for no common task, a task in another version or with other shots, and items that only one has.
        """
        both = self.scores.merge(other.scores, on=KEY)
        both = both[both["se_x"].notna() & both["se_y"].notna()]
        if both.empty:
            raise ValueError(f"nothing to compare: no score with an error is in both; one has {_named(self)}, the other {_named(other)}")
        rows = []
        for task, metric, filter_ in both[KEY].itertuples(index=False):
            pairs = [_pair(self, other, (leaf, metric, filter_)) for leaf in self.settings["groups"].get(task, [task])]
            found = _difference(metric, pd.concat(pairs))
            low, high = found.interval(level)
            rows.append((task, metric, filter_, found.value, found.se, low, high, found.n))
        return pd.DataFrame(rows, columns=[*KEY, "difference", "se", "low", "high", "items"])

    def covers(self, other: "Evaluation") -> bool:
        """Whether it is of the same checkpoint and has all tasks of another with as many items or more."""
        mine, theirs = self.settings["tasks"], other.settings["tasks"]
        told = [{key: value for key, value in one.settings["checkpoint"].items() if key != "folder"} for one in (self, other)]
        return told[0] == told[1] and all(task in mine and mine[task]["items"] >= of["items"] for task, of in theirs.items())

    def write(self, folder) -> Path:
        """Put it in a folder of its own, whole or not at all, in place of an evaluation that is there; returns the folder's path.

        Raises ValueError, with nothing written, where something else is there.
        """
        folder = Path(folder).expanduser().absolute()
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {SCORES, ITEMS, SETTINGS}):
            raise ValueError(f"{folder} holds something else than an evaluation; name another folder")
        partial = folder.parent / f".{folder.name}.{threading.get_native_id()}"
        partial.mkdir(parents=True)
        try:
            self.scores.to_csv(partial / SCORES, index=False)
            self.items.to_parquet(partial / ITEMS, index=False)
            write_json(partial / SETTINGS, self.settings)
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def read_evaluation(folder) -> Evaluation:
    """The evaluation in a folder; ValueError where there is none or it cannot be read."""
    folder = Path(folder).expanduser()
    if missing := [name for name in (SCORES, ITEMS, SETTINGS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} holds no evaluation: it has no {', '.join(missing)}; `etastar eval` writes one")
    try:
        exact = dict.fromkeys(("value", "se"), lambda text: float(text or "nan"))  # to the last bit, whatever pandas' default is
        scores = pd.read_csv(folder / SCORES, keep_default_na=False, converters=exact)
        return Evaluation(scores, pd.read_parquet(folder / ITEMS), json.loads((folder / SETTINGS).read_bytes()))
    except (ValueError, OSError) as error:
        raise ValueError(f"the evaluation in {folder} is damaged ({error}); evaluate again") from None


def checkpoint_identity(folder: Path) -> dict[str, str]:
    """Which checkpoint a folder holds: folder, config_sha256, headers_sha256, repo and commit of what was fetched, run_id of an export.

    Cheap to ask of any size, since no weights are read: the headers of its safetensors tell names, shapes and types of all tensors, and
    so which model it is and not how it was trained; that, the commit or the run tells.
    """
    folder, headers = Path(folder).absolute(), hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            headers.update(path.name.encode() + b"\0" + file.read(int.from_bytes(file.read(8), "little")))
    told = {"folder": str(folder), "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "headers_sha256": headers.hexdigest()}
    return told | _fetched_from(folder) | _exported_from(folder)


def _fetched_from(folder: Path) -> dict[str, str]:
    """Repository and commit by the record of a fetch: in the folder itself, or in the hub cache's folder of all of its snapshots."""
    for path, commit in ((folder / RECORD, None), (folder.parent.parent / RECORD, folder.name)):
        if path.is_file():
            record = read_record(path, json_object(path).get("repo", ""))
            known = [one for one in record.listings if commit in (None, one)]
            if len(known) == 1:
                return {"repo": record.repo, "commit": known[0]}
    return {}


def _exported_from(folder: Path) -> dict[str, str]:
    path = folder / MARK
    run_id = json_object(path).get("run_id") if path.is_file() else None
    return {"run_id": run_id} if run_id else {}


def score_of(metric: str, items: pd.DataFrame) -> tuple[float, float]:
    """(score, its standard error over items) of rows with above and below."""
    value, se = ratio(items["above"], items["below"])
    of_ratio, slope = OF_RATIO.get(metric, ITSELF)
    return of_ratio(value), slope(value) * se


def _difference(metric: str, pairs: pd.DataFrame) -> Estimate:
    """The score of `_x` less that of `_y`, with the error of what each pair moves it by."""
    count, value, moves = len(pairs), 0.0, np.zeros(len(pairs))
    of_ratio, slope = OF_RATIO.get(metric, ITSELF)
    for side, sign in (("x", 1.0), ("y", -1.0)):
        above, below = pairs[f"above_{side}"].to_numpy(), pairs[f"below_{side}"].to_numpy()
        own, _ = ratio(above, below)
        value += sign * of_ratio(own)
        moves += sign * slope(own) * (above - own * below) / below.sum()
    se = math.sqrt(count / (count - 1) * float((moves**2).sum())) if count > 1 else math.nan
    return Estimate(value, se, max(count - 1, 1), count, "score")


def _pair(one: Evaluation, other: Evaluation, key: tuple[str, str, str]) -> pd.DataFrame:
    """The items of a task, metric and filter that both have, one row each; ValueError for those that only one has."""
    _refuse_unlike(one, other, key[0])
    mine, theirs = (_of(evaluation, key) for evaluation in (one, other))
    pairs = mine.merge(theirs, on=["doc_hash", "occurrence"])
    limits = [evaluation.settings["limit"] for evaluation in (one, other)]
    needed = max(len(mine), len(theirs)) if limits[0] == limits[1] else min(len(mine), len(theirs))
    if len(pairs) < needed:
        raise ValueError(f"{key[0]} has other items in the two evaluations: {len(mine) - len(pairs)} only in the first, "
                         f"{len(theirs) - len(pairs)} only in the second, {len(pairs)} in both (limits {limits[0]} and {limits[1]}); "
                         "evaluate both on the same task data")
    return pairs


def _of(evaluation: Evaluation, key: tuple[str, str, str]) -> pd.DataFrame:
    """Items of a task, metric and filter; a document that comes several times is told apart by which time it is."""
    items = evaluation.items
    for name, value in zip(KEY, key, strict=True):
        items = items[items[name] == value]
    items = items.sort_values("item")
    return items.assign(occurrence=items.groupby("doc_hash").cumcount())[["doc_hash", "occurrence", "above", "below"]]


def _refuse_unlike(one: Evaluation, other: Evaluation, task: str) -> None:
    mine, theirs = (evaluation.settings["tasks"][task] for evaluation in (one, other))
    unlike = [f"{name} {mine[name]} and {theirs[name]}" for name in SAME_TASK if mine[name] != theirs[name]]
    if unlike:
        raise ValueError(f"{task} is another task in the two evaluations: {', '.join(unlike)}; evaluate both in the same way")


def _named(evaluation: Evaluation) -> str:
    return ", ".join(dict.fromkeys(evaluation.scores["task"])) or "none"
