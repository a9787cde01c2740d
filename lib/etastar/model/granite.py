"""Our decoder's twin: parameters and settings of transformers' `granite` and `granitemoe`, both ways, without importing transformers.

Names are those of checkpoints as they lie on the disk; transformers calls a mixture's parameters otherwise once it has read them.
"""

import torch

from etastar.model.parametrization import Scalars
from etastar.recipe import Mixture, Model

_LAYER = {"attention_norm": "input_layernorm", "attention_out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm"}
_DENSE = {"mlp_out": "mlp.down_proj"}
_MIXTURE = {"router": "block_sparse_moe.router.layer", "experts_gate_up": "block_sparse_moe.input_linear",
            "experts_out": "block_sparse_moe.output_linear"}
_KINDS = {"granite": "GraniteForCausalLM", "granitemoe": "GraniteMoeForCausalLM"}
# What transformers takes for an entry that config.json leaves out; the head is then not tied.
_UNSAID = {"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
           "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0}


def granite_config(model: Model, vocab: int, by: Scalars) -> dict:
    """config.json of a GraniteForCausalLM, or of a GraniteMoeForCausalLM for a mixture, with this shape and these multipliers.

    Raises ValueError for a shape that neither has. The router's z loss has no name there; "router_z_loss_coef" is ours.
    """
    _refuse_normalization(model)
    kind = "granite" if model.mixture is None else "granitemoe"
    own = {"mlp_bias": False} if model.mixture is None else {
        "num_local_experts": model.mixture.experts, "num_experts_per_tok": model.mixture.experts_per_token,
        "router_aux_loss_coef": model.mixture.balance, "router_z_loss_coef": model.mixture.router_z,
    }
    return {
        "architectures": [_KINDS[kind]], "model_type": kind, "vocab_size": vocab, "hidden_size": model.width,
        "num_hidden_layers": model.depth, "num_attention_heads": model.heads, "num_key_value_heads": model.resolved_kv_heads,
        "intermediate_size": model.resolved_ffn_width, "max_position_embeddings": model.context, "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta, "tie_word_embeddings": model.tied, "hidden_act": "silu", "attention_bias": False,
        "embedding_multiplier": by.embedding, "residual_multiplier": by.residual,
        "attention_multiplier": by.attention, "logits_scaling": by.logits, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    } | own


def _refuse_normalization(model: Model) -> None:
    if model.normalization != "pre":
        raise ValueError("granite normalizes before attention, MLP and head alone, and this model has "
                         f'normalization="{model.normalization}", which cannot be told in that form; train with "pre" to export')
    if model.qk_norm:
        raise ValueError("granite has queries and keys as they are, and this model has qk_norm=True, which normalizes them by what they "
                         "are and so cannot be put into its matrices; train with qk_norm=False to export")


def from_granite_config(config: dict) -> tuple[Model, int, Scalars]:
    """(shape, vocabulary, multipliers) of a granite or granitemoe config.json.

    An entry that it lacks is what transformers takes for it (a head of its own, multipliers of 1); a coefficient of a mixture's losses,
    which decides no logits, is 0. Raises ValueError for another kind of model, and for biases or an activation we do not have.
    """
    config = _UNSAID | {key: value for key, value in config.items() if value is not None}
    kind = config.get("model_type", "granite")
    if kind not in _KINDS:
        raise ValueError(f"our decoder is that of {' and '.join(_KINDS)}; this config.json has model_type {kind!r}")
    if config.get("attention_bias") or config.get("mlp_bias") or config["hidden_act"] != "silu":
        raise ValueError("this granite has biases or another activation than silu; our decoder has neither: "
                         f"attention_bias={config.get('attention_bias')}, mlp_bias={config.get('mlp_bias')}, "
                         f"hidden_act={config['hidden_act']!r}")
    theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10_000.0)
    heads = config["num_attention_heads"]
    mixture = None if kind == "granite" else Mixture(
        config["num_local_experts"], config["num_experts_per_tok"], balance=config.get("router_aux_loss_coef", 0.0),
        router_z=config.get("router_z_loss_coef", 0.0))
    model = Model(width=config["hidden_size"], depth=config["num_hidden_layers"], head_dim=config["hidden_size"] // heads,
                  context=config["max_position_embeddings"], kv_heads=config.get("num_key_value_heads", heads),
                  ffn_width=config["intermediate_size"], tied=config["tie_word_embeddings"], rope_theta=theta,
                  norm_eps=config["rms_norm_eps"], mixture=mixture)
    by = Scalars(config["embedding_multiplier"], config["residual_multiplier"], config["attention_multiplier"],
                 config["logits_scaling"])
    return model, config["vocab_size"], by


def _as_they_are(model: Model) -> dict[str, str]:
    """Parameters of a layer that both hold in one piece, our name to theirs."""
    return _LAYER | (_DENSE if model.mixture is None else _MIXTURE)


def to_granite_state(params: dict[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    """Our parameters under granite's names; fused matrices are cut, a tied head is left out."""
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    q, kv = model.heads * model.head_dim, model.resolved_kv_heads * model.head_dim
    for i in range(model.depth):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state |= {f"{theirs}{name}.weight": params[ours + key] for key, name in _as_they_are(model).items()}
        names = ("q_proj", "k_proj", "v_proj")
        state |= {f"{theirs}self_attn.{n}.weight": t for n, t in zip(names, params[ours + "qkv"].split([q, kv, kv]), strict=True)}
        if model.mixture is None:
            halves = zip(("gate", "up"), params[ours + "gate_up"].chunk(2), strict=True)
            state |= {f"{theirs}mlp.{n}_proj.weight": t for n, t in halves}
    if not model.tied:
        state["lm_head.weight"] = params["head"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def from_granite_state(state: dict[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    """Granite's parameters under our names; KeyError names what is missing."""
    params = {"embedding": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"]}
    for i in range(model.depth):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        params |= {ours + key: state[f"{theirs}{name}.weight"] for key, name in _as_they_are(model).items()}
        params[ours + "qkv"] = torch.cat([state[f"{theirs}self_attn.{n}_proj.weight"] for n in "qkv"])
        if model.mixture is None:
            params[ours + "gate_up"] = torch.cat([state[f"{theirs}mlp.{n}_proj.weight"] for n in ("gate", "up")])
    if not model.tied:
        params["head"] = state["lm_head.weight"]
    return params
