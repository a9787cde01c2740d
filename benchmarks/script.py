"""A training script as nanoGPT's readers write it, in one plain file: it shows that `plain` is not slow by its own fault."""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Layer(nn.Module):
    def __init__(self, d, heads, f):
        super().__init__()
        self.heads, self.ln_1, self.c_attn = heads, RMSNorm(d), nn.Linear(d, 3 * d, bias=False)
        self.c_proj, self.ln_2 = nn.Linear(d, d, bias=False), RMSNorm(d)
        self.c_fc, self.c_out = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, D // self.heads).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))
        gate, up = self.c_fc(self.ln_2(x)).chunk(2, dim=-1)
        return x + self.c_out(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class GPT(nn.Module):
    def __init__(self, vocab, d, layers, heads, f, block_size):
        super().__init__()
        self.wte, self.h = nn.Embedding(vocab, d), nn.ModuleList(Layer(d, heads, f) for _ in range(layers))
        self.ln_f, self.lm_head = RMSNorm(d), nn.Linear(d, vocab, bias=False)
        frequency = 1.0 / 10_000 ** (torch.arange(0, d // heads, 2).float() / (d // heads))
        angle = torch.arange(block_size).float()[:, None] * frequency[None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx, targets):
        x = self.wte(idx)
        for layer in self.h:
            x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def train(model, get_batch, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=1.0):
    """Train for ever; yields the loss of each step. get_batch(i) gives inputs and targets, (B, T) each."""
    decay = [p for n, p in model.named_parameters() if p.dim() >= 2 and "wte" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() < 2 or "wte" in n]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    for i in itertools.count():
        loss = model(*get_batch(i))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.detach()
