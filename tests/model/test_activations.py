"""Activations by name: their logits are the decoder's, and each is what its name says."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from etastar.model.activations import activations
from etastar.model.decoder import logits
from etastar.model.parametrization import Scalars, scalars
from etastar.model.shapes import parameter_shapes, role_of
from etastar.recipe import SP, Mixture, Model

MODEL = Model(width=32, depth=2, head_dim=16, context=16)
MIXED = dataclasses.replace(MODEL, mixture=Mixture(5, 2))
PLAIN = scalars(SP(), MODEL)
ODD = Scalars(embedding=3.0, residual=0.7, attention=0.11, logits=2.5)
SHAPES = {
    "pre": MODEL,
    "untied": dataclasses.replace(MODEL, tied=False),
    "grouped": Model(width=48, depth=1, head_dim=8, context=16, kv_heads=2),
    "everywhere": dataclasses.replace(MODEL, normalization="everywhere"),
    "qk_norm": dataclasses.replace(MODEL, qk_norm=True),
    "mixture": MIXED,
    "mixture, everywhere": dataclasses.replace(MIXED, normalization="everywhere", tied=False),
}


def given(model, seed=0):
    """Parameters large enough that no activation is small, gains that are not 1, and tokens (3, 13)."""
    stream = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(shape, generator=stream) * 0.2 + (role_of(name) == "norm")
              for name, shape in parameter_shapes(model, 40).items()}
    return params, torch.randint(40, (3, 13), generator=stream)


def rms(x):
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize("by", [PLAIN, ODD], ids=["plain", "odd multipliers"])
@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
def test_the_logits_are_what_the_decoder_computes(model, by):
    params, tokens = given(model)
    theirs_BxTxV = logits({name: p[None] for name, p in params.items()}, tokens[None], model, by)[0]
    torch.testing.assert_close(activations(params, tokens, model, by)["logits"], theirs_BxTxV, rtol=1e-5, atol=1e-5)


def test_names_and_shapes_in_the_order_of_computing():
    params, tokens = given(MIXED)
    found = activations(params, tokens, MIXED, PLAIN)
    layer = ("attention_logits", "attention", "router", "mlp", "stream")
    assert list(found) == ["embedding", *(f"layers.{i}.{name}" for i in (0, 1) for name in layer), "final", "logits"]
    shapes = {"attention_logits": (3, 2, 13, 13), "router": (39, 5), "logits": (3, 13, 40)}
    assert all(x.shape == shapes.get(name.split(".")[-1], (3, 13, 32)) and not x.requires_grad for name, x in found.items())


@pytest.mark.parametrize("model", [MODEL, MIXED], ids=["dense", "mixture"])
def test_the_stream_is_the_sum_of_what_is_added_to_it(model):
    params, tokens = given(model)
    found = activations(params, tokens, model, ODD)
    torch.testing.assert_close(found["embedding"], 3.0 * params["embedding"][tokens])
    stream = found["embedding"]
    for i in range(model.depth):
        stream = stream + found[f"layers.{i}.attention"] + found[f"layers.{i}.mlp"]
        torch.testing.assert_close(found[f"layers.{i}.stream"], stream)
    torch.testing.assert_close(rms(found["final"] / params["final_norm"]), torch.ones(3, 13), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["logits"] * 2.5, found["final"] @ params["embedding"].T)


def test_multipliers_act_where_they_are_said_to():
    params, tokens = given(MODEL)
    one = activations(params, tokens, MODEL, PLAIN)
    half = activations(params, tokens, MODEL, dataclasses.replace(PLAIN, residual=0.5, attention=PLAIN.attention / 4))
    for name in ("attention_logits", "attention"):
        assert not torch.allclose(one[f"layers.0.{name}"], half[f"layers.0.{name}"])
    seen = one["layers.0.attention_logits"].isfinite()
    torch.testing.assert_close(one["layers.0.attention_logits"][seen], 4 * half["layers.0.attention_logits"][seen])
    torch.testing.assert_close(one["embedding"], half["embedding"], rtol=0, atol=0)
    halved = activations(params, tokens, MODEL, dataclasses.replace(PLAIN, residual=0.5))
    torch.testing.assert_close(halved["layers.0.attention"], one["layers.0.attention"] / 2)


def test_attention_logits_are_those_of_keys_no_later_than_the_query():
    params, tokens = given(MODEL)
    logits_BxAxTxT = activations(params, tokens, MODEL, PLAIN)["layers.0.attention_logits"]
    assert (logits_BxAxTxT.isneginf() == torch.ones(13, 13, dtype=torch.bool).triu(1)).all() and not logits_BxAxTxT.isnan().any()
    # A token at position 0 is not turned: the product of its query and key as they are
    h_D = rms(params["embedding"][tokens[0, 0]])
    x_D = params["embedding"][tokens[0, 0]] / math.sqrt(float(h_D) ** 2 + 1e-5) * params["layers.0.attention_norm"]
    q, k = params["layers.0.qkv"][:16] @ x_D, params["layers.0.qkv"][32:48] @ x_D
    assert float(logits_BxAxTxT[0, 0, 0, 0]) == pytest.approx(float(q @ k) / 4, rel=1e-4)


def test_queries_and_keys_normalized_have_logits_no_larger_than_the_root_of_their_size():
    params, tokens = given(SHAPES["qk_norm"])
    params["layers.0.qkv"] *= 1000
    logits_BxAxTxT = activations(params, tokens, SHAPES["qk_norm"], PLAIN)["layers.0.attention_logits"]
    largest = float(logits_BxAxTxT[logits_BxAxTxT.isfinite()].abs().max())
    assert 1.0 < largest <= 16 * PLAIN.attention * (1 + 1e-5)
    diagonal_BxAxT = logits_BxAxTxT.diagonal(dim1=-2, dim2=-1)
    assert diagonal_BxAxT.std() > 0  # a query is not its own key


def test_a_mixture_token_by_token():
    params, tokens = given(MIXED)
    found = activations(params, tokens, MIXED, dataclasses.replace(PLAIN, residual=1.0))
    before = (found["embedding"] + found["layers.0.attention"]).flatten(0, 1)
    h_NxD = before / torch.sqrt(before.square().mean(-1, keepdim=True) + 1e-5) * params["layers.0.mlp_norm"]
    for h_D, logit_E, added_D in zip(h_NxD, found["layers.0.router"], found["layers.0.mlp"].flatten(0, 1), strict=True):
        torch.testing.assert_close(logit_E, params["layers.0.router"] @ h_D, rtol=1e-4, atol=1e-5)
        first, second = sorted(range(5), key=lambda e: -float(logit_E[e]))[:2]
        share = 1 / (1 + math.exp(float(logit_E[second] - logit_E[first])))
        expected_D = torch.zeros(32)
        for expert, weight in ((first, share), (second, 1 - share)):
            gate, up = (params["layers.0.experts_gate_up"][expert] @ h_D).chunk(2)
            expected_D += weight * (params["layers.0.experts_out"][expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(added_D, expected_D, rtol=1e-4, atol=1e-4)


def test_a_single_expert_is_the_mlp():
    params, tokens = given(MODEL)
    single = dataclasses.replace(MODEL, mixture=Mixture(1, 1))
    alike = {name: params[name] for name in params if ".gate_up" not in name and ".mlp_out" not in name}
    for i in range(2):
        alike |= {f"layers.{i}.router": torch.randn(1, 32), f"layers.{i}.experts_gate_up": params[f"layers.{i}.gate_up"][None],
                  f"layers.{i}.experts_out": params[f"layers.{i}.mlp_out"][None]}
    torch.testing.assert_close(activations(alike, tokens, single, ODD)["logits"], activations(params, tokens, MODEL, ODD)["logits"])
