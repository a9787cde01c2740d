"""Induced operator norms of matrices, ‖W‖_{a→b} = max ‖Wx‖_b / ‖x‖_a with ‖x‖_RMS = ‖x‖₂ / √dim (arXiv 2510.03871 Def. 2).

A matrix is (…, out, in), as y = W x; leading axes are matrices side by side. All functions give float64 (…). Which norm is a layer's
own: 1→RMS of a token table, whose map takes a token to its row, so that it is the transpose of what is stored; RMS→RMS of a hidden
matrix; RMS→∞ of a head.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from etastar.model.matrices import Found, matrices_of
from etastar.model.spectral import blocks_of_rows, eigenvalue_bracket, spectral_bracket

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
    sums = _read_once(found.tensor)
    if not bool(sums.squares.isfinite().all()):
        raise ValueError(f"{found.label} has entries that are NaN or infinite, and so no norm; take the weights before it diverged")
    square, rows = eigenvalue_bracket(sums.gram, max(found.shape)), []
    for role in found.roles:
        norms = _norms(sums.turned() if role == "embedding" else sums, square.low.sqrt(), square.high.sqrt())
        for slot, numbers in enumerate(zip(*(column.tolist() for column in norms.values()), strict=True)):
            row = dict(zip(norms, numbers, strict=True))
            rows.append(told | {"slot": slot, "role": role, "shape": found.shape, "norm": row[OWN_NORM[role]]} | row)
    return rows


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What all norms of maps (S, O, I) are made of, float64 (S,): the largest sum of squares and of absolute values in a row, the same in
    a column, and the sum of all squares; and the Gram matrices of the shorter side, (S, n, n)."""

    shape: tuple[int, int]
    row_squares: torch.Tensor
    row_sum: torch.Tensor
    column_squares: torch.Tensor
    column_sum: torch.Tensor
    squares: torch.Tensor
    gram: torch.Tensor

    def turned(self) -> "_Sums":
        """Those of the transposes."""
        return _Sums(self.shape[::-1], self.column_squares, self.column_sum, self.row_squares, self.row_sum, self.squares, self.gram)


def _read_once(w_SxOxI: torch.Tensor) -> _Sums:
    """The sums of matrices in one pass over their entries, some rows (columns, where these are more) at a time."""
    (slots, out, into), wide = w_SxOxI.shape, w_SxOxI.shape[-2] < w_SxOxI.shape[-1]
    column_sum_SxN = torch.zeros(slots, min(out, into), dtype=torch.float64, device=w_SxOxI.device)
    gram_SxNxN, row_squares, row_sum = column_sum_SxN.new_zeros(slots, min(out, into), min(out, into)), [], []
    for part_SxRxN in blocks_of_rows(w_SxOxI.mT if wide else w_SxOxI):
        row_squares.append(part_SxRxN.square().sum(-1).amax(-1))
        size_SxRxN = part_SxRxN.abs()
        row_sum.append(size_SxRxN.sum(-1).amax(-1))
        column_sum_SxN += size_SxRxN.sum(-2)
        gram_SxNxN += _with_itself(part_SxRxN)
    squares_SxN = gram_SxNxN.diagonal(dim1=-2, dim2=-1)
    sums = _Sums((max(out, into), min(out, into)), torch.stack(row_squares).amax(0), torch.stack(row_sum).amax(0),
                 squares_SxN.amax(-1), column_sum_SxN.amax(-1), squares_SxN.sum(-1), gram_SxNxN)
    return sums.turned() if wide else sums


def _with_itself(w_SxRxN: torch.Tensor) -> torch.Tensor:
    """wᵀ w (S, n, n). Of a product with itself numpy works out one half, and so takes about half of torch's time."""
    if w_SxRxN.device.type != "cpu":
        return w_SxRxN.mT @ w_SxRxN
    each = w_SxRxN.numpy()
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by name, once
        return torch.from_numpy(np.matmul(each.swapaxes(-1, -2), each))


def _norms(sums: _Sums, low_S: torch.Tensor, high_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """All norms of maps whose spectral norm lies in `low` … `high`, each (S,)."""
    out, into = sums.shape
    return {"rms_to_inf": (into * sums.row_squares).sqrt(), "rms_to_rms": low_S * math.sqrt(into / out),
            "one_to_rms": (sums.column_squares / out).sqrt(), "inf_to_inf": sums.row_sum, "spectral": low_S,
            "spectral_error": torch.where(low_S > 0, high_S / low_S - 1, high_S),
            "frobenius": sums.squares.sqrt(), "rms": (sums.squares / (out * into)).sqrt()}


_COLUMNS = ("rms_to_inf", "rms_to_rms", "one_to_rms", "inf_to_inf", "spectral", "spectral_error", "frobenius", "rms")
