"""The smallest recipes that still have two layers, several heads and something to learn."""

import contextlib
from unittest import mock

import pytest

from etastar.engine.execute import run
from etastar.engine.slots import SlotStack
from etastar.recipe import AdamW, Corpus, Model, Recipe
from etastar.schedules import WSD, Constant

MODEL = Model(width=32, depth=2, head_dim=16, context=32)
CORPUS = Corpus("synthetic", vocab=64, options=(("tokens", 200_000), ("validation_tokens", 8_192)))
BATCH = 4 * MODEL.context


def recipe(steps=24, peak_lr=2**-6, schedule=None, **changes) -> Recipe:
    given = dict(model=MODEL, corpus=CORPUS, optimizer=AdamW(), schedule=schedule or Constant(warmup_steps=4), peak_lr=peak_lr,
                 batch_tokens=BATCH, horizon_tokens=steps * BATCH, seed=0)
    return Recipe(**(given | changes))


def wsd(cooldown_steps=6, shape="linear") -> WSD:
    return WSD(warmup_steps=4, cooldown_steps=cooldown_steps, shape=shape)


def trained_alone(root, **options):
    """A function that gives the run of a recipe trained alone, from its first step, in a store of its own; once for each."""
    done = {}

    def alone(r: Recipe):
        if r.run_id not in done:
            (done[r.run_id],) = run([r], store=root / r.run_id, **options)
        return done[r.run_id]

    return alone


@contextlib.contextmanager
def interrupted_after(steps: int):
    """As if Ctrl-C came once the first slot has trained so many steps; what is run within must be stopped by it."""
    train = SlotStack.train

    def stopping(stack, lr_MxS):
        told = train(stack, lr_MxS)
        if stack.step_M[0] >= steps:
            raise KeyboardInterrupt
        return told

    with mock.patch.object(SlotStack, "train", stopping), pytest.raises(KeyboardInterrupt):
        yield


def counted(monkeypatch) -> list[int]:
    """How many steps each stretch has that stacks train from now on."""
    steps, train = [], SlotStack.train
    monkeypatch.setattr(SlotStack, "train", lambda stack, lr_MxS: (steps.append(lr_MxS.shape[1]), train(stack, lr_MxS))[1])
    return steps
