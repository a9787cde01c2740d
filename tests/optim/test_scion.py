"""Stacked Scion: steps by hand, torch.optim.Muon as its special case, slots as solo runs, what norms can become, bad input."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gradients import gradient

import etastar as es
from etastar.engine.slots import SlotStack
from etastar.model.decoder import init_parameters, loss
from etastar.model.parametrization import ParameterNumbers, numbers, scalars
from etastar.optim import lmo
from etastar.optim.scion import StackedScion
from etastar.optim.stacked import Flat
from etastar.text.corpora import prepare

MODEL = es.Model(width=16, depth=2, head_dim=8, context=16, tied=False)
EVERYWHERE = dataclasses.replace(MODEL, normalization="everywhere", norm_eps=1e-20)
ALIVE = torch.ones(1, dtype=torch.bool)


def filled(table, optimizer, slots=1, seed=0):
    flat = Flat(table, slots, "cpu")
    draw = torch.Generator().manual_seed(seed)
    for view in flat.views(flat.data).values():
        view.copy_(torch.randn(view.shape, generator=draw))
    stacked = StackedScion(flat)
    for slot in range(slots):
        stacked.configure(slot, optimizer)
    return flat, stacked


def by_definition(name, row, g, optimizer):
    """radius · LMO in numpy, exact polar factors replaced by the quintic on exact singular values."""
    g = g.numpy().astype(float)
    if row.role == "norm":
        return optimizer.radius_norm * g / math.sqrt((g**2).mean())
    length = np.sqrt((g**2).sum(1, keepdims=True))
    if row.role == "embedding":
        return optimizer.radius_embedding * g / length * math.sqrt(g.shape[1])
    if row.role == "output":
        return optimizer.radius_output * (np.sign(g) / g.shape[1] if optimizer.output == "sign" else g / length / math.sqrt(g.shape[1]))
    made = []
    for part in np.split(g, np.cumsum(row.rows)[:-1]) if row.rows else [g]:
        u, s, vh = np.linalg.svd(part, full_matrices=False)
        s, (a, b, c) = s / np.linalg.norm(s), lmo.NEWTON_SCHULZ
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        made.append(math.sqrt(part.shape[0] / part.shape[1]) * u * s @ vh)
    return optimizer.radius_hidden * np.concatenate(made)


@pytest.mark.parametrize("optimizer", [
    es.Scion(), es.Scion(momentum=0.1, weight_decay=1.0), es.Scion(output="sign", momentum=0.5),
    es.Scion(radius_embedding=2.0, radius_hidden=50.0, radius_output=3000.0, radius_norm=0.5, weight_decay=0.1)], ids=str)
def test_steps_are_those_of_the_definition(optimizer):
    table = numbers(es.UnitNorm(), MODEL, 20, (1.0, 0.125, 2.0))
    flat, stacked = filled(table, optimizer)
    views = flat.views(flat.data)
    own, average = {n: v[0].numpy().astype(float) for n, v in views.items()}, {n: 0.0 for n in views}
    for step in range(1, 6):
        grad, lr = gradient(flat, step), 0.1 / step
        for name, g in flat.views(grad).items():
            average[name] = (1 - optimizer.momentum) * average[name] + optimizer.momentum * g[0].double()
            rate = lr * table[name].lr_multiplier
            own[name] = own[name] * (1 - rate * optimizer.weight_decay) - rate * by_definition(name, table[name], average[name], optimizer)
        stacked.step(grad, torch.tensor([lr], dtype=torch.float64), torch.tensor([step]), ALIVE)
        for name, view in views.items():
            scale = max(1.0, np.abs(own[name]).max())
            np.testing.assert_allclose(view[0].numpy() / scale, own[name] / scale, atol=3e-5, err_msg=name)


@pytest.mark.parametrize(("scale", "adjust"), [("keller", "original"), ("adamw", "match_rms_adamw")])
def test_with_nesterov_and_half_precision_it_is_torchs_muon_bit_for_bit(scale, adjust):
    shapes = {"a": (24, 10), "b": (10, 24), "c": (9, 9)}
    table = {name: ParameterNumbers("hidden", shape, 0.1, 1.0, 1.0) for name, shape in shapes.items()}
    flat, stacked = filled(table, es.Scion(momentum=0.05, nesterov=True, hidden_scale=scale, newton_schulz="bf16", weight_decay=0.1))
    params = {n: v[0].clone().requires_grad_() for n, v in flat.views(flat.data).items()}
    muon = torch.optim.Muon(params.values(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, eps=1e-20, adjust_lr_fn=adjust)
    for step in range(1, 21):
        grad = gradient(flat, step)
        for name, p in params.items():
            p.grad = flat.views(grad)[name][0].clone()
        muon.step()
        stacked.step(grad, torch.tensor([0.02], dtype=torch.float64), torch.tensor([step]), ALIVE)
    for name, view in flat.views(flat.data).items():
        near = dict(rtol=0, atol=1e-6)  # the polar factor is the same to the bit; rates are multiplied in another order
        torch.testing.assert_close(view[0], params[name].detach(), **near, msg=name)


# -- slots -------------------------------------------------------------------------------------------------------------

OPTIONS = [es.Scion(), es.Scion(momentum=0.2), es.Scion(radius_output=3.0), es.Scion(radius_hidden=0.5, radius_norm=2.0), es.Scion()]


def trained(slots, model=EVERYWHERE, broken=None):
    """Parameters (one row a slot) and losses (slots, steps) after 16 steps; options, rate and data follow from the slot's number."""
    flat = Flat(numbers(es.UnitNorm(), model, 64), len(slots), "cpu")
    stacked, params = StackedScion(flat), {name: view.requires_grad_() for name, view in flat.views(flat.data).items()}
    for place, slot in enumerate(slots):
        stacked.configure(place, OPTIONS[slot])
        for name, initial in init_parameters(model, 64, es.UnitNorm(), slot).items():
            params[name].detach()[place].copy_(initial)
    alive, losses = torch.ones(len(slots), dtype=torch.bool), []
    for step in range(1, 17):
        tokens = torch.stack([torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(100 * s + step)) for s in slots])
        loss_M, grad = loss(params, tokens, model, scalars(es.UnitNorm(), model)), flat.like()
        for view, found in zip(flat.views(grad).values(), torch.autograd.grad(loss_M.sum(), list(params.values())), strict=True):
            view.copy_(found)
        if broken is not None and step > 5:
            grad[broken] = float("nan")
        alive &= stacked.clip(grad).isfinite()
        stacked.step(grad, torch.tensor([2.0 ** -(3 + s % 3) for s in slots], dtype=torch.float64), torch.full((len(slots),), step), alive)
        losses.append(loss_M.detach())
    return flat.data.detach(), torch.stack(losses, 1)


