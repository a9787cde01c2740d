"""Bowls: closed forms, recovery, refusals at the edge and at the wall of divergence, and cross-fitting."""

import math

import numpy as np
import pytest

import etastar as es
from etastar.analysis.bowl import EdgeOptimum, cross_fitted

X = np.arange(-9.0, -3.0)


def parabola(x, best=-6.3, depth=3.2, bend=0.06):
    return depth + bend / 2 * (x - best) ** 2


def many(seeds=4, best=-6.3, noise=0.0, rng=None, cubic=0.0, x=X):
    rng = rng or np.random.default_rng(0)
    rows = [(2.0**v, parabola(v, best) + cubic * (v - best) ** 3 + 0.05 * s + noise * rng.normal(), s) for s in range(seeds) for v in x]
    return (np.array(c) for c in zip(*rows, strict=True))


def test_a_parabola_is_recovered_exactly():
    bowl = es.fit_bowl(2.0**X, parabola(X))
    assert bowl.best_log2_lr == pytest.approx(-6.3, abs=1e-9)
    assert bowl.best_loss == pytest.approx(3.2) and bowl.curvature == pytest.approx(0.06)
    assert bowl.r2 == pytest.approx(1.0) and bowl.loss_at(2.0**-5) == pytest.approx(parabola(-5.0))


def test_a_skewed_bowl_is_recovered_with_five_rates_and_not_with_four():
    lr, loss, seed = many(cubic=0.006, x=X[:5])
    bowl = es.fit_bowl(lr, loss, seed)
    assert bowl.degree == 3 and bowl.best_log2_lr == pytest.approx(-6.3, abs=1e-9)
    lr, loss, seed = many(cubic=0.006, x=X[1:5])
    bowl = es.fit_bowl(lr, loss, seed)
    assert bowl.degree == 2 and abs(bowl.best_log2_lr + 6.3) > 0.02


def test_seeds_that_only_shift_the_loss_do_not_widen_the_interval():
    lr, loss, seed = many()
    bowl = es.fit_bowl(lr, loss, seed)
    assert bowl.vertices == pytest.approx([-6.3] * 4) and bowl.best_lr_high / bowl.best_lr_low == pytest.approx(1.0, abs=1e-6)


def test_the_interval_over_seeds_is_students():
    x = np.array([-8.0, -7.0, -6.0, -5.0, -4.0])
    best = np.array([-6.2, -6.0, -5.8])
    lr = np.tile(2.0**x, 3)
    loss = np.concatenate([parabola(x, b) for b in best])
    bowl = es.fit_bowl(lr, loss, np.repeat([0, 1, 2], 5))
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert math.log2(bowl.best_lr_high) - bowl.best_log2_lr == pytest.approx(half, rel=1e-4)
    assert bowl.best_log2_lr == pytest.approx(-6.0) and bowl.window_sd == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("sigma", [1e-4, 0.01])
def test_without_seeds_the_interval_is_fiellers(sigma):
    x = np.array([-7.0, -6.0, -5.0, -4.0])  # four rates: a parabola, its best rate in the middle of the grid
    bowl = es.fit_bowl(2.0**x, parabola(x, best=-5.5), sigma=sigma)
    # slope b + 2c·v about the centre: error² = σ² (1 / Σu² + 4v² / Σ(u² − mean u²)²), Σu² = 5, Σ(u² − 1.25)² = 4; 2c = 0.06
    half = 1.95996 * sigma / math.sqrt(5) / math.sqrt(0.06**2 - 1.95996**2 * sigma**2)
    assert math.log2(bowl.best_lr_high) - bowl.best_log2_lr == pytest.approx(half, rel=1e-4)
    assert bowl.best_log2_lr - math.log2(bowl.best_lr_low) == pytest.approx(half, rel=1e-4)


