"""Normalization everywhere, layer-group rates and initialization by dual norm: against plain torch, and what they refuse."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import etastar as es
from etastar.model.decoder import Decoder, init_parameters
from etastar.model.functions import NormalizeFirst
from etastar.model.granite import granite_config
from etastar.model.parametrization import Scalars, as_table, numbers
from etastar.model.shapes import fused_rows, parameter_shapes

MODEL = es.Model(width=24, depth=2, head_dim=8, context=12, tied=False, kv_heads=1, normalization="everywhere", norm_eps=1e-20)
VOCAB = 40


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def turned(x_BxAxTxH, theta=10_000.0):
    """Rotary positions by complex numbers, the halves of a head being real and imaginary parts."""
    *_, length, size = x_BxAxTxH.shape
    angle = torch.outer(torch.arange(length), theta ** (-torch.arange(0, size, 2) / size))
    a, b = x_BxAxTxH.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def plainly(params, tokens_BxT, model):
    """Logits as arXiv 2510.03871 §2.2 has them, written with nothing of ours."""
    x, (batch, length) = params["embedding"][tokens_BxT], tokens_BxT.shape
    for i in range(model.depth):
        of = {name: params[f"layers.{i}.{name}"] for name in ("qkv", "attention_out", "gate_up", "mlp_out")}
        parts = (norm(x) @ of["qkv"].T).view(batch, length, -1, model.head_dim)
        q, k, v = (norm(p).transpose(1, 2) for p in parts.split([model.heads, 1, 1], dim=2))
        h = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + norm(h.transpose(1, 2).reshape(batch, length, -1)) @ of["attention_out"].T
        gate, up = (norm(x) @ of["gate_up"].T).chunk(2, -1)
        x = x + norm(F.silu(gate) * up) @ of["mlp_out"].T
    return norm(x) @ params["head"].T


def test_the_decoder_normalized_everywhere_is_the_plain_one():
    params = init_parameters(MODEL, VOCAB, es.UnitNorm(), seed=1)
    tokens = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = Decoder(MODEL, VOCAB, es.UnitNorm(), params)(tokens)
    torch.testing.assert_close(ours, plainly(params, tokens, MODEL), rtol=1e-4, atol=1e-5)
    other = dataclasses.replace(MODEL, normalization="pre")
    assert not any(name.endswith("norm") for name in parameter_shapes(MODEL, VOCAB))
    assert sum(name.endswith("norm") for name in parameter_shapes(other, VOCAB)) == 5


@pytest.mark.parametrize("kv_heads, context", [(None, 12), (1, 12), (None, 300)], ids=["by hand", "shared keys", "long context"])
def test_queries_and_keys_alone_are_normalized_before_they_turn(kv_heads, context):
    model = es.Model(width=24, depth=1, head_dim=8, context=context, kv_heads=kv_heads, qk_norm=True, norm_eps=1e-6)
    params = init_parameters(model, VOCAB, es.SP(init_std=0.3), seed=1)
    assert list(params) == list(parameter_shapes(dataclasses.replace(model, qk_norm=False), VOCAB))  # it has no gain
    tokens = torch.randint(VOCAB, (2, context), generator=torch.Generator().manual_seed(2))
    of = {name.removeprefix("layers.0."): p for name, p in params.items()}
    x, kinds = of["embedding"][tokens], [model.heads, *[model.resolved_kv_heads] * 2]
    q, k, v = (p.transpose(1, 2) for p in (norm(x) @ of["qkv"].T).view(2, context, -1, 8).split(kinds, dim=2))
    h = F.scaled_dot_product_attention(turned(norm(q)), turned(norm(k)), v, is_causal=True, enable_gqa=True)
    x = x + h.transpose(1, 2).reshape(2, context, -1) @ of["attention_out"].T
    gate, up = (norm(x) @ of["gate_up"].T).chunk(2, -1)
    x = x + (F.silu(gate) * up) @ of["mlp_out"].T
    with torch.no_grad():
        ours, other = (Decoder(m, VOCAB, es.SP(), params)(tokens) for m in (model, dataclasses.replace(model, qk_norm=False)))
    torch.testing.assert_close(ours, norm(x) @ of["embedding"].T, rtol=1e-3, atol=1e-4)
    assert (ours - other).abs().max() > 0.01


def test_the_first_heads_are_normalized_with_autograds_gradient_and_the_others_pass():
    x, above = (torch.randn(2, 5, 7, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: NormalizeFirst.apply(x, 5, 0.1), x)
    ours, (grad,) = NormalizeFirst.apply(x, 5, 0.1), torch.autograd.grad(NormalizeFirst.apply(x, 5, 0.1), x, above)
    torch.testing.assert_close(ours[:, :, :5], F.rms_norm(x[:, :, :5], (4,), eps=0.1))
    assert torch.equal(ours[:, :, 5:], x[:, :, 5:]) and torch.equal(grad[:, :, 5:], above[:, :, 5:])


def test_scores_of_normalized_queries_and_keys_are_bounded_whatever_the_weights():
    model = es.Model(width=24, depth=1, head_dim=8, context=12, qk_norm=True)
    params = init_parameters(model, VOCAB, es.SP(init_std=0.3), seed=1)
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    larger = dict(params) | {"layers.0.qkv": torch.cat([params["layers.0.qkv"][:48] * 100, params["layers.0.qkv"][48:]])}
    with torch.no_grad():
        one, other = (Decoder(model, VOCAB, es.SP(), p)(tokens) for p in (params, larger))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # queries and keys a hundred times as long change nothing but ε's share


def test_a_fused_parameter_is_told_apart_into_its_matrices():
    assert fused_rows("layers.1.qkv", MODEL) == (24, 8, 8) and fused_rows("layers.0.gate_up", MODEL) == (64, 64)
    assert fused_rows("layers.0.mlp_out", MODEL) == fused_rows("head", MODEL) == ()
    assert all(sum(row.rows) in (0, row.shape[0]) for row in numbers(es.UnitNorm(), MODEL, VOCAB).values())


def recipe(**changes):
    given = dict(model=dataclasses.replace(MODEL, kv_heads=None), corpus=es.Corpus("synthetic", vocab=VOCAB), optimizer=es.Scion(),
                 schedule=es.Constant(), parametrization=es.UnitNorm(), peak_lr=0.5, batch_tokens=48, horizon_tokens=480)
    return es.Recipe(**(given | changes))


def test_ratios_multiply_the_rates_of_their_groups_and_are_part_of_the_id():
    table = as_table(recipe(lr_ratios=(2.0, 0.125, 4.0))).set_index("parameter").peak_lr
    assert (table["embedding"], table["layers.0.qkv"], table["head"]) == (1.0, 0.0625, 2.0)
    pre = recipe(model=dataclasses.replace(MODEL, kv_heads=None, normalization="pre"), lr_ratios=(2.0, 0.125, 4.0))
    assert as_table(pre).set_index("parameter").peak_lr["final_norm"] == 0.0625  # gains go with the blocks
    assert recipe().run_id == recipe(lr_ratios=(1.0, 1.0, 1.0)).run_id != recipe(lr_ratios=(1.0, 0.5, 1.0)).run_id
    assert es.Recipe.from_json(recipe(lr_ratios=(1.0, 0.5, 1.0)).to_json()) == recipe(lr_ratios=(1.0, 0.5, 1.0))


@pytest.mark.parametrize("optimizer", [es.Scion(), es.AdamW(weight_decay=0.0, clip_norm=None)], ids=["scion", "adamw"])
def test_a_group_with_ratio_zero_stays_and_others_move_as_without_it(optimizer, tmp_path):
    corpus = es.Corpus("synthetic", vocab=64, options=(("tokens", 50_000), ("validation_tokens", 4096)))
    frozen, free = es.run([recipe(corpus=corpus, optimizer=optimizer, horizon_tokens=48, peak_lr=2**-6, lr_ratios=ratios)
                           for ratios in ((1.0, 0.0, 1.0), (1.0, 1.0, 1.0))], store=tmp_path, workers=1)
    start = init_parameters(frozen.recipe.model, 64, es.UnitNorm(), 0)
    one, other = frozen.model().parameters_by_name(), free.model().parameters_by_name()
    for name in start:
        if name.startswith("layers"):
            assert torch.equal(one[name], start[name]) and not torch.equal(other[name], start[name])
        else:
            assert torch.equal(one[name], other[name])  # the first step is of the same gradients


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="lr_ratios"):
        recipe(lr_ratios=(1.0, -0.5, 1.0))
    with pytest.raises(ValueError, match='train with "pre" to export'):
        granite_config(MODEL, VOCAB, Scalars(1.0, 1.0, 0.3, 1.0))
    with pytest.raises(ValueError, match="pre.*everywhere"):
        es.Model(width=32, depth=1, head_dim=16, normalization="nowhere")
