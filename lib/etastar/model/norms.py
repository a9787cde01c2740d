"""Induced operator norms of matrices, ‖W‖_{a→b} = max ‖Wx‖_b / ‖x‖_a with ‖x‖_RMS = ‖x‖₂ / √dim (arXiv 2510.03871 Def. 2).

A matrix is (…, out, in), as y = W x; leading axes are matrices side by side. All functions give float64 (…). Which norm is a layer's
own: 1→RMS of a token table, whose map takes a token to its row, so that it is the transpose of what is stored; RMS→RMS of a hidden
matrix; RMS→∞ of a head.
"""

import math
from collections.abc import Callable

import pandas as pd
import torch

from etastar.model.matrices import Found, matrices_of
from etastar.model.spectral import blocks_of_rows, spectral_bracket

Norm = Callable[[torch.Tensor], torch.Tensor]

OWN_NORM = {"embedding": "one_to_rms", "hidden": "rms_to_rms", "output": "rms_to_inf"}


@torch.no_grad()
def rms_to_inf(w_xOxI: torch.Tensor) -> torch.Tensor:
    """RMS→∞: √in times the length of the longest row."""
    return _largest_row(w_xOxI, 2) * math.sqrt(w_xOxI.shape[-1])


@torch.no_grad()
def inf_to_inf(w_xOxI: torch.Tensor) -> torch.Tensor:
    """∞→∞: the largest sum of a row's absolute values."""
    return _largest_row(w_xOxI, 1)


@torch.no_grad()
def one_to_rms(w_xOxI: torch.Tensor) -> torch.Tensor:
    """1→RMS: the length of the longest column over √out."""
    squares_xI = sum(rows.square().sum(-2) for rows in blocks_of_rows(w_xOxI))
    return (squares_xI.amax(-1) / w_xOxI.shape[-2]).sqrt()


@torch.no_grad()
def spectral(w_xOxI: torch.Tensor) -> torch.Tensor:
    """The largest singular value, from below; `spectral_bracket` says how far."""
    return spectral_bracket(w_xOxI).low


@torch.no_grad()
def rms_to_rms(w_xOxI: torch.Tensor) -> torch.Tensor:
    """RMS→RMS: √(in / out) times the largest singular value."""
    return spectral(w_xOxI) * _rms_over_spectral(w_xOxI)


@torch.no_grad()
def frobenius(w_xOxI: torch.Tensor) -> torch.Tensor:
    """The root of the sum of squares."""
    return sum(rows.square().sum((-2, -1)) for rows in blocks_of_rows(w_xOxI)).sqrt()


@torch.no_grad()
def rms(w_xOxI: torch.Tensor) -> torch.Tensor:
    """The root of the mean square: what a normal initialization calls its std."""
    return frobenius(w_xOxI) / math.sqrt(math.prod(w_xOxI.shape[-2:]))


def _largest_row(w_xOxI: torch.Tensor, order: int) -> torch.Tensor:
    lengths = [torch.linalg.vector_norm(rows, order, dim=-1).amax(-1) for rows in blocks_of_rows(w_xOxI)]
    return torch.stack(lengths).amax(0)


def _rms_over_spectral(w_xOxI: torch.Tensor) -> float:
    return math.sqrt(w_xOxI.shape[-1] / w_xOxI.shape[-2])


def operator_norms(x, role: str | None = None) -> pd.DataFrame:
    """The operator norms of all matrices in x, one row a matrix.

    x is a matrix (out, in) or a stack of them (slots, out, in), a torch tensor or a numpy array, whose `role` is "embedding", "hidden"
    (default) or "output"; one of our decoders or anybody's nn.Module; parameters by name; or a path to a safetensors file or a folder
    of them, of which one tensor is read at a time. Roles there are given by kinds of modules and by names (`model.matrices`).

    Columns: name; part ("q", "k", "v", "gate", "up" of our fused parameters, else ""); slot; role; shape as stored; `norm`, the role's
    own: 1→RMS of a token table, RMS→RMS of a hidden matrix, RMS→∞ of a head; rms_to_inf, rms_to_rms, one_to_rms, inf_to_inf, spectral,
    frobenius, rms. A token table stored (tokens, width) is taken as the map from tokens, its transpose. A table that is the head too
    has two rows. The spectral norm may be larger than told by `spectral_error` of it at most. Parameters of other kinds (convolutions,
    integers) have role "other" and no numbers; vectors are left out. Raises ValueError for what has no matrix, and for entries that are
    not finite, naming the parameter. arXiv 2510.03871 Def. 2 and eqs. 7–9.
    """
    return pd.DataFrame([row for found in matrices_of(x, role) for row in _rows(found)])


@torch.no_grad()
def _rows(found: Found) -> list[dict]:
    told = {"name": found.name, "part": found.part}
    if found.tensor is None:
        return [told | {"slot": 0, "role": "other", "shape": found.shape} | dict.fromkeys(("norm", *_COLUMNS), math.nan)]
    stored_SxOxI = found.tensor
    if not bool(frobenius(stored_SxOxI).isfinite().all()):
        raise ValueError(f"{found.label} has entries that are NaN or infinite, and so no norm; take the weights before it diverged")
    bracket, rows = spectral_bracket(stored_SxOxI), []
    for role in found.roles:
        norms = _norms(stored_SxOxI.mT if role == "embedding" else stored_SxOxI, bracket)
        for slot, numbers in enumerate(zip(*(column.tolist() for column in norms.values()), strict=True)):
            row = dict(zip(norms, numbers, strict=True))
            rows.append(told | {"slot": slot, "role": role, "shape": found.shape, "norm": row[OWN_NORM[role]]} | row)
    return rows


def _norms(w_SxOxI: torch.Tensor, bracket) -> dict[str, torch.Tensor]:
    """All norms of maps whose spectral norm is known, each (S,)."""
    error = torch.where(bracket.low > 0, bracket.high / bracket.low - 1, bracket.high)
    return {"rms_to_inf": rms_to_inf(w_SxOxI), "rms_to_rms": bracket.low * _rms_over_spectral(w_SxOxI),
            "one_to_rms": one_to_rms(w_SxOxI), "inf_to_inf": inf_to_inf(w_SxOxI), "spectral": bracket.low, "spectral_error": error,
            "frobenius": frobenius(w_SxOxI), "rms": rms(w_SxOxI)}


_COLUMNS = ("rms_to_inf", "rms_to_rms", "one_to_rms", "inf_to_inf", "spectral", "spectral_error", "frobenius", "rms")
