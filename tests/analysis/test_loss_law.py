"""The loss law: the published refit of the digitised runs, recovery of known truths, gradients, closed forms, refusals."""

import itertools
import math

import numpy as np
import pytest

import etastar as es
from etastar.analysis.loss_law import _problem, fit_loss_law, huber_objective, loss_law
from etastar.analysis.units import UnitWarning
from etastar.archives import NotFetched

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
FEW_STARTS = np.array([[0.0, a, x, b, y] for a, x, b, y in itertools.product((0, 20), (0.5, 1.5), (0, 20), (0.5, 1.5))])


def runs(noise=0.0, count=80, seed=0):
    rng = np.random.default_rng(seed)
    params, tokens = 10 ** rng.uniform(7.5, 10, count), 10 ** rng.uniform(8.5, 11.5, count)
    return params, tokens, loss_law(**TRUTH).predict(params, tokens) * np.exp(noise * rng.normal(size=count))


def test_an_exact_law_is_recovered():
    law = fit_loss_law(*runs(), starts=FEW_STARTS)
    for name, value in TRUTH.items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-3), name
    assert law.objective < 1e-12 and law.n == 80 and law.r2 == pytest.approx(1) and math.isnan(law.E_low)


def test_under_noise_the_truth_lies_within_the_bootstraps_interval():
    laws = [fit_loss_law(*runs(0.004, seed=s), starts=FEW_STARTS[:2], bootstrap=60) for s in (0, 1, 2, 0)]
    inside = [[getattr(law, f"{name}_low") <= value <= getattr(law, f"{name}_high") for name, value in TRUTH.items()] for law in laws[:3]]
    assert np.mean(inside) > 0.7
    assert 0.002 < laws[0].draws["beta"].std() < 0.05 and list(laws[0].draws) == ["E", "A", "alpha", "B", "beta"]
    assert laws[0].draws.equals(laws[3].draws)


def test_a_tenth_of_wild_points_does_not_move_the_fit():
    params, tokens, loss = runs(0.001)
    loss[::10] *= 1.3
    law = fit_loss_law(params, tokens, loss, starts=FEW_STARTS)
    assert law.E == pytest.approx(1.8, abs=0.05) and law.beta == pytest.approx(0.37, abs=0.03)


def test_the_stack_goes_down_to_where_bfgs_ends_also_where_points_are_wild():
    params, tokens, loss = runs(0.01)
    loss[::8] *= 1.2
    problem = _problem(params, tokens, loss, 1e-3)
    best, least = min((problem.polish(row) for row in problem.to_centred(FEW_STARTS)), key=lambda fit: fit[1])
    near = best + 0.1 * np.random.default_rng(0).normal(size=(4, 5))
    assert problem.descend(near, np.ones((1, 80)), 150)[1] == pytest.approx([least] * 4, rel=1e-4)


@pytest.mark.parametrize("name, letter, power", [("params", "A", "alpha"), ("tokens", "B", "beta")])
def test_one_variable_laws_have_a_floor_and_one_power(name, letter, power):
    x = np.geomspace(1e8, 1e11, 12)
    law = fit_loss_law(**{"params": None, "tokens": None, name: x}, loss=1.9 + 350 * x**-0.31)
    assert (law.E, getattr(law, letter), getattr(law, power)) == pytest.approx((1.9, 350, 0.31), rel=1e-3)
    assert law.predict(**{name: 1e12}) == pytest.approx(1.9 + 350 * 1e12**-0.31, rel=1e-4)
    other = {"params": "tokens", "tokens": "params"}[name]
    with pytest.raises(ValueError, match=f"this law is in {name}; got {other}"):
        law.predict(**{other: 1e9})


def test_the_gradient_is_that_of_the_objective():
    problem = _problem(*runs(0.01), 1e-3)
    rng = np.random.default_rng(1)
    for _ in range(5):
        at = np.array([0.5, 0.2, 0.3, 0.1, 0.4]) + 0.2 * rng.normal(size=5)
        value, slope = problem.gradient(at)
        ends = [[problem.gradient(at + s * 1e-6 * e)[0] for s in (1, -1)] for e in np.eye(5)]
        assert slope == pytest.approx(np.array([(up - down) / 2e-6 for up, down in ends]), rel=1e-4)
        residual = np.log(loss_law(**dict(zip(TRUTH, _natural(problem, at), strict=True))).predict(*runs()[:2])) - problem.log_loss
        inside = np.abs(residual) < 1e-3
        assert value == pytest.approx(np.where(inside, residual**2 / 2, 1e-3 * (np.abs(residual) - 5e-4)).sum())


def _natural(problem, theta):
    e, a, alpha, b, beta = problem.from_centred(theta[None])[0]
    return math.exp(e), math.exp(a), alpha, math.exp(b), beta


