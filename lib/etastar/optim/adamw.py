"""AdamW on a stack: one flat buffer a quantity, (M, P), with each slot's own rate, decay, betas, clip and step count.

The arithmetic of torch.optim.AdamW in its order, slot by slot, so that the bits are the same; the P parameters of a slot lie
side by side, so that a step is a dozen element-wise operations whatever the number of tensors.
"""

import math

import torch

from etastar.compiling import compiled_alone
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
    """Moments and per-slot options of a stack; `step` updates the flat parameters in place.

    No tensor is ever replaced, so that a captured CUDA graph can hold on to all of them. `compiled` fuses the update into one pass.
    """

    def __init__(self, flat: Flat, compiled: bool = False):
        self.flat = flat
        slots, device = len(flat.data), flat.data.device
        self.m_MxP, self.v_MxP = flat.like(), flat.like()
        self.options = {name: torch.zeros(slots, 1, dtype=torch.float64, device=device) for name in OPTIONS}
        # On a CPU a vectorized power may differ from a scalar one, and a slot's place would decide which it gets
        self.numbers = compiled_alone(_numbers) if compiled and flat.data.is_cuda else _numbers
        self.masked = compiled_alone(_masked_update) if compiled else _masked_update
        self.asks = not compiled and not flat.data.is_cuda  # asking a GPU would make the host wait for it

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

    @torch.no_grad()
    def step(self, grad_MxP: torch.Tensor, lr_M: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """One AdamW update (arXiv 1711.05101, Alg. 2) of every slot that is alive; the others keep every bit.

        `lr_M` float64 is the rate of this step, `step_M` the number of this step counted from 1.
        """
        multipliers = tuple(_multipliers(row) for _, _, row in self.flat.groups)
        by = self.numbers(self.options, lr_M, step_M, multipliers)
        spans = tuple((start, stop) for start, stop, _ in self.flat.groups)
        tensors = self.flat.data, self.m_MxP, self.v_MxP
        if self.asks and bool(alive_M.all()):
            _update(*tensors, grad_MxP, by, spans)
        else:
            self.masked(*tensors, grad_MxP, alive_M[:, None], by, spans)


OPTIONS = ("weight_decay", "beta1", "beta2", "eps", "clip_norm")


def _numbers(options, lr_M, step_M, multipliers):
    """What the update multiplies tensors by, (M, 1) float32 each; a slot's numbers are float64 until here, as in torch.

    (moment weight, beta2, square weight, root of the second bias) and for each group (decay or None, rate, eps).
    """
    beta1, beta2, lr_Mx1 = options["beta1"], options["beta2"], lr_M[:, None]
    bias1_Mx1 = 1 - beta1 ** step_M[:, None]
    bias2_root_Mx1 = (1 - beta2 ** step_M[:, None]).sqrt().float()
    groups = []
    for lr_multiplier, decay_multiplier, eps_multiplier in multipliers:
        rate_Mx1 = lr_Mx1 * lr_multiplier
        decay_Mx1 = (1 - rate_Mx1 * options["weight_decay"] * decay_multiplier).float() if decay_multiplier else None
        groups.append((decay_Mx1, (-rate_Mx1 / bias1_Mx1).float(), (options["eps"] * eps_multiplier).float()))
    return ((1 - beta1).float(), beta2.float(), (1 - beta2).float(), bias2_root_Mx1), groups


def _update(data_MxP, m_MxP, v_MxP, grad_MxP, by, spans) -> None:
    """The update in place, for every slot; `spans` are the columns of the groups."""
    (weight1_Mx1, beta2_Mx1, weight2_Mx1, bias2_root_Mx1), groups = by
    m_MxP.lerp_(grad_MxP, weight1_Mx1)
    v_MxP.mul_(beta2_Mx1).addcmul_(grad_MxP * weight2_Mx1, grad_MxP)
    root_MxP = v_MxP.sqrt().div_(bias2_root_Mx1)
    for (start, stop), (decay_Mx1, rate_Mx1, eps_Mx1) in zip(spans, groups, strict=True):
        data, m, root = (tensor[:, start:stop] for tensor in (data_MxP, m_MxP, root_MxP))
        if decay_Mx1 is not None:
            data.mul_(decay_Mx1)
        data.addcdiv_(m * rate_Mx1, root.add_(eps_Mx1))


def _masked_update(data_MxP, m_MxP, v_MxP, grad_MxP, alive_Mx1, by, spans) -> None:
    """`_update` of the slots that are alive; the others keep every bit, whatever their gradient is."""
    held = data_MxP, m_MxP, v_MxP
    made = tuple(tensor.clone() for tensor in held)
    _update(*made, grad_MxP, by, spans)
    for old_MxP, new_MxP in zip(held, made, strict=True):
        old_MxP.copy_(torch.where(alive_Mx1, new_MxP, old_MxP))
