"""A mixture of experts against plain torch with every expert on every token, its parts in float64, and the bits of a slot."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from etastar.model import mixture
from etastar.model.decoder import loss, objective
from etastar.model.mixture import Collect, Grouped, Route, Routed, Spread, auxiliary, placed
from etastar.model.parametrization import Scalars
from etastar.model.shapes import count_parameters, flops_per_token, fused_rows, matrices_in, parameter_shapes
from etastar.recipe import Mixture, Model

BY = Scalars(3.0, 0.5, 0.25, 2.0)
MODEL = Model(width=32, depth=2, head_dim=16, context=16, ffn_width=48, mixture=Mixture(5, 2, balance=0.3, router_z=0.05))
VOCAB = 64
ODD = [MODEL, dataclasses.replace(MODEL, tied=False, kv_heads=1, mixture=Mixture(4, 3, balance=0.0, router_z=0.2)),
       dataclasses.replace(MODEL, tied=False, normalization="everywhere"), dataclasses.replace(MODEL, qk_norm=True, mixture=Mixture(3, 1)),
       dataclasses.replace(MODEL, qk_norm=True, kv_heads=1, mixture=Mixture(6, 6))]


def drawn(model, slots=1, scale=0.2, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(slots, *shape, generator=stream) * scale + name.endswith("norm")).requires_grad_()
            for name, shape in parameter_shapes(model, VOCAB).items()}


def tokens(slots=1, batch=3, seed=1):
    return torch.randint(VOCAB, (slots, batch, 17), generator=torch.Generator().manual_seed(seed))


def gradients(params, told, model=MODEL, z_loss=0.0):
    trained, _ = objective(params, told, model, BY, z_loss)
    return trained, dict(zip(params, torch.autograd.grad(trained.sum(), list(params.values())), strict=True))


def rms(x, gain=None, eps=MODEL.norm_eps):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if gain is None else y * gain


def turned(x_BxAxTxH):
    length, size = x_BxAxTxH.shape[2:]
    angle = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, size, 2) / size))
    a, b = x_BxAxTxH.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def plainly(params, tokens_BxT1, model):
    """What is trained, written with nothing of ours: all experts see all tokens, and a mask forgets most of it."""
    seen, target, everywhere = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:], model.normalization == "everywhere"
    x, logits, (batch, length) = params["embedding"][seen] * BY.embedding, [], seen.shape
    for i in range(model.depth):
        of = {name.split(".")[-1]: p for name, p in params.items() if name.startswith(f"layers.{i}.")}
        parts = (rms(x, of.get("attention_norm")) @ of["qkv"].T).view(batch, length, -1, model.head_dim)
        q, k, v = (p.transpose(1, 2) for p in parts.split([model.heads, *[model.resolved_kv_heads] * 2], dim=2))
        q, k = (rms(q), rms(k)) if model.qk_norm or everywhere else (q, k)
        v = rms(v) if everywhere else v
        h = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True, scale=BY.attention)
        h = h.transpose(1, 2).reshape(batch, length, -1)
        x = x + BY.residual * (rms(h) if everywhere else h) @ of["attention_out"].T
        h = rms(x, of.get("mlp_norm")).flatten(0, 1)
        logits.append(h @ of["router"].T)
        top, chosen = logits[-1].topk(model.mixture.experts_per_token)
        weight_NxE = torch.zeros_like(logits[-1]).scatter(1, chosen, top.softmax(-1))
        inner = torch.einsum("nd,egd->neg", h, of["experts_gate_up"])
        inner = F.silu(inner[..., :inner.shape[-1] // 2]) * inner[..., inner.shape[-1] // 2:]
        inner = rms(inner) if everywhere else inner
        out = torch.einsum("nef,edf,ne->nd", inner, of["experts_out"], weight_NxE)
        x = x + BY.residual * out.view(x.shape)
    out = rms(x, params.get("final_norm")) @ params["embedding" if model.tied else "head"].T / BY.logits
    told = F.cross_entropy(out.flatten(0, 1), target.flatten())
    return told + plain_extra(logits, model.mixture), told


def plain_extra(logits, by):
    p = torch.stack([layer.softmax(-1) for layer in logits])
    used = torch.stack([F.one_hot(layer.topk(by.experts_per_token)[1], by.experts).sum(1) for layer in p]).float()
    balance = by.experts * (used.mean((0, 1)) * p.mean((0, 1))).sum()
    return by.balance * balance + by.router_z * torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()


@pytest.mark.parametrize("model", ODD, ids=["pre", "shared keys", "everywhere", "qk_norm", "all experts"])
def test_values_and_gradients_are_those_of_every_expert_on_every_token(model):
    params, told = drawn(model), tokens()
    trained, grads = gradients(params, told, model)
    expected, cross_entropy = plainly({name: p[0] for name, p in params.items()}, told[0], model)
    torch.testing.assert_close(trained[0], expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(loss(params, told, model, BY)[0], cross_entropy, rtol=2e-6, atol=0)
    assert bool(trained[0] > cross_entropy + 0.01)
    for name, grad in zip(params, torch.autograd.grad(expected, list(params.values())), strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=2e-4, atol=2e-6, msg=name)
        assert grad.norm() > 0, name


def test_the_gradient_of_what_is_told_has_no_balance_in_it():
    params, told = drawn(MODEL), tokens()
    one = torch.autograd.grad(loss(params, told, MODEL, BY).sum(), params["layers.0.router"])[0]
    _, cross_entropy = plainly({name: p[0] for name, p in params.items()}, told[0], MODEL)
    torch.testing.assert_close(one, torch.autograd.grad(cross_entropy, params["layers.0.router"])[0], rtol=2e-4, atol=2e-6)
    assert not torch.allclose(one, gradients(params, told)[1]["layers.0.router"], rtol=0.1)


@pytest.mark.parametrize("padded", [False, True])
def test_the_parts_pass_gradcheck_in_float64(padded):
    stream = torch.Generator().manual_seed(3)
    x, weight, w = (torch.randn(shape, generator=stream, dtype=torch.float64).requires_grad_() for shape in ((12, 3), (12, 2), (8, 5, 3)))
    expert = torch.randn(2, 6, 4, generator=stream)[:, :, :3].topk(2, dim=-1)[1]  # the last expert of either slot has no token
    places, load = placed(expert, 4, padded)
    assert bool((load[:, 3] == 0).all()) and isinstance(places.sizes, int) == padded
    assert torch.autograd.gradcheck(
        lambda x, w, weight: Collect.apply(Grouped.apply(Spread.apply(x, places), w, places.sizes), weight, places), (x, w, weight))
    assert torch.equal(Collect.apply(Spread.apply(x, places), torch.ones(12, 2, dtype=torch.float64), places), 2 * x)


def test_the_router_passes_gradcheck_in_float64_whichever_of_its_results_is_used():
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul_(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: [y for i, y in enumerate(Route.apply(x, 2)) if i != 1], logits)
    for i in (0, 2, 3):
        assert torch.autograd.gradcheck(lambda x, i=i: Route.apply(x, 2)[i], logits)
    weight, expert, p, z = Route.apply(torch.tensor([[[1.0, 3.0, 2.0, -9.0]]]), 2)
    assert expert.tolist() == [[[1, 2]]]
    torch.testing.assert_close(weight, torch.tensor([[[1 / (1 + torch.e**-1), 1 / (1 + torch.e)]]]))
    torch.testing.assert_close(p, torch.tensor([[1.0, 3.0, 2.0, -9.0]]).softmax(-1))
    torch.testing.assert_close(z, torch.tensor([1.0, 3.0, 2.0, -9.0]).logsumexp(0).square()[None])


@pytest.mark.parametrize("normalization", ["pre", "everywhere"])
def test_one_expert_is_the_dense_model_bit_for_bit(normalization):
    one = dataclasses.replace(MODEL, normalization=normalization, tied=False, mixture=Mixture(1, 1, balance=0.0, router_z=0.0))
    dense, params, told = dataclasses.replace(one, mixture=None), drawn(one, slots=2), tokens(slots=2)
    names = {"experts_gate_up": "gate_up", "experts_out": "mlp_out"}
    same = {}
    for name, p in params.items():
        *path, last = name.split(".")
        if last != "router":
            same[".".join((*path, names.get(last, last)))] = (p[:, 0] if last in names else p).detach().clone().requires_grad_()
    assert set(same) == set(parameter_shapes(dense, VOCAB))
    (trained, grads), (expected, dense_grads) = gradients(params, told, one), gradients(same, told, dense)
    assert torch.equal(trained, expected)
    for name, grad in grads.items():
        *path, last = name.split(".")
        if last == "router":
            assert not grad.any()
        else:
            assert torch.equal(grad[:, 0] if last in names else grad, dense_grads[".".join((*path, names.get(last, last)))]), name


@pytest.mark.parametrize("width, ffn, broken", [(32, 48, False), (48, 16, True), (64, 96, True)])
def test_a_slot_has_the_bits_of_a_run_alone_even_beside_one_of_nans(width, ffn, broken):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = dataclasses.replace(MODEL, width=width, ffn_width=ffn, mixture=Mixture(8, 2))
    params, told = drawn(model, slots=3), tokens(slots=3, batch=5)
    with torch.no_grad():
        for p in params.values():
            p[1] = float("nan") if broken else p[1]
    trained, grads = gradients(params, told, model, 0.01)
    assert trained.isnan().tolist() == [False, broken, False]
    for slot in (0, 2):
        solo = {name: p[slot : slot + 1].detach().clone().requires_grad_() for name, p in params.items()}
        alone, own = gradients(solo, told[slot : slot + 1], model, 0.01)
        assert torch.equal(alone[0], trained[slot])
        for name, grad in own.items():
            assert torch.equal(grad[0], grads[name][slot]), name
    torch.set_num_threads(threads)


def test_padding_as_on_a_gpu_changes_nothing_and_keeps_a_broken_slot_to_itself(monkeypatch):
    params, told = drawn(MODEL, slots=3), tokens(slots=3)
    ragged, grads = gradients(params, told)
    seen, plain = [], mixture.placed
    monkeypatch.setattr(mixture, "placed", lambda expert, experts, padded: seen.append(plain(expert, experts, True)) or seen[-1])
    padded, others = gradients(params, told)
    assert {type(places.sizes) for places, _ in seen} == {int}
    torch.testing.assert_close(padded, ragged, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        params["layers.0.experts_out"][1] = float("nan")
    broken, others = gradients(params, told)
    assert broken.isnan().tolist() == [False, True, False]
    for name, grad in grads.items():
        torch.testing.assert_close(others[name][[0, 2]], grad[[0, 2]], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_no_assignment_is_dropped_and_each_stands_with_its_expert(padded):
    expert = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(2)).topk(3, dim=-1)[1]
    places, load = placed(expert, 7, padded)
    assert places.of.shape == (150, 3) and len(places.of.unique()) == 450
    sizes = torch.tensor([places.sizes] * 21 if padded else places.sizes)
    group_R = torch.arange(21).repeat_interleave(sizes)
    assert torch.equal(group_R[places.of] % 7, expert.flatten(0, 1))
    assert torch.equal(places.token[places.of], torch.arange(150)[:, None].expand(150, 3))
    assert torch.equal(places.token // 50, group_R // 7)  # what is left over is of the own slot too
    torch.testing.assert_close(load.sum(1), torch.full((3,), 3.0))
    assert torch.equal((load * 50).round(), torch.stack([F.one_hot(e, 7).sum((0, 1)) for e in expert]).float())


def test_the_balance_loss_is_that_of_transformers_and_of_equal_use_k():
    modeling = pytest.importorskip("transformers.models.granitemoe.modeling_granitemoe")
    layers = torch.randn(3, 2, 40, 6, generator=torch.Generator().manual_seed(1)).mul_(2).requires_grad_()

    def ours(k):
        dealt = []
        for logits in layers:
            _, expert, p, z = Route.apply(logits, k)
            dealt.append(Routed(placed(expert, 6, False)[1], p, z))
        return auxiliary(dealt, Mixture(6, k, balance=0.5, router_z=0.0))

    for k in (1, 2, 5):
        theirs = torch.stack([0.5 * modeling.load_balancing_loss_func(tuple(layers[:, slot]), 6, k) for slot in range(2)])
        torch.testing.assert_close(ours(k), theirs)
        one, other = (torch.autograd.grad(x.sum(), layers)[0] for x in (ours(k), theirs))
        torch.testing.assert_close(one, other)
    alike = Routed(torch.full((1, 6), 2 / 6), torch.full((1, 6), 1 / 6), torch.tensor([9.0]))
    torch.testing.assert_close(auxiliary([alike], Mixture(6, 2, balance=1.0, router_z=0.1)), torch.tensor([2.0 + 0.9]))


def test_ties_and_logits_that_are_no_numbers_choose_some_experts():
    logits = torch.zeros(1, 4, 5)
    logits[0, 1:3] = torch.tensor([float("nan"), float("inf")])[:, None]
    weight, expert, p, z = Route.apply(logits.requires_grad_(), 3)
    assert all(len(set(row)) == 3 and 0 <= min(row) and max(row) < 5 for row in expert[0].tolist())
    torch.testing.assert_close(weight[0, [0, 3]], torch.full((2, 3), 1 / 3))
    assert placed(expert, 5, False)[1].sum() == 3 and p.isnan().all() and z.isnan().all()
    (grad,) = torch.autograd.grad((p.sum() + z.sum() + weight.sum()), logits)
    assert grad.shape == logits.shape


def test_bfloat16_stays_near_float32_and_gradients_come_back_in_float32():
    params, told = drawn(MODEL, slots=2, scale=0.1), tokens(slots=2, batch=8)
    exact, grads = gradients(params, told)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(params, told, MODEL, BY)[0]
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)
    for name, grad in zip(params, torch.autograd.grad(rough.sum(), list(params.values())), strict=True):
        assert grad.dtype == torch.float32
        # a token near a tie takes another expert, which a router's gradient shows most
        assert (grad - grads[name]).norm() < 0.3 * grads[name].norm(), name


def test_counts_are_the_literal_ones():
    # a layer: 4 · 32² attention, 2 · 32 gains, 5 · 32 router, 5 experts of 3 · 48 · 32, of which a token sees 2
    expert, rest = 3 * 48 * 32, 4 * 32**2 + 2 * 32 + 5 * 32
    assert count_parameters(MODEL, VOCAB) == {
        "total": 64 * 32 + 32 + 2 * (rest + 5 * expert), "non_embedding": 32 + 2 * (rest + 5 * expert),
        "active": 64 * 32 + 32 + 2 * (rest + 2 * expert)}
    matrices = 64 * 32 + 2 * (4 * 32**2 + 5 * 32 + 2 * expert)
    assert flops_per_token(MODEL, VOCAB)["exact"] == 3 * (2 * matrices + 2 * 2 * 16 * 32)
    assert flops_per_token(MODEL, VOCAB)["6nd"] == 6 * count_parameters(MODEL, VOCAB)["active"]
    dense = count_parameters(dataclasses.replace(MODEL, mixture=None), VOCAB)
    assert dense["active"] == dense["total"]


def test_the_matrices_of_every_expert_are_told_apart():
    shape, rows = parameter_shapes(MODEL, VOCAB)["layers.0.experts_gate_up"], fused_rows("layers.0.experts_gate_up", MODEL)
    assert (shape, rows) == ((5, 96, 32), (48, 48))
    assert matrices_in(shape, rows)[:3] == [(0, slice(0, 48)), (0, slice(48, 96)), (1, slice(0, 48))]
    assert matrices_in((5, 32, 48), fused_rows("layers.0.experts_out", MODEL)) == [(i, slice(0, 32)) for i in range(5)]
    assert matrices_in((9, 4), (4, 3, 2)) == [(slice(0, 4),), (slice(4, 7),), (slice(7, 9),)]
