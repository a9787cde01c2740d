"""Averages of a stack against torch.optim.swa_utils over real training steps, and what keeps them right in slots that come and go."""

import math

import numpy as np
import pytest
import torch
from torch.optim import swa_utils

from etastar.engine.slots import SlotStack
from etastar.observe import Observe, step_of_window
from etastar.optim.averaging import StackedAverages, compose, ema_decay
from etastar.optim.stacked import Flat
from etastar.recipe import AdamW, ScheduleFreeAdamW
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, recipe

STEPS, EVERY = 15, 5
OBSERVE = Observe(ema_horizon_tokens=(3 * BATCH, 40 * BATCH), average_every_tokens=EVERY * BATCH)


class Weights(torch.nn.Module):
    """A module of given parameters, as torch's AveragedModel takes it."""

    def __init__(self, params):
        super().__init__()
        self.put(params)

    def put(self, params):
        self.held = torch.nn.ParameterList([params[name].clone() for name in sorted(params)])
        return self


def stack_of(optimizer, slots=2, **given):
    stack = SlotStack(recipe(optimizer=optimizer), prepare(CORPUS), slots, observe=OBSERVE, **given)
    for slot in range(slots):
        stack.load(slot, recipe(optimizer=optimizer, seed=slot), None)
    return stack


def held(stack, name, slot):
    views = stack.flat.views(stack.averages.buffers[name])
    return [views[parameter][slot] for parameter in sorted(views)]


@pytest.mark.parametrize("optimizer", [AdamW(), ScheduleFreeAdamW()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("way", ["host", "tables"])
def test_ema_and_window_means_are_torchs_over_real_steps(optimizer, way):
    stack = stack_of(optimizer, way=way)
    emas = {f"ema-{tokens}": ema_decay(tokens, BATCH) for tokens in OBSERVE.ema_horizon_tokens}
    torchs = {name: swa_utils.AveragedModel(Weights(stack.weights(1)), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
              for name, decay in emas.items()}
    for step in range(1, STEPS + 1):
        stack.train(np.full((2, 1), 2**-6))
        now = Weights(stack.weights(1))
        if (step - 1) % EVERY == 0:
            torchs["mean"] = swa_utils.AveragedModel(now, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
            plain = swa_utils.AveragedModel(now, avg_fn=swa_utils.get_swa_avg_fn())
        for average in (*torchs.values(), plain):
            average.update_parameters(now)
        for name, average in torchs.items():
            for ours, theirs in zip(held(stack, name, 1), average.module.held, strict=True):
                assert torch.equal(ours, theirs), (name, step)
        for ours, theirs in zip(held(stack, "mean", 1), plain.module.held, strict=True):  # the same mean, rounded in another order
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
        assert step == 1 or not torch.equal(held(stack, "ema-384", 1)[0], now.held[0])


def test_windows_compose_to_the_mean_over_all_their_steps_however_long_each_is():
    stack, seen, parts = stack_of(AdamW(), 1), [], []
    for step in range(1, STEPS + 1):
        stack.train(np.full((1, 1), 2**-6))
        seen.append(stack.weights(0))
        if step % EVERY == 0:
            parts.append(stack.window_mean(0))
    swa = swa_utils.AveragedModel(Weights(seen[5]), avg_fn=swa_utils.get_swa_avg_fn())
    for weights in seen[5:]:
        swa.update_parameters(Weights(weights))
    for (name, ours), theirs in zip(sorted(compose(parts[1:], [5, 5]).items()), swa.module.held, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7, msg=name)
    uneven = compose([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [1, 2])
    assert uneven["w"].tolist() == [3.0]
    assert all(torch.equal(t, parts[0][name]) for name, t in compose(parts[:1], [5]).items())


@pytest.mark.parametrize("every", [1, 63, 64, 65, 200, 1000])
def test_a_step_knows_its_place_in_its_window(every):
    observe, place = Observe(average_every_tokens=every), 0
    for step in range(1, 60):
        place += 1
        assert step_of_window(step, 64, every) == place
        place = 0 if observe.window_due(step, 64) else place
    steps = torch.arange(1, 60)
    assert step_of_window(steps, 64, every).tolist() == [step_of_window(step, 64, every) for step in steps.tolist()]
    assert observe.window_ends(59, 64) == [step for step in range(1, 60) if step * 64 // every > (step - 1) * 64 // every]


def test_a_dead_slots_averages_keep_every_bit_and_a_slot_loaded_again_starts_anew():
    stack, fresh = stack_of(AdamW()), stack_of(AdamW())
    places = [buffer.data_ptr() for buffer in stack.averages.buffers.values()]
    stack.train(np.full((2, 3), 2**-6))
    stack.train(np.array([[np.inf], [2**-6]]))  # leaves slot 0 with weights that are no numbers
    broken = {name: buffer[0].clone() for name, buffer in stack.averages.buffers.items()}
    stack.train(np.full((2, 3), 2**-6))
    assert [stack.is_alive(slot) for slot in (0, 1)] == [False, True]
    for name, buffer in stack.averages.buffers.items():
        assert torch.equal(buffer[0].nan_to_num(7.0), broken[name].nan_to_num(7.0)) and buffer[1].isfinite().all()
    stack.load(0, recipe(seed=0), None)
    for made in (stack, fresh):
        made.train(np.full((2, 4), 2**-6))
    for name, buffer in stack.averages.buffers.items():
        assert torch.equal(buffer[0], fresh.averages.buffers[name][0]) and buffer[0].isfinite().all()
    assert [buffer.data_ptr() for buffer in stack.averages.buffers.values()] == places


def test_averages_go_on_from_a_state_with_the_same_bits():
    straight, first, second = stack_of(AdamW(), 1), stack_of(AdamW(), 1), stack_of(AdamW(), 3)
    straight.train(np.full((1, 8), 2**-6))
    first.train(np.full((1, 3), 2**-6))
    second.load(2, recipe(seed=0), first.state(0))
    second.train(np.full((3, 5), 2**-6))
    for name, buffer in straight.averages.buffers.items():
        assert torch.equal(buffer[0], second.averages.buffers[name][2])


def test_an_update_leaves_a_masked_slot_alone_whatever_its_weights_are():
    flat = Flat(stack_of(AdamW(), 1).flat.table, 2, "cpu")
    averages = StackedAverages(flat, OBSERVE, BATCH)
    averages.update(flat.like() + 1, torch.tensor([1, 1]), torch.tensor([True, True]))
    broken = flat.like()
    broken[0], broken[1] = float("nan"), 3.0
    averages.update(broken, torch.tensor([1, 2]), torch.tensor([False, True]))
    assert (averages.buffers["mean"][0] == 1).all() and (averages.buffers["mean"][1] == 2).all()
    assert averages.buffers["ema-384"][1, 0] == pytest.approx(1 + 2 * (1 - math.exp(-1 / 3)))
