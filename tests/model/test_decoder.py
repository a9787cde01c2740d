"""The decoder: counts by hand, causality, seeds keyed by name, and slots that do not feel each other."""

import dataclasses
import math

import pytest
import torch

from etastar.model.decoder import Decoder, init_parameters, logits, loss, stack, token_losses, unstack
from etastar.model.parametrization import as_table, numbers, scalars
from etastar.model.shapes import count_parameters, flops_per_token, parameter_shapes
from etastar.recipe import SP, AdamW, Corpus, Mixture, Model, Recipe
from etastar.schedules import Constant

MODEL = Model(width=32, depth=2, head_dim=16, context=16, tied=False)
BY = scalars(SP(), MODEL)


def stacked(seeds, model=MODEL, vocab=64):
    return stack([init_parameters(model, vocab, SP(init_std=0.1), s) for s in seeds])


def tokens(slots=1, batch=3, length=17, seed=0):
    return torch.randint(64, (slots, batch, length), generator=torch.Generator().manual_seed(seed))


def test_parameter_counts_by_hand_and_of_a_published_model():
    # 33M of arXiv 2405.18392 Table: 33,479,040 with vocab 50304, tied, ffn 1024
    assert count_parameters(Model(width=384, depth=8, head_dim=64, ffn_width=1024), 50_304)["total"] == 33_479_040
    assert count_parameters(Model(width=768, depth=24, head_dim=64, ffn_width=2048), 50_304)["total"] == 208_540_416
    block = 3 * 32 * 32 + 32 * 32 + 3 * 32 * 96 + 2 * 32
    assert count_parameters(MODEL, 64) == {"total": 2 * 64 * 32 + 2 * block + 32, "non_embedding": 2 * block + 32,
                                           "active": 2 * 64 * 32 + 2 * block + 32}


def test_flops_by_hand():
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 64 * 32
    assert flops_per_token(MODEL, 64)["exact"] == 3 * (2 * matrices + 2 * 2 * 16 * 32)
    assert flops_per_token(MODEL, 64)["6nd"] == 6 * count_parameters(MODEL, 64)["total"]


def test_standard_parametrization_literally():
    table = numbers(SP(init_std=0.02), MODEL, 64)
    assert table["layers.1.attention_out"].init_std == table["layers.0.mlp_out"].init_std == 0.02 / 2
    assert table["embedding"].init_std == table["layers.0.qkv"].init_std == table["head"].init_std == 0.02
    assert table["final_norm"].init_std is None and list(table) == list(parameter_shapes(MODEL, 64))
    assert {n for n, row in table.items() if row.decay_multiplier == 0} == {"embedding", "final_norm"} | {
        f"layers.{i}.{n}_norm" for i in range(2) for n in ("attention", "mlp")}
    recipe = Recipe(model=MODEL, corpus=Corpus("synthetic", vocab=64), optimizer=AdamW(weight_decay=0.3), schedule=Constant(),
                    peak_lr=0.5, batch_tokens=16, horizon_tokens=16)
    assert as_table(recipe).set_index("parameter").loc["layers.0.qkv", ["peak_lr", "weight_decay"]].tolist() == [0.5, 0.3]


