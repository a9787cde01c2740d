"""Cooldown shapes: the factor that takes a learning rate from its plateau (1) to its floor, as functions of x in [0, 1]."""

import math

import numpy as np

HALF_LIVES = 10.0  # of the half-life shape over a whole cooldown: it ends at 2^-10 of the plateau


SHAPES = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(math.pi * x)) / 2,
    "mirror-cosine": lambda x: 2 * (1 - x) - (1 + np.cos(math.pi * x)) / 2,
    "square": lambda x: 1 - x * x,
    # one e-fold of exp(-x), stretched to end at 0: the exponential decay of IBM's engine, of the Power scheduler's runs
    "exponential": lambda x: (np.exp(1 - x) - 1) / (math.e - 1),
    # MiniCPM's 0.5^(steps / half-life) (arXiv 2404.06395 §6.2), ten half-lives a cooldown
    "half-life": lambda x: 0.5 ** (HALF_LIVES * x),
}
PARAMETRIC = {
    "1-x^p": lambda x, p: 1 - x**p,
    # jumps to a share of the plateau, then linear (Dremov et al., arXiv 2508.01483)
    "lowered-linear": lambda x, p: p * (1 - x),
}
DEFAULT_PARAMETER = {"1-x^p": 0.5, "lowered-linear": 0.7}


def check_shape(owner: str, shape: str, parameter: float | None) -> None:
    """ValueError for an unknown shape (lists the known) or a parameter that the shape does not take."""
    if shape not in SHAPES and shape not in PARAMETRIC:
        raise ValueError(f"{owner}: unknown shape {shape!r}; known: {', '.join([*SHAPES, *PARAMETRIC])}")
    if parameter is not None and shape not in PARAMETRIC:
        raise ValueError(f"{owner}: shape {shape!r} takes no shape_parameter; got {parameter}")
    if parameter is not None and not parameter > 0:
        raise ValueError(f"{owner}: shape_parameter must be positive; got {parameter}")


def shape_factor(shape: str, x: np.ndarray, parameter: float | None = None) -> np.ndarray:
    """The factor at x (0: plateau, 1: end of the cooldown): float64 of x's shape."""
    if shape in PARAMETRIC:
        return PARAMETRIC[shape](x, DEFAULT_PARAMETER[shape] if parameter is None else parameter)
    return SHAPES[shape](x)
