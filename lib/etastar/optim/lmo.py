"""Linear minimization oracles of operator norms: for a gradient G the matrix U of norm 1 with the largest ⟨G, U⟩ (arXiv 2502.07529 §3).

All take matrices (…, out, in), any leading axes, and give the direction to step against. A row of zeros has no direction and stays
zero. Which norm is a layer's own: 1→RMS for a token table (of its transpose, so per row), RMS→RMS for a hidden matrix, RMS→∞ for a
head (arXiv 2510.03871 eqs. 7–9).
"""

import math

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's Muon: singular values end in about 0.7 … 1.2 and not at 1
NEWTON_SCHULZ_STEPS = 5


def embedding_rows(g_VxD: torch.Tensor) -> torch.Tensor:
    """Each row over its RMS: unit 1→RMS norm of a token table stored as (…, V, D), a token a row."""
    return _unit(g_VxD) * math.sqrt(g_VxD.shape[-1])


def head_rows(g_VxD: torch.Tensor) -> torch.Tensor:
    """Each row over √in times its length: unit RMS→∞ norm, rows being outputs."""
    return _unit(g_VxD) / math.sqrt(g_VxD.shape[-1])


def signs(g_OxI: torch.Tensor) -> torch.Tensor:
    """Signs over the number of inputs: unit ∞→∞ norm, and unit RMS→∞ norm too."""
    return g_OxI.sign() / g_OxI.shape[-1]


def vector(g_xD: torch.Tensor) -> torch.Tensor:
    """A gain or bias (…, D) over its RMS."""
    return _unit(g_xD) * math.sqrt(g_xD.shape[-1])


ROW_RULES = {"embedding": embedding_rows, "embedding_sign": torch.sign, "output": head_rows, "output_sign": signs, "norm": vector}
LIKE = {"expert": "hidden", "router": "output"}  # the parts of a mixture have the rules, and radii, of these


def spectral(g_OxI: torch.Tensor, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> torch.Tensor:
    """√(out/in) times the polar factor of G: unit RMS→RMS norm, as far as `newton_schulz` gets there."""
    return newton_schulz(g_OxI, steps, dtype).mul_(math.sqrt(g_OxI.shape[-2] / g_OxI.shape[-1]))


def newton_schulz(g_OxI: torch.Tensor, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> torch.Tensor:
    """About the polar factor UVᵀ of G = USVᵀ by `steps` quintic Newton–Schulz steps in `dtype` (None: the gradient's own).

    Singular values that are not tiny beside the Frobenius norm end between about 0.68 and 1.2; those under a thousandth of it
    are not raised all the way in five steps. The result has the type of G.
    """
    (a, b, c), wide = NEWTON_SCHULZ, g_OxI.shape[-2] <= g_OxI.shape[-1]
    x = (g_OxI if wide else g_OxI.mT).flatten(0, -3) if g_OxI.ndim > 2 else (g_OxI if wide else g_OxI.mT)[None]
    x = x.to(dtype or g_OxI.dtype)
    x = _unit(x.flatten(1)).view(x.shape)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(g_OxI.shape).to(g_OxI.dtype)


def _unit(g: torch.Tensor) -> torch.Tensor:
    """g over its length along the last axis, after a power of two, which rounds nothing, has kept small squares from underflowing."""
    largest = g.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    g = torch.ldexp(g, -torch.frexp(largest).exponent)
    return g / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp(min=0.5)
