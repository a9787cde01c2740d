"""Training speed, one JSON row a way and shape: the engine's stack against a plain module, measured in turns in one process.

    python benchmarks/train.py [--shapes XS S] [--ways engine plain engine_compiled plain_compiled] [--slots 1] [--processes 1]

`tokens_per_s` is the median over rounds of one process, `best_tokens_per_s` the best round; `gemm_gflops` is what a 1024³ matrix
product reaches in the same process. With --processes N, N of them run at once and each prints its rows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from plain import trainer

from etastar.engine.slots import SlotStack
from etastar.model.parametrization import flops_per_token
from etastar.recipe import SP, AdamW, Corpus, Execution, Model, Recipe
from etastar.schedules import Constant
from etastar.text.batches import batch
from etastar.text.corpora import prepare

SHAPES = {  # model, vocabulary, tokens a step
    "XS": (Model(width=32, depth=2, head_dim=16, context=64, tied=False), 512, 2048),
    "S": (Model(width=64, depth=2, head_dim=32, context=64, tied=False), 1024, 1024),
    "M": (Model(width=128, depth=4, head_dim=32, context=128, tied=False), 1024, 4096),
}


def engine_stepper(recipe, tokens, slots):
    """Trains `steps` steps of a stack."""
    stack = SlotStack(recipe, tokens, slots)
    for slot in range(slots):
        stack.load(slot, recipe.replace(seed=slot), None)
    return lambda steps: stack.train(np.full((slots, steps), 1e-3))


def plain_stepper(recipe, tokens, compiled):
    """Trains `steps` steps of a plain module on the same batches."""
    step, device, done = trainer(recipe.model, tokens.vocab, compiled, recipe.execution.device), recipe.execution.device, [0]

    def train(steps):
        for _ in range(steps):
            rows = batch(tokens.train, recipe.model.context, 0, done[0], recipe.batch_sequences)
            step(torch.from_numpy(rows).to(device))
            done[0] += 1

    return train


def measure(shape, ways, slots, device, rounds, round_seconds=0.25):
    """Rows of one shape; ways take turns, so that whatever else the machine does hits all alike."""
    model, vocab, batch_tokens = SHAPES[shape]
    corpus = Corpus("synthetic", vocab=vocab, options=(("tokens", 2_000_000), ("validation_tokens", 65_536)))
    recipe = Recipe(model=model, corpus=corpus, optimizer=AdamW(), schedule=Constant(), peak_lr=1e-3, batch_tokens=batch_tokens,
                    horizon_tokens=batch_tokens, parametrization=SP(init_std=0.1), execution=Execution(device=device))
    tokens, trainers, rows = prepare(corpus), {}, {}
    for way in ways:
        compiled = way.endswith("_compiled")
        began = time.perf_counter()
        if way.startswith("engine"):
            trainers[way] = engine_stepper(recipe.replace(execution=Execution(device=device, compiled=compiled)), tokens, slots)
        else:
            trainers[way] = plain_stepper(recipe, tokens, compiled)
        trainers[way](2)
        rows[way] = {"compile_s": round(time.perf_counter() - began, 1) if compiled else 0.0, "speeds": []}
    product, gemm = torch.randn(1024, 1024, device=device), []
    steps = {way: max(1, round(round_seconds / timed(train, 3, device) * 3)) for way, train in trainers.items()}
    for _ in range(rounds):
        for way, train in trainers.items():
            of = slots if way.startswith("engine") else 1
            rows[way]["speeds"].append(of * batch_tokens * steps[way] / timed(train, steps[way], device))
        gemm.append(2 * 1024**3 / timed(lambda _: product @ product, 1, device) / 1e9)
    flops = flops_per_token(model, vocab)["exact"]
    for way, row in rows.items():
        speeds = row.pop("speeds")
        median = statistics.median(speeds)
        yield {"bench": "train", "shape": shape, "way": way, "slots": slots if way.startswith("engine") else 1, "device": device,
               "precision": "fp32", "tokens_per_s": round(median), "best_tokens_per_s": round(max(speeds)),
               "gflops": round(median * flops / 1e9, 1), "gemm_gflops": round(statistics.median(gemm), 1),
               "peak_bytes": peak_bytes(device)} | row


def timed(train, steps, device) -> float:
    """Seconds of a call, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    train(steps)
    wait()
    return time.perf_counter() - began


def peak_bytes(device) -> int:
    """Most memory so far: the GPU's, or the process's own."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["XS", "S"])
    parser.add_argument("--ways", nargs="+", default=["engine", "plain"],
                        choices=["engine", "plain", "engine_compiled", "plain_compiled"])
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.processes > 1:
        command = [sys.executable, *sys.argv, "--processes", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        sys.exit(max(p.wait() for p in [subprocess.Popen(command, env=environment) for _ in range(args.processes)]))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in args.shapes:
        for row in measure(name, args.ways, args.slots, args.device, args.rounds):
            print(json.dumps(row), flush=True)
