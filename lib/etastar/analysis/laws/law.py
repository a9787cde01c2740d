"""What a published law is: formulas with their units and the range each was fitted in, and answers that carry their warnings.

A law is asked by argument names alone. Each formula can be asked in a few ways, exact or approximate; whatever is not exact,
lies outside the range of the fit or looks like another unit is said in words: by `LawWarning`, or as data (`Law.answer`).
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

from etastar.analysis.laws.units import ARGUMENTS, check_arguments, probable_slips, range_text

QUANTITIES = ("lr", "batch", "tau", "weight_decay")


class LawWarning(UserWarning):
    """A law was asked with an approximated input, outside the range it was fitted in, or in what looks like another unit."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One set of arguments a formula can be asked with.

    `convert` turns them into the formula's own (None: they are its own); `approximates` says what is then not exact.
    """

    takes: tuple[str, ...]
    convert: Callable[..., dict] | None = None
    approximates: str = ""

    def own_arguments(self, given: Mapping) -> dict:
        """The formula's own arguments from those of this way."""
        chosen = {name: float(given[name]) for name in self.takes}
        return self.convert(**chosen) if self.convert else chosen


@dataclasses.dataclass(frozen=True)
class Formula:
    """One quantity of a law: prefactor · Π argumentᵉ, or `rule` where it is no product of powers.

    `prefactor` None: only ratios can be asked. `ranges` maps an argument to the least and greatest value fitted on, as
    printed (None: not told). `other_fits` are further printed (prefactor, exponents) of the same data; they and the value
    make low and high. `evidence` says which numbers are printed and which known from another text.
    """

    equation: str
    evidence: str
    ways: tuple[Way, ...]
    prefactor: float | None = None
    exponents: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rule: Callable[..., float] | None = None
    ranges: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    other_fits: tuple = ()

    def __post_init__(self):
        for name in ("exponents", "ranges"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def value(self, own: Mapping) -> float:
        """The formula at its own arguments."""
        return self.rule(**own) if self.rule else _product(self.prefactor, self.exponents, own)

    def ratio(self, start: Mapping, end: Mapping) -> float:
        """The formula at `end` over that at `start`; arguments in neither are unchanged."""
        if self.rule:
            return self.rule(**end) / self.rule(**start)
        return math.prod((end[name] / start[name]) ** power for name, power in self.exponents.items() if name in start)

    def low_high(self, own: Mapping) -> tuple[float, float]:
        """Least and greatest of what the printed fits say; NaN where there is one fit only."""
        if not self.other_fits:
            return math.nan, math.nan
        said = [self.value(own)] + [_product(prefactor, exponents, own) for prefactor, exponents in self.other_fits]
        return min(said), max(said)

    def outside(self, values: Mapping) -> dict[str, float]:
        """How many times beyond its range each argument lies: name → factor > 1."""
        factors = {name: _beyond(values[name], *ends) for name, ends in self.ranges.items() if name in values}
        return {name: factor for name, factor in factors.items() if factor > 1}

    def extrapolation(self, values: Mapping) -> float:
        """The greatest factor beyond a range: 1 inside, NaN where it cannot be told since the end of a range is not."""
        untold = not self.ranges or any(end is None for name in values if name in self.ranges for end in self.ranges[name])
        return max(self.outside(values).values(), default=math.nan if untold else 1.0)

    def range_warnings(self, values: Mapping) -> list[str]:
        """One sentence for each argument outside the range of the fit."""
        return [f"{name}={values[name]:.4g} is {factor:.3g} times beyond the range fitted on, {range_text(*self.ranges[name])}"
                for name, factor in self.outside(values).items()]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a law says: `value`, `low` and `high` over its printed fits (NaN without), and what speaks against it.

    `extrapolation` is the greatest factor by which an argument lies beyond the range of the fit: 1 inside, NaN where that
    range is not told. `arguments` are the formula's own, as they came of those given.
    """

    value: float
    low: float
    high: float
    extrapolation: float
    warnings: tuple[str, ...]
    arguments: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Law:
    """A published learning-rate or batch law with all that is needed not to misread it.

    Rates are peak rates: a base rate where `parametrization` is "mup"; batches are in tokens. `schedule` is the kind it was
    fitted under and `final_lr` where that ended; `params_convention` says which parameters its N counts, `batch_unit` in
    what its own text counts a batch; `base_width` and `multipliers` are those of its μP. `lacking` says why a quantity cannot be asked.
    """

    name: str
    title: str
    source: str
    parametrization: str
    optimizer: str
    schedule: str
    final_lr: str
    params_convention: str
    batch_unit: str
    formulas: Mapping[str, Formula]
    lacking: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base_width: int | None = None
    multipliers: str = ""

    def __post_init__(self):
        for name in ("formulas", "lacking"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def units(self) -> dict[str, str]:
        """The unit of every argument this law can be asked with."""
        names = dict.fromkeys(name for formula in self.formulas.values() for way in formula.ways for name in way.takes)
        own = {"params": f"parameters, {self.params_convention}", "batch_sequences": f"{self.batch_unit} a step"}
        return {name: own.get(name, ARGUMENTS[name]) for name in names}

    def lr(self, **given) -> float:
        """The optimal peak learning rate; arguments by name, those of one of `self.formulas["lr"].ways`, units in `units`.

        Warns (LawWarning) as the module's docstring tells. Raises ValueError for arguments it does not take or that are
        not positive, and where the law has no usable constant: then `lr_ratio` is what can be asked.
        """
        return self._told("lr", given)

    def batch(self, **given) -> float:
        """The optimal batch in tokens; asked, warning and raising as `lr`."""
        return self._told("batch", given)

    def tau(self, **given) -> float:
        """The optimal AdamW timescale B/(η·λ·D), a share of the run; asked, warning and raising as `lr`."""
        return self._told("tau", given)

    def weight_decay(self, **given) -> float:
        """The optimal AdamW weight decay at `peak_lr`; asked, warning and raising as `lr`."""
        return self._told("weight_decay", given)

    def lr_ratio(self, **changes) -> float:
        """By what the rate changes from one setting to another, each argument a pair (from, to); others stay as they are.

        Example: `laws["fitting"].lr_ratio(horizon_tokens=(1e10, 1e11))`. Warns where an end lies outside the range of the fit;
        raises ValueError for names the formula has not, or for a law without a rate.
        """
        formula = self._formula("lr")
        own = {"batch_sequences" if name == "batch_tokens" and name not in formula.exponents else name: pair
               for name, pair in changes.items()}
        known = set(formula.exponents) or set(formula.ways[0].takes)
        if not own or not set(own) <= known or len(own) < len(changes):
            raise ValueError(f"{self.name}.lr_ratio takes pairs (from, to) of {', '.join(sorted(known)) or 'nothing: it is constant'}; "
                             f"got {', '.join(changes) or 'nothing'}")
        if bad := [name for name, pair in own.items() if not isinstance(pair, tuple | list) or len(pair) != 2]:
            raise ValueError(f"{self.name}.lr_ratio: {', '.join(bad)} must be a pair (from, to); got {own[bad[0]]!r}")
        start, end = ({name: pair[i] for name, pair in own.items()} for i in (0, 1))
        for ends in (start, end):
            check_arguments(ends)
            self._warn(formula.range_warnings(ends), stacklevel=3)
        return formula.ratio(start, end)

    def hidden_lr(self, base_lr: float, width: int, base_width: int | None = None) -> float:
        """The rate of hidden matrices: base_lr / (width / base_width) under μP, base_lr itself under other parametrizations."""
        if self.parametrization != "mup":
            return base_lr
        base = base_width or self.base_width
        if base is None:
            raise ValueError(f"{self.name}: its base width is not published; give base_width")
        check_arguments({"width": width, "base_width": base})
        return base_lr * base / width

    def answer(self, quantity: str, **given) -> Answer:
        """What `lr`, `batch`, `tau` or `weight_decay` would say, with the warnings as data and none raised."""
        formula = self._formula(quantity)
        if formula.prefactor is None and formula.rule is None:
            raise ValueError(f"{self.name}.{quantity}: {self.lacking[quantity]}")
        way = next((w for w in formula.ways if set(w.takes) == set(given)), None)
        if way is None:
            raise ValueError(f"{self.name}.{quantity} takes {_ways(formula)}; got {', '.join(given) or 'nothing'}")
        check_arguments(given)
        own = way.own_arguments(given)
        value = formula.value(own)
        if not value > 0:
            raise ValueError(f"{self.name}.{quantity} is not positive ({value:.3g}) at {_spoken(own)}; the law ends before that")
        told = probable_slips(given) + ([way.approximates] if way.approximates else []) + formula.range_warnings(given | own)
        return Answer(value, *formula.low_high(own), formula.extrapolation(given | own), tuple(told), MappingProxyType(own))

    def answer_from(self, quantity: str, known: Mapping) -> Answer | None:
        """`answer` by the first way that the known arguments allow; None where the law has no such quantity or needs more."""
        formula = self.formulas.get(quantity)
        if formula is None or (formula.prefactor is None and formula.rule is None):
            return None
        way = next((w for w in formula.ways if set(w.takes) <= set(known)), None)
        return None if way is None else self.answer(quantity, **{name: known[name] for name in way.takes})

    def _told(self, quantity, given) -> float:
        answer = self.answer(quantity, **given)
        self._warn(answer.warnings)
        return answer.value

    def _warn(self, sentences, stacklevel=4) -> None:
        for sentence in sentences:
            warnings.warn(f"{self.name}: {sentence}", LawWarning, stacklevel=stacklevel)

    def _formula(self, quantity) -> Formula:
        if quantity not in self.formulas:
            why = self.lacking.get(quantity, "it says nothing about that")
            raise ValueError(f"{self.name} has no {quantity}: {why}; it has {', '.join(self.formulas)}")
        return self.formulas[quantity]


def _product(prefactor, exponents, own) -> float:
    return float(prefactor * math.prod(own[name] ** power for name, power in exponents.items()))


def _beyond(value, low, high) -> float:
    return max(low / value if low else 0.0, value / high if high else 0.0)


def _ways(formula) -> str:
    return " or ".join(f"({', '.join(way.takes)})" for way in formula.ways if way.takes) or "no arguments"


def _spoken(own) -> str:
    return ", ".join(f"{name}={value:.4g} {ARGUMENTS[name]}" for name, value in own.items())
