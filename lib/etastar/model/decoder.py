"""The decoder on a stack of runs: every tensor has a leading slot axis M, and a slot's bits never depend on M.

Granite-shaped: RMSNorm, rotary positions, SwiGLU or a mixture of such experts, grouped-query attention, tied or untied head, four
multipliers.
"""

import contextlib
import functools
import hashlib
import math

import torch
import torch.nn.functional as F

from etastar.model.functions import Attention, Linear, Normalize, NormalizeFirst, Surprise, Turn, fused_elsewhere, gated
from etastar.model.mixture import Layer, Routed, auxiliary, mixed
from etastar.model.parametrization import ParameterNumbers, Parametrization, Scalars, numbers, scalars
from etastar.recipe import Model

Params = dict[str, torch.Tensor]


def init_parameters(model: Model, vocab: int, parametrization: Parametrization, seed: int) -> Params:
    """Initial fp32 parameters of one run; each drawn from its own stream, keyed by its name and the seed.

    A longer, wider or deeper model shifts no other parameter's stream.
    """
    return {name: _initial(name, row, seed) for name, row in numbers(parametrization, model, vocab).items()}


def _initial(name: str, row: ParameterNumbers, seed: int) -> torch.Tensor:
    if row.init_std is None:
        return torch.ones(row.shape)
    key = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    drawn = torch.randn(row.shape, generator=stream)
    if row.init == "normal":
        return drawn * row.init_std
    if row.init == "rows":
        return drawn * (row.init_std / drawn.square().mean(1, keepdim=True).sqrt())
    return torch.cat([_semi_orthogonal(part) * row.init_std for part in drawn.split(row.rows or row.shape[:1])])


def _semi_orthogonal(gauss_OxI: torch.Tensor) -> torch.Tensor:
    """The polar factor of a Gaussian, which is uniform among semi-orthogonal matrices, times √(out/in)."""
    u, _, vh = torch.linalg.svd(gauss_OxI.double(), full_matrices=False)
    return (u @ vh * math.sqrt(gauss_OxI.shape[0] / gauss_OxI.shape[1])).float()


def stack(runs: list[Params]) -> Params:
    """Parameters of several runs in one set of tensors, (M, …)."""
    return {name: torch.stack([params[name] for params in runs]) for name in runs[0]}


def unstack(params: Params, slot: int) -> Params:
    """Contiguous copies of one slot's parameters."""
    return {name: tensor[slot].detach().clone() for name, tensor in params.items()}


