"""Whole training steps of a stack, forward to update: every slot has the bits of the run alone, in any order, beside any neighbour."""

import pytest
import torch

from etastar.model.decoder import init_parameters, loss
from etastar.model.parametrization import numbers, scalars
from etastar.optim.adamw import StackedAdamW
from etastar.optim.stacked import Flat
from etastar.recipe import SP, AdamW, Model

MODEL, VOCAB, STEPS = Model(width=32, depth=2, head_dim=16, context=32, tied=False), 128, 32
SEEDS = range(8)


def trained(seeds, broken=None):
    """Final parameters (one row a seed) and losses (seeds, STEPS); the rate, decay and data of a run follow from its seed."""
    flat = Flat(numbers(SP(init_std=0.1), MODEL, VOCAB), len(seeds), "cpu")
    optimizer, params = StackedAdamW(flat), {name: view.requires_grad_() for name, view in flat.views(flat.data).items()}
    for slot, seed in enumerate(seeds):
        optimizer.configure(slot, AdamW(weight_decay=0.05 * seed, clip_norm=0.5 + seed))
        for name, initial in init_parameters(MODEL, VOCAB, SP(init_std=0.1), seed).items():
            params[name].detach()[slot].copy_(initial)
    alive, losses = torch.ones(len(seeds), dtype=torch.bool), []
    for step in range(1, STEPS + 1):
        tokens = torch.stack([torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(100 * seed + step))
                              for seed in seeds])
        loss_M = loss(params, tokens, MODEL, scalars(SP(), MODEL))
        grad = flat.like()
        for view, found in zip(flat.views(grad).values(), torch.autograd.grad(loss_M.sum(), list(params.values())), strict=True):
            view.copy_(found)
        if broken is not None and step > 5:
            grad[broken] = float("nan")
        alive &= optimizer.clip(grad).isfinite()
        optimizer.step(grad, torch.tensor([2.0 ** -(5 + seed % 4) for seed in seeds], dtype=torch.float64),
                       torch.full((len(seeds),), step), alive)
        losses.append(loss_M.detach())
    return flat.data.detach(), torch.stack(losses, dim=1)


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    runs = [trained([seed]) for seed in SEEDS]
    return torch.cat([params for params, _ in runs]), torch.cat([losses for _, losses in runs])


@pytest.mark.parametrize("order", [list(SEEDS), list(SEEDS)[::-1], [4, 1, 6]], ids=str)
def test_slots_have_the_bits_of_runs_alone_in_any_order(order, alone):
    params, losses = trained(order)
    assert torch.equal(params, alone[0][order]) and torch.equal(losses, alone[1][order])
    assert (losses[:, 0] - losses[:, -1]).abs().min() > 0


def test_a_slot_broken_on_the_way_stops_and_is_not_noticed(alone):
    params, losses = trained(list(SEEDS), broken=3)
    others = [seed for seed in SEEDS if seed != 3]
    assert torch.equal(params[others], alone[0][others]) and torch.equal(losses[others], alone[1][others])
    assert params[3].isfinite().all() and not torch.equal(params[3], alone[0][3])
