"""Scion on a stack (arXiv 2502.07529): each matrix steps by a unit of its own operator norm, each slot at its own rate.

Rates, radii, momentum and decay are a slot's own; which rule a layer has and how Newton–Schulz is computed the whole stack shares.
Matrices of one shape, of all layers and fused parameters and either way round, go through Newton–Schulz in one batch.
"""

import math
from collections import defaultdict

import torch

from etastar.model.parametrization import ParameterNumbers
from etastar.model.shapes import matrices_in
from etastar.optim import lmo
from etastar.optim.stacked import Flat, StackedOptimizer
from etastar.recipe import Scion

ROLES = ("embedding", "hidden", "output", "norm")
Matrix = tuple[str, tuple]  # a parameter and the index in it of one matrix


def _numbers(options, lr_M, multipliers, decays):
    """(momentum, radii) and for each group (decay or None, rate): float32 (M, 1) each. Decay takes all weights, tables too."""
    radii = {role: options[f"radius_{role}"].float() for role in ROLES}
    groups = []
    for lr_multiplier, _, _ in multipliers:
        rate_Mx1 = lr_M[:, None] * lr_multiplier
        groups.append(((1 - rate_Mx1 * options["weight_decay"]).float() if decays else None, (-rate_Mx1).float()))
    return (options["momentum"].float(), radii), groups


def by_shape(table: dict[str, ParameterNumbers]) -> dict[tuple[int, int], list[Matrix]]:
    """The hidden matrices by (shorter, longer) side; a fused parameter holds several, and one of experts those of each."""
    found = defaultdict(list)
    for name, row in table.items():
        if rule_of(row) == "hidden":
            for place in matrices_in(row.shape, row.rows):
                rows = place[-1].stop - place[-1].start
                found[tuple(sorted((rows, row.shape[-1])))].append((name, place))
    return dict(found)


def rule_of(row: ParameterNumbers) -> str:
    """Which of the `ROLES` a parameter's rule and radius are those of."""
    return lmo.LIKE.get(row.role, row.role)


class StackedScion(StackedOptimizer):
    """Averaged gradients of a stack; `step` updates the flat parameters in place."""

    option_names = ("momentum", "weight_decay", "radius_embedding", "radius_hidden", "radius_output", "radius_norm", "clip_norm")
    moments = ("m",)
    numbers = staticmethod(_numbers)

    def __init__(self, flat: Flat, compiled: bool = False):
        super().__init__(flat, compiled)
        if unknown := {name: row.role for name, row in flat.table.items() if rule_of(row) not in ROLES}:
            raise ValueError(f"Scion has no rule for the layers {unknown}; it knows the roles {', '.join((*ROLES, *lmo.LIKE))}")
        axes = {"norm": 1, "expert": 3}
        if flawed := {name: row.shape for name, row in flat.table.items() if len(row.shape) != axes.get(row.role, 2)}:
            raise ValueError(f"a rule for matrices was given what is none: {flawed}; give vectors the role norm")
        self.m_MxP, self.rules, self.shapes = flat.like(), None, by_shape(flat.table)

    def configure(self, slot: int, optimizer: Scion) -> None:
        """Take the options of one slot from its recipe; the rules are the stack's."""
        if self.rules is not None and self.rules.structure != optimizer.structure:
            raise ValueError(f"the slots of a stack share the rules of Scion; got {optimizer} beside {self.rules}")
        super().configure(slot, optimizer)
        self.rules = optimizer

    def direction(self, grad_MxP: torch.Tensor, radii: dict[str, torch.Tensor]) -> torch.Tensor:
        """radius · LMO of each layer, of every slot, in the layout of the parameters (M, P)."""
        direction_MxP = torch.zeros_like(grad_MxP)
        given, made = self.flat.views(grad_MxP), self.flat.views(direction_MxP)
        for name, row in self.flat.table.items():
            if (role := rule_of(row)) != "hidden":
                torch.mul(self._of_rows(role, given[name]), _at(radii[role], given[name]), out=made[name])
        for matrices in self.shapes.values():
            wide_MxNxAxB = torch.stack([_wide(given[name][:, *place]) for name, place in matrices], 1)
            for (name, place), polar_MxAxB in zip(matrices, self._polar(wide_MxNxAxB).unbind(1), strict=True):
                target = made[name][:, *place]
                polar = polar_MxAxB if target.shape == polar_MxAxB.shape else polar_MxAxB.mT
                torch.mul(polar, _at(radii["hidden"], target) * self._scale(*target.shape[1:]), out=target)
        return direction_MxP

    def _of_rows(self, role: str, grad: torch.Tensor) -> torch.Tensor:
        sign = role != "norm" and getattr(self.rules, role) == "sign"
        return lmo.ROW_RULES[f"{role}_sign" if sign else role](grad)

    def _polar(self, g_MxNxAxB: torch.Tensor) -> torch.Tensor:
        """Polar factors; on a CPU slot by slot, so that a slot's bits do not depend on its neighbours."""
        automatic = torch.bfloat16 if g_MxNxAxB.is_cuda else torch.float32
        dtype = {"auto": automatic, "fp32": torch.float32, "bf16": torch.bfloat16}[self.rules.newton_schulz]
        if g_MxNxAxB.is_cuda or len(g_MxNxAxB) == 1:
            return lmo.newton_schulz(g_MxNxAxB, self.rules.newton_schulz_steps, dtype)
        return torch.stack([lmo.newton_schulz(g, self.rules.newton_schulz_steps, dtype) for g in g_MxNxAxB])

    def _scale(self, rows: int, columns: int) -> float:
        return {"rms": math.sqrt(rows / columns), "keller": math.sqrt(max(1.0, rows / columns)),
                "adamw": 0.2 * math.sqrt(max(rows, columns))}[self.rules.hidden_scale]

    def update(self, data_MxP, m_MxP, grad_MxP, by, spans) -> None:
        """The update in place, for every slot; `spans` are the columns of the groups."""
        (momentum_Mx1, radii), groups = by
        m_MxP.lerp_(grad_MxP, momentum_Mx1)
        towards_MxP = grad_MxP.lerp(m_MxP, 1 - momentum_Mx1) if self.rules.nesterov else m_MxP
        direction_MxP = self.direction(towards_MxP, radii)
        for (start, stop), (decay_Mx1, rate_Mx1) in zip(spans, groups, strict=True):
            data = data_MxP[:, start:stop]
            if decay_Mx1 is not None:
                data.mul_(decay_Mx1)
            data.addcmul_(direction_MxP[:, start:stop], rate_Mx1)

    @torch.no_grad()
    def step(self, grad_MxP: torch.Tensor, lr_M: torch.Tensor, step_M: torch.Tensor, alive_M: torch.Tensor) -> None:
        """One update of every slot that is alive; the others keep every bit. `lr_M` float64 is the rate of this step."""
        by = self.numbers(self.options, lr_M, self.multipliers, bool(self.rules.weight_decay))
        self._apply((self.flat.data, self.m_MxP), grad_MxP, alive_M, by)


def _wide(g_MxOxI: torch.Tensor) -> torch.Tensor:
    return g_MxOxI if g_MxOxI.shape[-2] <= g_MxOxI.shape[-1] else g_MxOxI.mT


def _at(number_Mx1: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A number a slot, shaped to multiply (M, …)."""
    return number_Mx1.view(-1, *(1,) * (like.ndim - 1))
