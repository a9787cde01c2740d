"""Backward passes by hand against autograd's own, and the bits of a slot against a run alone."""

import pytest
import torch
import torch.nn.functional as F

from etastar.model.decoder import loss
from etastar.model.functions import LOSS_ROWS, Attention, Gate, Linear, Normalize, Surprise, Turn, product
from etastar.model.parametrization import Scalars
from etastar.model.shapes import parameter_shapes
from etastar.recipe import Model


def leaf(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


TARGETS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
ANGLE = torch.rand(5, 1, 3, generator=torch.Generator().manual_seed(2)).repeat(1, 4, 2)
SIGN = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
PAIRS = {
    "linear": (lambda x, w: Linear.apply(x, w), lambda x, w: x @ w.mT, [(2, 7, 6), (2, 9, 6)]),
    "normalize": (lambda x: Normalize.apply(x, 0.1), lambda x: F.rms_norm(x, x.shape[-1:], eps=0.1), [(2, 7, 6)]),
    "turn": (lambda x: Turn.apply(x, ANGLE.cos(), ANGLE.sin() * SIGN), lambda x: turned(x, ANGLE.cos(), ANGLE.sin()), [(3, 5, 4, 6)]),
    "surprise": (lambda x, w: Surprise.apply(x, w, TARGETS)[0],
                 lambda x, w: F.cross_entropy((x @ w.mT).flatten(0, 1), TARGETS.flatten(), reduction="none").view(2, 7).mean(1),
                 [(2, 7, 6), (2, 11, 6)]),
    "gate": (Gate.apply, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [(2, 7, 10)]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_are_autograds_whatever_comes_from_above(name):
    ours, theirs, shapes = PAIRS[name]
    given = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    one, other = ours(*given), theirs(*given)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    above = leaf(*one.shape, seed=9).detach()
    for a, b in zip(torch.autograd.grad(one, given, above), torch.autograd.grad(other, given, above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("length", [1, 5, 64, 150])
def test_attention_is_sdpa_of_turned_queries_and_keys_around_any_number_of_blocks(length):
    x, above = leaf(3, length, 3, 2, 8), leaf(3, length, 2, 8, seed=9).detach()
    angle = torch.rand(length, 4, generator=torch.Generator().manual_seed(2)) * 6
    both = torch.cat((angle, angle), 1)[:, None]

    def theirs(x):
        q, k, v = x.unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (turned(q, both.cos(), both.sin()), turned(k, both.cos(), both.sin()), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)

    one, other = Attention.apply(x, both[:, 0].cos(), angle.sin(), 0.3), theirs(x)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, above)[0] for y in (one, other)), rtol=1e-4, atol=1e-5)


def test_surprise_in_parts_is_surprise_at_once():
    rows = LOSS_ROWS * 2 + 3
    x, w = leaf(2, rows, 6), leaf(2, 11, 6, seed=1)
    targets = torch.randint(11, (2, rows), generator=torch.Generator().manual_seed(1))
    mean, each = Surprise.apply(x, w, targets)
    logits = (x @ w.mT).flatten(0, 1)
    torch.testing.assert_close(each.flatten(), F.cross_entropy(logits, targets.flatten(), reduction="none"), rtol=1e-5, atol=1e-6)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="none").view(2, rows).mean(1)
    above = torch.tensor([2.0, -0.5])
    for a, b in zip(torch.autograd.grad(mean, (x, w), above), torch.autograd.grad(expected, (x, w), above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not each.requires_grad


def test_surprise_of_what_has_no_probability_in_float32_is_still_exact():
    x, w = torch.tensor([[[1.0]]]), torch.tensor([[[0.0], [300.0], [299.0]]])
    expected = 300.0 + torch.tensor(1.0 + torch.e ** -1).log()
    torch.testing.assert_close(Surprise.apply(x, w, torch.tensor([[0]]))[1], expected.view(1, 1))


@pytest.mark.parametrize("width, head_dim, vocab, context, batch", [
    (32, 16, 512, 64, 32), (48, 16, 512, 32, 5), (64, 32, 1024, 64, 16), (128, 32, 1024, 128, 4)])
def test_a_slot_of_eight_has_the_gradient_bits_of_a_run_alone_at_training_shapes(width, head_dim, vocab, context, batch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Model(width=width, depth=1, head_dim=head_dim, context=context, tied=width == 48)
    by = Scalars(3.0, 0.5, head_dim**-0.5, 2.0)
    params = {name: leaf(8, *shape, seed=i, scale=0.1) for i, (name, shape) in enumerate(parameter_shapes(model, vocab).items())}
    tokens = torch.randint(vocab, (8, batch, context + 1), generator=torch.Generator().manual_seed(3))
    stacked = loss(params, tokens, model, by)
    grads = dict(zip(params, torch.autograd.grad(stacked.sum(), list(params.values())), strict=True))
    for slot in (0, 5):
        solo = {name: p[slot : slot + 1].detach().clone().requires_grad_() for name, p in params.items()}
        alone = loss(solo, tokens[slot : slot + 1], model, by)
        assert torch.equal(alone[0], stacked[slot])
        for name, grad in zip(solo, torch.autograd.grad(alone.sum(), list(solo.values())), strict=True):
            assert torch.equal(grad[0], grads[name][slot]), name
    torch.set_num_threads(threads)


def test_bfloat16_stays_near_float32_and_gradients_come_back_in_float32():
    model, by = Model(width=32, depth=2, head_dim=16, context=16, kv_heads=1), Scalars(1.0, 1.0, 0.25, 1.0)
    params = {name: leaf(2, *shape, seed=i, scale=0.1) for i, (name, shape) in enumerate(parameter_shapes(model, 64).items())}
    tokens = torch.randint(64, (2, 3, 17), generator=torch.Generator().manual_seed(3))
    exact = loss(params, tokens, model, by)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss(params, tokens, model, by)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)
    for a, b in zip(*(torch.autograd.grad(mean.sum(), list(params.values())) for mean in (rough, exact)), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()


def test_a_slot_of_nans_leaves_the_others_products_alone():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    clean = product(a, b)
    a[1] = b[1] = float("nan")
    mixed = product(a, b)
    assert torch.equal(mixed[0], clean[0]) and torch.equal(mixed[2], clean[2]) and mixed[1].isnan().all()
