"""The decoder's operations with backward passes by hand: fewer and smaller passes over memory than autograd would make.

On small models most of a step's time is not in matrix products, so this is where a CPU's speed comes from. Every function
treats each slot of a stack as a run on its own would be.
"""

import functools

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


def add_product(sum_MxKxO: torch.Tensor | None, a_MxKxN: torch.Tensor, b_MxNxO: torch.Tensor) -> torch.Tensor:
    """`sum` with each slot's matrix product added to it in place; a new tensor where there is no sum yet."""
    if sum_MxKxO is None:
        return product(a_MxKxN, b_MxNxO)
    for total, a, b in zip(sum_MxKxO.unbind(), a_MxKxN.unbind(), b_MxNxO.unbind(), strict=True):
        total.addmm_(a, b)
    return sum_MxKxO


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


class NormalizeFirst(Function):
    """x (M, N, heads, H) with the first heads each over its root mean square and the others as they are."""

    @staticmethod
    def forward(ctx, x_MxNxAxH, first, eps):
        scale_MxNxAx1 = x_MxNxAxH.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        scale_MxNxAx1[:, :, first:] = 1
        y_MxNxAxH, ctx.first = x_MxNxAxH * scale_MxNxAx1, first
        ctx.save_for_backward(y_MxNxAxH, scale_MxNxAx1)
        return y_MxNxAxH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxNxAxH):
        y_MxNxAxH, scale_MxNxAx1 = ctx.saved_tensors
        along_MxNxAx1 = (grad_MxNxAxH * y_MxNxAxH).mean(-1, keepdim=True)
        along_MxNxAx1[:, :, ctx.first:] = 0
        return torch.addcmul(grad_MxNxAxH, y_MxNxAxH, along_MxNxAx1, value=-1).mul_(scale_MxNxAx1), None, None


def gated(x_MxNxG: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of x = gate | up (…, 2F): (…, F)."""
    if fused_elsewhere(x_MxNxG):
        gate, up = x_MxNxG.chunk(2, dim=-1)
        return F.silu(gate) * up
    return Gate.apply(x_MxNxG)


def fused_elsewhere(x: torch.Tensor) -> bool:
    """Whether the device or the compiler has better than what is written by hand for a CPU."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


class Gate(Function):
    """silu(gate) · up of x = gate | up (M, N, 2F): SwiGLU's elementwise part (arXiv 2002.05202), (M, N, F)."""

    @staticmethod
    def forward(ctx, x_MxNxG):
        gate_MxNxF, up_MxNxF = x_MxNxG.chunk(2, dim=-1)
        open_MxNxF = F.silu(gate_MxNxF)
        ctx.save_for_backward(x_MxNxG, open_MxNxF)
        return open_MxNxF * up_MxNxF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxNxF):
        x_MxNxG, open_MxNxF = ctx.saved_tensors
        gate_MxNxF, up_MxNxF = x_MxNxG.chunk(2, dim=-1)
        to_x_MxNxG = torch.empty_like(x_MxNxG)
        to_gate_MxNxF, to_up_MxNxF = to_x_MxNxG.chunk(2, dim=-1)
        torch.mul(grad_MxNxF, open_MxNxF, out=to_up_MxNxF)
        torch.ops.aten.silu_backward.grad_input(grad_MxNxF * up_MxNxF, gate_MxNxF, grad_input=to_gate_MxNxF)
        return to_x_MxNxG


