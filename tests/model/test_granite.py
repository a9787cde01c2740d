"""Our decoder is transformers' granite: logits agree to 1e-5 both ways, with odd multipliers, shared heads, either head."""

import pytest
import torch

from etastar.model.decoder import init_parameters, logits
from etastar.model.granite import from_granite_config, from_granite_state, granite_config, to_granite_state
from etastar.model.parametrization import Scalars
from etastar.recipe import SP, Model

transformers = pytest.importorskip("transformers")
SHAPES = [
    (Model(width=32, depth=2, head_dim=16, context=24), Scalars(1.0, 1.0, 16**-0.5, 1.0)),
    (Model(width=48, depth=3, head_dim=8, context=24, kv_heads=2, tied=False, ffn_width=80), Scalars(12.0, 0.22, 0.0371, 6.5)),
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
