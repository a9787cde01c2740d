"""AdamW on a stack: one flat buffer a quantity, (M, P), with each slot's own rate, decay, betas, clip and step count.

The arithmetic of torch.optim.AdamW in its order, slot by slot, so that the bits are the same; the P parameters of a slot lie
side by side, so that a step is a dozen element-wise operations whatever the number of tensors.
"""

import math

import torch

from etastar.model.parametrization import ParameterNumbers
from etastar.recipe import AdamW

ALIGN = 64  # floats: every parameter starts on a cache line and a vector, so that a slot's place changes no bit


class Flat:
    """One (M, P) buffer and a view (M, *shape) of it for each parameter.

    Parameters with equal multipliers lie side by side; `groups` holds (first, last + 1, ParameterNumbers) of each such stretch.
    """

    def __init__(self, table: dict[str, ParameterNumbers], slots: int, device):
        self.table, self.spans, self.groups, size = table, {}, [], 0
        for name, row in sorted(table.items(), key=lambda item: _multipliers(item[1])):
            start, size = size, size + -(-math.prod(row.shape) // ALIGN) * ALIGN
            self.spans[name] = (start, start + math.prod(row.shape))
            if self.groups and _multipliers(self.groups[-1][2]) == _multipliers(row):
                start = self.groups.pop()[0]
            self.groups.append((start, size, row))
        self.data = torch.zeros(slots, size, device=device)

    def like(self) -> torch.Tensor:
        """Another buffer of this layout, zeros."""
        return torch.zeros_like(self.data)

    def views(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (M, *shape) into a buffer of this layout, by name."""
        return {name: data[:, slice(*self.spans[name])].view(-1, *row.shape) for name, row in self.table.items()}


def _multipliers(row: ParameterNumbers) -> tuple[float, ...]:
    return row.lr_multiplier, row.decay_multiplier, row.eps_multiplier


class StackedAdamW:
    """Moments and per-slot options of a stack; `step` updates the flat parameters in place."""

    def __init__(self, flat: Flat):
        self.flat = flat
        slots, device = len(flat.data), flat.data.device
        self.m_MxP, self.v_MxP = flat.like(), flat.like()
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

        `lr_M` float64 is the rate of this step, `step_M` the number of this step counted from 1. Numbers of a slot are float64
        until they meet a tensor, as in torch.
        """
        o, lr_Mx1 = self.options, lr_M[:, None]
        bias1_Mx1 = 1 - o["beta1"] ** step_M[:, None]
        bias2_root_Mx1 = (1 - o["beta2"] ** step_M[:, None]).sqrt().float()
        m_MxP = torch.lerp(self.m_MxP, grad_MxP, (1 - o["beta1"]).float())
        v_MxP = (self.v_MxP * o["beta2"].float()).addcmul_(grad_MxP * (1 - o["beta2"]).float(), grad_MxP)
        root_MxP = v_MxP.sqrt().div_(bias2_root_Mx1)
        new_MxP = self.flat.data.clone()
        for start, stop, by in self.flat.groups:
            new, m, root = (tensor[:, start:stop] for tensor in (new_MxP, m_MxP, root_MxP))
            rate_Mx1 = lr_Mx1 * by.lr_multiplier
            if by.decay_multiplier:
                new.mul_((1 - rate_Mx1 * o["weight_decay"] * by.decay_multiplier).float())
            new.addcdiv_(m * (-rate_Mx1 / bias1_Mx1).float(), root.add_((o["eps"] * by.eps_multiplier).float()))
        if alive_M.is_cuda or not bool(alive_M.all()):  # asking a GPU would make the host wait for it
            alive_Mx1 = alive_M[:, None]
            m_MxP = torch.where(alive_Mx1, m_MxP, self.m_MxP)
            v_MxP = torch.where(alive_Mx1, v_MxP, self.v_MxP)
            new_MxP = torch.where(alive_Mx1, new_MxP, self.flat.data)
        self.m_MxP, self.v_MxP = m_MxP, v_MxP
        self.flat.data.copy_(new_MxP)


OPTIONS = ("weight_decay", "beta1", "beta2", "eps", "clip_norm")
