"""Units of a table of runs: to ours from what they are said to be in, and what to say where the values speak for another unit."""

import math
import re
import warnings

import numpy as np
import pandas as pd

from etastar.analysis.units import PLAUSIBLE, UnitWarning

THOUSANDS = {"": 1.0, "thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
LETTERS = {"k": "thousands", "m": "millions", "b": "billions", "bn": "billions", "t": "trillions"}
LARGEST_LOSS = 15.0  # nats a token; above ln of any vocabulary in use
FEW_TOKENS = 8192  # a largest batch below it, in a column that does not say tokens, may well be sequences
_INVERSE = {"log2": np.exp2, "log10": lambda x: 10.0**x, "ln": np.exp, "bits": lambda x: x * math.log(2), "perplexity": np.log}


def refuse_units(units: dict, found: list[str]) -> None:
    """ValueError for a unit that is not known, or of a column that is not among those found."""
    for ours, unit in units.items():
        if ours not in found:
            raise ValueError(f"units={{{ours!r}: {unit!r}}}: no such column of numbers was found; found are {', '.join(found)}")
        _factor(ours, unit)


def _factor(ours: str, unit):
    """A factor, or a function to our unit, or "steps"; ValueError listing what is known."""
    own = {"batch_tokens": ["sequences of N"], "horizon_tokens": ["steps", "sequences of N"], "loss": ["bits", "perplexity"]}
    known = [*(w for w in THOUSANDS if w), "log2", "log10", "ln", "a factor as 1e-3", *own.get(ours, [])]
    if isinstance(unit, int | float) and unit > 0:
        return float(unit)
    word = str(unit).strip().lower()
    if ours in ("batch_tokens", "horizon_tokens") and (sequences := re.fullmatch(r"sequences of (\d+)", word)):
        return float(sequences[1])
    if word in ("", "plain", "tokens", "nats"):
        return 1.0
    if word == "steps" and ours == "horizon_tokens":
        return "steps"
    if word in THOUSANDS or word in LETTERS:
        return THOUSANDS[LETTERS.get(word, word)]
    if word in ("log2", "log10", "ln") or (word in ("bits", "perplexity") and ours == "loss"):
        return _INVERSE[word]
    raise ValueError(f"units={{{ours!r}: {unit!r}}} is not known; known are {', '.join(known)}")


def to_our_units(frame: pd.DataFrame, units: dict) -> None:
    """Convert the columns of a frame in place; tokens are steps × batch where only these are there."""
    for ours, unit in sorted(units.items(), key=lambda item: item[1] == "steps"):  # steps want the batch in tokens
        factor = _factor(ours, unit)
        if factor == "steps":
            if "batch_tokens" not in frame:
                raise ValueError("horizon_tokens in steps needs batch_tokens, which no column is known for; name one in columns")
            frame[ours] = frame[ours] * frame["batch_tokens"]
        else:
            frame[ours] = factor(frame[ours]) if callable(factor) else frame[ours] * factor
    if "horizon_tokens" not in frame and {"steps", "batch_tokens"} <= set(frame):
        frame.insert(list(frame).index("batch_tokens"), "horizon_tokens", frame["steps"] * frame["batch_tokens"])


def check(frame: pd.DataFrame, theirs: dict) -> None:
    """Refuse rates that are none; warn (UnitWarning) of values that speak for another unit; `theirs` are their names of ours."""
    lr = frame["peak_lr"]
    if not (np.isfinite(lr) & (lr > 0)).all():
        bad = lr[~(np.isfinite(lr) & (lr > 0))]
        mend = ('; logarithms are read with units={"peak_lr": "log2"} (or "log10")' if (bad < 0).any() else "; drop the rows without one")
        raise ValueError(f"peak_lr ({theirs['peak_lr']!r}) must be positive: {len(bad)} of {len(lr)} are not, {bad.iloc[0]:g} in row "
                         f"{bad.index[0]} for example{mend}")
    for ours in [name for name in ("params", "horizon_tokens", "batch_tokens", "peak_lr", "loss") if name in frame]:
        values = frame[ours][np.isfinite(frame[ours])]
        if len(values) and (unit := _probable(frame, ours, values, theirs.get(ours, ours))):
            name = theirs.get(ours, "steps × batch")
            warnings.warn(f"{ours} ({name!r}) = {values.min():.4g} … {values.max():.4g} is implausible; probably {unit[0]}. "
                          f"Mend: units={{{ours!r}: {unit[1]!r}}}", UnitWarning, stacklevel=3)


def _probable(frame: pd.DataFrame, ours: str, values: pd.Series, theirs: str) -> tuple[str, object] | None:
    """(what was probably meant, the unit to write), None where the values are plausible."""
    middle = float(values.median())
    if ours == "loss":
        return ("a perplexity", "perplexity") if middle > LARGEST_LOSS else None
    if ours == "peak_lr":
        factor = 10.0 ** round(-3 - math.log10(middle))
        return (f"multiples of {factor:g}", factor) if values.max() > PLAUSIBLE[ours][1] else None
    least, most, *_ = PLAUSIBLE[ours]
    if values.max() > most:
        return "plain already, or FLOPs", "plain"
    if ours == "batch_tokens":
        return _sequences(frame, values, theirs)
    if values.min() >= least:
        return None
    unit = "billions" if middle < (20 if ours == "params" else 2000) else "millions" if middle < 1e6 else "thousands"
    return f"in {unit}", unit


def _sequences(frame: pd.DataFrame, values: pd.Series, theirs: str) -> tuple[str, str] | None:
    """Whether a batch is told in sequences: steps × batch falls short of the tokens, or the name does not say tokens and it is small."""
    if {"steps", "horizon_tokens"} <= set(frame):
        context = frame["horizon_tokens"] / frame["steps"] / frame["batch_tokens"]
        whole = round(float(context.median())) if np.isfinite(context.median()) else 1
        if whole > 1 and (abs(context / whole - 1) < 0.02).all():
            return f"in sequences of {whole} tokens (steps × batch is that much less than horizon_tokens)", f"sequences of {whole}"
    if values.min() < PLAUSIBLE["batch_tokens"][0] or ("token" not in theirs.lower() and values.max() <= FEW_TOKENS):
        return "in sequences of so many tokens as the context has, 2048 for example", "sequences of 2048"
    return None
