"""Cooldown shapes: published factors, end points, parameters."""

import numpy as np
import pytest

from etastar.cooldown_shapes import SHAPES, check_shape, shape_factor

X = np.linspace(0, 1, 101)


def test_exponential_is_the_one_e_fold_of_ibms_engine():
    x = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    assert shape_factor("exponential", x) == pytest.approx([0.8495, 0.6501, 0.3775, 0.1653, 0.0612, 0.0], abs=5e-5)


def test_half_life_is_minicpms():
    """MiniCPM halves the rate every 5000 steps: 0.5^(s / 5000)."""
    steps = np.array([2500, 5000, 16_610])
    got = shape_factor("half-life", steps / 20_000, parameter=4.0)
    assert got == pytest.approx([0.70711, 0.5, 0.1], rel=1e-4)


def test_mirror_cosine_mirrors_cosine_in_the_line():
    mean = (shape_factor("mirror-cosine", X) + shape_factor("cosine", X)) / 2
    assert mean == pytest.approx(shape_factor("linear", X), abs=1e-15)


def test_power_of_one_half_and_two_are_the_named_shapes():
    assert shape_factor("1-x^p", X) == pytest.approx(shape_factor("1-sqrt", X), abs=1e-15)
    assert shape_factor("1-x^p", X, 2.0) == pytest.approx(shape_factor("square", X), abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fall_from_the_plateau_to_the_floor(shape):
    factor = shape_factor(shape, X, floor=0.2)
    assert factor[0] == pytest.approx(0.2 + 0.8 * 0.7 if shape == "lowered-linear" else 1.0)
    assert factor[-1] == pytest.approx(0.2 + 0.8 * 2**-10 if shape == "half-life" else 0.2)
    assert (np.diff(factor) < 0).all()


@pytest.mark.parametrize(
    "shape, parameter, message",
    [
        ("linaer", None, "WSD: unknown shape 'linaer'; known: linear, "),
        ("cosine", 2.0, r"'cosine' takes no shape_parameter, 1-x\^p, lowered-linear, half-life do; got 2.0"),
        ("1-x^p", 0.0, "must be positive and finite; got 0.0"),
        ("half-life", float("inf"), "must be positive and finite; got inf"),
        ("lowered-linear", 1.5, r"must be in \(0, 1\]; got 1.5"),
    ],
)
def test_what_is_no_shape_is_refused(shape, parameter, message):
    with pytest.raises(ValueError, match=message):
        check_shape("WSD", shape, parameter)
