"""The matrices of anybody's model, each with its role: of modules by their kind, of named tensors by their names.

A name's last word (before ".weight") decides: one with "embed" in it, wte and wpe are token tables; lm_head, head, output, unembed and
embed_out outside numbered layers are heads; any other matrix is hidden, (out, in) as torch.nn.Linear has it. Three axes are matrices
side by side (runs or experts), unless the name says conv. Our own fused parameters and the experts of granitemoe are cut into their
matrices; how others lay theirs out is not in a file, so they count as one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from etastar.model.decoder import Decoder

ROLES = ("embedding", "hidden", "output")
HEADS = {"lm_head", "head", "output", "unembed", "unembedding", "embed_out"}
PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "experts_gate_up": ("gate", "up"),
         "block_sparse_moe.input_linear.weight": ("gate", "up")}

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Matrices (S, out, in) under one name, as stored and in all `roles` they have; `tensor` None is a parameter of another kind."""

    name: str
    part: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    tensor: torch.Tensor | None

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return f"{self.name!r}" + (f" ({self.part})" if self.part else "")


def matrices_of(x, role: str | None = None) -> Iterator[Found]:
    """All matrices in x, one at a time; `role` is that of a bare matrix. See `model.norms.operator_norms`."""
    if role is not None and role not in ROLES:
        raise ValueError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(x, np.ndarray | torch.Tensor):
        return _bare(torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x, role or "hidden")
    if role is not None:
        raise ValueError(f"role={role!r} is for a single matrix or stack; in {_kind(x)} names and kinds of modules give the roles")
    if isinstance(x, Decoder):
        x = x.parameters_by_name()
    if isinstance(x, torch.nn.Module):
        return _some(_of_modules(x), x)
    if isinstance(x, Mapping):
        _refuse_others(x)
        return _some(_named({name: tuple(t.shape) for name, t in x.items()}, x.__getitem__), x)
    if isinstance(x, str | Path):
        return _some(_of_files(Path(x).expanduser()), x)
    raise ValueError(f"operator norms are of a matrix, a stack, parameters by name, an nn.Module or a path to safetensors; got {_kind(x)}")


def _bare(tensor: torch.Tensor, role: str) -> Iterator[Found]:
    if tensor.ndim not in (2, 3) or not tensor.numel() or tensor.is_complex():
        raise ValueError(f"operator norms are of a real matrix (out, in) or a stack (slots, out, in) that is not empty; "
                         f"got {tensor.dtype} of shape {tuple(tensor.shape)}")
    yield _found("matrix", "", (role,), tensor)


def _found(name: str, part: str, roles: tuple[str, ...], tensor: torch.Tensor) -> Found:
    shape = tuple(tensor.shape[-2:])
    return Found(name, part, roles, shape, tensor.detach().reshape(-1, *shape))


def _some(found: Iterator[Found], x) -> Iterator[Found]:
    first = next(found, None)
    if first is None:
        raise ValueError(f"there is no matrix in {x if isinstance(x, str | Path) else _kind(x)}, and operator norms are of matrices")
    yield first
    yield from found


def _kind(x) -> str:
    return f"a {type(x).__name__}"


def _refuse_others(params: Mapping) -> None:
    if wrong := {name: _kind(t) for name, t in params.items() if not isinstance(t, torch.Tensor)}:
        raise ValueError(f"parameters by name must be torch tensors; got {wrong}")


def _named(shapes: Shapes, read: Callable[[str], torch.Tensor], tied: bool = True) -> Iterator[Found]:
    """Matrices of named tensors; where none is a head and it is not said otherwise, the token table is the head too."""
    roles = {name: role_by_name(name) for name, shape in shapes.items() if len(shape) > 1}
    tables = [name for name, role in roles.items() if role == "embedding" and not re.search("position|wpe", name)]
    shared = max(tables, key=lambda name: shapes[name][-2], default=None) if tied and "output" not in roles.values() else None
    for name, role in roles.items():
        if role is None:
            continue
        tensor = read(name) if len(shapes[name]) < 4 and not (len(shapes[name]) == 3 and "conv" in name) else None
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            yield Found(name, "", (), shapes[name], None)
            continue
        for part, rows in _parts(name, *tensor.shape[-2:]):
            yield _found(name, part, (role, "output") if name == shared else (role,), tensor[..., rows, :])


def role_by_name(name: str) -> str | None:
    """The role that a matrix of this name has; None for a gain, of which a stack has a matrix too."""
    *path, last = re.split(r"[./]", name.removesuffix(".weight").lower())
    if last.endswith("norm"):
        return None
    if last in HEADS and not any(word.isdigit() for word in path):
        return "output"
    return "embedding" if last not in HEADS and ("embed" in last or last in ("wte", "wpe")) else "hidden"


def _parts(name: str, rows: int, columns: int) -> list[tuple[str, slice]]:
    """The matrices in one of the known parameters: queries are square, and keys and values share what rows are left."""
    fused = next((fused for fused in PARTS if re.search(rf"(^|[./]){re.escape(fused)}$", name)), None)
    parts = PARTS.get(fused, ("",))
    first = {None: rows, "qkv": columns}.get(fused, rows // 2)
    if first == rows or (rows - first) % (len(parts) - 1):
        return [("", slice(0, rows))]
    rest = (rows - first) // (len(parts) - 1)
    starts = [0, *range(first, rows, rest), rows]
    return [(part, slice(*ends)) for part, ends in zip(parts, zip(starts, starts[1:], strict=False), strict=True)]


def _of_modules(module: torch.nn.Module) -> Iterator[Found]:
    """Linear maps and tables by kind; a linear map is a head by its name, or where it shares a table's parameter."""
    kinds = [(name, m) for name, m in module.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    tables = {id(m.weight) for _, m in kinds if isinstance(m, torch.nn.Embedding)}
    seen = set()
    for path, m in kinds:
        name = f"{path}.weight".removeprefix(".")
        if isinstance(m, torch.nn.Embedding):
            role = "embedding"
        else:
            role = "output" if id(m.weight) in tables or role_by_name(name) == "output" else "hidden"
        seen.add(id(m.weight))
        yield _found(name, "", (role,), m.weight)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in seen:
            yield Found(name, "", (), tuple(parameter.shape), None)


def _of_files(path: Path) -> Iterator[Found]:
    """Of one safetensors file or a folder of them; a config.json beside them may say that the head is not tied."""
    from etastar.model.stored import StoredTensors, json_object

    stored, config = StoredTensors(path), (path if path.is_dir() else path.parent) / "config.json"
    tied = json_object(config).get("tie_word_embeddings", True) if config.exists() else True
    return _named(stored.shapes, stored.__getitem__, tied)
