"""AdamW on a stack, with each slot's own rate, decay, betas, clip and step count.

The arithmetic of torch.optim.AdamW in its order, slot by slot, so that the bits are the same. A slot's beta2 may change on the way
(arXiv 2508.01483 raises it in the cooldown): the bias of the second moment is then that of an average whose weights the changed
beta2 gave, 1 − the product of the beta2 of all steps, where torch's 1 − beta2^step would forget the steps before.
"""

import numpy as np
import torch

from etastar.optim.stacked import Flat, StackedOptimizer


def _numbers(options, lr_M, step_M, multipliers):
    """What the update multiplies tensors by, (M, 1) float32 each; a slot's numbers are float64 until here, as in torch.

    (moment weight, beta2, square weight, root of the second bias) and for each group (decay or None, rate, eps).
    """
    beta1, beta2, lr_Mx1 = options["beta1"], options["beta2"], lr_M[:, None]
    bias1_Mx1 = 1 - beta1 ** step_M[:, None]
    lasting_Mx1 = step_M[:, None] - options["beta2_since"]
    bias2_root_Mx1 = (1 - options["beta2_carried"] * beta2**lasting_Mx1).sqrt().float()
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


def turns(beta2_S: np.ndarray) -> list[int]:
    """The steps after which beta2 is another one."""
    return (np.flatnonzero(np.diff(beta2_S)) + 1).tolist()


def in_force(beta2_S: np.ndarray, step: int) -> tuple[float, int, float]:
    """After `step` steps: beta2 of the next one, the step since which it holds, and the product of those of all steps up to there."""
    since, carried = 0, 1.0
    for turn in turns(beta2_S[: step + 1]):
        since, carried = turn, carried * float(beta2_S[since]) ** (turn - since)
    return float(beta2_S[since]), since, carried


class StackedAdamW(StackedOptimizer):
    """Moments and per-slot options of a stack; `step` updates the flat parameters in place."""

    option_names, moments = ("weight_decay", "beta1", "beta2", "eps", "clip_norm"), ("m", "v")
    numbers, update = staticmethod(_numbers), staticmethod(_update)

    def __init__(self, flat: Flat, compiled: bool = False):
        super().__init__(flat, compiled)
        self.m_MxP, self.v_MxP = flat.like(), flat.like()
        self.options |= {name: torch.zeros_like(self.options["beta2"]) for name in ("beta2_since", "beta2_carried")}

    def configure(self, slot: int, optimizer) -> None:
        """Take the options of one slot from its recipe; its beta2 is the optimizer's until `set_beta2`."""
        super().configure(slot, optimizer)
        self.set_beta2(slot, optimizer.beta2)

    def set_beta2(self, slot: int, beta2: float, since: int = 0, carried: float = 1.0) -> None:
        """Another beta2 for the steps after step `since`; `carried` is the product of those of the steps up to it (`in_force`)."""
        for name, given in (("beta2", beta2), ("beta2_since", since), ("beta2_carried", carried)):
            self.options[name][slot] = given

    @torch.no_grad()
    def step(self, grad_MxP: torch.Tensor, lr_M: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """One AdamW update (arXiv 1711.05101, Alg. 2) of every slot that is alive; the others keep every bit.

        `lr_M` float64 is the rate of this step, `step_M` the number of this step counted from 1.
        """
        by = self.numbers(self.options, lr_M, step_M, self.multipliers)
        self._apply((self.flat.data, self.m_MxP, self.v_MxP), grad_MxP, alive_M, by)