class Attention(Function):
    """Causal attention with rotary positions (arXiv 2104.09864) of queries, keys and values x (S, T, 3, heads, H): (S, T, heads, H).

    `cos` (T, H) and `sin` (T, H / 2). In blocks of QUERY_ROWS rows with the probabilities kept: at contexts of a few hundred
    tokens that takes less time on a CPU than computing them again, and half of the square is never touched.
    """

    @staticmethod
    def forward(ctx, x_SxTx3xAxH, cos_TxH, sin_Txh, scale):
        sequences, length, _, heads, size = x_SxTx3xAxH.shape
        turned_3xAxSxTxH = x_SxTx3xAxH.new_empty(3, heads, sequences, length, size)
        _turn(x_SxTx3xAxH.permute(2, 3, 0, 1, 4), cos_TxH, sin_Txh, turned_3xAxSxTxH)
        q_PxTxH, k_PxTxH, v_PxTxH = turned_3xAxSxTxH.flatten(1, 2)  # P pairs of a head and a sequence
        out_SxTxAxH = x_SxTx3xAxH.new_empty(sequences, length, heads, size)
        out_AxSxTxH, kept = out_SxTxAxH.permute(2, 0, 1, 3), []
        for first, last in _query_rows(length):
            hidden = _future(first, last, x_SxTx3xAxH.device)
            score_PxRxL = torch.baddbmm(hidden, q_PxTxH[:, first:last], k_PxTxH[:, :last].mT, alpha=scale)
            kept.append(torch.softmax(score_PxRxL, -1))
            block_PxRxH = torch.bmm(kept[-1], v_PxTxH[:, :last])
            out_AxSxTxH[:, :, first:last] = block_PxRxH.view(heads, sequences, last - first, size)
        ctx.save_for_backward(turned_3xAxSxTxH, cos_TxH, sin_Txh, *kept)
        ctx.scale = scale
        return out_SxTxAxH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SxTxAxH):
        turned_3xAxSxTxH, cos_TxH, sin_Txh, *kept = ctx.saved_tensors
        sequences, length, heads, size = grad_SxTxAxH.shape
        q_PxTxH, k_PxTxH, v_PxTxH = turned_3xAxSxTxH.flatten(1, 2)
        to_turned_3xAxSxTxH = torch.empty_like(turned_3xAxSxTxH)
        to_q_PxTxH, to_k_PxTxH, to_v_PxTxH = to_turned_3xAxSxTxH.flatten(1, 2)
        grad_PxTxH = grad_SxTxAxH.permute(2, 0, 1, 3).reshape(heads * sequences, length, size)
        for (first, last), p_PxRxL in zip(_query_rows(length)[::-1], kept[::-1], strict=True):
            grad_PxRxH, beta = grad_PxTxH[:, first:last], float(last < length)  # the last rows come first and see every key
            to_v_PxTxH[:, :last].baddbmm_(p_PxRxL.mT, grad_PxRxH, beta=beta)
            to_p_PxRxL = torch.bmm(grad_PxRxH, v_PxTxH[:, :last].mT)
            to_score_PxRxL = torch._softmax_backward_data(to_p_PxRxL, p_PxRxL, -1, p_PxRxL.dtype)
            to_q_PxTxH[:, first:last].baddbmm_(to_score_PxRxL, k_PxTxH[:, :last], beta=0, alpha=ctx.scale)
            to_k_PxTxH[:, :last].baddbmm_(to_score_PxRxL.mT, q_PxTxH[:, first:last], beta=beta, alpha=ctx.scale)
        to_x_SxTx3xAxH = grad_SxTxAxH.new_empty(sequences, length, 3, heads, size)
        _turn(to_turned_3xAxSxTxH, cos_TxH, -sin_Txh, to_x_SxTx3xAxH.permute(2, 3, 0, 1, 4))
        return to_x_SxTx3xAxH, None, None, None


QUERY_ROWS = 64


def _query_rows(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + QUERY_ROWS, length)) for first in range(0, length, QUERY_ROWS)]


@functools.lru_cache(maxsize=64)
def _future(first: int, last: int, device) -> torch.Tensor:
    """−∞ where a key (columns 0 … last − 1) is later than the query (rows first … last − 1)."""
    return torch.full((last - first, last), -torch.inf, device=device).triu(first + 1)


