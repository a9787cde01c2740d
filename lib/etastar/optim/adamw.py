"""AdamW on a stack: one flat buffer a quantity, (M, P), with each slot's own rate, decay, betas, clip and step count.

Same arithmetic as torch.optim.AdamW, slot by slot; the P parameters of a slot lie side by side, so that a step is a
dozen element-wise operations whatever the number of tensors.
"""

import math

import torch

from etastar.model.parametrization import ParameterNumbers
from etastar.recipe import AdamW

ALIGN = 64  # floats: every parameter starts on a cache line and a vector, so that a slot's place changes no bit


class Flat:
    """One (M, P) buffer and a view (M, *shape) of it for each parameter."""

    def __init__(self, table: dict[str, ParameterNumbers], slots: int, device):
        self.table, self.spans, size = table, {}, 0
        for name, row in table.items():
            length = math.prod(row.shape)
            self.spans[name] = (size, size + length)
            size += -(-length // ALIGN) * ALIGN
        self.data = torch.zeros(slots, size, device=device)

    def like(self) -> torch.Tensor:
        """Another buffer of this layout, zeros."""
        return torch.zeros_like(self.data)

    def views(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (M, *shape) into a buffer of this layout, by name."""
        return {name: data[:, a:b].view(-1, *self.table[name].shape) for name, (a, b) in self.spans.items()}

    def spread(self, field: str) -> torch.Tensor:
        """A number of each parameter's table row, spread over its floats: (P,)."""
        out_P = torch.zeros(self.data.shape[1])
        for name, (a, b) in self.spans.items():
            out_P[a:b] = getattr(self.table[name], field)
        return out_P.to(self.data.device)


class StackedAdamW:
    """Moments and per-slot options of a stack; `step` updates the flat parameters in place."""

    def __init__(self, flat: Flat):
        self.flat = flat
        slots, device = len(flat.data), flat.data.device
        self.m_MxP, self.v_MxP = flat.like(), flat.like()
        self.lr_P, self.decay_P = flat.spread("lr_multiplier"), flat.spread("decay_multiplier")
        self.options = {name: torch.zeros(slots, 1, dtype=torch.float64, device=device) for name in OPTIONS}

    def configure(self, slot: int, optimizer: AdamW) -> None:
        """Take the options of one slot from its recipe."""
        for name, tensor in self.options.items():
            given = getattr(optimizer, name)
            tensor[slot] = math.inf if given is None else given

    def clip(self, grad_MxP: torch.Tensor) -> torch.Tensor:
        """Scale each slot's gradient to its own `clip_norm` at most; returns the norms before, (M,).

        As torch.nn.utils.clip_grad_norm_: by clip_norm / (norm + 1e-6) where that is below 1.
        """
        norm_M = torch.linalg.vector_norm(grad_MxP, dim=1)
        scale_Mx1 = (self.options["clip_norm"].float() / (norm_M[:, None] + 1e-6)).clamp(max=1.0)
        grad_MxP.mul_(scale_Mx1)
        return norm_M

    def step(self, grad_MxP: torch.Tensor, lr_M: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """One AdamW update (arXiv 1711.05101, Alg. 2) of every slot that is alive; the others keep every bit.

        `lr_M` float64 is the rate of this step, `step_M` the number of this step counted from 1.
        """
        o = self.options
        bias1 = 1 - o["beta1"] ** step_M[:, None]
        bias2_root = (1 - o["beta2"] ** step_M[:, None]).sqrt().float()
        lr_Mx1 = lr_M[:, None]
        rate_MxP = (lr_Mx1 / bias1).float() * self.lr_P
        keep_MxP = 1 - (lr_Mx1 * o["weight_decay"]).float() * (self.lr_P * self.decay_P)
        m_MxP = self.m_MxP * o["beta1"].float() + grad_MxP * (1 - o["beta1"]).float()
        v_MxP = self.v_MxP * o["beta2"].float() + grad_MxP * grad_MxP * (1 - o["beta2"]).float()
        new_MxP = self.flat.data * keep_MxP - rate_MxP * m_MxP / (v_MxP.sqrt() / bias2_root + o["eps"].float())
        if bool(alive_M.all()):
            self.m_MxP, self.v_MxP = m_MxP, v_MxP
            self.flat.data.copy_(new_MxP)
            return
        alive_Mx1 = alive_M[:, None]
        self.m_MxP = torch.where(alive_Mx1, m_MxP, self.m_MxP)
        self.v_MxP = torch.where(alive_Mx1, v_MxP, self.v_MxP)
        self.flat.data.copy_(torch.where(alive_Mx1, new_MxP, self.flat.data))


OPTIONS = ("weight_decay", "beta1", "beta2", "eps", "clip_norm")
