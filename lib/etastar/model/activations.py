"""What a decoder computes on its way to the logits, by name, in plain torch: for measuring a model, not for training it.

Written for one run (tensors without a slot axis) and for reading, with nothing of the decoder's own operations, so that the two can
be held against each other.
"""

import torch
import torch.nn.functional as F

from etastar.model.parametrization import Scalars
from etastar.recipe import Model


@torch.no_grad()
def activations(params: dict[str, torch.Tensor], tokens_BxT: torch.Tensor, model: Model, by: Scalars) -> dict[str, torch.Tensor]:
    """Every activation of one run's decoder on tokens (B, T) int64, by name, in the order in which they are computed.

    "embedding": the stream at the start, after its multiplier (B, T, D). For each layer i "layers.i.attention_logits": what the
    softmax is of, −inf where a key is later than its query (B, heads, T, T); "layers.i.attention": what the block adds to the stream,
    after the residual multiplier (B, T, D); "layers.i.router", of a mixture: router logits of all experts (B·T, E); "layers.i.mlp":
    what MLP or mixture adds, likewise (B, T, D); "layers.i.stream": the stream after the layer (B, T, D). "final": the normalized
    stream with the last gain, if there is one (B, T, D). "logits": after their divisor (B, T, V). Nothing is differentiable.
    """
    x_BxTxD = F.embedding(tokens_BxT, params["embedding"]) * by.embedding
    found = {"embedding": x_BxTxD}
    for i in range(model.depth):
        own = {name.removeprefix(f"layers.{i}."): w for name, w in params.items() if name.startswith(f"layers.{i}.")}
        layer = _layer(x_BxTxD, own, model, by)
        found |= {f"layers.{i}.{name}": x for name, x in layer.items()}
        x_BxTxD = layer["stream"]
    found["final"] = _normalized(x_BxTxD, params.get("final_norm"), model)
    found["logits"] = found["final"] @ params["embedding" if model.tied else "head"].mT / by.logits
    return found


def _layer(x_BxTxD: torch.Tensor, own: dict[str, torch.Tensor], model: Model, by: Scalars) -> dict[str, torch.Tensor]:
    """A layer's activations by their names within it, from the stream before it and the layer's own parameters."""
    added_BxTxD, logits_BxAxTxT = _attention(_normalized(x_BxTxD, own.get("attention_norm"), model), own, model, by)
    found = {"attention_logits": logits_BxAxTxT, "attention": added_BxTxD * by.residual}
    x_BxTxD = x_BxTxD + found["attention"]
    h_BxTxD = _normalized(x_BxTxD, own.get("mlp_norm"), model)
    if model.mixture is None:
        added_BxTxD = _swiglu(h_BxTxD, own["gate_up"], own["mlp_out"], model)
    else:
        added_BxTxD, found["router"] = _experts(h_BxTxD, own, model)
    found["mlp"] = added_BxTxD * by.residual
    return found | {"stream": x_BxTxD + found["mlp"]}


def _normalized(x: torch.Tensor, gain_D: torch.Tensor | None, model: Model) -> torch.Tensor:
    """x over its root mean square along the last axis (arXiv 1910.07467), times the gain if there is one."""
    y = x * (x.square().mean(-1, keepdim=True) + model.norm_eps).rsqrt()
    return y if gain_D is None else y * gain_D


def _inner(h: torch.Tensor, model: Model) -> torch.Tensor:
    """The input of a matrix back into the stream, normalized where everything is."""
    return _normalized(h, None, model) if model.normalization == "everywhere" else h


def _attention(h_BxTxD: torch.Tensor, own: dict[str, torch.Tensor], model: Model, by: Scalars) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the attention block makes of its normalized input (B, T, D), its logits (B, heads, T, T))."""
    kinds = model.heads, model.resolved_kv_heads, model.resolved_kv_heads
    qkv_BxAxTxH = (h_BxTxD @ own["qkv"].mT).unflatten(-1, (-1, model.head_dim)).transpose(1, 2)
    q, k, v = qkv_BxAxTxH.split(kinds, dim=1)
    if model.qk_norm or model.normalization == "everywhere":
        q, k = _normalized(q, None, model), _normalized(k, None, model)
    if model.normalization == "everywhere":
        v = _normalized(v, None, model)
    k, v = (part.repeat_interleave(model.heads // model.resolved_kv_heads, dim=1) for part in (k, v))
    length = h_BxTxD.shape[1]
    future_TxT = torch.ones(length, length, dtype=torch.bool, device=h_BxTxD.device).triu(1)
    logits_BxAxTxT = (_turned(q, model) @ _turned(k, model).mT * by.attention).masked_fill(future_TxT, -torch.inf)
    mixed_BxTxD = (logits_BxAxTxT.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return _inner(mixed_BxTxD, model) @ own["attention_out"].mT, logits_BxAxTxT


def _turned(x_BxAxTxH: torch.Tensor, model: Model) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): unit j of a head and unit j + H / 2 turn by position · theta^(−2j / H)."""
    length, half = x_BxAxTxH.shape[2], model.head_dim // 2
    rate = model.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=x_BxAxTxH.device) / half)
    angle_Txh = torch.arange(length, dtype=torch.float32, device=x_BxAxTxH.device)[:, None] * rate
    cos, sin = angle_Txh.cos(), angle_Txh.sin()
    first, second = x_BxAxTxH.split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _swiglu(h_xD: torch.Tensor, gate_up_GxD: torch.Tensor, out_DxF: torch.Tensor, model: Model) -> torch.Tensor:
    gate, up = (h_xD @ gate_up_GxD.mT).chunk(2, dim=-1)
    return _inner(F.silu(gate) * up, model) @ out_DxF.mT


def _experts(h_BxTxD: torch.Tensor, own: dict[str, torch.Tensor], model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the mixture makes of its normalized input (B, T, D), router logits (B·T, E)); every expert sees every token here."""
    router_NxE = h_BxTxD.flatten(0, 1) @ own["router"].mT
    chosen_NxK, expert_NxK = router_NxE.topk(model.mixture.experts_per_token, dim=-1)
    weight_NxE = torch.zeros_like(router_NxE).scatter(-1, expert_NxK, chosen_NxK.softmax(-1))
    out_BxTxD = torch.zeros_like(h_BxTxD)
    for gate_up_GxD, out_DxF, weight_N in zip(own["experts_gate_up"], own["experts_out"], weight_NxE.unbind(-1), strict=True):
        out_BxTxD += weight_N.view(*h_BxTxD.shape[:2], 1) * _swiglu(h_BxTxD, gate_up_GxD, out_DxF, model)
    return out_BxTxD, router_NxE