@pytest.mark.parametrize("model", [EVERYWHERE, MODEL], ids=["norm everywhere", "pre-norm"])
def test_a_slot_has_the_bits_of_the_run_alone(model):
    torch.set_num_threads(1)
    alone = [trained([slot], model) for slot in range(5)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1]):
        params, losses = trained(order, model)
        for place, slot in enumerate(order):
            assert torch.equal(params[place], alone[slot][0][0]) and torch.equal(losses[place], alone[slot][1][0])
    assert not torch.equal(alone[0][0], alone[1][0])


def test_a_slot_that_breaks_stops_and_is_not_noticed():
    whole, broken = trained([0, 1, 2])[0], trained([0, 1, 2], broken=1)[0]
    assert torch.equal(broken[[0, 2]], whole[[0, 2]]) and broken[1].isfinite().all() and not torch.equal(broken[1], whole[1])


# -- norms -------------------------------------------------------------------------------------------------------------


def norms_of(params):
    """(1→RMS of the table, RMS→∞ of the head)."""
    table, head = params["embedding"], params["head"]
    return float(table.norm(dim=1).max() / table.shape[1] ** 0.5), float(head.norm(dim=1).max() * head.shape[1] ** 0.5)


def trained_by_engine(optimizer, lr, steps):
    corpus = es.Corpus("synthetic", vocab=64, options=(("tokens", 200_000), ("validation_tokens", 8_192)))
    recipe = es.Recipe(model=EVERYWHERE, corpus=corpus, optimizer=optimizer, schedule=es.Constant(), parametrization=es.UnitNorm(),
                       peak_lr=lr, batch_tokens=64, horizon_tokens=64 * steps)
    stack = SlotStack(recipe, prepare(recipe.corpus), 1)
    stack.load(0, recipe, None)
    stack.train(recipe.lr()[None])
    return stack.weights(0)


