"""The z loss of the logits: in what is trained and its gradient, and in nothing that is told."""

import pytest
import torch
import torch.nn.functional as F

from etastar.model.decoder import init_parameters, loss, objective, stack
from etastar.model.functions import LOSS_ROWS, Surprise
from etastar.model.parametrization import scalars
from etastar.recipe import SP, Model

MODEL = Model(width=32, depth=1, head_dim=16, context=16)
BY = scalars(SP(), MODEL)


def given(rows, slots=2, vocab=11):
    stream = torch.Generator().manual_seed(4)
    x, w = torch.randn(slots, rows, 6, generator=stream), torch.randn(slots, vocab, 6, generator=stream)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(vocab, (slots, rows), generator=stream)


@pytest.mark.parametrize("rows", [7, 2 * LOSS_ROWS + 3], ids=["at once", "in parts"])
@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_value_and_gradient_are_autograds_and_what_is_told_is_cross_entropy(rows, z_loss):
    x, w, targets = given(rows)
    trained, each = Surprise.apply(x, w, targets, z_loss)
    logits = x @ w.mT
    told = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    expected = told.mean(1) + z_loss * logits.logsumexp(-1).square().mean(1)
    torch.testing.assert_close(each, told, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=0)
    above = torch.tensor([2.0, -0.5])
    for a, b in zip(torch.autograd.grad(trained, (x, w), above), torch.autograd.grad(expected, (x, w), above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_gradient_by_hand():
    # two logits of 0: log Z = log 2, p = ½; the slope is ½ (1 + 2 z log 2) less the target
    x, w = torch.ones(1, 1, 1, requires_grad=True), torch.zeros(1, 2, 1, requires_grad=True)
    trained, _ = Surprise.apply(x, w, torch.tensor([[1]]), 0.25)
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(trained, (log2 + 0.25 * log2**2)[None])
    (to_w,) = torch.autograd.grad(trained.sum(), w)
    torch.testing.assert_close(to_w.flatten(), torch.stack([0.5 + 0.25 * log2, -0.5 + 0.25 * log2]))


def test_without_a_z_loss_no_bit_moves_and_all_three_losses_are_one():
    x, w, targets = given(40)
    with_zero, without = Surprise.apply(x, w, targets, 0.0), Surprise.apply(x, w, targets)
    assert torch.equal(with_zero[0], without[0]) and torch.equal(with_zero[1], without[1])
    assert all(torch.equal(*pair) for pair in zip(*(torch.autograd.grad(y[0].sum(), (x, w)) for y in (with_zero, without)), strict=True))
    params = stack([init_parameters(MODEL, 64, SP(), seed) for seed in (0, 1)])
    tokens = torch.randint(64, (2, 3, 17), generator=torch.Generator().manual_seed(1))
    plain = loss(params, tokens, MODEL, BY)
    trained, told = objective(params, tokens, MODEL, BY)
    assert torch.equal(trained, plain) and torch.equal(told, plain)
    trained, told = objective(params, tokens, MODEL, BY, z_loss=0.1)
    assert torch.equal(told, plain) and bool((trained > plain + 1).all())  # log Z of a fresh model is log 64, whose square is 17.3


def test_a_logit_beyond_float32_s_exponential_has_its_log_z():
    x, w = torch.tensor([[[1.0]]]), torch.tensor([[[0.0], [300.0], [299.0]]])
    log_z = 300.0 + torch.tensor(1.0 + torch.e ** -1).log()
    torch.testing.assert_close(Surprise.apply(x, w, torch.tensor([[1]]), 0.1)[0], (log_z - 300.0 + 0.1 * log_z**2)[None])
