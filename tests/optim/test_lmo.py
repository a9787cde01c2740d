"""Linear minimization oracles by definition: unit norm, the dual norm attained, and what Newton–Schulz makes of polar factors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from etastar.optim import lmo

SHAPES = [(5, 8), (8, 5), (7, 7), (1, 6), (6, 1)]
NORMS = {  # of a step U (out, in) as stored, and the dual norm of a gradient
    "embedding_rows": (lambda u: np.linalg.norm(u, axis=1).max() / math.sqrt(u.shape[1]),
                       lambda g: math.sqrt(g.shape[1]) * np.linalg.norm(g, axis=1).sum()),
    "head_rows": (lambda u: math.sqrt(u.shape[1]) * np.linalg.norm(u, axis=1).max(),
                  lambda g: np.linalg.norm(g, axis=1).sum() / math.sqrt(g.shape[1])),
    "signs": (lambda u: np.abs(u).sum(1).max(), lambda g: np.abs(g).sum() / g.shape[1]),  # see below for ∞→∞
    "spectral": (lambda u: math.sqrt(u.shape[1] / u.shape[0]) * np.linalg.norm(u, 2),
                 lambda g: math.sqrt(g.shape[0] / g.shape[1]) * np.linalg.svd(g, compute_uv=False).sum()),
}


def gauss(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def exactly_spectral(g):
    """The oracle itself, without Newton–Schulz."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh * math.sqrt(g.shape[0] / g.shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["embedding_rows", "head_rows"])
def test_a_rule_has_unit_norm_and_attains_the_dual_norm(rule, shape):
    g, (norm, dual) = gauss(shape), NORMS[rule]
    u = getattr(lmo, rule)(g)
    assert norm(u.numpy()) == pytest.approx(1.0, rel=1e-6)
    assert float((g * u).sum()) == pytest.approx(dual(g.numpy()), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), columns=st.integers(1, 6), rule=st.sampled_from(["embedding_rows", "head_rows"]))
def test_no_other_matrix_of_unit_norm_lies_further_along_the_gradient(seed, rows, columns, rule):
    g, other = gauss((rows, columns), seed), gauss((rows, columns), seed + 1)
    other = other / NORMS[rule][0](other.numpy())
    assert float((g * other).sum()) <= float((g * getattr(lmo, rule)(g)).sum()) * (1 + 1e-5) + 1e-6


def test_signs_have_unit_norm_from_rms_to_infinity_and_from_infinity_to_infinity():
    for shape in SHAPES:
        u = lmo.signs(gauss(shape)).numpy()
        assert np.abs(u).sum(1).max() == pytest.approx(1.0)  # ∞→∞: the largest row sum
        assert NORMS["head_rows"][0](u) == pytest.approx(1.0)
        assert float((gauss(shape) * torch.from_numpy(u)).sum()) == pytest.approx(NORMS["signs"][1](gauss(shape).numpy()), rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)], ids=str)
def test_newton_schulz_lies_in_its_band_about_the_polar_factor(shape):
    """The published band of five steps: Gaussian matrices end with singular values in 0.68 … 1.14, tiny ones (square) below."""
    g = gauss(shape, 3)
    polar, exact = lmo.newton_schulz(g), exactly_spectral(g) / math.sqrt(shape[0] / shape[1])
    values = torch.linalg.svdvals(polar)
    assert values.max() < 1.21 and values.median() > 0.68
    assert float((polar * exact).sum() / (polar.norm() * exact.norm())) > 0.96  # 2√(.68·1.2) / (.68 + 1.2): Kantorovich for the band
    assert NORMS["spectral"][0](lmo.spectral(g).numpy()) == pytest.approx(values.max().item(), rel=1e-5)


def test_each_singular_value_goes_where_the_quintic_sends_it_however_ill_conditioned():
    """UVᵀ is kept exactly; five steps of x ↦ ax + bx³ + cx⁵ from σ/‖G‖ are what comes out, down to σ/σ_max = 1e-6."""
    generator = np.random.default_rng(5)
    u, v = (np.linalg.qr(generator.standard_normal((n, 12)))[0] for n in (20, 12))
    sigma = np.logspace(0, -6, 12)
    x, (a, b, c) = sigma / np.linalg.norm(sigma), lmo.NEWTON_SCHULZ
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    found = lmo.newton_schulz(torch.from_numpy(u * sigma @ v.T)).numpy()  # float64
    np.testing.assert_allclose(u.T @ found @ v, np.diag(x), atol=1e-9)
    assert x[-1] < 1e-3 < 0.6 < x[4]  # σ under a thousandth of the norm are not raised all the way, those above are


def test_half_precision_is_bit_for_bit_that_of_torchs_muon():
    for seed, shape in enumerate([(33, 64), (64, 33), (16, 16)]):
        g = gauss(shape, seed) * 10.0 ** (seed - 1)
        wanted = _zeropower_via_newtonschulz(g, lmo.NEWTON_SCHULZ, 5, 1e-20)
        assert torch.equal(lmo.newton_schulz(g, dtype=torch.bfloat16), wanted.float())


@pytest.mark.parametrize("rule", ["embedding_rows", "head_rows", "vector", "spectral"])
def test_the_size_of_the_gradient_does_not_matter_and_rows_of_zeros_stay(rule):
    g = gauss((4, 6))
    g[1] = 0.0
    at_one = getattr(lmo, rule)(g)
    for power in (-120, -60, 60, 120):
        torch.testing.assert_close(getattr(lmo, rule)(g * 2.0**power), at_one, rtol=1e-5, atol=1e-6)
    assert rule == "spectral" or not at_one[1].any()
    assert not getattr(lmo, rule)(torch.zeros(2, 3)).any()


def test_any_leading_axes_are_matrices_on_their_own():
    g = gauss((2, 3, 5, 4))
    for rule in (lmo.embedding_rows, lmo.head_rows, lmo.signs, lmo.spectral):
        torch.testing.assert_close(rule(g)[1, 2], rule(g[1, 2]))