def test_every_matrix_starts_with_unit_norm_and_the_first_loss_is_nearly_a_uniform_guess():
    params = init_parameters(EVERYWHERE, 64, es.UnitNorm(), seed=3)
    assert norms_of(params) == pytest.approx((1.0, 1.0), rel=1e-5)
    for name, row in numbers(es.UnitNorm(), EVERYWHERE, 64).items():
        for part in params[name].split(row.rows or row.shape[:1]) if row.role == "hidden" else ():
            wanted = 0.5 if name.endswith("_out") else 1.0  # √(2·depth) = 2
            values = torch.linalg.svdvals(part) * math.sqrt(part.shape[1] / part.shape[0])
            torch.testing.assert_close(values, torch.full_like(values, wanted))
    tokens = torch.randint(64, (1, 32, 17), generator=torch.Generator().manual_seed(1))
    stacked = {name: p[None] for name, p in params.items()}
    first = float(loss(stacked, tokens, EVERYWHERE, scalars(es.UnitNorm(), EVERYWHERE)))
    assert first == pytest.approx(math.log(64) + 1 / 32, abs=0.01)  # logits are cosines, of variance 1/16


@pytest.mark.parametrize(("lr", "steps"), [(2**-4, 64), (2**-2, 48), (1.0, 24)])
def test_a_norm_is_never_more_than_one_and_the_sum_of_the_rates(lr, steps):
    table, head = norms_of(trained_by_engine(es.Scion(), lr, steps))
    assert 1.5 < head <= (1 + lr * steps) * (1 + 1e-5) and table <= (1 + lr * steps) * (1 + 1e-5)


def test_the_constrained_form_keeps_every_norm_within_its_radius_and_decay_draws_it_to_one_over_decay():
    table, head = norms_of(trained_by_engine(es.Scion(weight_decay=1.0), 0.25, 64))
    assert table <= 1 + 1e-5 and head <= 1 + 1e-5
    table, head = norms_of(trained_by_engine(es.Scion(weight_decay=0.1, momentum=0.1), 1.0, 400))  # published: towards 1/λ = 10
    assert 8 < head <= 10 * (1 + 1e-5) and 8 < table <= 10 * (1 + 1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (dict(radius_output=0.0), "radius_output"), (dict(radius_hidden=-1.0), "radius_hidden"), (dict(momentum=0.0), r"\(0, 1\]; got 0.0"),
    (dict(momentum=1.5), "got 1.5"), (dict(weight_decay=-0.1), "weight_decay"), (dict(newton_schulz_steps=0), "steps")], ids=str)
def test_bad_options_are_told(options, words):
    with pytest.raises(ValueError, match=words):
        es.Scion(**options)


def test_layers_without_a_rule_and_vectors_under_a_spectral_one_are_told():
    with pytest.raises(ValueError, match="no rule for the layers {'gate': 'convolution'}"):
        StackedScion(Flat({"gate": ParameterNumbers("convolution", (4, 4), 0.1, 1.0, 1.0)}, 1, "cpu"))
    with pytest.raises(ValueError, match=r"{'bias': \(4,\)}"):
        StackedScion(Flat({"bias": ParameterNumbers("hidden", (4,), 0.1, 1.0, 1.0)}, 1, "cpu"))
    _, stacked = filled(numbers(es.UnitNorm(), MODEL, 20), es.Scion())
    with pytest.raises(ValueError, match="share the rules"):
        stacked.configure(0, es.Scion(output="sign"))


def test_a_tied_head_cannot_start_with_two_norms():
    with pytest.raises(ValueError, match="tied=False"):
        es.Recipe(model=dataclasses.replace(MODEL, tied=True), corpus=es.Corpus("python", vocab=64), optimizer=es.Scion(),
                  schedule=es.Constant(), parametrization=es.UnitNorm(), peak_lr=0.1, batch_tokens=64, horizon_tokens=640)
