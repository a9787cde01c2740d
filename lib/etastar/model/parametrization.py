"""A parametrization as plain numbers: per parameter an init std and multipliers, and four scalars for the forward pass."""

import dataclasses
import math

import pandas as pd

from etastar.model.shapes import fused_rows, parameter_shapes, role_of
from etastar.recipe import SP, Model, MuP, Recipe, Scion, UnitNorm


@dataclasses.dataclass(frozen=True)
class ParameterNumbers:
    """What initialisation and the optimizer need to know of one parameter; `init_std` None means ones.

    `init` "normal" draws with `init_std`; "rows" gives each row a length of √columns times `init_std`; "orthogonal" makes each
    matrix in it semi-orthogonal with RMS→RMS norm `init_std` (`rows` says how many rows each has; (): it is one matrix).
    """

    role: str
    shape: tuple[int, ...]
    init_std: float | None
    lr_multiplier: float
    decay_multiplier: float
    eps_multiplier: float = 1.0
    init: str = "normal"
    rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scalars:
    """The four Granite multipliers: embeddings, block outputs, attention logits (before softmax), and 1/logits."""

    embedding: float
    residual: float
    attention: float
    logits: float


def numbers(parametrization: SP | MuP | UnitNorm, model: Model, vocab: int,
            lr_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> dict[str, ParameterNumbers]:
    """The table of a parametrization: every parameter's numbers, by name; `lr_ratios` as in a Recipe.

    Standard parametrization: N(0, init_std²), the projections back into the residual stream over √(2·depth) (as
    arXiv 2405.18392 and GPT-2 do), one learning rate, decay on matrices but not on the embedding or gains. μP: see recipe.MuP.
    """
    table, ratio = {}, dict(zip(("embedding", "hidden", "output"), lr_ratios, strict=True))
    for name, shape in parameter_shapes(model, vocab).items():
        role = role_of(name)
        wider = width_ratio(parametrization, model) if role == "hidden" else 1.0
        decay = 1.0 if role in ("hidden", "output") else 0.0
        if isinstance(parametrization, MuP) and parametrization.decay == "independent":
            decay *= wider
        init, std = _start(parametrization, model, role)
        if name.endswith("_out"):
            std /= math.sqrt(2 * model.depth)
        std, lr = None if role == "norm" else std / math.sqrt(wider), ratio.get(role, ratio["hidden"]) / wider
        table[name] = ParameterNumbers(role, shape, std, lr, decay, init=init, rows=fused_rows(name, model))
    return table


def _start(parametrization: SP | MuP | UnitNorm, model: Model, role: str) -> tuple[str, float]:
    """(kind of initialisation, its scale) of a role."""
    if not isinstance(parametrization, UnitNorm):
        return "normal", parametrization.init_std
    return {"hidden": ("orthogonal", 1.0), "output": ("rows", 1 / model.width)}.get(role, ("rows", 1.0))


def width_ratio(parametrization: SP | MuP | UnitNorm, model: Model) -> float:
    """m of μP, the width over the base width; 1 in standard parametrization."""
    return model.width / parametrization.base_width if isinstance(parametrization, MuP) else 1.0


def scalars(parametrization: SP | MuP | UnitNorm, model: Model) -> Scalars:
    """The forward multipliers of a parametrization."""
    if isinstance(parametrization, MuP):
        return Scalars(parametrization.embedding_multiplier, parametrization.residual_multiplier, 1 / model.head_dim,
                       width_ratio(parametrization, model))
    return Scalars(embedding=1.0, residual=1.0, attention=model.head_dim**-0.5, logits=1.0)


def as_table(recipe: Recipe) -> pd.DataFrame:
    """One row a parameter: name, role, shape, init std, learning rate and decay as they apply in this recipe."""
    table = numbers(recipe.parametrization, recipe.model, recipe.corpus.vocab, recipe.lr_ratios)
    decays_all = isinstance(recipe.optimizer, Scion)
    return pd.DataFrame([{
        "parameter": name, "role": row.role, "shape": "×".join(map(str, row.shape)), "init_std": row.init_std,
        "peak_lr": recipe.peak_lr * row.lr_multiplier,
        "weight_decay": recipe.optimizer.weight_decay * (1.0 if decays_all else row.decay_multiplier),
    } for name, row in table.items()])
