"""How fast this machine trains a shape: measured once in seconds with all workers busy, kept in the cache folder."""

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
from etastar.cores import cores
from etastar.engine.checkpoint import write_json
from etastar.engine.execute import Sweep, default_layout, disk_bytes, one_thread_environment
from etastar.engine.plan import Cost, build_segments, schedule_length
from etastar.engine.provenance import machine
from etastar.engine.slots import SlotStack, stack_key
from etastar.model.parametrization import flops_per_token
from etastar.recipe import Corpus, Recipe
from etastar.text.corpora import prepare
from etastar.values import digest

MEASURE_SECONDS = 3.0
START_SECONDS = 6.0  # a worker process imports torch and opens the corpus before its first step


def cost(sweep: Sweep, workers: int | None = None, slots: int | None = None, measure: bool = True) -> Cost:
    """What a sweep will take here; with `measure` the time too, from a few seconds of training each new shape."""
    segments = sweep.segments
    tokens = sum(s.tokens for s in segments)
    workers, slots = default_layout(sweep, workers, slots) if segments else (workers or cores(), 1)
    flops = sum(s.tokens * flops_per_token(s.recipe.model, s.recipe.corpus.vocab)["exact"] for s in segments)
    seconds = 0.0 if not segments else _seconds(sweep, workers, slots) if measure else None
    return Cost(runs=len({r.run_id for r in sweep.recipes}), done=len(sweep.finished), segments=len(segments),
                steps=sum(s.stop - s.start for s in segments), tokens=tokens,
                tokens_without_sharing=sum(r.horizon_tokens for r in sweep.missing.values()), flops=flops,
                disk_bytes=disk_bytes(segments), seconds=seconds, workers=workers)


def cost_without_corpus(recipes: list[Recipe]) -> Cost:
    """Counts and FLOPs of recipes whose corpus need not be here, no time: what a cluster's share would be."""
    stand_ins = [r.replace(corpus=Corpus("synthetic", vocab=r.corpus.vocab)) for r in recipes]
    segments = build_segments(stand_ins)
    tokens = sum(s.tokens for s in segments)
    flops = sum(s.tokens * flops_per_token(s.recipe.model, s.recipe.corpus.vocab)["exact"] for s in segments)
    return Cost(runs=len({r.run_id for r in stand_ins}), done=0, segments=len(segments), steps=sum(s.stop - s.start for s in segments),
                tokens=tokens, tokens_without_sharing=sum(r.horizon_tokens for r in {r.run_id: r for r in stand_ins}.values()),
                flops=flops, disk_bytes=disk_bytes(segments), seconds=None, workers=0)


def _seconds(sweep: Sweep, workers: int, slots: int) -> float:
    rates = {}
    for segment in sweep.segments:
        key = stack_key(segment.recipe)
        if key not in rates:
            rates[key] = measured(segment.recipe, workers, slots)
    seconds = {}
    for segment in sweep.segments:
        rate = rates[stack_key(segment.recipe)]
        seconds[segment.node.id] = (segment.stop - segment.start) * rate["step"] + bool(segment.ends) * rate["validation"] \
            + rate["write"]
    return START_SECONDS + schedule_length(sweep.segments, seconds, workers, slots)


def measured(recipe: Recipe, workers: int, slots: int) -> dict:
    """Seconds of a step, a validation and a segment's writing with `workers` processes busy at once; cached by shape."""
    path = Path(cache_folder()) / "speed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = digest(stack_key(recipe), workers, slots, machine()["torch"], machine()["cpu"], machine()["gpu"])
    if key not in known:
        config = json.dumps({"recipe": recipe.to_json(), "slots": slots})
        prepare(recipe.corpus)
        processes = [subprocess.Popen([sys.executable, "-m", "etastar.engine.speed", config], stdout=subprocess.PIPE, text=True,
                                      env=one_thread_environment()) for _ in range(workers)]
        told = [json.loads(process.communicate()[0]) for process in processes]
        known[key] = {name: float(np.mean([t[name] for t in told])) for name in told[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return known[key]


def _measure(recipe: Recipe, slots: int) -> dict:
    stack = SlotStack(recipe, prepare(recipe.corpus), slots)
    for slot in range(slots):
        stack.load(slot, dataclasses.replace(recipe, seed=slot), None)
    stack.train(np.full((slots, 5), 1e-4))
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < MEASURE_SECONDS:
        stack.train(np.full((slots, 5), 1e-4))
        steps += 5
    step = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    stack.validate(0)
    return {"step": step, "validation": time.perf_counter() - began, "write": 0.03}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    asked = json.loads(sys.argv[1])
    print(json.dumps(_measure(Recipe.from_json(asked["recipe"]), asked["slots"])))
    os._exit(0)
