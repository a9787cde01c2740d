"""Published scores of released checkpoints, and the verdict on one of our own beside them; `data/published_scores.toml` has the numbers."""

import dataclasses
import difflib
import functools
import math
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd

from etastar.analysis.claims import Claim, judge
from etastar.analysis.paired import Estimate

PUBLISHED = Path(__file__).resolve().parents[3] / "data" / "published_scores.toml"
PAPER = "arXiv 2408.13359"
COLUMNS = ["benchmark", "score", "se", "low", "high", "items", "published", "difference", "margin", "verdict", "reason"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark of a paper as tasks of lm-evaluation-harness: their `metric` (of `filter`'s answers), `shots` in the prompt.

    `chance` and `margin` are in points (percent). `reading` "printed" or "unverified" says whether the paper tells how its score is made.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    shots: int
    reading: str
    chance: float = math.nan
    margin: float = math.nan
    filter: str = "none"
    runs_code: bool = False
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model's printed scores in percent, by benchmark, where each is printed, and the models printed beside it."""

    name: str
    repo: str
    beside: tuple[str, ...]
    scores: dict[str, float]
    places: dict[str, str]


@functools.cache
def benchmarks(path: Path = PUBLISHED) -> dict[str, Benchmark]:
    """The papers' benchmarks by name."""
    rows = _body(path)["benchmarks"]
    return {name: Benchmark(name, **row | {"tasks": tuple(row["tasks"])}) for name, row in rows.items()}


@functools.cache
def published(path: Path = PUBLISHED) -> dict[str, Scored]:
    """Models with printed scores by name; ValueError for a score of no benchmark and for a neighbour that is not listed."""
    models = {name: _scored(name, row) for name, row in _body(path)["models"].items()}
    for model in models.values():
        if unknown := (set(model.scores) - set(benchmarks(path))) | (set(model.beside) - set(models)):
            raise ValueError(f"{path}: {model.name} names {', '.join(sorted(unknown))}, not listed there")
    return models


def _body(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"no published scores at {path}: they are part of a source checkout")
    return tomllib.loads(path.read_text())


def _scored(name: str, row: dict) -> Scored:
    tables = {"zero_shot": f"{PAPER} Table 6", "others": f"{PAPER} Table 7"}
    places = {benchmark: place for table, place in tables.items() for benchmark in row.get(table, {})}
    scores = {benchmark: float(score) for table in tables for benchmark, score in row.get(table, {}).items()}
    return Scored(name, row.get("repo", ""), tuple(row.get("beside", ())), scores, places)


def find_published(name: str) -> Scored:
    """The printed scores of a model, by its name or its repository's; ValueError naming the models there are."""
    models = published()
    for model in models.values():
        if name.lower() in {model.name.lower(), model.repo.lower()} - {""}:
            return model
    near = [f", did you mean {other}" for other in difflib.get_close_matches(name, models, n=1)]
    raise ValueError(f"no published scores of {name!r}{''.join(near)}; there are those of {', '.join(models)}")


def score(benchmark: Benchmark, scores: pd.DataFrame) -> Estimate | None:
    """A benchmark's score in points from rows of `evaluate` (task, metric, filter, value, se, items): the mean over its tasks, which
    count alike; None where one of them is not there."""
    rows = scores[(scores["metric"] == benchmark.metric) & (scores["filter"] == benchmark.filter)].set_index("task")
    if not set(benchmark.tasks) <= set(rows.index):
        return None
    own = rows.loc[list(benchmark.tasks)]
    items = int(own["items"].sum())
    value, se = float(own["value"].mean()), math.sqrt(float((own["se"] ** 2).sum())) / len(own)
    return Estimate(100 * value, 100 * se, max(items - len(own), 1), items, "points")


def beside_published(scores: pd.DataFrame, model: str, whole: bool = True) -> pd.DataFrame:
    """What a checkpoint scored here beside what is printed of `model`, one row a benchmark that both have, in points (percent).

    Columns: benchmark, score, se (over items), low and high (90 %), items, published, difference, margin, verdict and reason by the
    rules for a published number (equal within the margin that data/published_scores.toml states, chance excluded), and one column a
    model of the same size that the paper prints beside it. The printed score is taken as exact. `untested` is what the paper does not
    say how to measure; a difference found on a part of the items (`whole` False) is none of the paper's settings.
    """
    printed, rows = find_published(model), []
    for benchmark in benchmarks().values():
        found = score(benchmark, scores)
        if found is None or benchmark.name not in printed.scores:
            continue
        verdict, reason = _verdict(benchmark, printed, found, whole)
        low, high = found.interval(0.9) if np.isfinite(found.se) else (math.nan, math.nan)
        target = printed.scores[benchmark.name]
        row = (benchmark.title, found.value, found.se, low, high, found.n, target, found.value - target, benchmark.margin, verdict, reason)
        others = {name: published()[name].scores.get(benchmark.name, math.nan) for name in printed.beside}
        rows.append(dict(zip(COLUMNS, row, strict=True)) | others)
    return pd.DataFrame(rows, columns=[*COLUMNS, *printed.beside])


def _verdict(benchmark: Benchmark, printed: Scored, found: Estimate, whole: bool) -> tuple[str, str]:
    if benchmark.reading != "printed":
        return "untested", benchmark.why
    if not np.isfinite(found.se):
        return "inconclusive", f"{found.n} item has no spread; evaluate more"
    claim = Claim(
        id=f"{printed.name}/{benchmark.name}", study="released_checkpoints", paper=PAPER, place=printed.places[benchmark.name],
        statement=f"{printed.name} scores {printed.scores[benchmark.name]} on {benchmark.title}", kind="number", estimand="score",
        arms=(printed.name,), unit="points", published=printed.scores[benchmark.name], published_note="", primary=False, minimum_scale={},
        matching="the whole test set", margin=benchmark.margin, rival=benchmark.chance, rival_name="chance")
    finding = judge(claim, found, evidence="live", scale={}, matching=whole)
    return finding.verdict, finding.reason
