"""The largest singular value of matrices, between two bounds that hold whether or not an iteration has converged.

Small Gram matrices G = WᵀW have all their eigenvalues worked out. For large ones power iteration that keeps its vectors (Lanczos)
gives a vector; its Rayleigh quotient is a lower bound of the largest eigenvalue, however good the vector is. An upper bound μ is one
for which μ − G has a Cholesky factor, since then it is positive definite; that costs little beside G itself. Where no μ close to
the lower bound passes, all eigenvalues are worked out after all.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch

EXACT_SIZE = {"cpu": 256}  # rows of the Gram matrix up to which all eigenvalues cost no more than the search
EXACT_SIZE_ELSEWHERE = 32  # a GPU waits for many small kernels there
STEPS, WARM_STEPS = 32, 8
TOLERANCES = (1e-6, 1e-3)  # of the singular value: the upper bounds that are tried, the closer first
BLOCK = 2**22  # entries that are held as float64 at once, so that a large table is not copied


@dataclasses.dataclass(frozen=True)
class Bracket:
    """The largest singular values lie in `low` … `high`, float64 (…,). `vector` (…, n) is what a later search may start from.

    It is of the shorter side, and None where all singular values were worked out, which needs no start.
    """

    low: torch.Tensor
    high: torch.Tensor
    vector: torch.Tensor | None


def blocks_of_rows(w_xOxI: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of matrices (…, O, I) as float64, a few at a time."""
    rows = max(1, BLOCK // max(1, w_xOxI.numel() // w_xOxI.shape[-2]))
    for some in w_xOxI.detach().split(rows, dim=-2):
        yield some.double()


@torch.no_grad()
def gram(w_xOxI: torch.Tensor) -> torch.Tensor:
    """Products of all pairs of rows or columns, whichever are fewer: float64 (…, n, n), n the shorter side."""
    tall = w_xOxI if w_xOxI.shape[-2] >= w_xOxI.shape[-1] else w_xOxI.mT
    return sum(part.mT @ part for part in blocks_of_rows(tall))


@torch.no_grad()
def spectral_bracket(w_xOxI: torch.Tensor, start: torch.Tensor | None = None) -> Bracket:
    """Bounds of the largest singular value of matrices (…, O, I), from `start` (…, n), an earlier `Bracket.vector`, if given."""
    found = eigenvalue_bracket(gram(w_xOxI), max(w_xOxI.shape[-2:]), start)
    return Bracket(found.low.sqrt(), found.high.sqrt(), found.vector)


@torch.no_grad()
def eigenvalue_bracket(gram_xNxN: torch.Tensor, terms: int, start: torch.Tensor | None = None) -> Bracket:
    """Bounds of the largest eigenvalue of Gram matrices (…, n, n), float64, each entry a sum of `terms` products.

    Both are moved apart by what rounding can have done: γ = terms · 2⁻⁵² of the trace in the Gram matrix, n · 2⁻⁵² of the trace in
    its eigenvalues, and n² · 2⁻⁵² of the bound in the Cholesky factor.
    """
    lead, size = gram_xNxN.shape[:-2], gram_xNxN.shape[-1]
    gram_SxNxN = gram_xNxN.reshape(-1, size, size)
    trace_S = gram_SxNxN.diagonal(dim1=-2, dim2=-1).sum(-1)
    if size <= EXACT_SIZE.get(gram_xNxN.device.type, EXACT_SIZE_ELSEWHERE):
        low_S = high_S = torch.linalg.eigvalsh(gram_SxNxN)[:, -1]
        vector = None
    else:
        low_S, high_S, vector_SxN = _searched(gram_SxNxN, None if start is None else start.reshape(-1, size))
        vector = vector_SxN.view(*lead, size)
    rounding_S = torch.finfo(torch.float64).eps * ((terms + size) * trace_S + size**2 * high_S)
    return Bracket((low_S - rounding_S).clamp(min=0).view(lead), (high_S + rounding_S).view(lead), vector)


def _searched(gram_SxNxN: torch.Tensor, start_SxN: torch.Tensor | None):
    """(lower bound, upper bound, vector) by search, certificate, and all eigenvalues where that is refused."""
    low_S, vector_SxN = _ritz(gram_SxNxN, start_SxN)
    high_S = torch.full_like(low_S, math.inf)
    for tolerance in TOLERANCES:
        tried_S = low_S * (1 + tolerance) ** 2
        shifted = torch.diag_embed(tried_S[:, None].expand(-1, gram_SxNxN.shape[-1])).sub_(gram_SxNxN)
        holds_S = torch.linalg.cholesky_ex(shifted).info == 0
        high_S = torch.where(holds_S, torch.minimum(high_S, tried_S), high_S)
        if bool(high_S.isfinite().all()):
            return low_S, high_S, vector_SxN
    open_S = high_S.isinf()
    low_S[open_S] = high_S[open_S] = torch.linalg.eigvalsh(gram_SxNxN[open_S])[:, -1]
    return low_S, high_S, vector_SxN


def _ritz(gram_SxNxN: torch.Tensor, start_SxN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest Rayleigh quotient in the space of a start and its first products with G, (S,), and its unit vector (S, n)."""
    slots, size, _ = gram_SxNxN.shape
    steps = min(size, STEPS if start_SxN is None else WARM_STEPS)
    basis_SxKxN = gram_SxNxN.new_zeros(slots, steps, size)
    image_SxKxN = torch.zeros_like(basis_SxKxN)
    v_SxN = _any_vector(size).to(gram_SxNxN.device).expand(slots, -1) if start_SxN is None else start_SxN
    for k in range(steps):
        known = basis_SxKxN[:, :k]
        for _ in range(2 if k else 0):  # once leaves what rounding brought back
            v_SxN = v_SxN - torch.bmm(torch.bmm(known, v_SxN[..., None]).mT, known)[:, 0]
        basis_SxKxN[:, k] = v_SxN = _unit(v_SxN)
        image_SxKxN[:, k] = v_SxN = torch.bmm(gram_SxNxN, v_SxN[..., None])[..., 0]
    small_SxKxK = torch.bmm(basis_SxKxN, image_SxKxN.mT)
    top_Sx1xK = torch.linalg.eigh((small_SxKxK + small_SxKxK.mT) / 2).eigenvectors[..., -1:].mT
    vector_SxN = _unit(torch.bmm(top_Sx1xK, basis_SxKxN)[:, 0])
    image_SxN = torch.bmm(gram_SxNxN, vector_SxN[..., None])[..., 0]
    return (vector_SxN * image_SxN).sum(-1), vector_SxN


def _unit(v_SxN: torch.Tensor) -> torch.Tensor:
    """v over its length; 0 stays 0."""
    return v_SxN / torch.linalg.vector_norm(v_SxN, dim=-1, keepdim=True).clamp(min=torch.finfo(v_SxN.dtype).tiny)


def _any_vector(size: int) -> torch.Tensor:
    """The same start for every search, so that what is found follows from the matrix alone."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
