"""Learning-rate schedules as values: each is a pure function to the array of rates applied, step by step.

Conventions of this kit ("etastar"), for 0-based step s:
  warm-up of W steps      factor (s + 1) / W: the first step already moves, step W − 1 is at the peak;
  cooldown of D steps     step k = 0 … D − 1 has x = (k + 1) / (D + 1): the first step already decays, the last is not
                          spent at the floor; a floor f turns a shape's factor g into f + (1 − f)·g;
  cosine over D steps after warm-up   the same x.
Other codebases' conventions are offered by name where they differ (`WSD(convention=…)`, `Cosine(convention=…)`).
"""

import math
from typing import Literal

import numpy as np

from etastar.cooldown_shapes import check_shape, shape_factor
from etastar.values import at_most_one, exactly_one, value


class Schedule:
    """Base of all schedules; `lr` is the whole of its interface."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None

    def lr(self, total_steps: int, *, peak_lr: float, batch_tokens: int) -> np.ndarray:
        """The rate applied at each step, warm-up included: float64 (total_steps,).

        Raises ValueError where the schedule does not fit the run, naming both lengths.
        """
        if total_steps < 1:
            raise ValueError(f"a run needs at least one step; got total_steps={total_steps}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
        warmup = self._steps("warmup", batch_tokens) or 0
        if warmup > total_steps:
            raise ValueError(f"{type(self).__name__}: a warm-up of {warmup} steps is longer than the run of {total_steps} steps")
        return self._rates(total_steps, peak_lr, batch_tokens, warmup)

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        factor = np.concatenate([_ramp(warmup), self._after_warmup(total_steps, batch_tokens, warmup)])
        return peak_lr * factor

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        raise NotImplementedError

    def _steps(self, what: str, batch_tokens: int) -> int | None:
        """A length given as `what`_steps or `what`_tokens, in steps; None where neither was."""
        steps, tokens = getattr(self, f"{what}_steps"), getattr(self, f"{what}_tokens")
        if tokens is None:
            return steps
        if tokens % batch_tokens:
            near = max(1, round(tokens / batch_tokens)) * batch_tokens
            raise ValueError(f"{type(self).__name__}.{what}_tokens {tokens} is not a multiple of batch_tokens {batch_tokens}; "
                             f"take {near}")
        return tokens // batch_tokens

    def _check_warmup(self):
        at_most_one(type(self).__name__, warmup_steps=self.warmup_steps, warmup_tokens=self.warmup_tokens)
        _not_negative(self, "warmup_steps", "warmup_tokens")


@value
class Constant(Schedule):
    """The peak rate after warm-up, for ever."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None

    def check(self):
        self._check_warmup()

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        return np.ones(total_steps - warmup)


@value
class Cosine(Schedule):
    """Half a cosine from the peak to `floor` times the peak (arXiv 1608.03983 without restarts).

    The cycle, warm-up included, ends with the run, or after `cycle_fraction` of it, `cycle_steps` or `cycle_tokens`; one
    that ends early stays at the floor (`after="hold"`) or rises again (`after="loop"`), a longer one is cut off.
    `convention="epfml"` is torch's OneCycleLR as arXiv 2405.18392's code calls it: warm-up from 1/100, also a cosine.
    """

    floor: float = 0.1
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    cycle_fraction: float | None = None
    cycle_steps: int | None = None
    cycle_tokens: int | None = None
    after: Literal["hold", "loop"] = "hold"
    convention: Literal["etastar", "epfml"] = "etastar"

    def check(self):
        self._check_warmup()
        at_most_one("Cosine", cycle_fraction=self.cycle_fraction, cycle_steps=self.cycle_steps, cycle_tokens=self.cycle_tokens)
        _check_floor(self)
        if self.cycle_fraction is not None and self.cycle_fraction <= 0:
            raise ValueError(f"Cosine.cycle_fraction must be positive; got {self.cycle_fraction}")

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        cycle = self._cycle(total_steps, batch_tokens) - warmup
        if cycle < 1:
            raise ValueError(f"Cosine: a cycle of {cycle + warmup} steps leaves nothing after a warm-up of {warmup} steps")
        x = (np.arange(total_steps - warmup) + 1.0) / (cycle + 1)
        if self.after == "hold":
            x = np.minimum(x, 1.0)
        return self.floor + (1 - self.floor) * (1 + np.cos(math.pi * x)) / 2

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        if self.convention == "etastar":
            return super()._rates(total_steps, peak_lr, batch_tokens, warmup)
        total, steps = self._cycle(total_steps, batch_tokens), np.arange(total_steps, dtype=np.float64)
        first, top, last = 1 / 100, warmup - 1.0, total - 1.0
        up, down = np.clip(steps / top, 0, 1) if top > 0 else np.ones(total_steps), np.clip((steps - top) / (last - top), 0, 1)
        rise = 1 + (first - 1) / 2 * (1 + np.cos(math.pi * up))
        fall = self.floor + (1 - self.floor) / 2 * (1 + np.cos(math.pi * down))
        return peak_lr * np.where(steps <= top, rise, fall)

    def _cycle(self, total_steps, batch_tokens) -> int:
        if self.cycle_fraction is not None:
            return max(1, round(self.cycle_fraction * total_steps))
        return self._steps("cycle", batch_tokens) or total_steps


