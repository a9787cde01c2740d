"""How many slots a GPU gets, by literal values; a stack that does not fit is halved until it does."""

import types

import pytest
import torch

from etastar.engine import layout
from etastar.engine.execute import default_layout
from etastar.engine.layout import slot_bytes, stack_slots, verified
from etastar.engine.slots import stack_key
from etastar.model.shapes import flops_per_token
from etastar.recipe import Execution, Model
from tiny import recipe

GB = 10**9
CUDA = Execution(device="cuda")
BF16 = Execution(device="cuda", precision="bf16")
SMALL, MIDDLE = Model(width=64, depth=2, head_dim=32, context=128), Model(width=128, depth=4, head_dim=64, context=256)


@pytest.mark.parametrize(("model", "vocab", "batch", "segments", "memory", "slots"), [
    (SMALL, 1024, 32, 1000, 140 * GB, 64),  # 287 models of 167k parameters would keep an H200 busy; 64 is the most
    (SMALL, 1024, 32, 5, 140 * GB, 5),  # no more than there is work
    (MIDDLE, 4096, 16, 1000, 140 * GB, 9),  # 8.7 MFLOP a token, 4096 tokens: 0.036 TFLOP a slot
    (MIDDLE, 4096, 16, 1000, 2 * GB, 5),  # no more than 80 % of the memory holds
    (MIDDLE, 4096, 64, 1000, 140 * GB, 3),  # larger batches keep it busy with fewer
    (MIDDLE, 4096, 16, 1000, 1000, 1),
    (Model(width=256, depth=6, head_dim=64, context=256), 4096, 64, 1000, 140 * GB, 1),
    (Model(width=512, depth=1, head_dim=64, context=8), 64, 1, 1000, 140 * GB, 1),  # wide: one run fills it
])
def test_slots_by_literal_values(model, vocab, batch, segments, memory, slots):
    assert stack_slots(model, vocab, batch, BF16, segments, memory) == slots


def test_a_pass_of_the_stack_reaches_the_busy_mark_and_one_slot_fewer_does_not():
    slots = stack_slots(MIDDLE, 4096, 16, BF16, 1000, 140 * GB)
    each = 16 * 256 * flops_per_token(MIDDLE, 4096)["exact"]
    assert slots * each >= 0.3e12 > (slots - 1) * each


def test_a_micro_batch_is_what_fills_a_pass():
    quarter = Execution(device="cuda", precision="bf16", micro_batch_sequences=4)
    assert stack_slots(MIDDLE, 4096, 16, quarter, 1000, 140 * GB) == stack_slots(MIDDLE, 4096, 4, BF16, 1000, 140 * GB) == 34
    assert slot_bytes(MIDDLE, 4096, 16, quarter) == slot_bytes(MIDDLE, 4096, 4, BF16)


@pytest.mark.parametrize(("execution", "parameter_bytes", "item"), [(BF16, 26, 2), (CUDA, 28, 4)], ids=["bf16", "fp32"])
def test_bytes_of_a_slot_by_hand(execution, parameter_bytes, item):
    """Width 64, two layers, feed-forward 176, vocabulary 1024; 32 sequences of 128 tokens."""
    parameters = 1024 * 64 + 2 * (2 * 64 + 192 * 64 + 64 * 64 + 352 * 64 + 64 * 176) + 64
    layer = 8 * 64 + item * (4 * 64 + 192 + 4 * 176)
    token = 2 * layer + 12 * 64 + 8 * 1024
    assert slot_bytes(SMALL, 1024, 32, execution) == parameter_bytes * parameters + 32 * 128 * token


def test_a_stack_that_does_not_fit_is_halved_until_it_does():
    asked = []

    def build(slots):
        asked.append(slots)
        if slots > 10:
            raise torch.cuda.OutOfMemoryError("too large")
        return f"stack of {slots}"

    assert verified(build, 64) == ("stack of 8", 8) and asked == [64, 32, 16, 8]


def test_what_does_not_fit_alone_and_what_is_no_lack_of_memory_is_raised():
    def full(slots):
        raise torch.cuda.OutOfMemoryError("too large")

    def broken(slots):
        raise RuntimeError("something else")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        verified(full, 5)
    with pytest.raises(RuntimeError, match="something else"):
        verified(broken, 5)


def test_a_sweep_on_a_gpu_is_one_process_with_slots_that_suit_each_shape(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (140 * GB, 141 * GB))

    def told(*shapes, count=40, asked=(None, None)):
        recipes = [recipe(model=m, batch_tokens=4096, horizon_tokens=40_960, execution=BF16) for m in shapes]
        made = types.SimpleNamespace(segments=[types.SimpleNamespace(recipe=r) for r in recipes for _ in range(count)], chosen={})
        return default_layout(made, *asked)

    wide = Model(width=512, depth=2, head_dim=64, context=128)
    small, large = (stack_key(recipe(model=m, batch_tokens=4096, horizon_tokens=40_960, execution=BF16)) for m in (SMALL, wide))
    assert told(SMALL) == (1, {small: 40})
    assert told(SMALL, count=100) == (1, {small: 64})
    assert told(SMALL, wide) == (1, {small: 40, large: 1})
    assert told(SMALL, wide, asked=(2, 7)) == (2, {small: 7, large: 7})


def test_determinism_is_arranged_before_the_free_memory_is_asked_for(monkeypatch):
    order = []
    monkeypatch.setattr(layout, "fix_workspace", lambda: order.append("workspace"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: order.append("memory") or (GB, GB))
    layout.gpu_slots([recipe(execution=Execution(device="cuda", deterministic=True))])
    layout.gpu_slots([recipe(execution=CUDA)])
    assert order == ["workspace", "memory", "memory"]
