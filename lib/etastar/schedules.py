"""Learning-rate schedules as values: each is a pure function to the array of rates applied, step by step.

Conventions of this kit ("etastar"), for 0-based step s:
  warm-up of W steps      factor (s + 1) / W: the first step already moves, step W − 1 is at the peak;
  cooldown of D steps     step k = 0 … D − 1 stands at x = (k + 1) / (D + 1): the first step already decays, the last is
                          not spent at the floor; a floor f turns a shape's factor g into f + (1 − f)·g;
  cosine, line            the same x, D being all steps after warm-up;
  fractions               of all steps of the run, to the nearest step, halves to the even one.
So step s of a run of T steps has the rate that transformers' get_*_schedule have at step s + 1 of a run of T + 1 steps.
Other codebases' conventions are offered by name (`WSD(convention=…)`, `Cosine(convention="epfml")`).
Neither `warmup_steps` nor `warmup_tokens` means no warm-up.
"""

import math
from typing import Literal

import numpy as np

from etastar.cooldown_shapes import check_shape, shape_factor
from etastar.schedule_conventions import cooldown_position, one_cycle, warmup_factor
from etastar.values import at_most_one, exactly_one, value


class Schedule:
    """Base of all schedules; `lr` is the whole of its interface."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    convention: str = "etastar"

    def lr(self, total_steps: int, *, peak_lr: float, batch_tokens: int) -> np.ndarray:
        """The rate applied at each step, warm-up included: float64 (total_steps,).

        `batch_tokens` is tokens a step. Raises ValueError where the schedule does not fit the run, naming both lengths.
        """
        if total_steps < 1:
            raise ValueError(f"a run needs at least one step; got total_steps={total_steps}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
        if not 0 < peak_lr < math.inf:
            raise ValueError(f"peak_lr must be positive and finite; got {peak_lr}")
        warmup = self._length("warmup", batch_tokens) or 0
        if warmup > total_steps:
            raise ValueError(f"{_name(self)}: a warm-up of {warmup} steps exceeds the run of {total_steps}; shorten it")
        return self._rates(total_steps, peak_lr, batch_tokens, warmup)

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        after = self._after_warmup(total_steps, batch_tokens, warmup)
        return peak_lr * np.concatenate([warmup_factor(self.convention, warmup), after])

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        raise NotImplementedError

    def _length(self, what: str, batch_tokens: int) -> int | None:
        """A length given as `what`_steps or `what`_tokens, in steps; None where neither was."""
        if getattr(self, f"{what}_tokens") is None:
            return getattr(self, f"{what}_steps")
        return self._steps(f"{what}_tokens", batch_tokens)

    def _steps(self, field: str, batch_tokens: int) -> int:
        """A field in tokens, in steps; ValueError where that is no whole number."""
        tokens = getattr(self, field)
        if tokens % batch_tokens:
            near = max(1, round(tokens / batch_tokens)) * batch_tokens
            raise ValueError(f"{_name(self)}.{field} {tokens} is not a multiple of batch_tokens {batch_tokens}; "
                             f"take {near}")
        return tokens // batch_tokens

    def _check_warmup(self):
        at_most_one(_name(self), warmup_steps=self.warmup_steps, warmup_tokens=self.warmup_tokens)
        self._check_least(0, "warmup_steps", "warmup_tokens")

    def _check_floor(self):
        if not 0 <= self.floor <= 1:
            raise ValueError(f"{_name(self)}.floor is a share of the peak and must lie in [0, 1]; got {self.floor}")

    def _check_least(self, least: int, *names):
        for name in names:
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{_name(self)}.{name} must be at least {least}; got {given}")


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
    """Half a cosine from the peak to `floor` times it (arXiv 1608.03983 without restarts).

    The cycle, warm-up included, ends with the run or after `cycle_fraction` of it, `cycle_steps` or `cycle_tokens`; one
    that ends early stays at the floor (`after="hold"`) or rises again (`after="loop"`, arXiv 2404.06395's CosineLoop);
    a longer one is cut off. `convention="epfml"` is torch's OneCycleLR as arXiv 2405.18392's code
    calls it: warm-up is half a cosine from 1/100, the floor is reached at the last step of the cycle.
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
        self._check_floor()
        given = {name: getattr(self, name) for name in ("cycle_fraction", "cycle_steps", "cycle_tokens")}
        at_most_one("Cosine", **given)
        self._check_least(1, "cycle_steps", "cycle_tokens")
        if self.cycle_fraction is not None and not 0 < self.cycle_fraction < math.inf:
            raise ValueError(f"Cosine.cycle_fraction must be positive and finite; got {self.cycle_fraction}")
        if self.convention == "epfml" and self.after == "loop":
            raise ValueError("Cosine(convention='epfml') does not loop: OneCycleLR has one cycle; take after='hold'")

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        if self.convention == "etastar":
            return super()._rates(total_steps, peak_lr, batch_tokens, warmup)
        return peak_lr * one_cycle(total_steps, warmup, self._cycle(total_steps, batch_tokens, warmup), self.floor)

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        decay = self._cycle(total_steps, batch_tokens, warmup) - warmup
        x = (np.arange(total_steps - warmup) + 1.0) / (decay + 1)
        if self.after == "hold":
            x = np.minimum(x, 1.0)
        return shape_factor("cosine", x, floor=self.floor)

    def _cycle(self, total_steps, batch_tokens, warmup) -> int:
        """Steps of the cycle, warm-up included."""
        if self.cycle_fraction is not None:
            cycle = round(self.cycle_fraction * total_steps)
        else:
            cycle = self._length("cycle", batch_tokens) or total_steps
        if cycle <= warmup < total_steps:
            raise ValueError(f"Cosine: a cycle of {cycle} steps ends within a warm-up of {warmup}; lengthen the cycle")
        return cycle


class _WithCooldown(Schedule):
    """What schedules with a cooldown at the end share."""

    def _check_cooldown(self, choose):
        given = {name: getattr(self, name) for name in ("cooldown_fraction", "cooldown_steps", "cooldown_tokens")}
        choose(_name(self), **given)
        if self.cooldown_fraction is not None and not 0 <= self.cooldown_fraction <= 1:
            raise ValueError(f"{_name(self)}.cooldown_fraction must lie in [0, 1]; got {self.cooldown_fraction}")
        self._check_least(0, "cooldown_steps", "cooldown_tokens")
        check_shape(_name(self), self.shape, self.shape_parameter)
        self._check_floor()

    def _cooldown(self, total_steps, batch_tokens, warmup) -> int:
        """Steps of the cooldown; a fraction is of the whole run, and 1 means all after warm-up."""
        if self.cooldown_fraction == 1:
            return total_steps - warmup
        steps = self._length("cooldown", batch_tokens)
        if steps is None:
            steps = round((self.cooldown_fraction or 0.0) * total_steps)
            if self.cooldown_fraction and not steps:
                raise ValueError(
                    f"{_name(self)}: cooldown_fraction {self.cooldown_fraction} of {total_steps} steps is not even one "
                    f"step; take at least {1 / total_steps:.2g}, or 0 for none"
                )
        if steps + warmup > total_steps:
            raise ValueError(
                f"{_name(self)}: a cooldown of {steps} steps and a warm-up of {warmup} are longer than the run of "
                f"{total_steps} steps; shorten one, or take cooldown_fraction=1 for all steps after warm-up"
            )
        return steps

    def _decay(self, steps: int) -> np.ndarray:
        x = cooldown_position(self.convention, steps)
        return shape_factor(self.shape, x, self.shape_parameter, self.floor)


@value
class WSD(_WithCooldown):
    """Warm-up, stable, decay (arXiv 2404.06395 Eq. 1, 2405.18392 Eq. 1): the peak, then a cooldown to `floor` of it.

    Exactly one of `cooldown_fraction` (of all steps; 1: all steps after warm-up), `cooldown_steps`, `cooldown_tokens`.
    Shapes: linear, 1-sqrt, cosine, mirror-cosine, square, exponential; and, with a `shape_parameter`, 1-x^p (the power,
    0.5), lowered-linear (the share it starts from, 0.7), half-life (how many of them, 10).
    `convention` places the steps as another codebase does (table in schedule_conventions); "lingua" decays along
    1 / (x / floor + 1 − x) and so needs a floor above 0.
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
        self._check_cooldown(exactly_one)
        if self.convention == "lingua" and (self.shape != "linear" or not self.floor):
            raise ValueError(
                "WSD(convention='lingua') has one shape, 1 / (x / floor + 1 − x): leave shape at 'linear' and give a "
                f"floor above 0 (0.1 is its own default); got shape {self.shape!r}, floor {self.floor}"
            )

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        cooldown = self._cooldown(total_steps, batch_tokens, warmup)
        if self.convention == "fabian-sp" and warmup < warmup + cooldown == total_steps:
            cooldown -= 1  # that code keeps one step at the peak
        return np.concatenate([np.ones(total_steps - warmup - cooldown), self._decay(cooldown)])

    def _decay(self, steps):
        if self.convention != "lingua":
            return super()._decay(steps)
        x = cooldown_position(self.convention, steps)
        return 1 / (x / self.floor + 1 - x)


@value
class LinearToZero(Schedule):
    """A straight line from the peak to `floor` of it over all steps after warm-up (arXiv 2502.15938)."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    floor: float = 0.0

    def check(self):
        self._check_warmup()
        self._check_floor()

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        x = cooldown_position(self.convention, total_steps - warmup)
        return shape_factor("linear", x, floor=self.floor)


@value
class MultiStep(Schedule):
    """Falling in steps: from each of `boundaries`, fractions of all steps, on, the rate is the share in `factors`.

    Defaults are DeepSeek's (arXiv 2401.02954): 31.6 % of the peak after 80 % of tokens, 10 % after 90 %.
    """

    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    boundaries: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (10**-0.5, 0.1)

    def check(self):
        self._check_warmup()
        rising = all(a < b for a, b in zip((0.0, *self.boundaries), (*self.boundaries, 1.0), strict=True))
        if len(self.boundaries) != len(self.factors) or not rising or not all(0 <= f <= 1 for f in self.factors):
            raise ValueError(
                "MultiStep needs boundaries rising within (0, 1) and for each a factor in [0, 1]; "
                f"got boundaries {self.boundaries}, factors {self.factors}"
            )

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        boundaries = [round(fraction * total_steps) for fraction in self.boundaries]
        passed = np.searchsorted(boundaries, np.arange(warmup, total_steps), side="right")
        return np.array((1.0, *self.factors))[passed]


@value
class InverseSqrt(Schedule):
    """1/√s decay without a horizon: factor √(W / (s + 1)) at 0-based step s ≥ W, W the warm-up, at least one step."""

    warmup_steps: int | None = None
    warmup_tokens: int | None = None

    def check(self):
        self._check_warmup()

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        return np.sqrt(max(warmup, 1) / (np.arange(warmup, total_steps) + 1.0))


@value
class Power(_WithCooldown):
    """Power scheduler (arXiv 2408.13359 Eq. 7–8): η(n) = min(η_max, β·a·n^b), absolute, without a horizon.

    n counts the tokens seen after the step, as warm-up does; β is the batch in sequences, batch_tokens over
    `sequence_tokens` (4096 in the paper); `eta_max` None means the run's peak rate. Warm-up rises linearly to η at its
    end; an optional cooldown takes the rate from where the power law stood to `floor` of it. Raises ValueError where
    `eta_max` and the peak rate disagree.
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
        self._check_cooldown(at_most_one)
        self._check_least(1, "sequence_tokens")
        if not self.a > 0 or not self.b < 0 or (self.eta_max is not None and not self.eta_max > 0):
            raise ValueError(
                f"Power needs a > 0, b < 0 and eta_max > 0 or None; got a={self.a}, b={self.b}, eta_max={self.eta_max}"
            )

    def rate_at(self, tokens, *, batch_tokens: int, eta_max: float) -> np.ndarray:
        """min(η_max, β·a·n^b) at n = `tokens`."""
        sequences = batch_tokens / self.sequence_tokens
        return np.minimum(eta_max, sequences * self.a * np.asarray(tokens, dtype=np.float64) ** self.b)

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        if self.eta_max is not None and self.eta_max != peak_lr:
            raise ValueError(f"Power.eta_max {self.eta_max} and peak_lr {peak_lr} differ; equal them or drop eta_max")
        cooldown = self._cooldown(total_steps, batch_tokens, warmup)
        tokens = (np.arange(total_steps) + 1.0) * batch_tokens
        rates = self.rate_at(tokens, batch_tokens=batch_tokens, eta_max=peak_lr)
        if warmup:
            rates[:warmup] = rates[warmup - 1] * warmup_factor(self.convention, warmup)
        if cooldown:
            start = total_steps - cooldown
            rates[start:] = (rates[start - 1] if start else peak_lr) * self._decay(cooldown)
        return rates


@value
class Table(Schedule):
    """Any schedule at all: one factor of the peak rate a step, for exactly as many steps as the run has."""

    factors: tuple[float, ...]

    def check(self):
        if not self.factors or not all(0 <= factor < math.inf for factor in self.factors):
            raise ValueError("Table.factors must be finite numbers ≥ 0, at least one")

    def _after_warmup(self, total_steps, batch_tokens, warmup):
        if len(self.factors) != total_steps:
            raise ValueError(f"Table has {len(self.factors)} factors but the run {total_steps} steps; give one a step")
        return np.array(self.factors)


@value
class Branch(Schedule):
    """One schedule up to a point, another from there: a cooldown, a continuation, a second warm-up; branches may nest.

    Until `at_tokens` the rate is what `trunk` gives a run of `trunk_horizon_tokens` with the peak `trunk_peak_lr` (by
    default the run's); from there `then` runs over the rest as if it began there, with the peak `then_peak_lr` or, by
    default, the trunk's rate at the step before the branch, which is where a cooldown has x = 0.
    """

    trunk: Schedule
    trunk_horizon_tokens: int
    at_tokens: int
    then: Schedule
    then_peak_lr: float | None = None
    trunk_peak_lr: float | None = None

    def check(self):
        if not 0 < self.at_tokens <= self.trunk_horizon_tokens:
            raise ValueError(
                f"Branch.at_tokens {self.at_tokens} lies outside the trunk's 1 … {self.trunk_horizon_tokens} tokens"
            )
        for name in ("then_peak_lr", "trunk_peak_lr"):
            given = getattr(self, name)
            if given is not None and not 0 < given < math.inf:
                raise ValueError(f"Branch.{name} must be positive and finite; got {given}")

    def _rates(self, total_steps, peak_lr, batch_tokens, warmup):
        horizon = self._steps("trunk_horizon_tokens", batch_tokens)
        at = self._steps("at_tokens", batch_tokens)
        if at >= total_steps:
            raise ValueError(
                f"Branch.at_tokens {self.at_tokens} is not before the end of the run at {total_steps * batch_tokens} "
                "tokens; branch earlier or run longer"
            )
        trunk_peak = peak_lr if self.trunk_peak_lr is None else self.trunk_peak_lr
        trunk = self.trunk.lr(horizon, peak_lr=trunk_peak, batch_tokens=batch_tokens)[:at]
        peak = float(trunk[-1]) if self.then_peak_lr is None else self.then_peak_lr
        if not peak:
            raise ValueError(f"Branch: the trunk's rate is 0 at {self.at_tokens} tokens; give then_peak_lr")
        return np.concatenate([trunk, self.then.lr(total_steps - at, peak_lr=peak, batch_tokens=batch_tokens)])


def _name(schedule) -> str:
    return type(schedule).__name__
