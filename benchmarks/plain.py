"""The reference: what one would write in an afternoon, an nn.Module trained with torch.optim.AdamW(fused=True)."""

import torch
import torch.nn.functional as F
from torch import nn

from etastar.recipe import Model


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: Model):
        super().__init__()
        width, ffn = model.width, model.resolved_ffn_width
        self.head_dim, self.norm1, self.norm2 = model.head_dim, nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """Mean cross-entropy of tokens (B, T + 1)."""

    def __init__(self, model: Model, vocab: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab, model.width), nn.Linear(model.width, vocab, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(model) for _ in range(model.depth)), nn.RMSNorm(model.width, eps=1e-5)
        rate = model.rope_theta ** -(torch.arange(0, model.head_dim, 2) / model.head_dim)
        angle = torch.outer(torch.arange(model.context), rate).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def trainer(model: Model, vocab: int, compiled: bool, device: str):
    """A function that trains one step on tokens (B, T + 1)."""
    module = Plain(model, vocab).to(device)
    forward = torch.compile(module, dynamic=False) if compiled else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens):
        forward(tokens).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
