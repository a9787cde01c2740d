"""Scion (arXiv 2502.07529) for anybody's torch module: in one process, under DDP and under FSDP2 (arXiv 2510.03871 App. A.5).

A polar factor needs the whole matrix, so each hidden matrix has an owner among the ranks, and the work is dealt out by its cost. Under
DDP all ranks hold every gradient and the owners' results are gathered; under FSDP2 rows go to the owner and come back. All other rules
take whole rows, which both leave where they are. Matrices travel in the type that Newton–Schulz runs in, which loses no bit.
"""

import dataclasses
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from etastar.model.decoder import Decoder
from etastar.model.shapes import fused_rows, role_of
from etastar.optim import lmo

LOCAL_RULES = lmo.ROW_RULES | {"norm": lambda g: lmo.vector(g.reshape(-1)).view(g.shape)}  # a scalar is a vector of one
ROLES = ("hidden", *LOCAL_RULES)
OPTIONS = ("lr", "momentum", "weight_decay", "radius", "newton_schulz_steps", "dtype")
HEADS = ("head", "lm_head", "output")


def scion_groups(module: nn.Module, rules: Mapping[str, str] | None = None, options: Mapping[str, dict] | None = None,
                 splits: Mapping[str, tuple[int, ...]] | None = None) -> list[dict]:
    """Parameter groups of a module for `ScionOptimizer`, one for each role, with names.

    Roles: "hidden" (matrices, or several side by side as (experts, out, in): polar factor of each), "embedding" and "output" (a row a
    token: by its RMS, by its length), "embedding_sign" and "output_sign" (signs instead), "norm" (vectors: by their RMS). A mixture's
    experts are hidden and its router is output. `rules` gives a role to each parameter whose name a regular
    expression is found in, the first that fits. Else nn.Embedding is embedding, nn.Linear hidden but output where it is the last and is
    called head, lm_head or output, biases and parameters of normalizations norm, and our Decoder knows its own. A table that two
    layers share comes once, under its first name. `options` are those of `ScionOptimizer` by role. `splits`, also by regular
    expression, are the rows of each matrix where a parameter holds several (fused queries, keys and values): a polar factor is of each.
    Raises ValueError for parameters that no rule names, rules that name nothing, and roles and options that there are not.
    """
    rules, options, splits = rules or {}, options or {}, splits or {}
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _check_rules(rules, options, splits, named)
    own, groups = _own_roles(module), defaultdict(list)
    roles = {name: _found(rules, name) or own.get(name, (None,))[0] for name in named}
    if unnamed := [f"{name} {tuple(named[name].shape)}" for name, role in roles.items() if role is None]:
        raise ValueError(f"no rule names {', '.join(unnamed)}; give rules={{a part of the name: one of {', '.join(ROLES)}}}")
    for name, p in named.items():
        rows = _found(splits, name) or own.get(name, (None, ()))[1]
        groups[roles[name], tuple(rows) if roles[name] == "hidden" else ()].append((name, p))
    return [{"params": params, "role": role, "matrix_rows": rows, **options.get(role, {})} for (role, rows), params in groups.items()]


def _found(by_expression: Mapping, name: str):
    return next((given for expression, given in by_expression.items() if re.search(expression, name)), None)


def _check_rules(rules, options, splits, named) -> None:
    if wrong := {name: role for name, role in [*rules.items(), *((role, role) for role in options)] if role not in ROLES}:
        raise ValueError(f"no such role in {wrong}; roles are {', '.join(ROLES)}")
    if wrong := {role: name for role, given in options.items() for name in given if name not in OPTIONS}:
        raise ValueError(f"no such option in {wrong}; options are {', '.join(OPTIONS)}")
    if idle := [expression for expression in (*rules, *splits) if not any(re.search(expression, name) for name in named)]:
        raise ValueError(f"no parameter has a name with {idle} in it; there are {', '.join(named) or 'no parameters'}")


