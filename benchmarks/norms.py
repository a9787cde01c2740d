"""Operator norms: what logging them costs beside a training step, and one spectral norm by each way of working it out."""

import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.crew import apart
from benchmarks.rows import in_turns
from benchmarks.shapes import recipe_of, shapes
from etastar.engine.norm_log import slot_norms
from etastar.engine.slots import SlotStack
from etastar.model.spectral import EXACT_SIZE, gram, spectral_bracket
from etastar.recipe import Model
from etastar.text.corpora import prepare

REFERENCE = "torch.linalg.matrix_norm"
SIZES = (64, 256, 512, 1024)  # rows and columns of single matrices
SHARE = 0.02  # of step time that logging may take
TURN_SECONDS = 0.1


def rows(options) -> Iterator[dict]:
    """A row a shape and normalization: a step, a logging, and the steps between loggings at which it takes 2 %; then single matrices."""
    for shape in shapes(options.shapes, options.device):
        yield from apart("norms:logging", shape.name, options.device, options.rounds)
    for size in SIZES:
        yield from apart("norms:matrix", size, options.device, options.rounds)


def logging(shape_name: str, device: str, rounds: int) -> list[dict]:
    """The engine's own step and logging of one slot, in turns, one thread; the reference logs the same by singular values."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = recipe_of(shapes([shape_name], device)[0], device)
    stack = SlotStack(recipe, prepare(recipe.corpus))
    stack.load(0, recipe, None)
    ways = {"step": lambda: stack.train(np.full((1, 1), recipe.peak_lr)), "logging": lambda: slot_norms(stack, [0]),
            REFERENCE: lambda: _by_singular_values(stack.params, recipe.model)}
    measured = in_turns({way: _timed(call, device) for way, call in ways.items()}, rounds)
    us = {way: statistics.median(found) for way, found in measured.items()}
    apart_at_2_percent = math.ceil(us["logging"] / (SHARE * us["step"]))
    ratios = [of / own for own, of in zip(measured["logging"], measured[REFERENCE], strict=True)]
    return [{"bench": "norms", "shape": shape_name, "width": recipe.model.width, "depth": recipe.model.depth,
             "step_us": us["step"], "logging_us": us["logging"],
             "steps_apart_at_2_percent": apart_at_2_percent, "reference": REFERENCE, "ratio": statistics.median(ratios),
             "device": device, "threads": 1, "rounds": rounds}]


def matrix(size: int, device: str, rounds: int) -> list[dict]:
    """One spectral norm: what the package chooses, the same from the last vector of a slightly other matrix, and the reference."""
    torch.set_num_threads(1)
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    moved, start = w + 1e-3 * torch.randn(size, size).to(device), spectral_bracket(w).vector
    ways = {"bracket": lambda: spectral_bracket(moved), "bracket, started": lambda: spectral_bracket(moved, start=start),
            "all eigenvalues": lambda: torch.linalg.eigvalsh(gram(moved)), REFERENCE: lambda: torch.linalg.matrix_norm(moved, 2)}
    if start is None:  # small enough for all eigenvalues, which have no start
        ways = {way: ways[way] for way in ("bracket", REFERENCE)}
    found = spectral_bracket(moved)
    measured = in_turns({way: _timed(call, device) for way, call in ways.items()}, rounds)
    return [{"bench": "spectral", "shape": f"{size}²", "way": way, "us": statistics.median(us),
             "bound": float(found.high / found.low - 1) if way == "bracket" else None, "reference": REFERENCE,
             "ratio": statistics.median(of / own for own, of in zip(us, measured[REFERENCE], strict=True)),
             "exact_up_to": EXACT_SIZE.get(device), "device": device, "threads": 1, "rounds": rounds} for way, us in measured.items()]


@torch.no_grad()
def _by_singular_values(params: dict[str, torch.Tensor], model: Model) -> float:
    """The hidden norm as most would log it, all matrices apart; the two tables cost little either way."""
    parts = [part for name, w in params.items() if w.ndim == 3 and name.startswith("layers")
             for part in w[0].split({"qkv": model.width, "gate_up": model.resolved_ffn_width}.get(name.split(".")[-1], w.shape[1]))]
    return max(float(torch.linalg.matrix_norm(w, 2)) * math.sqrt(w.shape[1] / w.shape[0]) for w in parts)


def _timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that gives microseconds a call over about TURN_SECONDS."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()

    def turn() -> float:
        wait()
        began = time.perf_counter()
        calls = 0
        while time.perf_counter() - began < TURN_SECONDS:
            call()
            calls += 1
        wait()
        return 1e6 * (time.perf_counter() - began) / calls

    return turn
