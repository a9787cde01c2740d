"""Averages of the weights of a stack, read out while it trains: exponential ones, and equal ones over windows of steps.

They never feed back. Equal averages are kept window by window, so that SWA (the mean over steps, arXiv 1803.05407) and LAWA (the mean of
the last checkpoints, arXiv 2306.03241) of any later windows compose from them.
"""

import math

import torch

from etastar.observe import Observe, step_of_window
from etastar.optim.stacked import Flat


class StackedAverages:
    """One (M, P) float32 buffer an average: "ema-HORIZON" for each horizon in tokens and "mean" of the window that is open.

    An EMA starts as the weights after the first step, as torch.optim.swa_utils.AveragedModel does; its decay a step is
    exp(−batch_tokens / horizon). No tensor is ever replaced, and how many steps an average holds follows from the slot's step.
    """

    def __init__(self, flat: Flat, observe: Observe, batch_tokens: int):
        self.batch_tokens, self.every = batch_tokens, observe.average_every_tokens
        self.gain = {f"ema-{tokens}": 1 - ema_decay(tokens, batch_tokens) for tokens in observe.ema_horizon_tokens}
        self.buffers = {name: flat.like() for name in (*self.gain, *(["mean"] if self.every else []))}

    @torch.no_grad()
    def update(self, weights_MxP: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """Take in the weights after step `step_M` (counted from 1) of every slot that is alive; the others keep every bit."""
        for name, average_MxP in self.buffers.items():
            share_Mx1 = self._share(name, step_M).float()[:, None]
            new_MxP = torch.lerp(average_MxP, weights_MxP, share_Mx1)
            average_MxP.copy_(torch.where(alive_M[:, None], new_MxP, average_MxP))

    def _share(self, name: str, step_M: torch.Tensor) -> torch.Tensor:
        """The weight of the newest step in an average, float64 (M,)."""
        if name == "mean":
            return 1 / step_of_window(step_M, self.batch_tokens, self.every).clamp(min=1).double()
        return torch.where(step_M == 1, torch.ones_like(step_M, dtype=torch.float64), self.gain[name])


def ema_decay(horizon_tokens: int, batch_tokens: int) -> float:
    """The decay a step of an EMA in which weights count 1/e of the newest when they are one horizon old."""
    return math.exp(-batch_tokens / horizon_tokens)


def compose(parts: list[dict[str, torch.Tensor]], steps: list[int]) -> dict[str, torch.Tensor]:
    """The mean of the parts weighed by their steps, summed in float64, float32."""
    total = sum(steps)
    return {name: sum(part[name].double() * n for part, n in zip(parts, steps, strict=True)).div(total).float() for name in parts[0]}
