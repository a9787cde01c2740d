"""Stacked Schedule-Free AdamW against the package of its authors, slot by slot; and whole runs, which are validated at x."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradients import gradient

import etastar as es
from etastar.engine.checkpoint import split_state
from etastar.engine.plan import Node, prefix_hash
from etastar.engine.slots import SlotStack, validate
from etastar.model.parametrization import ParameterNumbers, numbers, scalars
from etastar.optim.schedule_free import StackedScheduleFreeAdamW, _power
from etastar.optim.stacked import Flat
from etastar.recipe import SP, Model, ScheduleFreeAdamW
from etastar.text.batches import validation_batches
from etastar.text.corpora import prepare
from tiny import CORPUS, recipe, wsd

MODEL, STEPS = Model(width=16, depth=1, head_dim=8, context=8), 200
TABLE = numbers(SP(), MODEL, 20)
OPTIONS = [ScheduleFreeAdamW(weight_decay=0.1, clip_norm=1.0),
           ScheduleFreeAdamW(weight_decay=0.0, beta1=0.95, beta2=0.95, clip_norm=None, r=0.75),
           ScheduleFreeAdamW(weight_decay=0.5, beta1=0.3, eps=1e-6, clip_norm=0.2, weight_lr_power=0.5)]
WARMUP, PEAKS = (20, 0, 7), (2.5e-3, 1e-2, 3e-3)


def filled(table=TABLE, options=OPTIONS, compiled=False):
    flat, gen = Flat(table, len(options), "cpu"), torch.Generator().manual_seed(0)
    for view in flat.views(flat.data).values():
        view.copy_(torch.randn(view.shape, generator=gen))
    optimizer = StackedScheduleFreeAdamW(flat, compiled)
    optimizer.z_MxP.copy_(flat.data)
    for slot, option in enumerate(options):
        optimizer.configure(slot, option)
    return flat, optimizer


def package(flat, slot, option, table=TABLE, **given):
    """The package's optimizer over copies of a slot's parameters, with one group for each pair of multipliers."""
    schedulefree = pytest.importorskip("schedulefree", reason="the reference is in the `dev` extra: pip install schedulefree==1.4.1")
    params = {name: view[slot].clone().requires_grad_() for name, view in flat.views(flat.data).items()}
    groups = [{"params": [p], "lr": given["lr"] * table[n].lr_multiplier, "eps": option.eps * table[n].eps_multiplier,
               "weight_decay": option.weight_decay * table[n].decay_multiplier} for n, p in params.items()]
    reference = schedulefree.AdamWScheduleFree(groups, **given, betas=(option.beta1, option.beta2), r=option.r,
                                               weight_lr_power=option.weight_lr_power, foreach=False)
    reference.train()
    return params, reference


@pytest.mark.parametrize("clipped", [False, True], ids=["bit for bit", "clipped"])
def test_every_slot_is_the_packages_step_for_step_warm_up_included(clipped):
    options = [option if clipped else dataclasses.replace(option, clip_norm=None) for option in OPTIONS]
    flat, optimizer = filled(options=options)
    solo = [package(flat, slot, option, lr=PEAKS[slot], warmup_steps=WARMUP[slot]) for slot, option in enumerate(options)]
    lr_MxS = np.stack([es.Constant(warmup_steps=w).lr(STEPS, peak_lr=p, batch_tokens=1) for w, p in zip(WARMUP, PEAKS, strict=True)])
    # Bits agree where nothing is clipped; the norm of a clipped gradient is summed in another order, so it may differ in the last
    # bits of float32 (6e-8 of a value), which 200 steps at rates of 0.01 at most keep below 1e-5 of parameters of order 1
    near = dict(rtol=1e-5, atol=1e-5) if clipped else dict(rtol=0, atol=0)
    for step in range(1, STEPS + 1):
        grad = gradient(flat, step)
        for slot, (params, reference) in enumerate(solo):
            for name, view in flat.views(grad).items():
                params[name].grad = view[slot].clone()
            if options[slot].clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), options[slot].clip_norm)
            reference.step()
        optimizer.clip(grad)
        optimizer.step(grad, torch.from_numpy(lr_MxS[:, step - 1]), torch.full((3,), step), torch.ones(3, dtype=torch.bool))
        for slot, (params, reference) in enumerate(solo):
            assert optimizer.weight_sum_M[slot] == reference.param_groups[0]["weight_sum"]
            assert optimizer.lr_max_M[slot] == reference.param_groups[0]["lr_max"]
            for name, y in flat.views(flat.data).items():
                torch.testing.assert_close(y[slot], params[name].detach(), **near)
    for held, key in ((optimizer.z_MxP, "z"), (optimizer.v_MxP, "exp_avg_sq")):
        for name, view in flat.views(held).items():
            for slot, (params, reference) in enumerate(solo):
                torch.testing.assert_close(view[slot], reference.state[params[name]][key], **near)
    x = flat.views(optimizer.evaluated())
    for slot, (params, reference) in enumerate(solo):
        reference.eval()
        for name, p in params.items():
            torch.testing.assert_close(x[name][slot], p.detach(), **near)
            assert not torch.equal(x[name][slot], flat.views(flat.data)[name][slot])


def test_any_schedule_is_an_array_of_rates():
    """The package takes one too, set before each step; a rate of 0 at the start weighs nothing, a falling one as the highest."""
    option = dataclasses.replace(OPTIONS[0], clip_norm=None)
    flat, optimizer = filled(options=[option])
    params, reference = package(flat, 0, option, lr=1.0)
    lr = np.concatenate([[0.0, 0.0], es.Cosine(warmup_steps=5, floor=0.0).lr(58, peak_lr=1e-2, batch_tokens=1)])
    for step in range(1, 61):
        grad = gradient(flat, step)
        for name, view in flat.views(grad).items():
            params[name].grad = view[0].clone()
        for group in reference.param_groups:
            group["lr"] = float(lr[step - 1])
        reference.step()
        optimizer.step(grad, torch.from_numpy(lr[step - 1 : step]), torch.tensor([step]), torch.tensor([True]))
    for name, y in flat.views(flat.data).items():
        assert torch.equal(y[0], params[name].detach())


def test_multipliers_of_a_parameter_are_those_of_its_own_group_of_the_package():
    table = {"a": ParameterNumbers("hidden", (3, 5), 1.0, 0.5, 2.0, 4.0), "b": ParameterNumbers("norm", (7,), None, 1.0, 0.0),
             "c": ParameterNumbers("hidden", (2, 2), 1.0, 0.3, 2.0, 4.0)}
    option = ScheduleFreeAdamW(weight_decay=0.3, eps=1e-3, clip_norm=None)
    flat, optimizer = filled(table, [option])
    params, reference = package(flat, 0, option, table, lr=0.01)
    for step in range(1, 21):
        grad = gradient(flat, step)
        for name, view in flat.views(grad).items():
            params[name].grad = view[0].clone()
        reference.step()
        optimizer.step(grad, torch.tensor([0.01], dtype=torch.float64), torch.tensor([step]), torch.tensor([True]))
    for name, y in flat.views(flat.data).items():  # the package sums weights a group, scaled by its rate: equal shares, rounded apart
        torch.testing.assert_close(y[0], params[name].detach(), rtol=1e-6, atol=1e-6)


def test_a_power_is_pythons_wherever_the_slot_is():
    gen = torch.Generator().manual_seed(0)
    for exponent in (0.0, 0.75, 2.0):
        base = torch.rand(2003, generator=gen, dtype=torch.float64) * 0.01  # a vectorized power differs in some of a hundred
        got = _power(base, torch.full((2003,), exponent, dtype=torch.float64))
        assert got.tolist() == [float(b) ** exponent for b in base]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_dead_slot_keeps_every_bit_its_neighbours_do_not_notice_and_no_tensor_is_replaced(compiled):
    (flat, optimizer), (calm, beside) = filled(compiled=compiled), filled(compiled=compiled)

    def held(flat, optimizer):
        return [flat.data, optimizer.z_MxP, optimizer.v_MxP, optimizer.lr_max_M, optimizer.weight_sum_M, *optimizer.options.values()]

    places = [tensor.data_ptr() for tensor in held(flat, optimizer)]
    lr = torch.full((3,), 1e-2, dtype=torch.float64)
    for step in range(1, 6):
        grad, alive = gradient(flat, step), torch.tensor([True, step == 1, True])
        wild, frozen = grad.clone(), [tensor[1].clone() for tensor in held(flat, optimizer)]
        if step > 1:
            wild[1] = float("nan")
        optimizer.clip(wild), beside.clip(grad)
        optimizer.step(wild, lr * step, torch.full((3,), step), alive)
        beside.step(grad, lr * step, torch.full((3,), step), torch.ones(3, dtype=torch.bool))
        if step > 1:
            assert all(torch.equal(old, new[1]) for old, new in zip(frozen, held(flat, optimizer), strict=True))
    for slot in (0, 2):
        for tensor, other in zip(held(flat, optimizer), held(calm, beside), strict=True):
            assert torch.equal(tensor[slot], other[slot])
    assert [tensor.data_ptr() for tensor in held(flat, optimizer)] == places


# -- whole runs ------------------------------------------------------------------------------------------------------------

FREE = dict(optimizer=ScheduleFreeAdamW(), peak_lr=2**-5)
FAST = dict(progress=False, backend="inline")


def end_state(run):
    lr = run.recipe.lr()
    return run.store.node_state(Node(run.recipe.trunk_id, len(lr), prefix_hash(lr).hexdigest()[:16]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    (run,) = es.run([recipe(40, **FREE)], store=tmp_path_factory.mktemp("free"), **FAST)
    return run


def test_what_is_validated_is_what_is_handed_out_and_is_x(trained):
    losses, tokens = [], prepare(CORPUS)
    with torch.no_grad():
        for tokens_BxT, _ in validation_batches(tokens, trained.recipe.model.context):
            given = torch.from_numpy(tokens_BxT)
            logits = trained.model()(given[:, :-1])
            losses.append(F.cross_entropy(logits.transpose(1, 2), given[:, 1:], reduction="none").mean(1))
    assert trained.val_loss == pytest.approx(float(torch.cat(losses).double().mean()), abs=1e-6)
    assert trained.curve.val_loss.iloc[-1] == trained.val_loss
    params, moments, _ = split_state(end_state(trained))
    model = {name: p.detach() for name, p in trained.model().parameters_by_name().items()}
    by = trained.recipe.model, scalars(SP(), trained.recipe.model), tokens
    assert validate(model, *by)[0] == trained.val_loss != validate(params, *by)[0]
    for name, y in params.items():
        z, x = moments[f"{name}.z"], model[name]
        assert torch.equal(x, y.lerp(z, 1 - 1 / 0.9)) and not torch.equal(x, y) and not torch.equal(x, z)
    assert moments["weight_sum"] == pytest.approx((trained.recipe.lr() ** 2).sum()) and moments["lr_max"] == 2**-5


def test_x_is_the_weighted_mean_of_z():
    """The paper's definition, without the package: x after t steps is the mean of z after each, weighed by the squared rate."""
    run = recipe(12, **FREE)
    stack, total, weights = SlotStack(run, prepare(CORPUS)), 0.0, 0.0
    stack.load(0, run, None)
    assert torch.equal(stack.optimizer.z_MxP, stack.flat.data) and torch.equal(stack.optimizer.evaluated(), stack.flat.data)
    for lr in run.lr():
        stack.train(np.array([[lr]]))
        weights += lr**2
        total = total + lr**2 * stack.optimizer.z_MxP.double()
    torch.testing.assert_close(stack.optimizer.evaluated().double(), total / weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [dict(slots=1), dict(slots=3), dict(slots=1, snapshot_seconds=0.0)], ids=str)
