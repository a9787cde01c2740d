"""Cooldown shapes: factors that take a learning rate from its plateau (1) to its floor, as functions of x in [0, 1]."""

import math

import numpy as np

_SHAPES = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(math.pi * x)) / 2,
    "mirror-cosine": lambda x: 2 * (1 - x) - (1 + np.cos(math.pi * x)) / 2,
    "square": lambda x: 1 - x * x,
    # one e-fold of exp(−x), stretched to end at 0: IBM's open-lm-engine, whence the Power scheduler's runs
    "exponential": lambda x: (np.exp(1 - x) - 1) / (math.e - 1),
}
# shape: (factor with parameter p, default of p, largest p)
_PARAMETRIC = {
    "1-x^p": (lambda x, p: 1 - x**p, 0.5, math.inf),
    # jumps to a share p of the plateau, then a straight line (arXiv 2508.01483)
    "lowered-linear": (lambda x, p: p * (1 - x), 0.7, 1.0),
    # MiniCPM's 0.5^(steps / half-life) (arXiv 2404.06395 §6.2) over p half-lives; it ends at 2^−p, not at the floor
    "half-life": (lambda x, p: 0.5 ** (p * x), 10.0, math.inf),
}
SHAPES = (*_SHAPES, *_PARAMETRIC)


def check_shape(owner: str, shape: str, parameter: float | None) -> None:
    """ValueError for an unknown shape (lists the known) or a parameter that the shape does not take."""
    if shape not in SHAPES:
        raise ValueError(f"{owner}: unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    if parameter is None:
        return
    if shape not in _PARAMETRIC:
        takers = ", ".join(_PARAMETRIC)
        raise ValueError(f"{owner}: shape {shape!r} takes no shape_parameter, {takers} do; got {parameter}")
    _, _, largest = _PARAMETRIC[shape]
    if not 0 < parameter <= largest or parameter == math.inf:
        bound = "positive and finite" if largest == math.inf else f"in (0, {largest:g}]"
        raise ValueError(f"{owner}: the shape_parameter of shape {shape!r} must be {bound}; got {parameter}")


def shape_factor(shape: str, x: np.ndarray, parameter: float | None = None, floor: float = 0.0) -> np.ndarray:
    """The factor at x (0: plateau, 1: end of the cooldown), stretched to end at `floor`: float64 of x's shape."""
    if shape in _SHAPES:
        factor = _SHAPES[shape](x)
    else:
        formula, default, _ = _PARAMETRIC[shape]
        factor = formula(x, default if parameter is None else parameter)
    return floor + (1 - floor) * factor
