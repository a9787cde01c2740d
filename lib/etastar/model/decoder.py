"""The decoder on a stack of runs: every tensor has a leading slot axis M, and a slot's bits never depend on M.

Granite-shaped: RMSNorm, rotary positions, SwiGLU, grouped-query attention, tied or untied head, four multipliers.
"""

import functools
import hashlib

import torch
import torch.nn.functional as F

from etastar.model.parametrization import Scalars, numbers, scalars
from etastar.recipe import SP, Model

Params = dict[str, torch.Tensor]


def init_parameters(model: Model, vocab: int, parametrization: SP, seed: int) -> Params:
    """Initial fp32 parameters of one run; each drawn from its own stream, keyed by its name and the seed.

    A longer, wider or deeper model shifts no other parameter's stream.
    """
    params = {}
    for name, row in numbers(parametrization, model, vocab).items():
        if row.init_std is None:
            params[name] = torch.ones(row.shape)
            continue
        key = hashlib.sha256(f"{name}:{seed}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        params[name] = torch.randn(row.shape, generator=stream) * row.init_std
    return params


def token_losses(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Cross-entropy in nats of every predicted token: (M, B, T) from tokens (M, B, T + 1)."""
    logits_MxNxV = logits(params, tokens_MxBxT1[..., :-1], model, by).flatten(1, 2)
    targets_MxN = tokens_MxBxT1[..., 1:].flatten(1)
    loss = F.cross_entropy(logits_MxNxV.flatten(0, 1).float(), targets_MxN.flatten(), reduction="none")
    return loss.view(len(tokens_MxBxT1), tokens_MxBxT1.shape[1], -1)


def loss(params: Params, tokens_MxBxT1: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Mean cross-entropy of each slot in nats per predicted token: (M,)."""
    return token_losses(params, tokens_MxBxT1, model, by).flatten(1).mean(1)


def logits(params: Params, tokens_MxBxT: torch.Tensor, model: Model, by: Scalars) -> torch.Tensor:
    """Logits (M, B, T, V) of tokens (M, B, T) int64."""
    slots, batch, length = tokens_MxBxT.shape
    x_MxNxD = _embed(tokens_MxBxT.flatten(1), params["embedding"])
    if by.embedding != 1.0:
        x_MxNxD = x_MxNxD * by.embedding
    tables = _rotary(length, model.head_dim, model.rope_theta, x_MxNxD.device)
    for i in range(model.depth):
        layer = {name: params[f"layers.{i}.{name}"] for name in _LAYER}
        h_MxNxD = _norm(x_MxNxD, layer["attention_norm"], model.norm_eps)
        h_MxNxD = _attend(h_MxNxD, layer, model, by, (slots, batch, length), tables)
        x_MxNxD = _add(x_MxNxD, h_MxNxD, by.residual)
        h_MxNxD = _norm(x_MxNxD, layer["mlp_norm"], model.norm_eps)
        gate, up = _linear(h_MxNxD, layer["gate_up"]).chunk(2, dim=-1)
        x_MxNxD = _add(x_MxNxD, _linear(F.silu(gate) * up, layer["mlp_out"]), by.residual)
    x_MxNxD = _norm(x_MxNxD, params["final_norm"], model.norm_eps)
    out_MxNxV = _linear(x_MxNxD, params["embedding"] if model.tied else params["head"])
    if by.logits != 1.0:
        out_MxNxV = out_MxNxV / by.logits
    return out_MxNxV.view(slots, batch, length, -1)


_LAYER = ("attention_norm", "qkv", "attention_out", "mlp_norm", "gate_up", "mlp_out")


def _attend(h_MxNxD, layer, model: Model, by: Scalars, shape, tables):
    """Causal attention; slots and sequences share SDPA's batch axis, so that each pair is on its own."""
    slots, batch, length = shape
    heads, kv = model.heads, model.resolved_kv_heads
    qkv = _linear(h_MxNxD, layer["qkv"]).view(slots * batch, length, heads + 2 * kv, model.head_dim).transpose(1, 2)
    qk = _rotate(qkv[:, : heads + kv], *tables)
    mixed = F.scaled_dot_product_attention(qk[:, :heads], qk[:, heads:], qkv[:, heads + kv :], is_causal=True,
                                           scale=by.attention, enable_gqa=kv != heads)
    return _linear(mixed.transpose(1, 2).reshape(slots, batch * length, heads * model.head_dim), layer["attention_out"])


def _linear(x_MxNxI: torch.Tensor, w_MxOxI: torch.Tensor) -> torch.Tensor:
    """x wᵀ of each slot. On a CPU slot by slot, the product a solo run makes; elsewhere one batched product."""
    if x_MxNxI.device.type == "cpu":
        return _join([F.linear(x, w) for x, w in zip(x_MxNxI.unbind(), w_MxOxI.unbind(), strict=True)])
    return torch.bmm(x_MxNxI, w_MxOxI.transpose(1, 2))


def _embed(tokens_MxN: torch.Tensor, table_MxVxD: torch.Tensor) -> torch.Tensor:
    if tokens_MxN.device.type == "cpu":
        return _join([F.embedding(t, e) for t, e in zip(tokens_MxN.unbind(), table_MxVxD.unbind(), strict=True)])
    first_M = torch.arange(len(tokens_MxN), device=tokens_MxN.device) * table_MxVxD.shape[1]
    return F.embedding(tokens_MxN + first_M[:, None], table_MxVxD.reshape(-1, table_MxVxD.shape[2]))


def _join(slots: list[torch.Tensor]) -> torch.Tensor:
    return slots[0][None] if len(slots) == 1 else torch.stack(slots)  # one slot needs no copy


def _norm(x_MxNxD: torch.Tensor, gain_MxD: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x_MxNxD, x_MxNxD.shape[-1:], eps=eps) * gain_MxD[:, None]


def _add(x: torch.Tensor, h: torch.Tensor, multiplier: float) -> torch.Tensor:
    return x + h if multiplier == 1.0 else x + h * multiplier


def _rotate(x: torch.Tensor, cos_TxH: torch.Tensor, sin_TxH: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_TxH + torch.cat((-second, first), dim=-1) * sin_TxH


@functools.lru_cache(maxsize=32)
def _rotary(length: int, head_dim: int, theta: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (length, head_dim) of rotary positions (arXiv 2104.09864), halves laid out as transformers does."""
    rate = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), rate).repeat(1, 2)
    return angle.cos().to(device), angle.sin().to(device)


class Decoder(torch.nn.Module):
    """One trained model for anybody's use: tokens (B, T) int64 to logits (B, T, V)."""

    def __init__(self, model: Model, vocab: int, parametrization: SP, params: Params | None = None, seed: int = 0):
        super().__init__()
        self.model, self.vocab, self.scalars = model, vocab, scalars(parametrization, model)
        params = params or init_parameters(model, vocab, parametrization, seed)
        self.weights = torch.nn.ParameterDict({name.replace(".", "/"): torch.nn.Parameter(p) for name, p in params.items()})

    def parameters_by_name(self) -> Params:
        """The parameters under the names the engine and the store use."""
        return {name.replace("/", "."): p for name, p in self.weights.items()}

    def forward(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V)."""
        stacked = {name: p[None] for name, p in self.parameters_by_name().items()}
        return logits(stacked, tokens_BxT[None], self.model, self.scalars)[0]