def test_branches_and_resumed_runs_have_the_bits_of_straight_ones(layout, trained, tmp_path):
    sweep = [recipe(40, **FREE), recipe(40, **FREE, schedule=wsd(8)), recipe(28, **FREE, schedule=wsd(4)), recipe(16, **FREE, seed=2)]
    for run in es.run(sweep, store=tmp_path / "shared", **layout, **FAST):
        (alone,) = [trained] if run.run_id == trained.run_id else es.run([run.recipe], store=tmp_path / run.run_id, **FAST)
        state, straight = end_state(run), end_state(alone)
        assert state.keys() == straight.keys() and all(torch.equal(state[name], straight[name]) for name in state)
        assert run.val_loss == alone.val_loss
        for name, p in run.model().parameters_by_name().items():
            assert torch.equal(p, alone.model().parameters_by_name()[name])
    (branch,) = es.run([trained.branch_recipe(at_tokens=16 * 128, schedule=es.LinearToZero(), horizon_tokens=24 * 128)],
                       store=trained.store.path, **FAST)
    (alone,) = es.run([branch.recipe], store=tmp_path / "branch", **FAST)
    assert branch.val_loss == alone.val_loss
    assert all(torch.equal(t, end_state(alone)[name]) for name, t in end_state(branch).items())


