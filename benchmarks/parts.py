"""Where the engine's time goes: the parts of a step, a validation and a checkpoint, on one process."""

import statistics
import time

import numpy as np
import torch

from benchmarks.rows import in_turns
from benchmarks.shapes import recipe_of, shapes
from benchmarks.ways import compiles, engine_layout
from etastar.engine.checkpoint import state_tensors, tensor_bytes
from etastar.engine.kernels import kernels
from etastar.engine.slots import SlotStack
from etastar.text.corpora import prepare

REPEATS, ENOUGH_MS = 8, 200  # calls a round and part: so many, fewer where they are slow


def parts(shape_name: str, device: str, rounds: int) -> list[dict]:
    """A row a part with its median milliseconds; `of_step` is its share of a whole step. Called in a one-thread process."""
    shape = shapes([shape_name], device)[0]
    recipe, slots = recipe_of(shape, device, compiled=compiles("engine", device)), engine_layout(shape, device).slots
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    stack = SlotStack(recipe, prepare(recipe.corpus), slots)
    for slot in range(slots):
        stack.load(slot, recipe.replace(seed=slot), None)
    calls = _calls(stack, recipe)
    timed = {name: _timed(*call, device) for name, call in calls.items()}
    for call in timed.values():
        call()
    measured = in_turns(timed, rounds)
    step_ms = statistics.median(measured["step"])
    return [{"bench": "part", "shape": shape_name, "part": name, "ms": statistics.median(ms), "of_step": statistics.median(ms) / step_ms,
             "slots": slots, "device": device, "precision": recipe.execution.precision, "rounds": rounds}
            for name, ms in measured.items()]


def _calls(stack: SlotStack, recipe) -> dict:
    """(what to prepare, what to time) of each part, in the engine's own functions; `step` is all from data to optimizer."""
    lr_M = torch.full((stack.slots,), recipe.peak_lr, dtype=torch.float64, device=stack.device)
    rates_Mx1 = np.full((stack.slots, 1), recipe.peak_lr)
    tokens, params = stack._batches([0] * stack.slots), list(stack.params.values())

    def forward(_=None):
        bf16, sequences = recipe.execution.precision == "bf16", stack.slots * stack.micro_batch
        precision = torch.autocast(stack.device.type, torch.bfloat16, enabled=bf16)
        with kernels(recipe.execution, stack.model, sequences, stack.device), precision:
            return stack.objective(stack.params, tokens, stack.model, stack.scalars, stack.z_loss)[0].sum()

    def optimizer(_):
        stack.optimizer.clip(stack.grad_MxP)
        stack.optimizer.step(stack.grad_MxP, lr_M, stack.step_M, stack.alive_M)

    return {
        "step": (None, lambda _: stack.train(rates_Mx1)),
        "data": (stack.step_M.tolist, stack._batches),
        "forward": (None, forward),
        "backward": (forward, lambda loss: torch.autograd.grad(loss, params)),
        "optimizer": (None, optimizer),
        "validation": (None, lambda _: stack.validate(0)),
        "checkpoint": (None, lambda _: tensor_bytes(state_tensors(*stack.state(0)))),
    }


def _timed(prepare, call, device: str):
    """A function that gives the median milliseconds of a few calls; preparing is not timed."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def once() -> float:
        given = prepare and prepare()
        wait()
        began = time.perf_counter()
        call(given)
        wait()
        return 1e3 * (time.perf_counter() - began)

    def several() -> float:
        ms = [once()]
        while len(ms) < REPEATS and sum(ms) < ENOUGH_MS:
            ms.append(once())
        return statistics.median(ms)

    return several