class _WithCooldown(Schedule):
    """What schedules with a cooldown at the end share."""

    def _check_cooldown(self, needed: bool):
        name = type(self).__name__
        given = dict(cooldown_fraction=self.cooldown_fraction, cooldown_steps=self.cooldown_steps,
                     cooldown_tokens=self.cooldown_tokens)
        exactly_one(name, **given) if needed else at_most_one(name, **given)
        if self.cooldown_fraction is not None and not 0 <= self.cooldown_fraction <= 1:
            raise ValueError(f"{name}.cooldown_fraction must lie in [0, 1]; got {self.cooldown_fraction}")
        _not_negative(self, "cooldown_steps", "cooldown_tokens")
        check_shape(name, self.shape, self.shape_parameter)
        _check_floor(self)

    def _cooldown(self, total_steps, batch_tokens, warmup) -> int:
        """Steps of the cooldown; a fraction is of the whole run, rounded, and 1 means all after warm-up."""
        if self.cooldown_fraction == 1:
            return total_steps - warmup
        steps = self._steps("cooldown", batch_tokens)
        steps = round((self.cooldown_fraction or 0.0) * total_steps) if steps is None else steps
        if steps + warmup > total_steps:
            raise ValueError(f"{type(self).__name__}: a cooldown of {steps} steps and a warm-up of {warmup} are longer than the run "
                             f"of {total_steps} steps; shorten one or take cooldown_fraction=1 for all steps after warm-up")
        return steps

    def _decay(self, steps: int) -> np.ndarray:
        x = (np.arange(steps) + 1.0) / (steps + 1)
        return self.floor + (1 - self.floor) * shape_factor(self.shape, x, self.shape_parameter)


@value
class WSD(_WithCooldown):
    """Warm-up, stable, decay (arXiv 2404.06395 Eq. 1, 2405.18392 Eq. 1): the peak, then a cooldown to `floor` of it.

    Exactly one of `cooldown_fraction` (of all steps; 1: all steps after warm-up), `cooldown_steps`, `cooldown_tokens`.
    Shapes: linear, 1-sqrt, cosine, mirror-cosine, square, exponential, half-life, 1-x^p and lowered-linear (whose power or
    starting share is `shape_parameter`). `convention` computes linear warm-up and decay as another codebase does.
    """

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    cooldown_fraction: float | None = None
    cooldown_steps: int | None = None
    cooldown_tokens: int | None = None
    shape: str = "linear"
    shape_parameter: float | None = None
    floor: float = 0.0
    convention: Literal["etastar", "epfml", "torchtitan", "nanochat", "olmo", "fabian-sp", "lingua"] = "etastar"

    def check(self):
        self._check_warmup()
        self._check_cooldown(needed=True)
        if self.convention != "etastar" and (self.shape != "linear" or self.floor):
            raise ValueError(f"WSD(convention={self.convention!r}) is offered for shape 'linear' and floor 0 only; "
                             f"got shape {self.shape!r}, floor {self.floor}")

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        cooldown = self._cooldown(total_steps, batch_tokens, warmup)
        return np.concatenate([np.ones(total_steps - warmup - cooldown), self._decay(cooldown)])

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        if self.convention == "etastar":
            return super()._rates(total_steps, peak_lr, batch_tokens, warmup)
        cooldown = self._cooldown(total_steps, batch_tokens, warmup)
        return peak_lr * _FOREIGN_WSD[self.convention](np.arange(total_steps, dtype=np.float64), warmup, cooldown, total_steps)


