"""How fast this machine trains a shape: timed in seconds with all workers busy at once, kept in the cache folder."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from etastar.cache import cache_folder
from etastar.engine.checkpoint import write_json
from etastar.engine.environment import one_thread_environment
from etastar.engine.provenance import machine
from etastar.engine.slots import SlotStack, stack_key
from etastar.recipe import NUMERICS, Recipe
from etastar.text.corpora import prepare
from etastar.values import digest

MEASURE_SECONDS = 3.0
WRITE_SECONDS = 0.03  # a segment's state and curve to disk


def measured(recipe: Recipe, workers: int, slots: int) -> dict:
    """Seconds of a step, a validation and a segment's writing with `workers` processes busy at once; cached by shape."""
    return measured_ways([(recipe, slots)], workers)[0]


def measured_ways(ways: list[tuple[Recipe, int]], workers: int, seconds: float = MEASURE_SECONDS) -> list[dict]:
    """`measured` for several (recipe, slots) in one start of the processes; also "start", seconds to the first step's end."""
    path = Path(cache_folder()) / "speed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    here = machine()
    about = workers, here["torch"], here["cpu"], here["gpu"], NUMERICS
    keys = [digest(stack_key(r.replace(lr_ratios=(1.0, 1.0, 1.0))), slots, *about) for r, slots in ways]  # ratios take no time
    new = {key: way for key, way in zip(keys, ways, strict=True) if key not in known}
    if new:
        for recipe, _ in ways:
            prepare(recipe.corpus)
        found = _run(list(new.values()), workers, seconds)
        known |= dict(zip(new, found, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return [known[key] for key in keys]


def _run(ways, workers, seconds) -> list[dict]:
    """Means over `workers` processes that go through the ways side by side."""
    config = json.dumps({"ways": [[recipe.to_json(), slots] for recipe, slots in ways], "seconds": seconds})
    environment = one_thread_environment(cache_folder() / "compiled")
    processes = [subprocess.Popen([sys.executable, "-m", "etastar.engine.measure", config], stdout=subprocess.PIPE, text=True,
                                  env=environment) for _ in range(workers)]
    told = [json.loads(process.communicate()[0]) for process in processes]
    return [{name: float(np.mean([each[i][name] for each in told])) for name in told[0][i]} for i in range(len(ways))]


def _measure(recipe: Recipe, slots: int, seconds: float) -> dict:
    began = time.perf_counter()
    stack = SlotStack(recipe, prepare(recipe.corpus), slots)
    for slot in range(slots):
        stack.load(slot, dataclasses.replace(recipe, seed=slot), None)
    stack.train(np.full((slots, 1), 1e-4))
    start = time.perf_counter() - began
    stack.train(np.full((slots, 4), 1e-4))
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        stack.train(np.full((slots, 2), 1e-4))
        steps += 2
    step = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    stack.validate(0)
    return {"start": start, "step": step, "validation": time.perf_counter() - began, "write": WRITE_SECONDS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    asked = json.loads(sys.argv[1])
    print(json.dumps([_measure(Recipe.from_json(recipe), slots, asked["seconds"]) for recipe, slots in asked["ways"]]))
    sys.stdout.flush()
    os._exit(0)
