"""A large sweep away from training: planning 10,000 recipes, and a store of 10,000 runs as a table."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.crew import apart
from benchmarks.machine import peak_bytes
from etastar.engine.plan import build_segments
from etastar.engine.run import curve_frame, summarize
from etastar.engine.store import Store
from etastar.observe import Observe
from etastar.recipe import AdamW, Corpus, Model, Recipe
from etastar.schedules import WSD

MODEL, CORPUS = Model(width=64, depth=2, head_dim=32, context=64), Corpus("synthetic", vocab=1024)
BATCH_TOKENS = 1024
HORIZONS, FRACTIONS, RATES = (256, 512, 1024, 2048), (0.1, 0.2, 0.3, 0.5, 1.0), 10  # 200 recipes a seed


def rows(options) -> Iterator[dict]:
    """A row a task and way, each in a fresh process, so that its peak memory is its own."""
    count = options.runs
    yield from _against([apart("plan:plan", way, count) for way in ("build_segments", "hash every control array")])
    with tempfile.TemporaryDirectory(prefix="etastar-bench-") as folder:
        yield apart("plan:write", folder, count)
        ways = ("Store.table", "pandas.read_parquet of one file", "json.loads of every summary")
        yield from _against([apart("plan:open_table", folder, way) for way in ways])
        yield apart("plan:add", folder, count)


def _against(found: list[dict]) -> list[dict]:
    """Rows with their speed over the last one's, the reference: the least that any way has to do."""
    return [row | {"reference": found[-1]["way"], "ratio": found[-1]["seconds"] / row["seconds"]} for row in found]


def grid(count: int) -> list[Recipe]:
    """The first `count` recipes of a WSD grid: 5 cooldowns of each of 4 horizons leave the trunk of their rate and seed."""
    recipes = []
    for at in range(count):
        seed, rest = divmod(at, RATES * len(HORIZONS) * len(FRACTIONS))
        rate, rest = divmod(rest, len(HORIZONS) * len(FRACTIONS))
        steps, fraction = HORIZONS[rest // len(FRACTIONS)], FRACTIONS[rest % len(FRACTIONS)]
        schedule = WSD(warmup_steps=64, cooldown_fraction=fraction, shape="1-sqrt")
        recipes.append(Recipe(model=MODEL, corpus=CORPUS, optimizer=AdamW(), schedule=schedule, peak_lr=2.0 ** (rate / 2 - 9),
                              batch_tokens=BATCH_TOKENS, horizon_tokens=steps * BATCH_TOKENS, seed=seed, repeat=True))
    return recipes


def plan(way: str, count: int) -> dict:
    """Recipes to segments; the reference only names every recipe and hashes its rates once, which any plan must."""
    recipes, before = grid(count), peak_bytes("cpu")
    began = time.perf_counter()
    if way == "build_segments":
        segments = build_segments(recipes)
    else:
        segments = {recipe.run_id: hashlib.sha256(recipe.lr()).hexdigest() for recipe in recipes}
    seconds = time.perf_counter() - began
    steps = sum(s.stop - s.start for s in segments) if isinstance(segments, list) else sum(r.total_steps for r in recipes)
    return {"bench": "plan", "shape": "plan", "way": way, "recipes": count, "segments": len(segments), "steps": steps,
            "steps_without_sharing": sum(r.total_steps for r in recipes), "seconds": seconds, "ms_a_recipe": 1e3 * seconds / count,
            "peak_bytes": peak_bytes("cpu"), "own_bytes": peak_bytes("cpu") - before}


def write(folder: str, count: int) -> dict:
    """A store of finished runs with summaries as the engine writes them; their curves and models are left out."""
    store = Store(folder)
    store.prepare()
    began = time.perf_counter()
    for recipe in grid(count):
        _write_run(store, recipe)
    seconds = time.perf_counter() - began
    store.table().drop(columns="observed").to_parquet(Path(folder) / ".table.parquet")  # the reference of open_table
    return {"bench": "plan", "shape": "write", "way": "Store.write_run", "runs": count, "seconds": seconds,
            "ms_a_run": 1e3 * seconds / count}


def _write_run(store: Store, recipe: Recipe) -> None:
    lr = recipe.lr()
    curve = curve_frame(recipe, 0, lr, np.linspace(7, 4, len(lr)), np.ones(len(lr)), {})
    store.write_run(recipe, {}, summarize(recipe, curve, Observe(), CORPUS.vocab, 4.0))


def open_table(folder: str, way: str) -> dict:
    """A store's runs as a DataFrame; the references read the same files and no more, and one file that holds all rows."""
    before, began = peak_bytes("cpu"), time.perf_counter()
    if way == "Store.table":
        table = Store(folder).table()
    elif way.startswith("pandas"):
        table = pd.read_parquet(Path(folder) / ".table.parquet")
    else:
        table = [json.loads(path.read_bytes()) for path in Path(folder).glob("[!.]*/summary.json")]
    seconds = time.perf_counter() - began
    return {"bench": "plan", "shape": "open", "way": way, "runs": len(table), "seconds": seconds,
            "peak_bytes": peak_bytes("cpu"), "own_bytes": peak_bytes("cpu") - before}


def add(folder: str, count: int) -> dict:
    """One more run with all else in place: files written and files changed that were there before."""
    store, before, recipe = Store(folder), _files(folder), grid(count + 1)[-1]
    began = time.perf_counter()
    _write_run(store, recipe)
    seconds = time.perf_counter() - began
    after = _files(folder)
    return {"bench": "plan", "shape": "add", "way": "Store.write_run", "runs": count, "ms": 1e3 * seconds,
            "files_new": len(set(after) - set(before)), "files_changed": sum(after.get(path) != was for path, was in before.items())}


def _files(folder: str) -> dict[str, tuple]:
    """Every file with what changes when it is written."""
    found = ((path, path.stat()) for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (told.st_ino, told.st_size, told.st_mtime_ns) for path, told in found}