def test_slots_have_the_bits_of_runs_alone(tmp_path):
    recipes = [recipe(10, seed=s, peak_lr=2 ** -(4 + s % 3), optimizer=ScheduleFreeAdamW(beta1=0.9 - 0.01 * s, r=0.5)) for s in range(9)]
    together = es.run(recipes, store=tmp_path / "a", slots=9, **FAST)
    for run, alone in zip(together, es.run(recipes, store=tmp_path / "b", slots=1, **FAST), strict=True):
        state, straight = end_state(run), end_state(alone)
        assert run.val_loss == alone.val_loss and all(torch.equal(state[name], straight[name]) for name in state)


def test_it_learns_and_is_told_apart_from_adamw(trained):
    assert trained.val_loss < trained.curve.train_loss.iloc[0] - 0.1
    assert trained.run_id != recipe(40, peak_lr=2**-5).run_id
    assert es.Recipe.from_json(trained.recipe.to_json()) == trained.recipe


@pytest.mark.parametrize("wrong", [dict(beta1=0.0), dict(beta1=1.0), dict(beta2=1.0), dict(weight_decay=-1.0), dict(r=-0.1), dict(eps=0.0),
                                   dict(clip_norm=0.0), dict(weight_lr_power=-1.0)], ids=str)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="ScheduleFreeAdamW needs"):
        ScheduleFreeAdamW(**wrong)
