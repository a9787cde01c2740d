"""Errors of what one archive says: every unit (a cell, a size) left out in turn, for archives have one run a point and no seeds."""

import math

import numpy as np
import pandas as pd

from etastar.analysis.paired import Estimate

LEAST_UNITS = 4


def jackknife(units, measure, unit: str = "exponent") -> list[Estimate]:
    """What `measure` makes of the rows, a vector (values,), as Estimates with the error of leaving out one of `units` (rows,) at a time.

    `measure` takes the rows kept, a mask (rows,). The values are those of all rows, df the units less one, n the rows; `unit` is as
    printed. Raises ValueError for fewer than 4 units; what `measure` raises on a part of the rows is raised on.
    """
    number, labels = pd.factorize(np.asarray(units))
    if len(labels) < LEAST_UNITS:
        raise ValueError(f"an error of leaving one out needs at least {LEAST_UNITS} units; got {len(labels)}: "
                         f"{', '.join(map(str, labels))}")
    whole = np.atleast_1d(np.asarray(measure(np.ones(len(number), dtype=bool)), dtype=float))
    without = np.array([np.atleast_1d(measure(number != one)) for one in range(len(labels))], dtype=float)
    errors = math.sqrt((len(labels) - 1) / len(labels)) * np.linalg.norm(without - without.mean(0), axis=0)
    return [Estimate(float(value), float(se), len(labels) - 1, len(number), unit) for value, se in zip(whole, errors, strict=True)]