def test_initial_parameters_have_the_deviation_asked_for_and_streams_of_their_own():
    params = init_parameters(Model(width=128, depth=2, head_dim=32), 512, SP(init_std=0.02), seed=1)
    assert float(params["layers.0.qkv"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(params["layers.0.mlp_out"].std()) == pytest.approx(0.01, rel=0.02)
    assert torch.equal(params["final_norm"], torch.ones(128))
    deeper = init_parameters(Model(width=128, depth=3, head_dim=32), 512, SP(init_std=0.02), seed=1)
    assert torch.equal(params["layers.1.qkv"], deeper["layers.1.qkv"]) and torch.equal(params["embedding"], deeper["embedding"])
    other = init_parameters(Model(width=128, depth=2, head_dim=32), 512, SP(init_std=0.02), seed=2)
    assert not torch.equal(params["embedding"], other["embedding"])
    assert not torch.equal(params["layers.0.qkv"], params["layers.1.qkv"])


def test_unstacking_gives_back_copies_of_what_was_stacked():
    params, alone = stacked([3, 4]), init_parameters(MODEL, 64, SP(init_std=0.1), 4)
    taken = unstack(params, 1)
    assert list(taken) == list(alone) and all(torch.equal(taken[name], alone[name]) for name in alone)
    taken["embedding"].zero_()
    assert torch.equal(params["embedding"][1], alone["embedding"]) and taken["layers.0.qkv"].is_contiguous()


def test_the_future_is_not_seen():
    params, t = stacked([0]), tokens(length=16)
    changed = t.clone()
    changed[..., 9:] = (changed[..., 9:] + 1) % 64
    a, b = logits(params, t, MODEL, BY), logits(params, changed, MODEL, BY)
    assert torch.equal(a[:, :, :9], b[:, :, :9]) and not torch.equal(a[:, :, 9:], b[:, :, 9:])


def test_a_fresh_model_knows_nothing():
    params = {n: p * (0.01 if n == "head" else 1) for n, p in stacked([0]).items()}
    assert float(loss(params, tokens(batch=64), MODEL, BY)) == pytest.approx(math.log(64), abs=0.01)


def test_loss_is_the_mean_of_token_losses():
    params, t = stacked([0, 1]), tokens(slots=2)
    each = token_losses(params, t, MODEL, BY)
    assert each.shape == (2, 3, 16)
    torch.testing.assert_close(loss(params, t, MODEL, BY), each.mean((1, 2)))


@pytest.mark.parametrize("model", [MODEL, Model(width=48, depth=1, head_dim=8, context=40, kv_heads=3),
                                   Model(width=128, depth=1, head_dim=32, context=24)], ids=str)
def test_a_slot_equals_the_solo_run_bit_for_bit_forward_and_backward(model):
    torch.set_num_threads(1)
    params, t = stacked(range(8), model), tokens(slots=8, batch=5, length=model.context + 1)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    all_losses = loss(leaves, t, model, BY)
    all_losses.sum().backward()
    for slot in (0, 3, 7):
        solo = {n: p[slot : slot + 1].clone().requires_grad_() for n, p in params.items()}
        one = loss(solo, t[slot : slot + 1], model, BY)
        one.sum().backward()
        assert torch.equal(one[0], all_losses[slot])
        for name in solo:
            assert torch.equal(solo[name].grad[0], leaves[name].grad[slot]), name


def test_the_module_is_the_same_model():
    decoder = Decoder(MODEL, 64, SP(init_std=0.1), seed=4)
    t = tokens()[0]
    torch.testing.assert_close(decoder(t), logits(stacked([4]), t[None], MODEL, BY)[0], rtol=0, atol=0)
    assert set(decoder.parameters_by_name()) == set(parameter_shapes(MODEL, 64))


# A mixture takes all of its experts, since rounding may take another one of some.
HALVES = [MODEL, Model(width=48, depth=2, head_dim=8, context=16, kv_heads=3),
          dataclasses.replace(MODEL, ffn_width=48, mixture=Mixture(5, 5)), dataclasses.replace(MODEL, qk_norm=True),
          dataclasses.replace(MODEL, normalization="everywhere")]


@pytest.mark.parametrize("model", HALVES, ids=["own keys", "grouped keys", "mixture", "qk norm", "everywhere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_decoder_of_another_precision_has_the_logits_and_gradients_of_its_weights(model, dtype):
    own = Decoder(model, 64, SP(init_std=0.1), seed=4).to(dtype)
    exact, t = Decoder(model, 64, SP(), {name: p.detach().float() for name, p in own.parameters_by_name().items()}), tokens()[0]
    mine, wanted = own(t), exact(t)
    assert mine.dtype == dtype and wanted.dtype == torch.float32
    tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
    assert (mine - wanted).square().mean().sqrt() < tolerance * wanted.std()
    for out in (mine, wanted):
        torch.nn.functional.cross_entropy(out.flatten(0, 1).float(), t.flatten()).backward()
    for name, p in exact.parameters_by_name().items():
        found = own.parameters_by_name()[name].grad
        assert found.dtype == dtype and (found - p.grad).norm() < 5 * tolerance * p.grad.norm(), name


def test_a_stream_whose_squares_overflow_half_precision_is_normalized_all_the_same():
    """Entries of 300 and more, as embedding multipliers make them: squares in float16 end at 65,504."""
    own = Decoder(MODEL, 64, SP(init_std=0.1), seed=4).half()
    own.scalars = dataclasses.replace(BY, embedding=6000.0)
    exact = Decoder(MODEL, 64, SP(), {name: p.detach().float() for name, p in own.parameters_by_name().items()})
    exact.scalars = own.scalars
    found, wanted = own(tokens()[0]).float(), exact(tokens()[0])
    assert (found - wanted).square().mean().sqrt() < 0.01 * wanted.std()


def test_what_the_caller_says_of_autocast_stands():
    decoder, t = Decoder(MODEL, 64, SP(init_std=0.1), seed=4), tokens()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(t).dtype == torch.bfloat16
    assert decoder(t).dtype == torch.float32
