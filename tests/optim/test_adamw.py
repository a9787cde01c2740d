"""Stacked AdamW against torch.optim.AdamW, slot by slot, and a slot that has died."""

import dataclasses

import numpy as np
import pytest
import torch
from gradients import gradient

from etastar.model.parametrization import ParameterNumbers, numbers
from etastar.optim.adamw import StackedAdamW, in_force, turns
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


def schedules_of_beta2(steps=30):
    """One for each slot: the optimizer's own throughout, a change in the middle, two changes elsewhere."""
    own = [np.full(steps, option.beta2) for option in OPTIONS]
    own[1][13:] = 0.9
    own[2][5:], own[2][20:] = 0.999, 0.5
    return own


def step_as_told(optimizer, beta2_of_slots, step, grad, lr_M):
    """One step (counted from 1) at each slot's beta2 of that step, put in force where it changes."""
    for slot, beta2_S in enumerate(beta2_of_slots):
        if step - 1 in turns(beta2_S):
            optimizer.set_beta2(slot, *in_force(beta2_S, step - 1))
    optimizer.step(grad, lr_M, torch.full((len(lr_M),), step), torch.ones(len(lr_M), dtype=torch.bool))


def test_a_changed_beta2_is_corrected_by_the_product_of_all():
    """The reference is Algorithm 2 of arXiv 1711.05101, its 1 − beta2^t being one minus the product of the beta2 of all steps."""
    flat, optimizer = filled()
    beta2_of_slots, places = schedules_of_beta2(), [tensor.data_ptr() for tensor in optimizer.options.values()]
    p = {(slot, n): v[slot].clone() for slot in range(3) for n, v in flat.views(flat.data).items()}
    m, v = ({at: torch.zeros_like(t) for at, t in p.items()} for _ in range(2))
    for step in range(1, 31):
        grad = gradient(flat, step)
        for (slot, n), data in p.items():
            option, g, beta2 = OPTIONS[slot], flat.views(grad)[n][slot], beta2_of_slots[slot][step - 1]
            m[slot, n].mul_(option.beta1).add_(g, alpha=1 - option.beta1)
            v[slot, n].mul_(beta2).add_(g * g, alpha=1 - beta2)
            m_hat = m[slot, n] / (1 - option.beta1**step)
            v_hat = v[slot, n] / (1 - beta2_of_slots[slot][:step].prod())
            data.sub_(3e-3 * (m_hat / (v_hat.sqrt() + option.eps) + option.weight_decay * TABLE[n].decay_multiplier * data))
        step_as_told(optimizer, beta2_of_slots, step, grad, torch.full((3,), 3e-3, dtype=torch.float64))
    for (slot, n), data in p.items():
        torch.testing.assert_close(flat.views(flat.data)[n][slot], data, rtol=1e-6, atol=1e-6, msg=f"{slot} {n}")
    assert [tensor.data_ptr() for tensor in optimizer.options.values()] == places


def test_under_one_gradient_every_step_has_the_length_of_the_rate_whatever_beta2_does():
    """Both averages are that gradient's then, once corrected: the second moment's weights sum to one."""
    flat, optimizer = filled()
    for slot in range(3):
        optimizer.configure(slot, AdamW(weight_decay=0.0, beta2=OPTIONS[slot].beta2, clip_norm=None))
    flat.data.zero_()
    grad, rate = flat.like() - 0.25, 2.0**-7
    for step in range(1, 31):
        step_as_told(optimizer, schedules_of_beta2(), step, grad.clone(), torch.full((3,), rate, dtype=torch.float64))
        torch.testing.assert_close(flat.data, torch.full_like(flat.data, rate * step), rtol=1e-5, atol=0)


def test_what_is_in_force_by_hand():
    beta2_S = np.array([0.9, 0.9, 0.9, 0.99, 0.99, 0.9])
    assert turns(beta2_S) == [3, 5] and turns(np.full(4, 0.9)) == []
    assert [in_force(beta2_S, step) for step in (0, 2)] == [(0.9, 0, 1.0)] * 2
    assert [in_force(beta2_S, step) for step in (3, 4)] == [(0.99, 3, 0.9**3)] * 2
    assert [in_force(beta2_S, step) for step in (5, 6)] == [(0.9, 5, 0.9**3 * 0.99**2)] * 2


def test_a_slot_configured_again_has_forgotten_its_changes_and_its_neighbours_never_knew():
    (flat, optimizer), (calm, beside) = filled(), filled()
    optimizer.set_beta2(1, 0.5, since=7, carried=0.3)
    optimizer.configure(1, OPTIONS[1])
    optimizer.set_beta2(2, 0.5, since=7, carried=0.3)
    lr_M, alive_M = torch.full((3,), 1e-2, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    for step in (8, 9):
        for by in (optimizer, beside):
            by.step(gradient(flat, step), lr_M, torch.full((3,), step), alive_M)
    assert torch.equal(flat.data[:2], calm.data[:2]) and not torch.equal(flat.data[2], calm.data[2])


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