@value
class LinearToZero(Schedule):
    """A straight line from the peak to `floor` of it over all steps after warm-up (arXiv 2502.15938)."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    floor: float = 0.0

    def check(self):
        self._check_warmup()
        _check_floor(self)

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        steps = total_steps - warmup
        return self.floor + (1 - self.floor) * (1 - (np.arange(steps) + 1.0) / (steps + 1))


@value
class MultiStep(Schedule):
    """Falling in steps; defaults are DeepSeek's (arXiv 2401.02954): 31.6 % of the peak after 80 % of tokens, 10 % after 90 %."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    boundaries: tuple = (0.8, 0.9)
    factors: tuple = (10**-0.5, 0.1)

    def check(self):
        self._check_warmup()
        rising = all(a < b for a, b in zip((0.0, *self.boundaries), (*self.boundaries, 1.0), strict=True))
        if len(self.boundaries) != len(self.factors) or not rising or not all(0 <= f <= 1 for f in self.factors):
            raise ValueError("MultiStep needs one factor in [0, 1] a boundary, and boundaries rising within (0, 1); "
                             f"got boundaries {self.boundaries}, factors {self.factors}")

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        steps = np.arange(warmup, total_steps)
        passed = np.searchsorted(np.round(np.array(self.boundaries) * total_steps), steps, side="right")
        return np.array((1.0, *self.factors))[passed]


