"""How many slots a GPU's stack gets: enough to keep it busy, as many as fit, never more than there is work for."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from etastar.engine.kernels import fix_workspace
from etastar.model.shapes import count_parameters, flops_per_token
from etastar.recipe import Execution, Model, Recipe

BUSY_FLOPS = 0.3e12  # of a pass: less, and a GPU waits for launches rather than for arithmetic (an H200 does it in 0.4 ms)
MOST_SLOTS = 64  # beyond, a batched product is slower for the same arithmetic
WIDE = 512  # units from which one run fills a GPU, and a batched product is slower than a plain one
MEMORY_SHARE = 0.8  # of the free memory; the rest is for the corpus, libraries and fragments

Stack = TypeVar("Stack")


def stack_slots(model: Model, vocab: int, batch_sequences: int, execution: Execution, segments: int, memory_bytes: int) -> int:
    """Slots of a stack on a GPU with so much free memory: the least that keeps it busy, at most 64, `segments`, and what fits.

    A pass is a micro-batch of every slot, forward and backward. From width 512 on it is 1 slot, which must fit.
    """
    if model.width >= WIDE:
        return 1
    tokens = (execution.micro_batch_sequences or batch_sequences) * model.context
    busy = -int(-BUSY_FLOPS // (tokens * flops_per_token(model, vocab)["exact"]))
    fit = int(MEMORY_SHARE * memory_bytes // slot_bytes(model, vocab, batch_sequences, execution))
    return max(1, min(busy, fit, MOST_SLOTS, segments))


def slot_bytes(model: Model, vocab: int, batch_sequences: int, execution: Execution) -> int:
    """Bytes of GPU memory a slot takes at the height of a pass.

    A parameter takes 16 (itself, two moments, the gradient, float32), 4 for the gradient as autograd hands it over, and 4 and `item`
    for the copies a product is made of: with the gain in it, and in the pass's precision (`item` bytes). A token takes, in every
    layer, two normalized streams (float32) and, in the pass's precision, the inputs of four products, queries, keys and values, what
    attention mixed, gate, up and their two outputs; at the end the last stream three times, and logits, probabilities and slopes.
    A mixture keeps gate, up and outputs, and its row before and after them, once for every expert of the token, and three float32 of
    the router for each there is; experts are taken to be used alike, for the rest is padding.
    """
    item, mixture = 2 if execution.precision == "bf16" else 4, model.mixture
    width, ffn, qkv = model.width, model.resolved_ffn_width, (model.heads + 2 * model.resolved_kv_heads) * model.head_dim
    a_parameter = 16 + 4 + 4 + item
    an_mlp = item * 4 * ffn if mixture is None else 12 * mixture.experts + item * mixture.experts_per_token * (4 * ffn + 2 * width)
    a_layer = 4 * 2 * width + item * (4 * width + qkv) + an_mlp
    a_token = model.depth * a_layer + 4 * 3 * width + 8 * vocab
    tokens = (execution.micro_batch_sequences or batch_sequences) * model.context
    return a_parameter * count_parameters(model, vocab)["total"] + a_token * tokens


def gpu_slots(recipes: Sequence[Recipe]) -> int:
    """Slots that suit every one of a sweep's segments, given by their recipes, on this machine's GPU as it is now."""
    if any(recipe.execution.deterministic for recipe in recipes):
        fix_workspace()  # asking for the free memory starts CUDA, after which it would be too late
    memory_bytes, _ = torch.cuda.mem_get_info()
    shapes = {(r.model, r.corpus.vocab, r.batch_sequences, r.execution) for r in recipes}
    return min(stack_slots(*shape, segments=len(recipes), memory_bytes=memory_bytes) for shape in shapes)


def verified(build: Callable[[int], Stack], slots: int) -> tuple[Stack, int]:
    """What `build` makes of `slots`, or of half as many after every torch.cuda.OutOfMemoryError, and how many it was.

    `build` should train a step of what it builds. The error of a single slot is raised.
    """
    while True:
        try:
            return build(slots), slots
        except torch.cuda.OutOfMemoryError:
            if slots == 1:
                raise
        slots //= 2  # out of the handler, whose traceback keeps the stack that was too large alive
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
