"""Operator norms of the weights of runs while they train: those of the token table, of the hidden matrix that has the largest, of the head.

What is logged follows from the weights alone and from nothing logged before, so that a branch's curve is the straight run's.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch

from etastar.model.decoder import Params
from etastar.model.norms import rms_to_inf
from etastar.model.shapes import fused_rows, matrices_in, role_of
from etastar.model.spectral import eigenvalue_bracket, gram
from etastar.recipe import Model

HELD_BYTES = 2**28  # of Gram matrices at once


def slot_norms(stack, slots: list[int]) -> list[list[float]]:
    """`weight_norms` of some slots of an engine.slots.SlotStack, of the weights it validates; on a CPU slot by slot, so that a slot's
    bits do not depend on its neighbours."""
    if stack.device.type == "cpu":
        return [_of_rows(stack, slice(slot, slot + 1))[0] for slot in slots]
    found = _of_rows(stack, slice(None))
    return [found[slot] for slot in slots]


def _of_rows(stack, rows: slice) -> list[list[float]]:
    return weight_norms(stack.flat.views(stack.optimizer.evaluated(rows)), stack.model).tolist()


@torch.no_grad()
def weight_norms(params: Params, model: Model) -> torch.Tensor:
    """(M, 3) float64 of stacked parameters, as observe.LOGS["norms"]: 1→RMS of the token table, the largest RMS→RMS of a hidden
    matrix, RMS→∞ of the head, which is the token table where these are tied."""
    table_MxVxD, head_MxVxD = params["embedding"], params["embedding" if model.tied else "head"]
    hidden_M = torch.stack(list(_largest(params, model))).amax(0)
    return torch.stack([rms_to_inf(table_MxVxD) / model.width, hidden_M, rms_to_inf(head_MxVxD)], dim=1)


def _largest(params: Params, model: Model) -> Iterator[torch.Tensor]:
    """The largest RMS→RMS norms of groups of hidden matrices, every expert's too, (M,) each; those of one shape, either way round, go
    together."""
    by_shape = defaultdict(list)
    for name, w_MxOxI in params.items():
        if role_of(name) in ("hidden", "expert"):
            for place in matrices_in(tuple(w_MxOxI.shape[1:]), fused_rows(name, model)):
                matrix = w_MxOxI[:, *place]
                rows, columns = matrix.shape[1:]
                by_shape[tuple(sorted((rows, columns)))].append((matrix if rows >= columns else matrix.mT, columns / rows))
    for (short, long), matrices in by_shape.items():
        most = max(1, HELD_BYTES // (8 * short**2 * len(matrices[0][0])))
        for first in range(0, len(matrices), most):
            tall, scales = zip(*matrices[first : first + most], strict=True)
            gram_MxKxNxN = gram(torch.stack(tall, dim=1))
            gram_MxKxNxN *= torch.tensor(scales, dtype=torch.float64, device=gram_MxKxNxN.device)[:, None, None]
            yield eigenvalue_bracket(gram_MxKxNxN, long).low.amax(1).sqrt()