def token_losses(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Cross-entropy in nats of every predicted token, not differentiable: (M, B, T) from tokens (M, B, T + 1) int64."""
    return _surprise(params, tokens_MxBxT1, model, by)[1].view(tokens_MxBxT1[..., 1:].shape)


def loss(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Mean cross-entropy of each slot in nats per predicted token: (M,)."""
    return _surprise(params, tokens_MxBxT1, model, by)[0]


def objective(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars,
              z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What is trained and what is told of it, (M,) each: the second is the mean cross-entropy in nats per predicted token, the first that
    and z_loss · mean (log Z)² of the logits and a mixture's balance and router z losses, which are of these tokens (of a micro-batch,
    where a batch goes in parts)."""
    trained_M, each_MxN, routed = _surprise(params, tokens_MxBxT1, model, by, z_loss)
    told_M = each_MxN.mean(1) if z_loss else trained_M
    return trained_M + auxiliary(routed, model.mixture) if routed else trained_M, told_M


def _surprise(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars,
              z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, list[Routed]]:
    x_MxNxD, routed = _blocks(params, tokens_MxBxT1[..., :-1], model, by)
    return *Surprise.apply(x_MxNxD, _head(params, model, by), tokens_MxBxT1[..., 1:].flatten(1), z_loss), routed


def logits(params: Params, tokens_MxBxT: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Logits (M, B, T, V) of tokens (M, B, T) int64."""
    out_MxNxV = Linear.apply(_blocks(params, tokens_MxBxT, model, by)[0], _head(params, model, by))
    return out_MxNxV.view(*tokens_MxBxT.shape, -1)


def _blocks(params: Params, tokens_MxBxT: torch.Tensor, model: Model, by: Scalars) -> tuple[torch.Tensor, list[Routed]]:
    """The residual stream after all blocks, normalized, without the last gain: (M, N, D) with N = B · T; how each mixture dealt it out."""
    x_MxNxD = _embed(tokens_MxBxT.flatten(1), params["embedding"])
    x_MxNxD = x_MxNxD.to(torch.promote_types(x_MxNxD.dtype, torch.float32))  # squares of a stream in half precision overflow
    if by.embedding != 1.0:
        x_MxNxD = x_MxNxD * by.embedding
    routed = []
    for i in range(model.depth):
        layer = {name: params.get(f"layers.{i}.{name}") for name in _LAYER}
        h_MxNxC = _of_heads(_gained(x_MxNxD, layer["attention_norm"], layer["qkv"], model), model)
        h_MxNxD = _inner(_mix(h_MxNxC, model, by, tokens_MxBxT.shape), model)
        x_MxNxD = torch.add(x_MxNxD, Linear.apply(h_MxNxD, layer["attention_out"]), alpha=by.residual)
        if model.mixture is None:
            change_MxNxD = _mlp(x_MxNxD, layer, model)
        else:
            change_MxNxD, dealt = mixed(x_MxNxD, layer, model)
            routed.append(dealt)
        x_MxNxD = torch.add(x_MxNxD, change_MxNxD, alpha=by.residual)
    return Normalize.apply(x_MxNxD, model.norm_eps), routed


_LAYER = ("attention_norm", "qkv", "attention_out", "mlp_norm", "gate_up", "mlp_out", "router", "experts_gate_up", "experts_out")


def _mlp(x_MxNxD: torch.Tensor, layer: Layer, model: Model) -> torch.Tensor:
    """SwiGLU of the normalized stream: (M, N, D)."""
    h_MxNxF = _inner(gated(_gained(x_MxNxD, layer["mlp_norm"], layer["gate_up"], model)), model)
    return Linear.apply(h_MxNxF, layer["mlp_out"])


def _gained(x_MxNxD, gain_MxD, w_MxOxD, model: Model) -> torch.Tensor:
    """A linear map of the normalized stream, (M, N, O); a gain is put into the matrix, the smaller of the two."""
    return Linear.apply(Normalize.apply(x_MxNxD, model.norm_eps), w_MxOxD if gain_MxD is None else w_MxOxD * gain_MxD[:, None])


def _inner(h_MxNxF, model: Model) -> torch.Tensor:
    """The input of a matrix back into the residual stream, normalized where everything is."""
    return Normalize.apply(h_MxNxF, model.norm_eps) if model.normalization == "everywhere" else h_MxNxF


def _of_heads(qkv_MxNxC, model: Model) -> torch.Tensor:
    """Queries, keys and values, each head's normalized where everything is, or the first two."""
    if model.normalization == "pre" and not model.qk_norm:
        return qkv_MxNxC
    heads_MxNxAxH = qkv_MxNxC.view(*qkv_MxNxC.shape[:2], -1, model.head_dim)
    if model.normalization == "everywhere":
        return Normalize.apply(heads_MxNxAxH, model.norm_eps).view(qkv_MxNxC.shape)
    return NormalizeFirst.apply(heads_MxNxAxH, model.heads + model.resolved_kv_heads, model.norm_eps).view(qkv_MxNxC.shape)


def _head(params: Params, model: Model, by: Scalars) -> torch.Tensor:
    """The output matrix (M, V, D) with the last gain, if there is one, and the logits multiplier in it."""
    table_MxVxD = params["embedding" if model.tied else "head"]
    if model.normalization == "everywhere":
        return table_MxVxD if by.logits == 1.0 else table_MxVxD / by.logits
    gain_MxD = params["final_norm"] if by.logits == 1.0 else params["final_norm"] / by.logits
    return table_MxVxD * gain_MxD[:, None]


def _mix(qkv_MxNxC, model: Model, by: Scalars, shape) -> torch.Tensor:
    """Causal attention; slots and sequences share one axis, so that each pair is on its own."""
    slots, batch, length = shape
    sequences, device = slots * batch, qkv_MxNxC.device
    own_keys = model.resolved_kv_heads == model.heads
    if own_keys and length <= HAND_CONTEXT and qkv_MxNxC.dtype == torch.float32 and not fused_elsewhere(qkv_MxNxC):
        x_SxTx3xAxH = qkv_MxNxC.view(sequences, length, 3, model.heads, model.head_dim)
        mixed_SxTxAxH = Attention.apply(x_SxTx3xAxH, *_angles(length, model, device), by.attention)
        return mixed_SxTxAxH.view(slots, batch * length, model.width)
    kinds = model.heads, model.resolved_kv_heads, model.resolved_kv_heads
    turn = _rotary(length, model, device)
    qkv_SxTxAxH = Turn.apply(qkv_MxNxC.view(sequences, length, sum(kinds), model.head_dim), *turn)
    q, k, v = (part.transpose(1, 2) for part in qkv_SxTxAxH.split(kinds, dim=2))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=by.attention, enable_gqa=not own_keys)
    return mixed.transpose(1, 2).reshape(slots, batch * length, model.width)