@value
class InverseSqrt(Schedule):
    """1/√s decay: factor √(W / (s + 1)) for 0-based step s ≥ W, W the warm-up (at least one step)."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None

    def check(self):
        self._check_warmup()

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        return np.sqrt(max(warmup, 1) / (np.arange(warmup, total_steps) + 1.0))


@value
class Power(_WithCooldown):
    """Power scheduler (arXiv 2408.13359 Eq. 7–8): η(n) = min(η_max, β·a·n^b), absolute, n tokens seen, β sequences a batch.

    n counts the tokens seen after the step, as warm-up does. `eta_max` None means the run's peak rate; β is batch_tokens
    over `sequence_tokens` (4096 in the paper). Warm-up rises linearly to η at its end; an optional cooldown takes the rate
    from where the power law stood to `floor` of it.
    """

    a: float = 4.0
    b: float = -0.51
    eta_max: float | None = None
    sequence_tokens: int = 4096
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    cooldown_fraction: float | None = None
    cooldown_steps: int | None = None
    cooldown_tokens: int | None = None
    shape: str = "exponential"
    shape_parameter: float | None = None
    floor: float = 0.0

    def check(self):
        self._check_warmup()
        self._check_cooldown(needed=False)
        if self.a <= 0 or self.sequence_tokens < 1 or (self.eta_max is not None and self.eta_max <= 0):
            raise ValueError(f"Power needs a > 0, eta_max > 0 and sequence_tokens ≥ 1; got a={self.a}, eta_max={self.eta_max}, "
                             f"sequence_tokens={self.sequence_tokens}")

    def rate_at(self, tokens, *, batch_tokens: int, eta_max: float) -> np.ndarray:
        """min(η_max, β·a·n^b) at n = `tokens`."""
        sequences = batch_tokens / self.sequence_tokens
        return np.minimum(eta_max, sequences * self.a * np.asarray(tokens, dtype=np.float64) ** self.b)

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        if self.eta_max is not None and self.eta_max != peak_lr:
            raise ValueError(f"Power.eta_max {self.eta_max} and the run's peak_lr {peak_lr} disagree; leave eta_max out or make "
                             "them equal")
        cooldown = self._cooldown(total_steps, batch_tokens, warmup)
        rates = self.rate_at((np.arange(total_steps) + 1.0) * batch_tokens, batch_tokens=batch_tokens, eta_max=peak_lr)
        if warmup:
            rates[:warmup] = rates[warmup - 1] * _ramp(warmup)
        if cooldown:
            start = total_steps - cooldown
            rates[start:] = (rates[start - 1] if start else peak_lr) * self._decay(cooldown)
        return rates


@value
class Table(Schedule):
    """Any schedule at all: one factor of the peak rate a step, for exactly as many steps as the run has."""

    factors: tuple

    def check(self):
        if not self.factors or not all(isinstance(f, int | float) and 0 <= f < math.inf for f in self.factors):
            raise ValueError("Table.factors must be finite numbers ≥ 0, at least one")

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        if len(self.factors) != total_steps:
            raise ValueError(f"Table has {len(self.factors)} factors but the run has {total_steps} steps")
        return np.array(self.factors, dtype=np.float64)


@value
class Branch(Schedule):
    """One schedule up to a point, another from there: a cooldown, a continuation, a second warm-up.

    Until `at_tokens` the rate is what `trunk` gives a run of `trunk_horizon_tokens`; from there `then` runs over the rest of
    the run as if it began there, with the peak `then_peak_lr` or, by default, the rate of the step before the branch.
    """

    trunk: Schedule
    trunk_horizon_tokens: int
    at_tokens: int
    then: Schedule
    then_peak_lr: float | None = None

    def check(self):
        if not 0 < self.at_tokens <= self.trunk_horizon_tokens:
            raise ValueError(f"Branch.at_tokens {self.at_tokens} lies outside the trunk's 1 … {self.trunk_horizon_tokens} tokens")
        if self.then_peak_lr is not None and not self.then_peak_lr > 0:
            raise ValueError(f"Branch.then_peak_lr must be positive; got {self.then_peak_lr}")

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        for name in ("trunk_horizon_tokens", "at_tokens"):
            if getattr(self, name) % batch_tokens:
                raise ValueError(f"Branch.{name} {getattr(self, name)} is not a multiple of batch_tokens {batch_tokens}")
        at = self.at_tokens // batch_tokens
        if at >= total_steps:
            raise ValueError(f"Branch.at_tokens {self.at_tokens} is not before the end of the run at {total_steps * batch_tokens}")
        trunk = self.trunk.lr(self.trunk_horizon_tokens // batch_tokens, peak_lr=peak_lr, batch_tokens=batch_tokens)[:at]
        peak = trunk[-1] if self.then_peak_lr is None else self.then_peak_lr
        return np.concatenate([trunk, self.then.lr(total_steps - at, peak_lr=float(peak), batch_tokens=batch_tokens)])


def _ramp(warmup: int) -> np.ndarray:
    return (np.arange(warmup) + 1.0) / warmup if warmup else np.empty(0)


def _check_floor(schedule) -> None:
    if not 0 <= schedule.floor <= 1:
        raise ValueError(f"{type(schedule).__name__}.floor is a share of the peak and must lie in [0, 1]; got {schedule.floor}")


def _not_negative(schedule, *names) -> None:
    for name in names:
        given = getattr(schedule, name)
        if given is not None and given < 0:
            raise ValueError(f"{type(schedule).__name__}.{name} must not be negative; got {given}")


def _from_zero(s, warmup, cooldown, total):
    """OLMo-core: warm-up from 0 at step 0, full rate at the first step of the decay."""
    return np.where(s < warmup, s / max(warmup, 1), np.where(s < total - cooldown, 1.0, (total - s) / max(cooldown, 1)))


def _from_one(s, warmup, cooldown, total):
    """torchtitan and nanochat: warm-up from 1/W, full rate at the first step of the decay."""
    return np.where(s < warmup, (s + 1) / max(warmup, 1), np.where(s < total - cooldown, 1.0, (total - s) / max(cooldown, 1)))


def _from_hundredth(s, warmup, cooldown, total):
    """epfml/schedules-and-scaling: warm-up from 1/100."""
    up = s / max(warmup, 1) + (1 - s / max(warmup, 1)) / 100
    return np.where(s < warmup, up, np.where(s < total - cooldown, 1.0, (total - s) / max(cooldown, 1)))


def _to_zero(s, warmup, cooldown, total):
    """fabian-sp/lr-scheduling: warm-up from 0 (1e-10), one step earlier in the decay, the last rate 0."""
    up = 1e-10 + (1 - 1e-10) * s / max(warmup, 1)
    return np.where(s < warmup, up, np.where(s < total - cooldown, 1.0, (total - s - 1) / max(cooldown, 1)))


def _inverse_linear(s, warmup, cooldown, total):
    """lingua: the inverse of a straight line from 1 to 1/0.1."""
    x = (s - (total - cooldown)) / max(cooldown, 1)
    return np.where(s < warmup, s / max(warmup, 1), np.where(s < total - cooldown, 1.0, 1 / (x / 0.1 + (1 - x))))


_FOREIGN_WSD = {"epfml": _from_hundredth, "torchtitan": _from_one, "nanochat": _from_one, "olmo": _from_zero,
                "fabian-sp": _to_zero, "lingua": _inverse_linear}
