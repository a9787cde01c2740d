"""Stacked AdamW against torch.optim.AdamW, slot by slot, and a slot that has died."""

import dataclasses

import pytest
import torch
from gradients import gradient

from etastar.model.parametrization import ParameterNumbers, numbers
from etastar.optim.adamw import StackedAdamW
from etastar.optim.stacked import ALIGN, Flat
from etastar.recipe import SP, AdamW, Model

MODEL = Model(width=16, depth=1, head_dim=8, context=8)
TABLE = numbers(SP(), MODEL, 20)
OPTIONS = [AdamW(weight_decay=0.1, clip_norm=1.0), AdamW(weight_decay=0.0, beta1=0.8, beta2=0.999, clip_norm=None),
           AdamW(weight_decay=0.5, eps=1e-6, clip_norm=0.2)]


def filled(slots=3, seed=0):
    flat = Flat(TABLE, slots, "cpu")
    gen = torch.Generator().manual_seed(seed)
    for view in flat.views(flat.data).values():
        view.copy_(torch.randn(view.shape, generator=gen))
    optimizer = StackedAdamW(flat)
    for slot, option in enumerate(OPTIONS[:slots]):
        optimizer.configure(slot, option)
    return flat, optimizer


@pytest.mark.parametrize("clipped", [False, True], ids=["bit for bit", "clipped"])
def test_every_slot_is_torchs_adamw_step_for_step(clipped):
    flat, optimizer = filled()
    options = [option if clipped else dataclasses.replace(option, clip_norm=None) for option in OPTIONS]
    solo = []
    for slot, option in enumerate(options):
        optimizer.configure(slot, option)
        params = {n: v[slot].clone().requires_grad_() for n, v in flat.views(flat.data).items()}
        groups = [{"params": [p for n, p in params.items() if TABLE[n].decay_multiplier == m], "weight_decay": m * option.weight_decay}
                  for m in (0.0, 1.0)]
        solo.append((params, torch.optim.AdamW(groups, lr=1.0, betas=(option.beta1, option.beta2), eps=option.eps, foreach=False)))
    for step in range(1, 221):
        grad = gradient(flat, step)
        views = flat.views(grad)
        lr_M = torch.tensor([1e-2 / step, 3e-3, 1e-3 * (step % 5)], dtype=torch.float64)
        for slot, (params, reference) in enumerate(solo):
            for name, p in params.items():
                p.grad = views[name][slot].clone()
            if options[slot].clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), options[slot].clip_norm)
            for group in reference.param_groups:
                group["lr"] = float(lr_M[slot])
            reference.step()
        optimizer.clip(grad)
        optimizer.step(grad, lr_M, torch.full((3,), step), torch.ones(3, dtype=torch.bool))
    for slot, (params, _) in enumerate(solo):
        for name, view in flat.views(flat.data).items():
            near = dict(rtol=1e-6, atol=1e-6) if clipped else dict(rtol=0, atol=0)  # the norm is summed in another order
            torch.testing.assert_close(view[slot], params[name].detach(), **near, msg=f"{slot} {name}")


def test_multipliers_of_a_parameter_are_those_of_its_own_torch_group():
    table = {"a": ParameterNumbers("hidden", (3, 5), 1.0, 0.5, 2.0, 4.0), "b": ParameterNumbers("norm", (7,), None, 1.0, 0.0),
             "c": ParameterNumbers("hidden", (2, 2), 1.0, 0.5, 2.0, 4.0)}
    flat = Flat(table, 1, "cpu")
    assert [(stop - start, row.role) for start, stop, row in flat.groups] == [(2 * ALIGN, "hidden"), (ALIGN, "norm")]
    optimizer, option = StackedAdamW(flat), AdamW(weight_decay=0.3, eps=1e-3, clip_norm=None)
    optimizer.configure(0, option)
    views = flat.views(flat.data)
    for view in views.values():
        view.normal_()
    params = {name: view[0].clone().requires_grad_() for name, view in views.items()}
    reference = torch.optim.AdamW([{"params": [p], "lr": 0.01 * table[n].lr_multiplier, "eps": 1e-3 * table[n].eps_multiplier,
                                    "weight_decay": 0.3 * table[n].decay_multiplier} for n, p in params.items()],
                                  betas=(option.beta1, option.beta2), foreach=False)
    for step in range(1, 6):
        grad = gradient(flat, step)
        for name, view in flat.views(grad).items():
            params[name].grad = view[0].clone()
        reference.step()
        optimizer.step(grad, torch.tensor([0.01], dtype=torch.float64), torch.tensor([step]), torch.tensor([True]))
    for name, view in views.items():
        torch.testing.assert_close(view[0], params[name].detach(), rtol=1e-6, atol=1e-7)


def test_clip_returns_torchs_norm_and_scales_only_what_is_too_long():
    flat, optimizer = filled()
    grad = gradient(flat, 3)
    before = grad.clone()
    norms = optimizer.clip(grad)
    for slot in range(3):
        one = [v[slot].clone().requires_grad_() for v in flat.views(before).values()]
        for p in one:
            p.grad = p.detach().clone()
        limit = OPTIONS[slot].clip_norm
        told = torch.nn.utils.clip_grad_norm_(one, float("inf") if limit is None else limit)
        assert float(norms[slot]) == pytest.approx(float(told), rel=1e-6)
        for p, view in zip(one, flat.views(grad).values(), strict=True):
            torch.testing.assert_close(view[slot], p.grad, rtol=1e-6, atol=0)
    assert torch.equal(grad[1], before[1])


def test_a_dead_slot_keeps_every_bit_and_its_neighbours_do_not_notice():
    (flat, optimizer), (calm, beside) = filled(), filled()
    for step in range(1, 6):
        grad = gradient(flat, step)
        wild = grad.clone()
        wild[1] = float("nan")
        frozen = flat.data[1].clone()
        alive = torch.tensor([True, False, True])
        lr = torch.full((3,), 1e-2, dtype=torch.float64)
        optimizer.clip(wild), beside.clip(grad)
        optimizer.step(wild, lr, torch.full((3,), step), alive)
        beside.step(grad, lr, torch.full((3,), step), torch.ones(3, dtype=torch.bool))
        assert torch.equal(flat.data[1], frozen) and torch.isfinite(optimizer.m_MxP).all()
    for slot in (0, 2):
        assert torch.equal(flat.data[slot], calm.data[slot]) and torch.equal(optimizer.v_MxP[slot], beside.v_MxP[slot])


def test_parameters_lie_on_aligned_places_and_views_share_memory():
    flat, _ = filled()
    assert all(a % ALIGN == 0 for a, _ in flat.spans.values()) and flat.data.shape[1] % ALIGN == 0
    views = flat.views(flat.data)
    views["embedding"][1, 0, 0] = 42.0
    assert flat.data[1, flat.spans["embedding"][0]] == 42.0
    assert {n: tuple(v.shape[1:]) for n, v in views.items()} == {n: row.shape for n, row in TABLE.items()}


def test_no_decay_where_the_table_says_none():
    flat, optimizer = filled(slots=1)
    before = {n: v.clone() for n, v in flat.views(flat.data).items()}
    optimizer.step(flat.like(), torch.tensor([0.1], dtype=torch.float64), torch.tensor([1]), torch.tensor([True]))
    for name, view in flat.views(flat.data).items():
        shrink = 1 - 0.1 * 0.1 * TABLE[name].decay_multiplier
        torch.testing.assert_close(view, before[name] * shrink)