def test_predictions_and_the_split_of_compute_by_closed_forms():
    # huggingface/datablations prints this law; alpha = beta, so params and tokens grow alike
    law = loss_law(E=1.8691, A=520.8, alpha=0.3526596, B=1487.7, beta=0.3526596)
    assert law.predict(1e9, 2e10) == pytest.approx(1.8691 + 520.8 * 1e9**-0.3526596 + 1487.7 * 2e10**-0.3526596)
    assert law.params_exponent == 0.5
    uneven = loss_law(**TRUTH)
    for compute in (1e19, 1e22):
        params, tokens = uneven.optimal_split(compute)
        assert 6 * params * tokens == pytest.approx(compute)
        near = [uneven.predict(params * f, tokens / f) for f in (0.99, 1.0, 1.01)]
        assert near[1] < near[0] and near[1] < near[2] and abs(near[0] - near[2]) < 1e-5
    (small, _), (large, _) = uneven.optimal_split(1e19), uneven.optimal_split(1e22)
    assert math.log10(large / small) / 3 == pytest.approx(0.37 / 0.72)


@pytest.mark.parametrize("call, said", [
    (lambda p, d, y: fit_loss_law(p, d, -y), "loss must be positive and finite"),
    (lambda p, d, y: fit_loss_law(p, d[:-1], y), "params: 80, tokens: 79, loss: 80"),
    (lambda p, d, y: fit_loss_law(p[:4], d[:4], y[:4]), "5 coefficients need as many points; got 4"),
    (lambda p, d, y: fit_loss_law(np.full(80, 1e9), d, y), "at least 3 different values of params"),
    (lambda p, d, y: fit_loss_law(None, None, y), "give params, tokens or both"),
    (lambda p, d, y: fit_loss_law(p, d, y, starts=[[0, 1, 2]]), "starts needs 5 columns, ln E, ln A, alpha, ln B, beta; got 3"),
    (lambda p, d, y: fit_loss_law(p, d, y, delta=0), "delta must be positive"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(*runs())


def test_params_in_billions_warn():
    params, tokens, loss = runs()
    with pytest.warns(UnitWarning, match="probably in millions or billions") as caught:
        fit_loss_law(params / 1e9, tokens, loss, starts=FEW_STARTS[:1])
    assert caught[0].filename == __file__


# -- the digitised Chinchilla runs, refitted by arXiv 2404.10102 -------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    try:
        return es.archive("chinchilla")
    except (NotFetched, ValueError) as error:
        pytest.skip(str(error))


def of(frame):
    return frame["params"], frame["tokens"], frame["loss"]


@pytest.mark.archive
@pytest.mark.parametrize("start", [[1, 25, 2, 25, 2], [-1, 0, 0, 0, 0], [1, 25, 0, 25, 0], [0.5267, 6.0, 0.339, 6.0, 0.285]])
def test_the_published_refit_is_reached_from_poor_starts_and_from_where_others_stall(published, start):
    law = fit_loss_law(*of(published[~published["outlier"]]), starts=[start])
    assert law.n == 240 and law.objective == pytest.approx(0.00101827, abs=5e-9)
    assert (law.E, law.alpha, law.beta) == pytest.approx((1.8172, 0.3473, 0.3672), abs=1e-4)
    assert (law.A, law.B) == pytest.approx((477.84, 2143.86), rel=1e-3)


@pytest.mark.archive
@pytest.mark.slow
def test_the_default_starts_reach_the_published_refit(published):
    law = fit_loss_law(*of(published[~published["outlier"]]))
    assert law.objective == pytest.approx(0.00101827, abs=5e-9) and law.params_exponent == pytest.approx(0.514, abs=1e-3)


@pytest.mark.archive
def test_left_out_points_decide_the_token_exponent(published):
    whole, less_one = (fit_loss_law(*of(published.iloc[n:]), starts=FEW_STARTS) for n in (0, 1))
    assert (whole.E, whole.beta, whole.params_exponent) == pytest.approx((1.891, 0.453, 0.565), abs=1e-3)
    assert (less_one.E, less_one.beta) == pytest.approx((1.855, 0.412), abs=1e-3)


@pytest.mark.archive
def test_rounded_coefficients_score_far_worse_than_the_fit(published):
    kept = of(published[~published["outlier"]])
    rounded = loss_law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
    unrounded = loss_law(E=1.6934, A=406.4, alpha=0.3392, B=410.7, beta=0.2849)
    assert huber_objective(rounded, *kept) == pytest.approx(0.00412, abs=5e-6)
    assert huber_objective(unrounded, *kept) == pytest.approx(0.00123, abs=6e-6)


@pytest.mark.archive
@pytest.mark.slow
def test_the_bootstraps_spread_is_the_published_one(published):
    law = fit_loss_law(*of(published[~published["outlier"]]), starts=FEW_STARTS, bootstrap=1000)
    sd = law.draws.std()
    # bootstrap sds have an error of 2 to 3 % at a thousand resamples
    assert (sd["A"], sd["E"], sd["alpha"], sd["beta"]) == pytest.approx((123, 0.0255, 0.0152, 0.0205), rel=0.1)
    assert (law.E_low, law.E_high) == pytest.approx((1.770, 1.872), abs=0.01)
