"""A stack that does not fit is halved, and its runs are what they would have been."""

import torch

import etastar as es
from etastar.engine import worker
from tiny import recipe


def test_a_stack_too_large_is_halved_and_every_run_has_its_bits(tmp_path, monkeypatch):
    recipes, build, asked = [recipe(seed=i) for i in range(4)], worker._build, []

    def small_memory(recipe, observe, slots):
        asked.append(slots)
        if slots > 2:
            raise torch.cuda.OutOfMemoryError("made up")
        return build(recipe, observe, slots)

    alone = es.run(recipes, store=tmp_path / "alone", backend="inline", progress=False)
    monkeypatch.setattr(worker, "_build", small_memory)
    stacked = es.run(recipes, store=tmp_path / "stacked", backend="inline", slots=4, progress=False)
    assert asked == [4, 2] and [r.val_loss for r in stacked] == [r.val_loss for r in alone]
