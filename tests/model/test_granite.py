"""Our decoder is transformers' granite and granitemoe: logits agree to 1e-5 both ways, with odd multipliers, shared heads, either head."""

import dataclasses
import json

import pytest
import torch

from etastar.model.decoder import init_parameters, logits
from etastar.model.granite import from_granite_config, from_granite_state, granite_config, to_granite_state
from etastar.model.parametrization import Scalars
from etastar.recipe import SP, Mixture, Model

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
SHAPES = [
    (Model(width=32, depth=2, head_dim=16, context=24), Scalars(1.0, 1.0, 16**-0.5, 1.0)),
    (Model(width=48, depth=3, head_dim=8, context=24, kv_heads=2, tied=False, ffn_width=80), Scalars(12.0, 0.22, 0.0371, 6.5)),
]
MIXTURES = [
    (Model(width=32, depth=2, head_dim=16, context=24, ffn_width=48, mixture=Mixture(4, 2, router_z=0.0)), Scalars(1.0, 1.0, 0.25, 1.0)),
    (Model(width=48, depth=3, head_dim=8, context=24, kv_heads=2, tied=False, ffn_width=40,
           mixture=Mixture(7, 3, balance=0.02, router_z=0.004)), Scalars(12.0, 0.22, 0.0371, 6.5)),
]


@pytest.mark.parametrize("model, by", SHAPES, ids=["plain", "odd"])
def test_ours_in_granite(model, by):
    params = init_parameters(model, 101, SP(init_std=0.1), seed=3)
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(**granite_config(model, 101, by))).eval()
    missing, unexpected = theirs.load_state_dict(to_granite_state(params, model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == model.tied
    theirs.tie_weights()
    assert_equal_logits(params, model, by, theirs)


@pytest.mark.parametrize("model, by", SHAPES, ids=["plain", "odd"])
def test_granite_in_ours(model, by):
    torch.manual_seed(5)
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(**granite_config(model, 101, by))).eval()
    read, vocab, scalars = from_granite_config(theirs.config.to_dict())
    assert (read, vocab, scalars) == (from_granite_config(granite_config(model, 101, by))[0], 101, by)
    assert_equal_logits(from_granite_state(theirs.state_dict(), read), read, scalars, theirs)


@pytest.mark.parametrize("model, by", [*SHAPES, *MIXTURES], ids=["plain", "odd", "plain mixture", "odd mixture"])
def test_a_folder_of_ours_is_read_by_transformers(model, by, tmp_path):
    params = init_parameters(model, 101, SP(init_std=0.1), seed=3)
    (tmp_path / "config.json").write_text(json.dumps(granite_config(model, 101, by)))
    safetensors_torch.save_file(to_granite_state(params, model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert type(theirs).__name__ == ("GraniteForCausalLM" if model.mixture is None else "GraniteMoeForCausalLM")
    assert_equal_logits(params, model, by, theirs.eval())


@pytest.mark.parametrize("model, by", MIXTURES, ids=["plain", "odd"])
def test_a_folder_of_granitemoe_is_read_by_ours(model, by, tmp_path):
    torch.manual_seed(5)
    config = transformers.GraniteMoeConfig(**granite_config(model, 101, by) | {"initializer_range": 0.1})
    theirs = transformers.GraniteMoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    read, vocab, scalars = from_granite_config(json.loads((tmp_path / "config.json").read_text()))
    assert (read, vocab, scalars) == (dataclasses.replace(model, kv_heads=model.resolved_kv_heads), 101, by)
    assert_equal_logits(from_granite_state(safetensors_torch.load_file(tmp_path / "model.safetensors"), read), read, scalars, theirs)


def test_a_mixture_says_what_it_is_in_granitemoes_words():
    model, by = MIXTURES[1]
    told = granite_config(model, 101, by)
    assert (told["model_type"], told["num_local_experts"], told["num_experts_per_tok"], told["router_aux_loss_coef"]) == (
        "granitemoe", 7, 3, 0.02)
    shapes = {name: tuple(t.shape) for name, t in to_granite_state(init_parameters(model, 101, SP(), seed=0), model).items()}
    assert {name: shape for name, shape in shapes.items() if ".2.block_sparse_moe." in name} == {
        "model.layers.2.block_sparse_moe.router.layer.weight": (7, 48), "model.layers.2.block_sparse_moe.input_linear.weight": (7, 80, 48),
        "model.layers.2.block_sparse_moe.output_linear.weight": (7, 48, 40)}
    bare = {name: value for name, value in told.items() if not name.endswith("_coef")}
    assert from_granite_config(bare)[0].mixture == Mixture(7, 3, balance=0.0, router_z=0.0)


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
@pytest.mark.parametrize("left_out", [
    "tie_word_embeddings", "hidden_act", "max_position_embeddings", "rms_norm_eps", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "rope_theta", "num_key_value_heads", "attention_bias"])
def test_an_entry_that_is_left_out_is_what_transformers_takes_for_it(kind, left_out):
    (model, by), config = {"granite": (SHAPES[1], transformers.GraniteConfig),
                           "granitemoe": (MIXTURES[1], transformers.GraniteMoeConfig)}[kind]
    told = granite_config(dataclasses.replace(model, tied=True, rope_theta=500.0, norm_eps=3e-5), 101, by)
    whole, less = from_granite_config(told), {name: value for name, value in told.items() if name != left_out}
    found = from_granite_config(less)
    assert found == from_granite_config(config(**less).to_dict()) == from_granite_config(told | {left_out: None})
    assert (found == whole) == (left_out in ("hidden_act", "attention_bias"))
    assert found[0].tied == (left_out != "tie_word_embeddings")


def assert_equal_logits(params, model, by, theirs):
    tokens = torch.randint(101, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = logits({n: p[None] for n, p in params.items()}, tokens[None], model, by)[0]
        other = theirs(tokens).logits
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def test_a_granite_we_do_not_have_is_refused():
    model, by = SHAPES[0]
    with pytest.raises(ValueError, match="attention_bias=True"):
        from_granite_config(granite_config(model, 101, by) | {"attention_bias": True})
    with pytest.raises(ValueError, match="granite and granitemoe; .* model_type 'llama'"):
        from_granite_config(granite_config(model, 101, by) | {"model_type": "llama"})


@pytest.mark.parametrize("model, by", [SHAPES[0], MIXTURES[0]], ids=["dense", "mixture"])
def test_normalized_queries_and_keys_cannot_be_told_to_granite(model, by):
    with pytest.raises(ValueError, match="qk_norm=True, which normalizes them by what they are"):
        granite_config(dataclasses.replace(model, qk_norm=True), 101, by)
