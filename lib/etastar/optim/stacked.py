"""What optimizers on a stack share: the layout of their buffers, each slot's options, the clip, and slots that stand still.

The P parameters of a slot lie side by side, so that a step is a dozen element-wise operations whatever the number of tensors.
"""

import math
from collections.abc import Callable

import torch

from etastar.compiling import compiled_alone
from etastar.model.parametrization import ParameterNumbers

ALIGN = 64  # floats: every parameter starts on a cache line and a vector, so that a slot's place changes no bit


class Flat:
    """One (M, P) buffer and a view (M, *shape) of it for each parameter.

    Parameters with equal multipliers lie side by side; `groups` holds (first, last + 1, ParameterNumbers) of each such stretch.
    """

    def __init__(self, table: dict[str, ParameterNumbers], slots: int, device):
        self.table, self.spans, self.groups, size = table, {}, [], 0
        for name, row in sorted(table.items(), key=lambda item: multipliers(item[1])):
            start, size = size, size + -(-math.prod(row.shape) // ALIGN) * ALIGN
            self.spans[name] = (start, start + math.prod(row.shape))
            if self.groups and multipliers(self.groups[-1][2]) == multipliers(row):
                start = self.groups.pop()[0]
            self.groups.append((start, size, row))
        self.data = torch.zeros(slots, size, device=device)

    def like(self) -> torch.Tensor:
        """Another buffer of this layout, zeros."""
        return torch.zeros_like(self.data)

    def views(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (M, *shape) into a buffer of this layout, by name."""
        return {name: data[:, slice(*self.spans[name])].view(-1, *row.shape) for name, row in self.table.items()}


def multipliers(row: ParameterNumbers) -> tuple[float, ...]:
    """What a parameter's rate, decay and eps are multiplied by."""
    return row.lr_multiplier, row.decay_multiplier, row.eps_multiplier


class StackedOptimizer:
    """Options of every slot of a stack, the clip before a step, and the update of those slots alone that are alive.

    A kind of optimizer says which `option_names` its recipe has, which (M, P) `moments` and which (M,) float64 `memories` it
    keeps beside the parameters (as attributes NAME_MxP and NAME_M), and gives two functions: `numbers`, what a step multiplies by,
    and `update`, which takes the tensors held, the gradient, these numbers and the groups' columns and works in place. No tensor is
    ever replaced, so that a captured CUDA graph can hold on to all of them. `compiled` fuses the update into one pass.
    """

    option_names: tuple[str, ...]
    moments: tuple[str, ...]
    memories: tuple[str, ...] = ()
    numbers: Callable
    update: Callable

    def __init__(self, flat: Flat, compiled: bool = False):
        self.flat = flat
        slots, device = len(flat.data), flat.data.device
        self.options = {name: torch.zeros(slots, 1, dtype=torch.float64, device=device) for name in self.option_names}
        self.multipliers = tuple(multipliers(row) for _, _, row in flat.groups)
        self.spans = tuple((start, stop) for start, stop, _ in flat.groups)
        # On a CPU a vectorized power may differ from a scalar one, and a slot's place would decide which it gets
        self.numbers = compiled_alone(self.numbers) if compiled and flat.data.is_cuda else self.numbers
        self.masked = compiled_alone(masked) if compiled else masked
        self.asks = not compiled and not flat.data.is_cuda  # asking a GPU would make the host wait for it

    def configure(self, slot: int, optimizer) -> None:
        """Take the options of one slot from its recipe."""
        for name in self.option_names:
            given = getattr(optimizer, name)
            self.options[name][slot] = math.inf if given is None else given

    def clip(self, grad_MxP: torch.Tensor) -> torch.Tensor:
        """Scale each slot's gradient to its own `clip_norm` at most; returns the norms before, (M,).

        As torch.nn.utils.clip_grad_norm_: by clip_norm / (norm + 1e-6) where that is below 1.
        """
        norm_M = torch.linalg.vector_norm(grad_MxP, dim=1)
        scale_Mx1 = (self.options["clip_norm"].float() / (norm_M[:, None] + 1e-6)).clamp(max=1.0)
        grad_MxP.mul_(scale_Mx1)
        return norm_M

    def evaluated(self, rows: slice = slice(None)) -> torch.Tensor:
        """The weights of some slots to validate, to average and to hand out, (rows, P): those that are trained."""
        return self.flat.data[rows].detach()

    def _apply(self, held: tuple[torch.Tensor, ...], grad_MxP: torch.Tensor, alive_M: torch.Tensor, by) -> None:
        if self.asks and bool(alive_M.all()):
            self.update(*held, grad_MxP, by, self.spans)
        else:
            self.masked(self.update, held, grad_MxP, alive_M[:, None], by, self.spans)


def masked(update: Callable, held: tuple[torch.Tensor, ...], grad_MxP, alive_Mx1, by, spans) -> None:
    """`update` of the slots that are alive; the others keep every bit, whatever their gradient is."""
    made = tuple(tensor.clone() for tensor in held)
    update(*made, grad_MxP, by, spans)
    for old_MxP, new_MxP in zip(held, made, strict=True):
        old_MxP.copy_(torch.where(alive_Mx1, new_MxP, old_MxP))
