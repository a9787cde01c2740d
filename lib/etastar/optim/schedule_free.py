"""Schedule-Free AdamW on a stack (arXiv 2405.15682), the arithmetic of schedulefree.AdamWScheduleFree in its order, slot by slot.

Three sequences: z takes the steps, x is their weighted mean, and gradients are taken at y = (1 − β1) z + β1 x. The flat parameters
are y; x is not kept but follows from y and z, and is what is validated and handed out.
"""

import torch

from etastar.optim.stacked import Flat, StackedOptimizer


def _numbers(options, lr_M, step_M, lr_max_M, weight_sum_M, multipliers):
    """(highest rate, sum of weights) after this step, float64 (M,), and what the update multiplies by, float32 (M, 1).

    The weight of a step in x is step^r · (highest rate so far)^weight_lr_power; rates of 0 from the start weigh nothing. One weight
    serves all groups: a multiplier of the rate cancels in it.
    """
    of = {name: tensor[:, 0] for name, tensor in options.items()}
    lr_max_M = torch.maximum(lr_max_M, lr_M)
    weight_M = _power(step_M.double(), of["r"]) * _power(lr_max_M, of["weight_lr_power"])
    weight_sum_M = weight_sum_M + weight_M
    share_M = torch.where(weight_sum_M > 0, weight_M / weight_sum_M, 0.0)
    bias2_M = 1 - _power(of["beta2"], step_M.double())
    y_rate_M = of["beta1"] * (1 - share_M) - 1
    shared = tuple(t[:, None].float() for t in (share_M, of["beta2"], 1 - of["beta2"], bias2_M))
    groups = []
    for lr_multiplier, decay_multiplier, eps_multiplier in multipliers:
        rate_M = lr_M * lr_multiplier
        decay_Mx1 = (of["weight_decay"] * decay_multiplier)[:, None].float() if decay_multiplier else None
        groups.append((decay_Mx1, (rate_M * y_rate_M)[:, None].float(), -rate_M[:, None].float(),
                       (of["eps"] * eps_multiplier)[:, None].float()))
    return lr_max_M, weight_sum_M, (shared, groups)


def _power(base_M: torch.Tensor, exponent_M: torch.Tensor) -> torch.Tensor:
    """base ** exponent with the bits of Python's, float64.

    Side by side in memory, four numbers go through a vectorized power that differs in the last bit from the scalar one, and a
    slot's place would decide which it gets; every other place keeps them apart.
    """
    return torch.pow(torch.stack((base_M, base_M), dim=1)[:, 0], exponent_M)


def _update(y_MxP, z_MxP, v_MxP, grad_MxP, by, spans) -> None:
    """The update in place, for every slot; `spans` are the columns of the groups. Decay is taken at y."""
    (share_Mx1, beta2_Mx1, weight2_Mx1, bias2_Mx1), groups = by
    v_MxP.mul_(beta2_Mx1).addcmul_(grad_MxP * weight2_Mx1, grad_MxP)
    root_MxP = (v_MxP / bias2_Mx1).sqrt_()
    for (start, stop), (decay_Mx1, y_rate_Mx1, z_rate_Mx1, eps_Mx1) in zip(spans, groups, strict=True):
        y, z, grad, root = (tensor[:, start:stop] for tensor in (y_MxP, z_MxP, grad_MxP, root_MxP))
        move = grad / root.add_(eps_Mx1)
        if decay_Mx1 is not None:
            move.addcmul_(y, decay_Mx1)
        y.lerp_(z, share_Mx1).addcmul_(move, y_rate_Mx1)
        z.addcmul_(move, z_rate_Mx1)


class StackedScheduleFreeAdamW(StackedOptimizer):
    """z, second moments and the running weights of a stack; `step` moves y, the flat parameters, in place.

    `lr_max_M` and `weight_sum_M` are all that the mean remembers of the rates before.
    """

    option_names = ("weight_decay", "beta1", "beta2", "eps", "clip_norm", "r", "weight_lr_power")
    moments, memories = ("z", "v"), ("lr_max", "weight_sum")
    numbers, update = staticmethod(_numbers), staticmethod(_update)

    def __init__(self, flat: Flat, compiled: bool = False):
        super().__init__(flat, compiled)
        self.z_MxP, self.v_MxP = flat.like(), flat.like()
        slots, device = len(flat.data), flat.data.device
        self.lr_max_M, self.weight_sum_M = (torch.zeros(slots, dtype=torch.float64, device=device) for _ in range(2))

    @torch.no_grad()
    def evaluated(self, rows: slice = slice(None)) -> torch.Tensor:
        """x of some slots, (rows, P): the weights to validate, to average and to hand out."""
        weight_Mx1 = (1 - 1 / self.options["beta1"][rows]).float()
        return torch.lerp(self.flat.data[rows], self.z_MxP[rows], weight_Mx1)

    @torch.no_grad()
    def step(self, grad_MxP: torch.Tensor, lr_M: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """One update of every slot that is alive; the others keep every bit.

        `lr_M` float64 is the rate of this step, warm-up included; `step_M` the number of this step counted from 1.
        """
        lr_max_M, weight_sum_M, by = self.numbers(self.options, lr_M, step_M, self.lr_max_M, self.weight_sum_M, self.multipliers)
        for held_M, new_M in ((self.lr_max_M, lr_max_M), (self.weight_sum_M, weight_sum_M)):
            held_M.copy_(torch.where(alive_M, new_M, held_M))
        self._apply((self.flat.data, self.z_MxP, self.v_MxP), grad_MxP, alive_M, by)
