"""A mixture of experts beside a dense model of the same active size: the engine's own steps of one slot, in turns, on one thread.

The dense MLP is as wide as all experts of a token together, so that the mixture has the same products but for its router, cut up.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.crew import apart
from benchmarks.rows import in_turns
from benchmarks.shapes import Shape, recipe_of, shapes
from etastar.engine.slots import SlotStack
from etastar.model.shapes import count_parameters, flops_per_token
from etastar.recipe import Mixture, Model, Recipe
from etastar.text.corpora import prepare

REFERENCE = "dense"
MIXTURES = ((4, 1), (4, 2), (8, 2), (8, 4))  # experts, and those of a token
TURN_SECONDS = 0.5


def rows(options) -> Iterator[dict]:
    """A row a shape and mixture: tokens/s, and the median over turns of its speed over the dense model's."""
    for shape in shapes(options.shapes, options.device):
        yield from apart("mixture:measure", shape.name, options.device, options.rounds, engine=True)


def measure(shape_name: str, device: str, rounds: int) -> list[dict]:
    """All mixtures of a shape and the dense model, in turns; called in a one-thread process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    (shape,) = shapes([shape_name], device)
    recipes = {REFERENCE: recipe_of(shape, device)} | {
        f"{each} of {experts}": recipe_of(shape, device, model=mixture_of(shape, experts, each)) for experts, each in MIXTURES}
    speeds = in_turns({way: _tokens_per_s(recipe) for way, recipe in recipes.items()}, rounds)
    return [_row(shape, way, recipe, speeds[way], speeds[REFERENCE]) | {"device": device, "threads": 1, "rounds": rounds}
            for way, recipe in recipes.items()]


def mixture_of(shape: Shape, experts: int, each: int) -> Model:
    """The shape's model with experts so wide that `each` of them are as wide as its MLP, or a little wider."""
    return dataclasses.replace(shape.model, ffn_width=-(-shape.model.resolved_ffn_width // each), mixture=Mixture(experts, each))


def _row(shape: Shape, way: str, recipe: Recipe, own: list[float], of: list[float]) -> dict:
    ratios, counts = [one / other for one, other in zip(own, of, strict=True)], count_parameters(recipe.model, shape.vocab)
    return {"bench": "mixture", "shape": shape.name, "way": way, "tokens_per_s": statistics.median(own), "reference": REFERENCE,
            "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios), "batch_tokens": shape.batch_tokens,
            "params_active": counts["active"], "params_total": counts["total"],
            "flops_per_token": flops_per_token(recipe.model, shape.vocab)["exact"], "precision": recipe.execution.precision}


def _tokens_per_s(recipe: Recipe) -> Callable[[], float]:
    """A function that trains for about TURN_SECONDS, at least a step, and gives tokens a second."""
    stack = SlotStack(recipe, prepare(recipe.corpus))
    stack.load(0, recipe, None)
    lr_1xS = np.full((1, 2), recipe.peak_lr)
    stack.train(lr_1xS)

    def turn() -> float:
        began, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - began < TURN_SECONDS:
            stack.train(lr_1xS)  # which hands losses back, and so has waited for a GPU
            steps += lr_1xS.shape[1]
        return steps * recipe.batch_tokens / (time.perf_counter() - began)

    return turn
