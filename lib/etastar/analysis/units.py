"""Values that their name's unit makes implausible: parameters in millions, tokens in billions, batches in sequences."""

import math
import warnings

import numpy as np

_LR = (0.0, 1.0, "", "multiples of 1e-3 or 1e-4")
_PARAMS = (1e3, 1e14, "millions or billions", "FLOPs")
_TOKENS = (1e4, 1e16, "millions or billions", "FLOPs")
_BATCH = (1e2, 1e10, "sequences", "tokens of the whole run")
# name: (least plausible, most plausible, unit probably meant below, and above)
PLAUSIBLE = {"lr": _LR, "peak_lr": _LR, "best_lr": _LR, "params": _PARAMS, "params_active": _PARAMS, "params_total": _PARAMS,
             "tokens": _TOKENS, "horizon_tokens": _TOKENS, "batch_tokens": _BATCH}


class UnitWarning(UserWarning):
    """Values are implausible in their name's unit; the message says which unit was probably meant."""


def implausible_unit(name: str, values) -> str | None:
    """What to say of values of `name` that are implausible in its unit; None where they are plausible or the name implies no unit."""
    least, most, if_below, if_above = PLAUSIBLE.get(name, (-math.inf, math.inf, "", ""))
    low, high = float(np.min(values)), float(np.max(values))
    if low < least:
        return f"{name} = {low:.4g} is implausibly small; it is probably in {if_below}: give plain {name}"
    if high > most:
        return f"{name} = {high:.4g} is implausibly large; it is probably in {if_above}: give plain {name}"
    return None


def warn_of_units(name: str, values, stacklevel: int = 2) -> None:
    """Warn (UnitWarning) where `implausible_unit` finds something."""
    if said := implausible_unit(name, values):
        warnings.warn(said, UnitWarning, stacklevel=stacklevel + 1)