def _own_roles(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(role, rows of each matrix) of the parameters whose layer says what they are, by name."""
    found, last = {}, [name for name, inner in module.named_modules() if isinstance(inner, nn.Linear)][-1:]
    for prefix, inner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(inner, Decoder):
            names = {key: key.replace("/", ".") for key in inner.weights}
            found |= {f"{dot}weights.{key}": (lmo.LIKE.get(r := role_of(n), r), fused_rows(n, inner.model)) for key, n in names.items()}
        elif isinstance(inner, (nn.Linear, nn.Embedding)):
            head = prefix in last and prefix.split(".")[-1] in HEADS
            role = "embedding" if isinstance(inner, nn.Embedding) else "output" if head else "hidden"
            found |= {f"{dot}weight": (role, ()), f"{dot}bias": ("norm", ())}
        elif "norm" in type(inner).__name__.lower():
            found |= {f"{dot}{name}": ("norm", ()) for name, p in inner.named_parameters(recurse=False) if p.ndim == 1}
    return found


class ScionOptimizer(torch.optim.Optimizer):
    """Scion: each layer steps by lr · radius in its own operator norm; the groups come from `scion_groups`.

    average = (1 − momentum) · average + momentum · gradient (1, the default, keeps none), then
    W ← (1 − lr · weight_decay) W − lr · radius · LMO(average): decay 0 is the unconstrained form, 1 the constrained one, which keeps
    every norm within its radius. `dtype` is what Newton–Schulz runs in; None means bfloat16 on a GPU and float32 elsewhere. All options
    may differ by group. Where torch.distributed is up, a DTensor is shared over its mesh, and every other parameter is taken to be the
    same, gradient included, on all ranks of `process_group` (None: all ranks). Averages are stored as the parameters are.
    `communicated_bytes` counts what this rank has "sent" and "received" by kind, gathers and sums as rings of ranks pass them on.
    Raises ValueError for groups without a role, shapes that a role has no rule for, parameters sharded otherwise than by rows, a
    radius ≤ 0, a momentum outside (0, 1], and in the first step for ranks that differ in names, shapes or options.
    Source: arXiv 2502.07529 Alg. 1 and 2; arXiv 2510.03871 eqs. 7–9 and App. A.5.
    """

    def __init__(self, groups, lr: float, momentum: float = 1.0, weight_decay: float = 0.0, radius: float = 1.0,
                 newton_schulz_steps: int = lmo.NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None, process_group=None):
        self.process_group, self._plan, self.communicated_bytes = process_group, None, {}
        options = (lr, momentum, weight_decay, radius, newton_schulz_steps, dtype)
        super().__init__(groups, dict(zip(OPTIONS, options, strict=True)) | {"role": None, "matrix_rows": ()})

    def add_param_group(self, param_group: dict) -> None:
        """Another group, with a role; checked like the first ones."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], self.process_group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._plan = None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # The plan refers to groups, which are others now; torch's copies leave out what is not an optimizer's
        self.__dict__ = {"process_group": None, "communicated_bytes": {}} | self.__dict__ | {"_plan": None}

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what the closure does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._plan = self._plan or self._agreed_plan()
        averages = {p: self._average(p, group) for p, group in self._members() if p.grad is not None}
        for p, group in self._members():
            if p in averages and group["weight_decay"]:
                _local(p).mul_(1 - float(group["lr"]) * group["weight_decay"])
        for part in self._plan:
            part.apply(averages)
        return loss

    def _members(self) -> list[tuple[torch.Tensor, dict]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _average(self, p: torch.Tensor, group: dict) -> torch.Tensor:
        """The rows held here of the average that the step goes against."""
        if p.grad.is_sparse:
            raise ValueError(f"Scion has no rule for the sparse gradient of a parameter {tuple(p.shape)}; take sparse=False")
        if group["momentum"] == 1 and p not in self.state:
            return _local(p.grad)
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return _local(self.state[p]["momentum_buffer"]).lerp_(_local(p.grad), group["momentum"])

    def _agreed_plan(self) -> list:
        """What is to be shared with other ranks, or done for many parameters at once, after all ranks were seen to have the same."""
        if _together():
            _check_ranks(self.param_groups, _Wire(self.process_group, self.communicated_bytes))
        parts = {}
        for p, group in self._members():
            (home, dealt), dtype, kind = _home(p, self.process_group), None, _Rows
            if group["role"] == "hidden":
                kind, dtype = _DealtMatrices if dealt else _Matrices, group["dtype"] or (torch.bfloat16 if p.is_cuda else torch.float32)
            elif group["role"] == "norm" and dealt:
                kind = _DealtVectors
            parts.setdefault((kind, home, dtype), kind(_Wire(home, self.communicated_bytes), dtype)).add(p, group)
        return list(parts.values())


def _check_group(group: dict, process_group) -> None:
    role, radius, momentum, rows = group["role"], group["radius"], group["momentum"], group["matrix_rows"]
    names = group.get("param_names") or [f"parameter {place}" for place in range(len(group["params"]))]
    if role not in ROLES:
        raise ValueError(f"a group of Scion needs a role, one of {', '.join(ROLES)}; got {role!r}: make groups with scion_groups(module)")
    if wrong := [f"{name} {tuple(p.shape)}" for name, p in zip(names, group["params"], strict=True)
                 if not (p.ndim < 2 if role == "norm" else p.ndim == 2 or (p.ndim == 3 and role == "hidden"))]:
        raise ValueError(f'role "{role}" is for {"vectors" if role == "norm" else "matrices"} and cannot take {", ".join(wrong)}; '
                         "name another role for them in the rules")
    if not 0 < radius < math.inf or not 0 < momentum <= 1:
        raise ValueError(f'Scion needs a radius > 0 and a momentum 1 − β in (0, 1]; got radius={radius}, momentum={momentum} for "{role}"')
    if not group["lr"] >= 0 or not group["weight_decay"] >= 0 or group["newton_schulz_steps"] < 1:
        raise ValueError(f"Scion needs lr and weight_decay ≥ 0 and newton_schulz_steps ≥ 1; got lr={group['lr']}, weight_decay="
                         f'{group["weight_decay"]}, newton_schulz_steps={group["newton_schulz_steps"]} for "{role}"')
    for name, p in zip(names, group["params"], strict=True):
        if rows and (min(rows) < 1 or sum(rows) != p.shape[-2]):
            raise ValueError(f"{name} has {p.shape[-2]} rows, which are not split by {tuple(rows)}; give row counts that sum to them")
        _home(p, process_group, name)


def _check_ranks(groups: list[dict], wire: "_Wire") -> None:
    """ValueError on every rank, before anything else is sent, where ranks would not do the same."""
    told = {
        "parameter names": [(group["role"], group.get("param_names")) for group in groups],
        "shapes": [[(tuple(p.shape), str(p.dtype), str(getattr(p, "placements", ""))) for p in group["params"]] for group in groups],
        "options": [[(name, str(group[name])) for name in (*OPTIONS, "matrix_rows")] for group in groups],
    }
    digests = b"".join(hashlib.sha256(repr(what).encode()).digest() for what in told.values())
    device = next(p.device for group in groups for p in group["params"])
    heard_RxH = wire.gather("agreement", torch.tensor(list(digests), dtype=torch.uint8, device=device)).cpu()
    for what, said_RxH in zip(told, heard_RxH.split(32, dim=1), strict=True):
        parties = defaultdict(list)
        for rank, said in enumerate(said_RxH.tolist()):
            parties[bytes(said)].append(rank)
        if len(parties) > 1:
            raise ValueError(f"ranks {' and '.join(map(str, parties.values()))} of ScionOptimizer differ in their {what}; "
                             "build the same model, groups and options on every rank")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _home(p: torch.Tensor, process_group, name: str = "a parameter") -> tuple[object, bool]:
    """The ranks that share a parameter (None: all) and whether its rows are dealt out over them."""
    if not _together():
        return None, False
    from torch.distributed.tensor import DTensor, Shard

    placements = p.placements if isinstance(p, DTensor) else ()
    dealt = [place for place, placed in enumerate(placements) if not placed.is_replicate()]
    if len(dealt) > 1 or any(type(placements[place]) is not Shard or placements[place].dim != 0 for place in dealt):
        raise ValueError(f"Scion needs whole rows, and {name} {tuple(p.shape)} is placed as {placements}; shard it by rows, "
                         "Shard(0) on one axis of the mesh, as fully_shard does by default")
    group = p.device_mesh.get_group(dealt[0]) if dealt else process_group
    return group, bool(dealt) and dist.get_world_size(group) > 1


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _length(group: dict) -> float:
    return float(group["lr"]) * group["radius"]


class _Wire:
    """Collectives over one group of ranks (None: all), with their bytes counted."""

    def __init__(self, group, counts: dict):
        self.group, self.counts = group, counts
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if _together() else (0, 1)

    def gather(self, kind: str, mine: torch.Tensor) -> torch.Tensor:
        """(ranks, n) of n numbers from each rank."""
        heard = mine.new_empty(self.ranks * mine.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter's name before torch 2.13
        gather(heard, mine, group=self.group)
        self._count(kind, *[(self.ranks - 1) * mine.nbytes] * 2)
        return heard.view(self.ranks, -1)

    def exchange(self, kind: str, mine: torch.Tensor, to: list[int], of: list[int]) -> torch.Tensor:
        """Numbers from all ranks, one rank's after another's; `to` and `of` say how many go to and come from each."""
        heard = mine.new_empty(sum(of))
        dist.all_to_all_single(heard, mine, of, to, group=self.group)
        self._count(kind, *[(sum(sizes) - sizes[self.rank]) * mine.itemsize for sizes in (to, of)])
        return heard

    def total(self, kind: str, mine: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks, in place."""
        dist.all_reduce(mine, group=self.group)
        self._count(kind, *[2 * (self.ranks - 1) * mine.nbytes // self.ranks] * 2)
        return mine

    def _count(self, kind: str, sent: int, received: int) -> None:
        self.counts.setdefault(kind, Counter()).update(sent=sent, received=received)


class _Rows:
    """Parameters whose rule takes nothing but the rows that are here."""

    def __init__(self, wire: _Wire, dtype: torch.dtype | None):
        self.wire, self.dtype, self.members = wire, dtype, []

    def add(self, p: torch.Tensor, group: dict) -> None:
        self.members.append((p, group))

    def apply(self, averages: dict) -> None:
        for p, group in self.members:
            if p in averages:
                _local(p).add_(LOCAL_RULES[group["role"]](averages[p]), alpha=-_length(group))


class _DealtVectors(_Rows):
    """Vectors in pieces on the ranks: the squares of all are summed in one call, in float64, where none underflows."""

    def apply(self, averages: dict) -> None:
        pieces = [averages[p].double() if p in averages else _local(p).new_zeros(0).double() for p, _ in self.members]
        squares = self.wire.total("vector_squares", torch.stack([piece.square().sum() for piece in pieces]))
        for (p, group), piece, square in zip(self.members, pieces, squares, strict=True):
            if p in averages:
                _local(p).add_(piece * torch.where(square > 0, p.numel() / square, 0).sqrt(), alpha=-_length(group))


@dataclasses.dataclass(frozen=True, eq=False)
class _Matrix:
    """Some rows of a parameter, which are a layer's matrix by themselves; most often all of them."""

    parameter: torch.Tensor
    group: dict
    first: int
    shape: tuple[int, int]

    @property
    def cost(self) -> int:
        """Multiply-adds of a Newton–Schulz step."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)

    def rows(self, rank: int, ranks: int) -> slice:
        """Which of the rows that a rank holds of the parameter are of this matrix; rows are dealt out as torch.chunk does it."""
        dealt, inner = self.parameter.shape[0], math.prod(self.parameter.shape[1:-1])
        start, stop = (inner * min((rank + more) * -(-dealt // ranks), dealt) for more in (0, 1))
        first = min(max(self.first, start), stop)
        return slice(first - start, max(first, min(self.first + self.shape[0], stop)) - start)


class _Matrices:
    """Matrices that every rank holds whole: each has an owner, which finds its polar factor, and the factors are gathered."""

    def __init__(self, wire: _Wire, dtype: torch.dtype):
        self.wire, self.dtype, self.matrices, self.owned = wire, dtype, [], None
        self.holds = (0, 1)  # of the rows of each parameter: this rank's place and how many share them

    def add(self, p: torch.Tensor, group: dict) -> None:
        first = 0
        for rows in (group["matrix_rows"] or p.shape[-2:-1]) * math.prod(p.shape[:-2]):
            self.matrices.append(_Matrix(p, group, first, (rows, p.shape[-1])))
            first += rows

    def apply(self, averages: dict) -> None:
        self.owned = self.owned or _deal([matrix.cost for matrix in self.matrices], self.wire.ranks)
        rows = [matrix.rows(*self.holds) for matrix in self.matrices]
        held = [(averages[p] if (p := matrix.parameter) in averages else torch.zeros_like(_local(p))).reshape(-1, matrix.shape[1])[mine]
                for matrix, mine in zip(self.matrices, rows, strict=True)]
        polar = self._directions(held)
        for place, (matrix, mine) in enumerate(zip(self.matrices, rows, strict=True)):
            if matrix.parameter in averages:
                length = _length(matrix.group) * math.sqrt(matrix.shape[0] / matrix.shape[1])
                _local(matrix.parameter).view(-1, matrix.shape[1])[mine].add_(polar[place], alpha=-length)

    def _directions(self, held: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The polar factors, or the rows of them that this rank holds, by place among the matrices."""
        mine = self.owned[self.wire.rank]
        made = self._polar({place: held[place] for place in mine})
        if self.wire.ranks == 1:
            return made
        sizes = [[held[place].numel() for place in places] for places in self.owned]
        flat = held[0].new_zeros(max(map(sum, sizes)), dtype=self.dtype)
        flat[:sum(sizes[self.wire.rank])] = self._packed(made[place] for place in mine)
        found = {}
        for places, numbers, heard in zip(self.owned, sizes, self.wire.gather("directions", flat), strict=True):
            for place, one in zip(places, heard[:sum(numbers)].split(numbers), strict=True):
                found[place] = one.view(self.matrices[place].shape)
        return found

    def _polar(self, given: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Polar factors; matrices of the same sides, either way round, go through Newton–Schulz together."""
        batches, made = defaultdict(list), {}
        for place in given:
            matrix = self.matrices[place]
            batches[*sorted(matrix.shape), matrix.group["newton_schulz_steps"]].append(place)
        for (*_, steps), places in batches.items():
            turned = {place: self.matrices[place].shape[0] > self.matrices[place].shape[1] for place in places}
            wide = torch.stack([given[place].mT if turned[place] else given[place] for place in places])
            for place, factor in zip(places, lmo.newton_schulz(wide, steps, self.dtype), strict=True):
                made[place] = factor.mT if turned[place] else factor
        return made

    def _packed(self, tensors) -> torch.Tensor:
        nothing = torch.empty(0, dtype=self.dtype, device=self.matrices[0].parameter.device)
        return torch.cat([nothing, *(tensor.reshape(-1) for tensor in tensors)]).to(self.dtype)


class _DealtMatrices(_Matrices):
    """Matrices whose rows are dealt out over the ranks: the rows of each go to its owner, those of the polar factor come back."""

    def __init__(self, wire: _Wire, dtype: torch.dtype):
        super().__init__(wire, dtype)
        self.holds = (wire.rank, wire.ranks)

    def _sizes(self, rank: int, owner: int) -> list[int]:
        """How many numbers a rank holds of each of an owner's matrices."""
        matrices = [self.matrices[place] for place in self.owned[owner]]
        return [((span := matrix.rows(rank, self.wire.ranks)).stop - span.start) * matrix.shape[1] for matrix in matrices]

    def _directions(self, held: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        ranks, mine, order = range(self.wire.ranks), self.owned[self.wire.rank], sum(self.owned, [])
        away = [self._sizes(self.wire.rank, owner) for owner in ranks]
        here = [self._sizes(rank, self.wire.rank) for rank in ranks]
        to, of = [sum(sizes) for sizes in away], [sum(sizes) for sizes in here]
        heard = self.wire.exchange("rows_to_owners", self._packed(held[place] for place in order), to, of)
        pieces = heard.split(sum(here, []))  # rank by rank, and each rank's matrix by matrix
        whole = {place: torch.cat(pieces[i::len(mine)]).view(self.matrices[place].shape) for i, place in enumerate(mine)}
        made = self._polar(whole)
        parts = [made[place].reshape(-1).split([sizes[i] for sizes in here]) for i, place in enumerate(mine)]
        back = self._packed(part[rank] for rank in ranks for part in parts)
        heard = self.wire.exchange("rows_from_owners", back, of, to)
        return {place: one.view(-1, self.matrices[place].shape[1]) for place, one in zip(order, heard.split(sum(away, [])), strict=True)}


def _deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Places dealt out so that no rank has much more to do: the costliest first, each to the rank with the least so far."""
    dealt, load = [[] for _ in range(ranks)], [0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = load.index(min(load))
        dealt[least].append(place)
        load[least] += costs[place]
    return [sorted(places) for places in dealt]
