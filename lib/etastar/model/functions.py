"""The decoder's operations with backward passes by hand: fewer and smaller passes over memory than autograd would make.

On small models most of a step's time is not in matrix products, so this is where a CPU's speed comes from. Every function
treats each slot of a stack as a run on its own would be.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def product(a_MxNxK: torch.Tensor, b_MxKxO: torch.Tensor) -> torch.Tensor:
    """Each slot's matrix product. On a CPU slot by slot, as a solo run makes it; elsewhere one batched product."""
    if a_MxNxK.device.type != "cpu":
        return torch.bmm(a_MxNxK, b_MxKxO)
    each = [torch.mm(a, b) for a, b in zip(a_MxNxK.unbind(), b_MxKxO.unbind(), strict=True)]
    return each[0][None] if len(each) == 1 else torch.stack(each)  # one slot needs no copy


class Linear(Function):
    """x wᵀ of each slot: (M, N, O) from x (M, N, I) and w (M, O, I)."""

    @staticmethod
    def forward(ctx, x_MxNxI, w_MxOxI):
        y_MxNxO = product(x_MxNxI, w_MxOxI.mT)
        ctx.save_for_backward(x_MxNxI.to(y_MxNxO.dtype), w_MxOxI.to(y_MxNxO.dtype))
        return y_MxNxO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxNxO):
        x_MxNxI, w_MxOxI = ctx.saved_tensors
        return product(grad_MxNxO, w_MxOxI), product(grad_MxNxO.mT, x_MxNxI)


class Normalize(Function):
    """x over its root mean square, without a gain (arXiv 1910.07467): the gain goes into the next matrix, which is smaller."""

    @staticmethod
    def forward(ctx, x_MxNxD, eps):
        scale_MxNx1 = x_MxNxD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y_MxNxD = x_MxNxD * scale_MxNx1
        ctx.save_for_backward(y_MxNxD, scale_MxNx1)
        return y_MxNxD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxNxD):
        y_MxNxD, scale_MxNx1 = ctx.saved_tensors
        along_MxNx1 = (grad_MxNxD * y_MxNxD).mean(-1, keepdim=True)
        return torch.addcmul(grad_MxNxD, y_MxNxD, along_MxNx1, value=-1).mul_(scale_MxNx1), None


class Turn(Function):
    """x cos + (−second half, first half of x) sin: rotary positions (arXiv 2104.09864) of x (S, T, heads, H).

    `cos` and `sin` are (T, heads, H), the first half of `sin` negative.
    """

    @staticmethod
    def forward(ctx, x_SxTxAxH, cos_TxAxH, sin_TxAxH):
        ctx.save_for_backward(cos_TxAxH, sin_TxAxH)
        return (x_SxTxAxH * cos_TxAxH).addcmul_(x_SxTxAxH.roll(x_SxTxAxH.shape[-1] // 2, -1), sin_TxAxH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SxTxAxH):
        cos_TxAxH, sin_TxAxH = ctx.saved_tensors
        swapped_SxTxAxH = grad_SxTxAxH.roll(grad_SxTxAxH.shape[-1] // 2, -1)
        return (grad_SxTxAxH * cos_TxAxH).addcmul_(swapped_SxTxAxH, sin_TxAxH, value=-1), None, None


class Surprise(Function):
    """Cross-entropy (M, N) in nats of targets (M, N) under logits x wᵀ, with x (M, N, D) and w (M, V, D).

    The probabilities of the forward pass, less one at the target, are its gradient: no second exponential, and what comes
    from above multiplies arrays of width D, not V.
    """

    @staticmethod
    def forward(ctx, x_MxNxD, w_MxVxD, targets_MxN):
        logits_MxNxV, target_MxNx1 = product(x_MxNxD, w_MxVxD.mT), targets_MxN[..., None]
        p_MxNxV = F.softmax(logits_MxNxV, dim=-1, dtype=torch.float32)
        away_MxN = logits_MxNxV.amax(-1).float() - logits_MxNxV.gather(-1, target_MxNx1)[..., 0].float()
        loss_MxN = away_MxN - p_MxNxV.amax(-1).log()  # the largest probability is 1 / Σ exp(logit − largest logit)
        p_MxNxV.scatter_add_(-1, target_MxNx1, torch.full_like(away_MxN, -1.0)[..., None])
        ctx.save_for_backward(*(saved.to(logits_MxNxV.dtype) for saved in (x_MxNxD, w_MxVxD, p_MxNxV)))
        return loss_MxN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxN):
        x_MxNxD, w_MxVxD, slope_MxNxV = ctx.saved_tensors
        grad_MxNx1 = grad_MxN[..., None].to(x_MxNxD.dtype)
        to_w_MxVxD = product((x_MxNxD * grad_MxNx1).mT, slope_MxNxV).mT
        return product(slope_MxNxV, w_MxVxD).mul_(grad_MxNx1), to_w_MxVxD, None
