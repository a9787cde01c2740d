"""A mixture of SwiGLU experts in place of an MLP: which experts a token goes through, their products, and what balances them.

Nothing is dropped: assignments are sorted by slot and expert, so that the rows of one expert lie side by side and each expert multiplies
as many as came. A CPU takes expert after expert, as a run alone would. Elsewhere the rows of each are padded to those of the fullest of
the stack and all go through one batched product; the host has to read how many these are, which a captured CUDA graph cannot wait for.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from etastar.model.functions import Linear, Normalize, gated
from etastar.recipe import Mixture, Model

Layer = dict[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Routed:
    """How a layer dealt out its tokens: `load`, assignments of each expert a token, `probability`, the router's mean softmax over all
    experts, both (M, E), and `z`, the mean of (log Σ exp logits)², (M,). The load has no gradient."""

    load: torch.Tensor
    probability: torch.Tensor
    z: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the rows of L tokens' assignments stand, G = slots · experts groups of rows one after another, R in all.

    `token` (R,) is the row of x at each place, `of` (L, k) the place of each assignment; `sizes` the rows of each group, one number where
    all are as long.
    """

    token: torch.Tensor
    of: torch.Tensor
    sizes: list[int] | int


def mixed(x_MxNxD: torch.Tensor, layer: Layer, model: Model) -> tuple[torch.Tensor, Routed]:
    """What the experts make of the residual stream, (M, N, D), and how its tokens were dealt out among them."""
    x_MxNxD, gain_MxD = Normalize.apply(x_MxNxD, model.norm_eps), layer["mlp_norm"]
    router_MxExD, gate_up_MxExGxD = layer["router"], layer["experts_gate_up"]
    if gain_MxD is not None:
        router_MxExD, gate_up_MxExGxD = router_MxExD * gain_MxD[:, None], gate_up_MxExGxD * gain_MxD[:, None, None]
    logits_MxNxE = Linear.apply(x_MxNxD, router_MxExD)
    weight_MxNxk, expert_MxNxk, probability_MxE, z_M = Route.apply(_wide(logits_MxNxE), model.mixture.experts_per_token)
    places, load_MxE = placed(expert_MxNxk, model.mixture.experts, padded=x_MxNxD.device.type != "cpu")
    rows_RxD = Spread.apply(x_MxNxD.flatten(0, 1), places)
    h_RxF = gated(Grouped.apply(rows_RxD, gate_up_MxExGxD.flatten(0, 1), places.sizes))
    if model.normalization == "everywhere":
        h_RxF = Normalize.apply(h_RxF, model.norm_eps)
    out_RxD = Grouped.apply(h_RxF, layer["experts_out"].flatten(0, 1), places.sizes)
    y_LxD = Collect.apply(out_RxD, weight_MxNxk.flatten(0, 1), places)
    return y_LxD.view(x_MxNxD.shape), Routed(load_MxE, probability_MxE, z_M)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: a router rounded to bfloat16 takes other experts."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def auxiliary(routed: list[Routed], mixture: Mixture) -> torch.Tensor:
    """What a mixture adds to the loss that is trained, (M,): `balance` times the load-balance loss and `router_z` times the z loss.

    The first is E Σ_e load_e · probability_e with both averaged over layers (arXiv 2101.03961 eq. 4, summed over the top k, so that
    experts used alike give k), as transformers has it; the second the mean over layers of (log Σ exp logits)² (arXiv 2202.08906 eq. 5).
    """
    load_MxE, probability_MxE, z_M = (torch.stack([getattr(layer, name) for layer in routed]).mean(0)
                                      for name in ("load", "probability", "z"))
    balance_M = mixture.experts * (load_MxE * probability_MxE).sum(1)
    return mixture.balance * balance_M + mixture.router_z * z_M


class Route(Function):
    """The k experts with the largest logits (M, N, E) of each token and a softmax over these alone, as transformers' granitemoe has it.

    Gives weights and experts (M, N, k), the mean softmax over all experts (M, E) and the mean of (log Σ exp logits)² (M,).
    """

    @staticmethod
    def forward(ctx, logits_MxNxE, experts_per_token):
        top_MxNxk, expert_MxNxk = logits_MxNxE.topk(experts_per_token, dim=-1)
        weight_MxNxk, p_MxNxE = F.softmax(top_MxNxk, dim=-1), F.softmax(logits_MxNxE, dim=-1)
        z_MxN = top_MxNxk[..., 0] - p_MxNxE.amax(-1).log()  # the largest probability is 1 / Σ exp(logit − largest logit)
        ctx.save_for_backward(weight_MxNxk, expert_MxNxk, p_MxNxE, z_MxN)
        ctx.mark_non_differentiable(expert_MxNxk)
        ctx.set_materialize_grads(False)
        return weight_MxNxk, expert_MxNxk, p_MxNxE.mean(1), z_MxN.square().mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MxNxk, _, grad_MxE, grad_M):
        weight_MxNxk, expert_MxNxk, p_MxNxE, z_MxN = ctx.saved_tensors
        to_logits_MxNxE = torch.zeros_like(p_MxNxE)
        if grad_MxE is not None:
            slope_Mx1xE = grad_MxE[:, None] / p_MxNxE.shape[1]
            torch.mul(p_MxNxE, slope_Mx1xE - (p_MxNxE * slope_Mx1xE).sum(-1, keepdim=True), out=to_logits_MxNxE)
        if grad_M is not None:
            to_logits_MxNxE.addcmul_(p_MxNxE, (z_MxN * (2 / z_MxN.shape[1] * grad_M[:, None]))[..., None])
        if grad_MxNxk is not None:
            along_MxNx1 = (grad_MxNxk * weight_MxNxk).sum(-1, keepdim=True)
            to_logits_MxNxE.scatter_add_(-1, expert_MxNxk, weight_MxNxk * (grad_MxNxk - along_MxNx1))
        return to_logits_MxNxE, None


