"""The reference: what one would write in an afternoon, an nn.Module trained with torch.optim.AdamW(fused=True)."""

import torch
import torch.nn.functional as F
from torch import nn

from etastar.recipe import Model, Recipe


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: Model):
        super().__init__()
        width, ffn = model.width, model.resolved_ffn_width
        self.head_dim = model.head_dim
        self.norm1, self.qkv, self.out = nn.RMSNorm(width, eps=1e-5), _linear(width, 3 * width), _linear(width, width)
        self.norm2, self.gate_up, self.down = nn.RMSNorm(width, eps=1e-5), _linear(width, 2 * ffn), _linear(ffn, width)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """Mean cross-entropy of tokens (B, T + 1). Parameters stand in the engine's order, so that `load` can copy them."""

    def __init__(self, model: Model, vocab: int):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(vocab, model.width), nn.ModuleList(Block(model) for _ in range(model.depth))
        self.norm, self.head = nn.RMSNorm(model.width, eps=1e-5), _linear(model.width, vocab)
        rate = model.rope_theta ** -(torch.arange(0, model.head_dim, 2) / model.head_dim)
        angle = torch.outer(torch.arange(model.context), rate).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos.to(x.dtype), self.sin.to(x.dtype))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def _linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


@torch.no_grad()
def load(module: nn.Module, params: dict[str, torch.Tensor]) -> nn.Module:
    """Take over the engine's (unstacked) parameters; ValueError where a module's do not stand in the same order."""
    for own, (name, given) in zip(module.parameters(), params.items(), strict=True):
        if own.shape != given.shape:
            raise ValueError(f"parameter {name} is {tuple(given.shape)} but the module has {tuple(own.shape)} in its place")
        own.copy_(given)
    return module


def decays(name: str) -> bool:
    """Whether weight decay touches a parameter of `Plain`: matrices, not the embedding or gains."""
    return not ("norm" in name or name.startswith("embedding"))


def trainer(recipe: Recipe, vocab: int, params: dict[str, torch.Tensor], compiled: bool):
    """A function that trains one step on tokens (B, T + 1) and returns the loss before it."""
    device, by = recipe.execution.device, recipe.optimizer
    module = load(Plain(recipe.model, vocab), params).to(device)
    forward = torch.compile(module, dynamic=False) if compiled else module
    groups = [{"params": [p for name, p in module.named_parameters() if decays(name) == wanted], "weight_decay": decay}
              for wanted, decay in ((True, by.weight_decay), (False, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(by.beta1, by.beta2), eps=by.eps, fused=True)

    def step(tokens):
        with torch.autocast(device, torch.bfloat16, enabled=recipe.execution.precision == "bf16"):
            loss = forward(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), by.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