def _turn(x_3xAxSxTxH, cos_TxH, sin_Txh, out_3xAxSxTxH) -> None:
    """Queries and keys turned by their positions into `out`, values as they are; −sin turns back."""
    half = x_3xAxSxTxH.shape[-1] // 2
    x, out = x_3xAxSxTxH[:2], out_3xAxSxTxH[:2]
    torch.mul(x, cos_TxH, out=out)
    out[..., :half].addcmul_(x[..., half:], sin_Txh, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin_Txh)
    out_3xAxSxTxH[2].copy_(x_3xAxSxTxH[2])


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
    """Mean cross-entropy in nats of each slot (M,), and each target's (M, N), of targets (M, N) under logits x wᵀ.

    x is (M, N, D) and w (M, V, D). `z_loss` times the mean of (log Z)², Z = Σ exp logits, is in the first (arXiv 2204.02311 §5) and never
    in the second. The gradient, p (1 + 2 z_loss log Z) less the target, is made on the way forward, some rows at a time, so that logits
    and probabilities are never in memory as a whole and no exponential is taken twice. Only the mean can be differentiated.
    """

    @staticmethod
    def forward(ctx, x_MxNxD, w_MxVxD, targets_MxN, z_loss=0.0):
        wanted = any(ctx.needs_input_grad)
        losses, squares, to_x, to_w_MxDxV = [], [], [], None
        for x_MxRxD, target_MxR in zip(*(t.split(_rows_at_once(x_MxNxD), 1) for t in (x_MxNxD, targets_MxN)), strict=True):
            logits_MxRxV, target_MxRx1 = product(x_MxRxD, w_MxVxD.mT), target_MxR[..., None]
            p_MxRxV = F.softmax(logits_MxRxV, dim=-1, dtype=torch.float32)
            away_MxR = logits_MxRxV.amax(-1).float() - logits_MxRxV.gather(-1, target_MxRx1)[..., 0].float()
            losses.append(away_MxR - p_MxRxV.amax(-1).log())  # the largest probability is 1 / Σ exp(logit − largest logit)
            if z_loss:
                log_z_MxR = logits_MxRxV.amax(-1).float() - p_MxRxV.amax(-1).log()
                squares.append(log_z_MxR.square())
                p_MxRxV.mul_((1 + 2 * z_loss * log_z_MxR)[..., None])
            if wanted:
                p_MxRxV.scatter_add_(-1, target_MxRx1, torch.full_like(away_MxR, -1.0)[..., None])
                slope_MxRxV = p_MxRxV.to(logits_MxRxV.dtype)
                to_x.append(product(slope_MxRxV, w_MxVxD))
                to_w_MxDxV = add_product(to_w_MxDxV, x_MxRxD.mT, slope_MxRxV)
        loss_MxN = torch.cat(losses, 1)
        ctx.save_for_backward(*((torch.cat(to_x, 1), to_w_MxDxV) if wanted else ()))
        ctx.mark_non_differentiable(loss_MxN)
        mean_M = loss_MxN.mean(1)
        return mean_M + z_loss * torch.cat(squares, 1).mean(1) if z_loss else mean_M, loss_MxN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M, _):
        to_x_MxNxD, to_w_MxDxV = ctx.saved_tensors
        grad_Mx1x1 = grad_M[:, None, None] / to_x_MxNxD.shape[1]
        return to_x_MxNxD * grad_Mx1x1, (to_w_MxDxV * grad_Mx1x1).mT, None, None


LOSS_ROWS = 512


def _rows_at_once(x_MxNxD: torch.Tensor) -> int:
    """Rows whose logits a core's cache holds; all of them where a sum over parts would be rounded, or the device is wide."""
    by_parts = x_MxNxD.device.type == "cpu" and x_MxNxD.dtype == torch.float32 and not torch.compiler.is_compiling()
    return LOSS_ROWS if by_parts else x_MxNxD.shape[1]