def test_without_seeds_an_interval_ends_where_the_grid_ends():
    x = np.array([-7.0, -6.0, -5.0, -4.0])
    bowl = es.fit_bowl(2.0**x, parabola(x, best=-5.5), sigma=0.1)  # so noisy that no slope is told from zero
    assert bowl.best_lr_low == pytest.approx(2**-7.0) and bowl.best_lr_high == pytest.approx(2**-4.0)


def test_spread_over_windows_widens_the_interval():
    x = np.arange(-9.0, -2.0)
    crooked = parabola(x, best=-6.0) + 0.02 * np.sin(2.1 * x)
    bowl = es.fit_bowl(2.0**x, crooked, sigma=1e-9)
    assert bowl.window_sd > 0.01 and math.log2(bowl.best_lr_high / bowl.best_lr_low) >= 2 * 1.95 * bowl.window_sd


@pytest.mark.parametrize("best, advice", [(-3.6, r"2\^-3\)"), (-9.4, r"2\^-10\)")])
def test_an_edge_optimum_is_refused_with_advice(best, advice):
    with pytest.raises(EdgeOptimum, match=advice):
        es.fit_bowl(2.0**X, parabola(X, best))


def test_diverged_rates_are_a_wall_and_an_optimum_at_it_is_refused():
    loss = parabola(X)
    loss[-1] = np.nan
    assert es.fit_bowl(2.0**X, loss).best_log2_lr == pytest.approx(-6.3)
    falling = parabola(X, best=-3.5)
    falling[-1] = np.nan
    with pytest.raises(EdgeOptimum, match=r"last before runs diverge at 2\^-4"):
        es.fit_bowl(2.0**X, falling)


def test_a_rate_at_which_one_seed_diverged_is_used_for_none():
    lr, loss, seed = many(seeds=3)
    loss[(seed == 1) & (lr == 2.0**-4)] = np.nan
    with_wall = es.fit_bowl(lr, loss, seed)
    assert with_wall.n == 3 * 5 and with_wall.best_log2_lr == pytest.approx(-6.3)


@pytest.mark.parametrize("call, said", [
    (lambda: es.fit_bowl([0.1, 0.2], [1.0, 2.0]), "at least 3 rates"),
    (lambda: es.fit_bowl([0.1, -0.2, 0.3], [1.0, 2.0, 1.0]), "must be positive"),
    (lambda: es.fit_bowl([0.1, 0.2, 0.4, 0.1, 0.2], [2, 1, 2, 2, 1], [0, 0, 0, 1, 1]), "seed 1 lacks lr 0.4"),
    (lambda: es.fit_bowl([0.1, 0.2, 0.4], [2, 1]), "equally long"),
    (lambda: es.fit_bowl([0.1, 0.2, 0.4], [2, 1, 2]), "no scatter to judge"),
    (lambda: es.fit_bowl([0.1, 0.2, 0.4] * 2, [2, 1, 2] * 2, [0, 0, 0, 1, 1, 1], sigma=0.1), "seed or sigma"),
    (lambda: es.fit_bowl(2.0**X, [1.0, np.nan, np.nan, np.nan, np.nan, np.nan]), "at least 3 rates"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_cross_fitting_tunes_a_seed_on_the_others():
    x = np.array([-8.0, -7.0, -6.0, -5.0, -4.0])
    best = {0: -6.4, 1: -6.0, 2: -5.8}
    lr, seed = np.tile(2.0**x, 3), np.repeat([0, 1, 2], 5)
    loss = np.concatenate([parabola(x, b, depth=3 + s) for s, b in best.items()])
    told = cross_fitted(lr, loss, seed)
    for s in best:
        others = np.mean([b for o, b in best.items() if o != s])
        assert math.log2(told[s][0]) == pytest.approx(others, abs=1e-6)
        assert told[s][1] == pytest.approx(parabola(others, best[s], depth=3 + s), abs=1e-9)
    with pytest.raises(ValueError, match="at least two seeds"):
        cross_fitted(lr[:5], loss[:5], seed[:5])
