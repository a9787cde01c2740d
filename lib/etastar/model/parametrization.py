"""A parametrization as plain numbers: per parameter an init std and multipliers, and four scalars for the forward pass."""

import dataclasses
import math

import pandas as pd

from etastar.model.shapes import fused_rows, parameter_shapes, role_of
from etastar.recipe import SP, CompleteP, Model, MuP, Recipe, Scion, UnitNorm

Parametrization = SP | MuP | CompleteP | UnitNorm


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


def numbers(parametrization: Parametrization, model: Model, vocab: int,
            lr_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> dict[str, ParameterNumbers]:
    """The table of a parametrization: every parameter's numbers, by name; `lr_ratios` as in a Recipe.

    Standard parametrization: N(0, init_std²), the projections back into the residual stream over √(2·depth) (as
    arXiv 2405.18392 and GPT-2 do), one learning rate. μP and CompleteP: see recipe.MuP and recipe.CompleteP. In all of them
    matrices decay, those of experts and routers too, and neither gains nor the token table do.
    Raises ValueError for UnitNorm of a mixture, for whose parts it has no norms.
    """
    if isinstance(parametrization, UnitNorm) and model.mixture is not None:
        raise ValueError("UnitNorm has no norms for a router and experts; take SP, MuP or CompleteP, or a model without a mixture")
    table, ratio = {}, dict(zip(("embedding", "hidden", "output"), lr_ratios, strict=True))
    for name, shape in parameter_shapes(model, vocab).items():
        role = role_of(name)
        init, std = _start(parametrization, model, role)
        if name.endswith("_out") and not isinstance(parametrization, CompleteP):
            std /= math.sqrt(2 * model.depth)
        smaller, slower, decay, eps = _scales(parametrization, model, name)
        table[name] = ParameterNumbers(
            role, shape, None if role == "norm" else std / smaller, ratio.get(role, ratio["hidden"]) / slower,
            0.0 if role in ("embedding", "norm") else decay, eps, init, fused_rows(name, model))
    return table


def _start(parametrization: Parametrization, model: Model, role: str) -> tuple[str, float]:
    """(kind of initialisation, its scale) of a role."""
    if not isinstance(parametrization, UnitNorm):
        return "normal", parametrization.init_std
    return {"hidden": ("orthogonal", 1.0), "output": ("rows", 1 / model.width)}.get(role, ("rows", 1.0))


def _scales(by: Parametrization, model: Model, name: str) -> tuple[float, float, float, float]:
    """What a parameter's init std and rate are divided by, and its decay and ε multiplied by, for width and depth."""
    if not isinstance(by, MuP | CompleteP) or not name.startswith("layers."):
        return 1.0, 1.0, 1.0, 1.0
    wide, deep, alpha = width_ratio(by, model), depth_ratio(by, model), getattr(by, "alpha", 1.0)
    slower, eps = deep ** (1 - alpha), wide * deep**alpha if by.eps == "scaled" else 1.0
    role = role_of(name)
    if role == "norm":
        return 1.0, slower, 1.0, 1 / eps
    if role == "router" and by.router == "output":
        # Its logits over m, as the head's are; but there is no scalar for them, so the weights are those over m. Their gradient is then
        # m times as large, and η·λ stays what it is for the head, whose rate has no m in it: under either rule of decay.
        return wide, wide * slower, wide, wide / eps
    return math.sqrt(wide), wide * slower, wide if by.decay == "independent" else 1.0, 1 / eps


def width_ratio(parametrization: Parametrization, model: Model) -> float:
    """m of μP and CompleteP, the width over the base width; 1 where there is no base."""
    return model.width / getattr(parametrization, "base_width", model.width)


def depth_ratio(parametrization: Parametrization, model: Model) -> float:
    """l of CompleteP, the depth over the base depth; 1 where there is no base."""
    return model.depth / getattr(parametrization, "base_depth", model.depth)


def scalars(parametrization: Parametrization, model: Model) -> Scalars:
    """The forward multipliers of a parametrization."""
    by = parametrization
    if not isinstance(by, MuP | CompleteP):
        return Scalars(embedding=1.0, residual=1.0, attention=model.head_dim**-0.5, logits=1.0)
    attention = 1 / model.head_dim if by.attention == "head_dim" else model.head_dim**-0.5
    if isinstance(by, CompleteP):
        return Scalars(1.0, depth_ratio(by, model) ** -by.alpha, attention, width_ratio(by, model))
    residual = by.residual_multiplier * model.depth**-by.residual_depth_exponent
    return Scalars(by.embedding_multiplier, residual, attention, width_ratio(by, model))


def as_table(recipe: Recipe) -> pd.DataFrame:
    """One row a parameter: name, role, shape, init std, learning rate, decay and ε as they apply in this recipe.

    A Scion has no ε and no such column. `attrs["forward"]` holds the four forward multipliers by name.
    """
    table = numbers(recipe.parametrization, recipe.model, recipe.corpus.vocab, recipe.lr_ratios)
    is_scion = isinstance(recipe.optimizer, Scion)
    shown = pd.DataFrame([{
        "parameter": name, "role": row.role, "shape": "×".join(map(str, row.shape)), "init_std": row.init_std,
        "peak_lr": recipe.peak_lr * row.lr_multiplier,
        "weight_decay": recipe.optimizer.weight_decay * (1.0 if is_scion else row.decay_multiplier),
    } | ({} if is_scion else {"eps": recipe.optimizer.eps * row.eps_multiplier}) for name, row in table.items()])
    shown.attrs["forward"] = dataclasses.asdict(scalars(recipe.parametrization, recipe.model))
    return shown
