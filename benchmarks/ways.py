"""The ways to train a shape, each as a function that trains some steps: same parameters, batches, rates and precision."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import plain, script, vmapped
from benchmarks.shapes import Shape, recipe_of
from etastar.cores import cores
from etastar.engine.execute import Sweep, default_layout
from etastar.engine.plan import build_segments
from etastar.engine.slots import SlotStack
from etastar.engine.store import Store
from etastar.model.decoder import init_parameters
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.text.batches import batch
from etastar.text.corpora import TokenSet, prepare

WAYS = {
    "cpu": ("engine", "engine_compiled", "plain", "plain_compiled", "vmap", "script"),
    "cuda": ("engine", "plain", "plain_compiled"),
}
DRIVEN = "way" in inspect.signature(SlotStack).parameters  # this engine can be told not to use a CUDA graph
Train = Callable[[int], np.ndarray]  # steps → losses (models, steps)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a way is spread over the machine; `slots` models are trained by each process."""

    processes: int
    threads: int
    slots: int = 1

    def __str__(self):
        return f"{self.processes}x{self.threads}"


def ways(names: list[str] | None, device: str) -> list[str]:
    """Ways by name, all of the device where none is named; ValueError for one that is not known."""
    known = WAYS[device] + (("engine_nograph",) if device == "cuda" and DRIVEN else ())
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown way {unknown[0]!r} on device {device}; known: {', '.join(known)}")
    return [name for name in known if name in (names or known)]


def layouts(way: str, shape: Shape, device: str) -> list[Layout]:
    """The engine's own layout; for what runs one after another, one thread and all of them: the better will count."""
    if way.startswith("engine"):
        return [engine_layout(shape, device)]
    if way == "vmap":
        return [Layout(1, cores(), slots=8 if shape.model.width < 128 else 4)]
    return [Layout(1, threads) for threads in sorted({1, cores()} if device == "cpu" else {1})]


def engine_layout(shape: Shape, device: str) -> Layout:
    """What the engine would do with a sweep of many runs of this shape."""
    recipes = [recipe_of(shape, device, seed=seed) for seed in range(256)]
    sweep = Sweep(tuple(recipes), {}, build_segments(recipes), frozenset(), Store("none"), Observe())
    processes, slots = default_layout(sweep, None, None)
    return Layout(processes, 1, max(slots.values()))


def compiles(way: str, device: str) -> bool:
    """Whether a way goes through torch.compile; the engine always does on a GPU."""
    return way.endswith("_compiled") or (device == "cuda" and way.startswith("engine"))


def build(way: str, shape: Shape, device: str, slots: int) -> Train:
    """Make everything ready to train in a way; model i has seed i, and so its own parameters and batches."""
    recipe = recipe_of(shape, device, compiled=compiles(way, device))
    tokens = prepare(recipe.corpus)
    if way.startswith("engine"):
        return _engine(recipe, tokens, slots, **({"way": "tables"} if way == "engine_nograph" else {}))
    if way == "vmap":
        return _vmap(recipe, tokens, slots)
    return _script(recipe, tokens) if way == "script" else _plain(recipe, tokens)


def _engine(recipe: Recipe, tokens: TokenSet, slots: int, **driven) -> Train:
    stack = SlotStack(recipe, tokens, slots, **driven)
    for slot in range(slots):
        stack.load(slot, recipe.replace(seed=slot), None)
    return lambda steps: stack.train(np.full((slots, steps), recipe.peak_lr))[0]


def _plain(recipe: Recipe, tokens: TokenSet) -> Train:
    step = plain.trainer(recipe, tokens.vocab, _initial(recipe, tokens, 0), recipe.execution.compiled)
    return _collecting(step(_batch(recipe, tokens, 0, i)) for i in itertools.count())


def _script(recipe: Recipe, tokens: TokenSet) -> Train:
    model, by = recipe.model, recipe.optimizer
    gpt = script.GPT(tokens.vocab, model.width, model.depth, model.heads, model.resolved_ffn_width, model.context)

    def get_batch(i):
        rows = _batch(recipe, tokens, 0, i)
        return rows[:, :-1], rows[:, 1:]

    return _collecting(script.train(plain.load(gpt, _initial(recipe, tokens, 0)), get_batch, recipe.peak_lr, by.weight_decay,
                                    (by.beta1, by.beta2), by.clip_norm))


def _vmap(recipe: Recipe, tokens: TokenSet, models: int) -> Train:
    step = vmapped.trainer(recipe, tokens.vocab, [_initial(recipe, tokens, seed) for seed in range(models)])
    return _collecting(step(torch.stack([_batch(recipe, tokens, seed, i) for seed in range(models)])) for i in itertools.count())


def _initial(recipe: Recipe, tokens: TokenSet, seed: int) -> dict[str, torch.Tensor]:
    return init_parameters(recipe.model, tokens.vocab, recipe.parametrization, seed)


def _batch(recipe: Recipe, tokens: TokenSet, data_seed: int, step: int) -> torch.Tensor:
    rows = torch.from_numpy(batch(tokens.train, recipe.model.context, data_seed, step, recipe.batch_sequences))
    return rows.to(recipe.execution.device, non_blocking=True)


def _collecting(losses) -> Train:
    """A trainer out of an endless iterator over the losses of steps; reading them at the end waits for a GPU."""

    def train(steps):
        return torch.stack(list(itertools.islice(losses, steps)), dim=-1).view(-1, steps).cpu().numpy()

    return train
