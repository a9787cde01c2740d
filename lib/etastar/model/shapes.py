"""The parameters of a decoder by name: their shapes, their roles, how many there are and what they cost.

Roles: embedding (token table, also the head when tied), hidden (matrices of the blocks), router and expert (of a mixture), output
(untied head), norm (gains).
"""

import functools
import itertools
import math

from etastar.recipe import Model


def parameter_shapes(model: Model, vocab: int) -> dict[str, tuple[int, ...]]:
    """Unstacked shapes by name, in order; a tied head is stored once, as the embedding."""
    width, head_dim = model.width, model.head_dim
    qkv = (model.heads + 2 * model.resolved_kv_heads) * head_dim
    shapes = {"embedding": (vocab, width)}
    for i in range(model.depth):
        shapes |= {
            f"layers.{i}.attention_norm": (width,),
            f"layers.{i}.qkv": (qkv, width),
            f"layers.{i}.attention_out": (width, model.heads * head_dim),
            f"layers.{i}.mlp_norm": (width,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _mlp_shapes(model).items()}
    shapes["final_norm"] = (width,)
    if not model.tied:
        shapes["head"] = (vocab, width)
    gains = model.normalization == "pre"
    return {name: shape for name, shape in shapes.items() if gains or role_of(name) != "norm"}


def _mlp_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    width, ffn = model.width, model.resolved_ffn_width
    if model.mixture is None:
        return {"gate_up": (2 * ffn, width), "mlp_out": (width, ffn)}
    experts = model.mixture.experts
    return {"router": (experts, width), "experts_gate_up": (experts, 2 * ffn, width), "experts_out": (experts, width, ffn)}


def fused_rows(name: str, model: Model) -> tuple[int, ...]:
    """Rows of each matrix that one parameter holds: queries, keys and values; gate and up, of every expert; else the parameter alone, ().

    An operator norm, and a spectral update, is of each such matrix and not of all of them as one. `matrices_in` gives them all.
    """
    if name.endswith(".qkv"):
        keys = model.resolved_kv_heads * model.head_dim
        return model.heads * model.head_dim, keys, keys
    return (model.resolved_ffn_width,) * 2 if name.endswith("gate_up") else ()


def matrices_in(shape: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[int | slice, ...]]:
    """The index of each matrix in a parameter of this shape, (out, in) or (experts, out, in), whose matrices have so many rows."""
    ends = list(itertools.accumulate(rows or shape[-2:-1]))
    parts = [slice(last - size, last) for last, size in zip(ends, rows or shape[-2:-1], strict=True)]
    return [(*place, part) for place in itertools.product(*map(range, shape[:-2])) for part in parts]


def role_of(name: str) -> str:
    """The role a parameter's name gives it."""
    if name.endswith("norm"):
        return "norm"
    last = name.split(".")[-1]
    return {"embedding": "embedding", "head": "output", "router": "router"}.get(last, "expert" if "experts" in last else "hidden")


@functools.lru_cache(maxsize=256)
def _sizes(model: Model, vocab: int) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in parameter_shapes(model, vocab).items()}


def count_parameters(model: Model, vocab: int) -> dict[str, int]:
    """Parameters in all, without token tables (embedding and head), and those that a token goes through: all but other experts."""
    sizes, idle = _sizes(model, vocab), sum(_idle(model, vocab).values())
    tables = sum(size for name, size in sizes.items() if role_of(name) in ("embedding", "output"))
    total = sum(sizes.values())
    return {"total": total, "non_embedding": total - tables, "active": total - idle}


def _idle(model: Model, vocab: int) -> dict[str, int]:
    """Parameters of the experts that a token does not go through, by name."""
    mixture = model.mixture
    return {name: size // mixture.experts * (mixture.experts - mixture.experts_per_token)
            for name, size in _sizes(model, vocab).items() if role_of(name) == "expert"}


def flops_per_token(model: Model, vocab: int) -> dict[str, float]:
    """Training FLOPs a token (forward and twice that backward): "exact", and "6nd", six times the active parameters.

    Exact counts 2 a multiply-add of every matrix including the head once, of a mixture the router and the experts that a token goes
    through, and causal attention at half its square: 3 · (2 · matrices + 2 · depth · context · heads · head_dim).
    """
    products = sum(size for name, size in _sizes(model, vocab).items() if role_of(name) in ("hidden", "router", "expert"))
    matrices = products - sum(_idle(model, vocab).values()) + vocab * model.width
    attention = 2 * model.depth * model.context * model.heads * model.head_dim
    return {"exact": 3.0 * (2 * matrices + attention), "6nd": 6.0 * count_parameters(model, vocab)["active"]}
