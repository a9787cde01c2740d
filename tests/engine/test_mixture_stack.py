"""Mixtures of experts and z losses in the engine's stack: bits of a slot, what is told, driving, optimizers, and a run from end to end."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny
from etastar.engine.execute import run
from etastar.engine.layout import slot_bytes
from etastar.engine.norm_log import weight_norms
from etastar.engine.slots import SlotStack, stack_key
from etastar.model import decoder
from etastar.model.shapes import count_parameters
from etastar.optim import lmo
from etastar.optim.distributed_scion import ScionOptimizer, scion_groups
from etastar.recipe import SP, Execution, Mixture, Scion
from etastar.text.batches import batch
from etastar.text.corpora import prepare

MODEL = dataclasses.replace(tiny.MODEL, ffn_width=32, mixture=Mixture(4, 2, balance=0.05, router_z=0.01))
STEPS = 6


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixture_recipe(steps=24, **changes):
    return tiny.recipe(steps, **({"model": MODEL} | changes))


def trained(recipes, rates=None, **driven):
    stack = SlotStack(recipes[0], prepare(tiny.CORPUS), len(recipes), **driven)
    for slot, recipe in enumerate(recipes):
        stack.load(slot, recipe, None)
    told = stack.train(np.tile(np.asarray(rates or [2**-6] * len(recipes))[:, None], STEPS))
    return stack, told


def assert_same_slot(one, other, slot, place=0):
    (stack, told), (alone, own) = one, other
    assert all(np.array_equal(a[slot], b[place]) for a, b in zip(told, own, strict=True)) and not np.isnan(told[0][slot]).any()
    assert torch.equal(stack.flat.data[slot], alone.flat.data[place])


@pytest.mark.parametrize("changes", [{}, {"z_loss": 1e-3, "execution": Execution(micro_batch_sequences=2)}, {"optimizer": Scion()}],
                         ids=["adamw", "z loss in parts", "scion"])
def test_a_slot_is_the_run_alone_also_beside_one_that_diverges(changes):
    recipes = [mixture_recipe(seed=seed, **changes) for seed in range(3)]
    together = trained(recipes, [2**-6, 1e30, 2**-7])
    assert together[0].alive_M.tolist() == [True, False, True] and np.isnan(together[1][0][1, -1])
    assert_same_slot(together, trained(recipes[:1]), 0)
    assert_same_slot(together, trained(recipes[2:], [2**-7]), 2)


def test_steps_from_tables_have_the_bits_of_steps_from_the_host_and_no_mixture_is_captured():
    recipes = [mixture_recipe(seed=seed) for seed in range(2)]
    host, tables = trained(recipes), trained(recipes, way="graph")
    assert tables[0].way == "tables" and not tables[0].tables.graphed and host[0].tables is None
    for slot in range(2):
        assert_same_slot(host, tables, slot, slot)


def test_a_mixture_that_is_to_be_compiled_is_refused():
    with pytest.raises(ValueError, match="compiled=False"):
        mixture_recipe(execution=Execution(compiled=True))


def first_tokens(recipe):
    return torch.from_numpy(batch(prepare(tiny.CORPUS).train, recipe.model.context, 0, 0, recipe.batch_sequences))[None]


@pytest.mark.parametrize("model, z_loss", [(tiny.MODEL, 0.01), (MODEL, 0.0), (MODEL, 0.01)], ids=["z loss", "mixture", "both"])
def test_what_is_told_is_cross_entropy_and_what_is_trained_is_more(model, z_loss):
    plain = mixture_recipe(model=model if model.mixture is None else dataclasses.replace(
        model, mixture=dataclasses.replace(model.mixture, balance=0.0, router_z=0.0)))
    more = plain.replace(model=model, z_loss=z_loss)
    (stack, (told, _)), (other, (other_told, _)) = trained([plain]), trained([more])
    start = {name: p[None] for name, p in decoder.init_parameters(model, 64, SP(), 0).items()}
    cross_entropy = decoder.loss(start, first_tokens(plain), model, stack.scalars)
    assert told[0, 0] == other_told[0, 0] == float(cross_entropy)  # at the first step the weights are the same
    assert told[0, 1] != other_told[0, 1]
    assert stack.validate(0)[0] < 4.2 and other.validate(0)[0] < 4.2  # log 64 is 4.16


def test_parts_of_a_batch_add_up_to_the_gradient_of_the_whole():
    recipe = tiny.recipe(z_loss=0.05)
    parts = recipe.replace(execution=Execution(micro_batch_sequences=1))
    grads = []
    for each in (recipe, parts):
        stack = SlotStack(each, prepare(tiny.CORPUS))
        stack.load(0, each, None)
        told_M = stack._backward(first_tokens(each))
        grads.append((told_M, stack.grad_MxP.clone()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-7)


def test_a_z_loss_and_a_mixture_are_part_of_what_a_stack_shares():
    keys = {stack_key(r) for r in (tiny.recipe(), tiny.recipe(z_loss=0.1), mixture_recipe(),
                                   mixture_recipe(model=dataclasses.replace(MODEL, mixture=Mixture(4, 1))))}
    assert len(keys) == 4


def test_a_run_of_a_mixture_goes_through_the_store_and_branches_with_its_bits(tmp_path):
    recipes = [mixture_recipe(steps, schedule=tiny.wsd(3), z_loss=1e-4) for steps in (8, 12)]
    short, long = run(recipes, store=tmp_path / "both", workers=1)
    (alone,) = run(recipes[1:], store=tmp_path / "alone", workers=1)
    assert short.status == long.status == "done" and long.val_loss == alone.val_loss
    ours, own = long.model().parameters_by_name(), alone.model().parameters_by_name()
    assert all(torch.equal(ours[name], own[name]) for name in own)
    counts = count_parameters(MODEL, 64)
    assert (long.summary["params_total"], long.summary["params_active"]) == (counts["total"], counts["active"])
    assert counts["active"] < counts["total"]


def test_the_logged_norm_is_that_of_the_largest_matrix_of_any_expert():
    params = {name: p[None] for name, p in decoder.init_parameters(MODEL, 64, SP(), 0).items()}
    before = weight_norms(params, MODEL)[0, 1]
    up = params["layers.1.experts_gate_up"][0, 2, 32:]
    up.mul_(20.0)
    expected = torch.linalg.matrix_norm(up.double(), 2) * (up.shape[1] / up.shape[0]) ** 0.5
    torch.testing.assert_close(weight_norms(params, MODEL)[0, 1], expected, rtol=1e-5, atol=0)
    assert float(expected) > 2 * float(before)
    params["layers.0.router"].mul_(1e6)  # no hidden matrix
    torch.testing.assert_close(weight_norms(params, MODEL)[0, 1], expected, rtol=1e-5, atol=0)


def test_scion_takes_each_experts_matrices_by_themselves_and_a_router_as_a_head():
    recipe = mixture_recipe(optimizer=Scion(radius_hidden=3.0, radius_output=0.5))
    stack = SlotStack(recipe, prepare(tiny.CORPUS))
    stack.load(0, recipe, None)
    before = stack.flat.data.clone()
    grad_MxP = torch.randn(before.shape, generator=torch.Generator().manual_seed(3))
    ones = torch.ones(1, dtype=torch.int64)
    stack.optimizer.step(grad_MxP, torch.tensor([0.125], dtype=torch.float64), ones, ones.bool())
    moved, grads = (stack.flat.views(x) for x in ((before - stack.flat.data) / 0.125, grad_MxP))
    gate_up, router, out = (f"layers.1.{name}" for name in ("experts_gate_up", "router", "experts_out"))
    for expert in range(4):
        for rows in (slice(0, 32), slice(32, 64)):
            expected = 3.0 * lmo.spectral(grads[gate_up][0, expert, rows])
            torch.testing.assert_close(moved[gate_up][0, expert, rows], expected, rtol=1e-3, atol=1e-4)
        expected = 3.0 * lmo.spectral(grads[out][0, expert])
        torch.testing.assert_close(moved[out][0, expert], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved[router][0], 0.5 * lmo.head_rows(grads[router][0]), rtol=1e-3, atol=1e-5)


def test_scion_for_modules_makes_the_stacks_steps_of_a_mixture():
    recipe = mixture_recipe(optimizer=Scion(momentum=0.25))
    stack = SlotStack(recipe, prepare(tiny.CORPUS))
    stack.load(0, recipe, None)
    module = decoder.Decoder(MODEL, 64, SP(), seed=0)
    optimizer = ScionOptimizer(scion_groups(module), lr=0.125, momentum=0.25)
    roles = {name.split(".")[-1].split("/")[-1]: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    assert (roles["router"], roles["experts_out"], roles["experts_gate_up"]) == ("output", "hidden", "hidden")
    for step in range(1, 3):
        grad_MxP = torch.randn(stack.flat.data.shape, generator=torch.Generator().manual_seed(step))
        for name, view in stack.flat.views(grad_MxP).items():
            module.parameters_by_name()[name].grad = view[0].clone()
        stack.optimizer.step(grad_MxP, torch.tensor([0.125], dtype=torch.float64), torch.tensor([step]), torch.tensor([True]))
        optimizer.step()
    for name, p in module.parameters_by_name().items():
        torch.testing.assert_close(p.detach(), stack.params[name][0].detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_slot_bytes_of_a_mixture_by_hand():
    # parameters as of any model; a token: in a layer two streams, four inputs of products less the experts' own two, q k v, three numbers
    # of the router an expert, and twice the row before and after an expert and four times its inner width; the end as of any model
    layer = 4 * 2 * 32 + 4 * (4 * 32 + 96) + 4 * 3 * 4 + 4 * 2 * (2 * 32 + 4 * 32)
    counted = 28 * count_parameters(MODEL, 64)["total"] + 128 * (2 * layer + 4 * 3 * 32 + 8 * 64)
    assert slot_bytes(MODEL, 64, 4, Execution()) == counted