def placed(expert_MxNxk: torch.Tensor, experts: int, padded: bool) -> tuple[Places, torch.Tensor]:
    """Places for the rows of all assignments, by slot, then expert, then token, and the load (M, E): assignments of each expert a token.

    `padded` gives every group as many places as the fullest has. Those left over hold a token of their own slot, which nobody collects.
    """
    (slots, tokens, k), device = expert_MxNxk.shape, expert_MxNxk.device
    group_A = (expert_MxNxk + experts * torch.arange(slots, device=device)[:, None, None]).flatten()
    sorted_A, order_A = group_A.sort(stable=True)
    count_G = torch.bincount(group_A, minlength=slots * experts)
    load_MxE = count_G.view(slots, experts).float() / tokens
    place_A = torch.arange(len(order_A), device=device)
    token_R, sizes = order_A.div(k, rounding_mode="floor"), count_G.tolist()
    if padded:
        sizes = max(sizes)
        place_A += sorted_A * sizes - (count_G.cumsum(0) - count_G)[sorted_A]
        slot_R = torch.arange(slots, device=device).repeat_interleave(experts * sizes)
        token_R = (slot_R * tokens).scatter_(0, place_A, token_R)
    of_A = torch.empty_like(place_A).scatter_(0, order_A, place_A)
    return Places(token_R, of_A.view(-1, k), sizes), load_MxE


class Spread(Function):
    """The rows of x (L, D) at their places: (R, D)."""

    @staticmethod
    def forward(ctx, x_LxD, places):
        ctx.places = places
        return _lowered(x_LxD).index_select(0, places.token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RxD):
        return F.embedding_bag(ctx.places.of, grad_RxD, mode="sum"), None


class Collect(Function):
    """Each token's rows (R, D) from their places, summed with its weights (L, k): (L, D), in the order of the weights."""

    @staticmethod
    def forward(ctx, rows_RxD, weight_Lxk, places):
        weight_Lxk, ctx.places = weight_Lxk.to(rows_RxD.dtype), places
        ctx.save_for_backward(rows_RxD, weight_Lxk)
        return F.embedding_bag(places.of, rows_RxD, mode="sum", per_sample_weights=weight_Lxk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LxD):
        (rows_RxD, weight_Lxk), places = ctx.saved_tensors, ctx.places
        grad_RxD = grad_LxD.index_select(0, places.token)
        to_weight_Lxk = (grad_RxD * rows_RxD).sum(1)[places.of]
        weight_R = weight_Lxk.new_zeros(len(rows_RxD)).scatter_(0, places.of.flatten(), weight_Lxk.flatten())
        return grad_RxD.mul_(weight_R[:, None]), to_weight_Lxk, None


class Grouped(Function):
    """x wᵀ of each group of rows: (R, O) from x (R, I) and w (G, O, I), the groups' rows as `Places.sizes` tells them."""

    @staticmethod
    def forward(ctx, x_RxI, w_GxOxI, sizes):
        x_RxI, w_GxOxI, ctx.sizes = _lowered(x_RxI), _lowered(w_GxOxI), sizes
        ctx.save_for_backward(x_RxI, w_GxOxI)
        return _products(x_RxI, w_GxOxI.mT, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RxO):
        x_RxI, w_GxOxI = ctx.saved_tensors
        return _products(grad_RxO, w_GxOxI, ctx.sizes), _inner_products(grad_RxO, x_RxI, ctx.sizes), None


def _products(x_RxI: torch.Tensor, w_GxIxO: torch.Tensor, sizes) -> torch.Tensor:
    """Each group's rows times its matrix: (R, O)."""
    if isinstance(sizes, int):
        return torch.bmm(x_RxI.view(len(w_GxIxO), sizes, -1), w_GxIxO).flatten(0, 1)
    y_RxO = x_RxI.new_empty(len(x_RxI), w_GxIxO.shape[-1])
    for x, w, y in zip(x_RxI.split(sizes), w_GxIxO.unbind(), y_RxO.split(sizes), strict=True):
        torch.mm(x, w, out=y)
    return y_RxO


def _inner_products(x_RxO: torch.Tensor, y_RxI: torch.Tensor, sizes) -> torch.Tensor:
    """xᵀ y of each group: (G, O, I)."""
    if isinstance(sizes, int):
        return torch.bmm(x_RxO.view(-1, sizes, x_RxO.shape[1]).mT, y_RxI.view(-1, sizes, y_RxI.shape[1]))
    made_GxOxI = x_RxO.new_empty(len(sizes), x_RxO.shape[1], y_RxI.shape[1])
    for x, y, made in zip(x_RxO.split(sizes), y_RxI.split(sizes), made_GxOxI.unbind(), strict=True):
        torch.mm(x.mT, y, out=made)
    return made_GxOxI


def _lowered(x: torch.Tensor) -> torch.Tensor:
    """x in the precision that products have here, which torch lowers by itself only where it makes their result."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
