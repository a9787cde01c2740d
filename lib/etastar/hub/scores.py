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


def averaged(model: str) -> list[Benchmark]:
    """The benchmarks that an average is over: zero-shot, of a printed reading, and with a printed score of the model."""
    return [b for b in benchmarks().values() if b.shots == 0 and b.reading == "printed" and b.name in find_published(model).scores]


def average(scores: pd.DataFrame, model: str) -> Estimate | None:
    """The mean in points over `averaged(model)` of what a checkpoint scored; None where one of them is missing from its scores.

    Items of different benchmarks are drawn independently, so the error is √Σse²/k over the k benchmarks.
    """
    found = [score(benchmark, scores) for benchmark in averaged(model)]
    if not found or None in found:
        return None
    items, count = sum(one.n for one in found), len(found)
    se = math.hypot(*(one.se for one in found)) / count
    return Estimate(math.fsum(one.value for one in found) / count, se, sum(one.df for one in found), items, "points")


def printed_average(model: str) -> float:
    """The mean of the printed scores of a model over `averaged(model)`, in points; NaN where there is none."""
    return _printed_mean(find_published(model), averaged(model))


def best_beside(model: str) -> tuple[str, float]:
    """(name, mean of its printed scores) of the best of the models printed beside one, over that one's `averaged` benchmarks.

    Those with a printed score of all of them count. Raises ValueError where there is none.
    """
    means = {name: mean for name in find_published(model).beside if np.isfinite(mean := _printed_mean(published()[name], averaged(model)))}
    if not means:
        raise ValueError(f"no model is printed beside {model} with scores of the same benchmarks")
    return max(means.items(), key=lambda pair: pair[1])


def _printed_mean(model: Scored, over: list[Benchmark]) -> float:
    return math.fsum(model.scores.get(b.name, math.nan) for b in over) / len(over) if over else math.nan


def _mean_of(over: list[Benchmark]) -> Benchmark:
    """The mean of benchmarks as a benchmark of its own."""
    chance = math.fsum(b.chance for b in over) / len(over)
    return Benchmark("average", f"mean of {', '.join(b.title for b in over)}", (), "", 0, "printed", chance, margin_of_average())


@functools.cache
def margin_of_average(path: Path = PUBLISHED) -> float:
    """Points within which two averages count as equal."""
    return float(_body(path)["average"]["margin"])


def beside_published(scores: pd.DataFrame, model: str, whole: bool = True) -> pd.DataFrame:
    """What a checkpoint scored here beside what is printed of `model`, one row a benchmark that both have, in points (percent).

    Columns: benchmark, score, se (over items), low and high (90 %), items, published, difference, margin, verdict and reason by the
    rules for a published number (equal within the margin that data/published_scores.toml states, chance excluded), and one column a
    model of the same size that the paper prints beside it. The printed score is taken as exact. `untested` is what the paper does not
    say how to measure; a difference found on a part of the items (`whole` False) is none of the paper's settings. The last row is the
    mean over `averaged(model)`, where all of these were scored.
    """
    printed = find_published(model)
    found = [(benchmark, score(benchmark, scores), printed.scores[benchmark.name], [benchmark])
             for benchmark in benchmarks().values() if benchmark.name in printed.scores]
    if over := averaged(model):
        found.append((_mean_of(over), average(scores, model), printed_average(model), over))
    rows = [_beside(benchmark, own, target, over, printed, whole) for benchmark, own, target, over in found if own is not None]
    return pd.DataFrame(rows, columns=[*COLUMNS, *printed.beside])


def _beside(benchmark: Benchmark, found: Estimate, target: float, over: list[Benchmark], printed: Scored, whole: bool) -> dict:
    """A row of `beside_published`; `over` are the benchmarks that the printed scores are the mean of."""
    verdict, reason = _verdict(benchmark, printed, target, found, whole)
    low, high = found.interval(0.9) if np.isfinite(found.se) else (math.nan, math.nan)
    row = (benchmark.title, found.value, found.se, low, high, found.n, target, found.value - target, benchmark.margin, verdict, reason)
    return dict(zip(COLUMNS, row, strict=True)) | {name: _printed_mean(published()[name], over) for name in printed.beside}


def _verdict(benchmark: Benchmark, printed: Scored, target: float, found: Estimate, whole: bool) -> tuple[str, str]:
    if benchmark.reading != "printed":
        return "untested", benchmark.why
    if not np.isfinite(found.se):
        return "inconclusive", f"too few items for an error ({found.n}); evaluate more"
    claim = Claim(
        id=f"{printed.name}/{benchmark.name}", study="released_checkpoints", paper=PAPER,
        place=printed.places.get(benchmark.name, f"{PAPER} Table 6"), statement=f"{printed.name} scores {target:g} on {benchmark.title}",
        kind="number", estimand="score", arms=(printed.name,), unit="points", published=target, published_note="", primary=False,
        minimum_scale={}, matching="the whole test set", margin=benchmark.margin, rival=benchmark.chance, rival_name="chance")
    finding = judge(claim, found, evidence="live", scale={}, matching=whole)
    return finding.verdict, finding.reason
