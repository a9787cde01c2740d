"""One optimizer step: StackedAdamW and StackedScion against torch.optim.AdamW in its three implementations, on the same shapes."""

import itertools
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.crew import apart
from benchmarks.rows import in_turns
from benchmarks.shapes import recipe_of, shapes
from etastar.model.decoder import init_parameters
from etastar.model.parametrization import numbers
from etastar.optim.adamw import StackedAdamW
from etastar.optim.scion import StackedScion
from etastar.optim.stacked import Flat
from etastar.recipe import Scion

SLOTS = (1, 8)
REFERENCE = "torch.optim.AdamW fused"
TURN_SECONDS = 0.1


def rows(options) -> Iterator[dict]:
    """A row a shape and way: milliseconds of a step and of a step of one model, on one thread as the engine's workers have."""
    for shape in shapes(options.shapes, options.device):
        yield from apart("optimizer:measure", shape.name, options.device, options.rounds)


def measure(shape_name: str, device: str, rounds: int) -> list[dict]:
    """All ways in turns; called in a one-thread process."""
    torch.set_num_threads(1)
    recipe = recipe_of(shapes([shape_name], device)[0], device)
    params = init_parameters(recipe.model, recipe.corpus.vocab, recipe.parametrization, 0)
    steps = {f"{kind.__name__} {slots} slot{'s' * (slots > 1)}": (slots, _ours(kind, optimizer, recipe, slots, device))
             for kind, optimizer in ((StackedAdamW, recipe.optimizer), (StackedScion, Scion())) for slots in SLOTS}
    for kind in ("for-loop", "foreach", "fused"):
        steps[f"torch.optim.AdamW {kind}"] = 1, _torch(recipe, params, kind, device)
    measured = in_turns({way: _timed(step, device) for way, (_, step) in steps.items()}, rounds)
    found = []
    for way, (slots, _) in steps.items():
        ratios = [slots * of / own for own, of in zip(measured[way], measured[REFERENCE], strict=True)]
        ms = statistics.median(measured[way])
        found.append({"bench": "optimizer", "shape": shape_name, "way": way, "slots": slots, "step_ms": ms, "step_ms_a_model": ms / slots,
                      "reference": REFERENCE, "ratio": statistics.median(ratios), "device": device, "precision": "fp32", "threads": 1,
                      "rounds": rounds})
    return found


def _ours(kind, options, recipe, slots: int, device: str):
    flat = Flat(numbers(recipe.parametrization, recipe.model, recipe.corpus.vocab), slots, device)
    optimizer = kind(flat)
    for slot in range(slots):
        optimizer.configure(slot, options)
    flat.data.normal_(std=0.02)
    grad_MxP = torch.randn_like(flat.data)
    lr_M = torch.full((slots,), recipe.peak_lr, dtype=torch.float64, device=device)
    step_M, alive_M = torch.zeros(slots, dtype=torch.int64, device=device), torch.ones(slots, dtype=torch.bool, device=device)

    def step():
        step_M.add_(1)
        optimizer.step(grad_MxP, lr_M, step_M, alive_M)

    return step


def _torch(recipe, params, kind: str, device: str):
    by, own = recipe.optimizer, [tensor.clone().to(device).requires_grad_() for tensor in params.values()]
    for tensor in own:
        tensor.grad = torch.randn_like(tensor)
    return torch.optim.AdamW(own, lr=recipe.peak_lr, betas=(by.beta1, by.beta2), eps=by.eps, weight_decay=by.weight_decay,
                             foreach=kind == "foreach", fused=kind == "fused").step


def _timed(step, device: str):
    """A function that gives milliseconds a step over about TURN_SECONDS."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()

    def turn() -> float:
        wait()
        began = time.perf_counter()
        for done in itertools.count(1):
            step()
            if done % 4 == 0 and time.perf_counter() - began > TURN_SECONDS:
                break
        wait()
        return 1e3 * (time.perf_counter() - began) / done

    return turn