HAND_CONTEXT = 256  # tokens; beyond, keeping the probabilities costs more memory than it saves time


def _embed(tokens_MxN: torch.Tensor, table_MxVxD: torch.Tensor) -> torch.Tensor:
    first_M = torch.arange(len(tokens_MxN), device=tokens_MxN.device) * table_MxVxD.shape[1]
    return F.embedding(tokens_MxN + first_M[:, None], table_MxVxD.reshape(-1, table_MxVxD.shape[2]))


@functools.lru_cache(maxsize=32)
def _angles(length: int, model: Model, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos (length, head_dim) and sin (length, head_dim / 2) of the rotary angles, the second half of the first repeated."""
    rate = model.rope_theta ** -(torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), rate)
    return torch.cat((angle.cos(),) * 2, dim=1).to(device), angle.sin().to(device)


def tell_compiler() -> None:
    """Let torch.compile take the rotary tables as constants. Not a decorator, which would import the compiler everywhere."""
    torch.compiler.assume_constant_result(_rotary)


def _rotary(length: int, model: Model, device) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotary_tables(length, model, device)  # two functions, since the compiler looks through a cache but not through this


@functools.lru_cache(maxsize=32)
def _rotary_tables(length: int, model: Model, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (length, heads, head_dim) for queries, keys and values side by side; values do not turn."""
    cos, sin = _angles(length, model, device)
    sin = torch.cat((-sin, sin), dim=1)
    turning, still = model.heads + model.resolved_kv_heads, model.resolved_kv_heads
    return tuple(torch.stack([table] * turning + [rest] * still, dim=1) for table, rest in
                 ((cos, torch.ones_like(cos)), (sin, torch.zeros_like(sin))))


class Decoder(torch.nn.Module):
    """One trained model for anybody's use: tokens (B, T) int64 to logits (B, T, V)."""

    def __init__(self, model: Model, vocab: int, parametrization: Parametrization, params: Params | None = None, seed: int = 0):
        super().__init__()
        self.model, self.vocab, self.scalars = model, vocab, scalars(parametrization, model)
        params = params or init_parameters(model, vocab, parametrization, seed)
        self.weights = torch.nn.ParameterDict({name.replace(".", "/"): torch.nn.Parameter(p) for name, p in params.items()})

    def parameters_by_name(self) -> Params:
        """The parameters under the names the engine and the store use."""
        return {name.replace("/", "."): p for name, p in self.weights.items()}

    def forward(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) in the precision of the weights; of half precision, the stream, rotations and routers are in float32."""
        stacked, kind = {name: p[None] for name, p in self.parameters_by_name().items()}, self.weights["embedding"].dtype
        half = kind in (torch.bfloat16, torch.float16)  # then as training under autocast computes; otherwise as the caller says
        with torch.autocast(tokens_BxT.device.type, kind) if half else contextlib.nullcontext():
            return logits(stacked, tokens_BxT[None], self.model, self.scalars)[0]
