"""The quadratic's answers by hand, by simulated descent and in the limits; and a control that broken machinery does not pass."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.special import gamma, zeta

from etastar.analysis.bowl import fit_bowl
from etastar.analysis.known_truth import SPINE, QuadraticTask, one_mode_best_rates, simulated_sweep, spine_recovers
from etastar.analysis.power_law import fit_power_law
from etastar.schedules import WSD, Constant, Cosine, LinearToZero

ONE = QuadraticTask(modes=1, initial_excess=2.0, noise_tokens=2048.0, floor=1.0)  # λ = 1, δ² = 4, and s = 2 at 1024 tokens a step


def test_two_steps_of_one_mode_by_hand():
    # m = 4 → ½²·4 + ½²·2 = 1.5 → ¾²·1.5 + ¼²·2 = 0.96875
    assert ONE.expected_curve([0.5, 0.25], 1024).tolist() == pytest.approx([1 + 1.5 / 2, 1 + 0.96875 / 2])
    assert ONE.expected_loss([0.5, 0.25], 1024) == pytest.approx(1 + 0.96875 / 2)
    assert ONE.expected_loss([0.5], 2048) == pytest.approx(1 + (0.25 * 4 + 0.25 * 1) / 2)  # twice the batch, half the noise


def test_steps_at_one_rate_taken_at_once_are_those_taken_one_by_one():
    task = QuadraticTask(modes=64)
    for schedule in (Constant(warmup_steps=5), WSD(warmup_steps=3, cooldown_fraction=0.3), Cosine(floor=0.1)):
        rates = np.array([schedule.lr(90, peak_lr=peak, batch_tokens=1024) for peak in (0.02, 0.1, 0.5)])
        square, last = np.broadcast_to(task.squares, (3, 64)), []
        for rate in rates.T[..., None]:
            square = (1 - rate * task.curvatures) ** 2 * square + rate**2 * 16 * task.curvatures
            last.append(3 + square @ task.curvatures / 2)
        assert task.expected_curve(rates, 1024) == pytest.approx(np.array(last).T, rel=1e-12)
        assert task.expected_loss(rates, 1024) == pytest.approx(last[-1], rel=1e-12)


def test_the_expected_loss_is_the_mean_of_descents_with_drawn_noise():
    task, rng = QuadraticTask(modes=8, noise_tokens=4096.0), np.random.default_rng(5)
    rates = LinearToZero().lr(60, peak_lr=0.4, batch_tokens=1024)
    place = np.broadcast_to(np.sqrt(task.squares), (20_000, 8)).copy()
    for rate in rates:
        place -= rate * (task.curvatures * place + rng.normal(size=place.shape) * np.sqrt(4 * task.curvatures))
    losses = task.floor + place**2 @ task.curvatures / 2
    assert losses.mean() == pytest.approx(float(task.expected_loss(rates, 1024)), abs=4 * losses.std() / math.sqrt(len(losses)))


def test_without_noise_the_excess_is_the_gamma_integral_of_the_spectrum():
    for a, p in ((2.0, 1.0), (3.0, 0.5)):
        task, rate, steps = QuadraticTask(spectrum_exponent=a, bias_exponent=p, noise_tokens=0.0, modes=20_000), 0.01, 20_000
        told = task.initial_excess / zeta(1 + a * p) * gamma(p) / a * (2 * rate * steps) ** -p
        assert task.expected_loss(np.full(steps, rate), 1024) - task.floor == pytest.approx(told, rel=0.02)


def test_best_constant_rates_have_the_exponents_of_the_theory():
    for task in (QuadraticTask(), QuadraticTask(spectrum_exponent=2.5, bias_exponent=0.7, noise_tokens=40_000.0, modes=256)):
        assert task.horizon_exponent() == pytest.approx(-task.bias_exponent / (1 + task.bias_exponent))
        short, long, wide = (task.best_lr(Constant(), h * 2**20, b) for h, b in ((1, 1024), (16, 1024), (16, 2048)))
        assert math.log(long / short, 16) == pytest.approx(task.horizon_exponent(), abs=0.02)
        assert math.log2(wide / long) == pytest.approx(1, abs=0.02)
        excess = [float(task.expected_loss(np.full(h, lr), 1024)) - task.floor for h, lr in ((1024, short), (16_384, long))]
        assert math.log(excess[1] / excess[0], 16) == pytest.approx(task.loss_exponent(), abs=0.02)


@pytest.mark.parametrize("spectrum, power, kappa", [(3.0, 1.0, 1 / 2), (3.0, 2.0, 2 / 3), (1.5, 2.0, 1 / 3)])
def test_decays_have_the_exponents_of_the_theory(spectrum, power, kappa):
    task = QuadraticTask(spectrum_exponent=spectrum, noise_tokens=2.0**22, modes=256)
    assert (task.noise_exponent(power), task.horizon_exponent(power)) == pytest.approx((kappa, -(1 - kappa) / (2 - kappa)))
    factors, best = (1 - (np.arange(512) + 0.5) / 512) ** power, []
    for steps in (2**18, 2**21):
        found = optimize.minimize_scalar(lambda x, n=steps: float(task.expected_loss(np.repeat(2.0**x * factors, n // 512), 1024)),
                                         bounds=(-16, -6), method="bounded", options={"xatol": 1e-3})
        best.append((found.x, found.fun - task.floor))
    assert (best[1][0] - best[0][0]) / 3 == pytest.approx(task.horizon_exponent(power), abs=0.06)
    assert math.log(best[1][1] / best[0][1], 8) == pytest.approx(task.loss_exponent(power), abs=0.08)
    assert (best[1][0] - best[0][0]) / 3 > task.horizon_exponent() + 0.05  # told from the constant rate's


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1.5), min_size=6, max_size=6), st.floats(0.1, 8))
def test_no_schedule_of_one_mode_beats_its_best(rates, noise):
    task = dataclasses.replace(ONE, noise_tokens=1024 * noise)
    best = one_mode_best_rates(6, curvature=1.0, square=4.0, noise=noise)
    assert task.expected_loss(best, 1024) == pytest.approx(1 + 1 / (1 / 4 + 6 / noise) / 2)
    assert task.expected_loss(best, 1024) <= task.expected_loss(np.array(rates), 1024) + 1e-12
    assert best[3] == pytest.approx(1 / (4 + noise / 4))


def test_a_sweep_has_a_row_a_run_and_its_seeds_shift_all_of_theirs():
    task = QuadraticTask(modes=64)
    made = simulated_sweep(task, horizons_tokens=[2**19, 2**20], batches_tokens=[1024, 2048], seeds=[7, 8], seed_sd=0.5, run_sd=0.0,
                           rng=np.random.default_rng(0), offsets=(-1, 0, 1, 8))
    assert len(made) == 2 * 2 * 4 * 2 and made.loss.isna().sum() == 8  # eight octaves up every run diverges
    wide = made.dropna().pivot(index=["horizon_tokens", "batch_tokens", "peak_lr"], columns="seed", values="loss")
    assert np.ptp(wide[7] - wide[8]) < 1e-12 and abs(wide[7] - wide[8]).iloc[0] > 0.01
    middle = made[(made.horizon_tokens == 2**20) & (made.batch_tokens == 2048)].peak_lr.unique()[1]
    assert abs(math.log2(middle / task.best_lr(Constant(), 2**20, 2048))) <= 0.25


@pytest.mark.parametrize("call, said", [
    (lambda: QuadraticTask(spectrum_exponent=1.0), "a finite trace"), (lambda: QuadraticTask(bias_exponent=0.0), "bias_exponent=0.0"),
    (lambda: ONE.expected_loss([0.1, -0.1], 1024), "not negative"), (lambda: ONE.best_lr(Constant(), 1000, 1024), "take 1024"),
    (lambda: dataclasses.replace(ONE, noise_tokens=0.0).best_lr(Constant(), 2048, 1024), "not within"),
    (lambda: spine_recovers(0, draws=3), "at least 20 draws"),
])
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# -- the control -------------------------------------------------------------------------------------------------------


def narrow(*args, **kwargs):
    """Intervals three times too narrow."""
    law = fit_power_law(*args, **kwargs)
    ends = {name: tuple(e + (end - e) / 3 for e, end in zip(law.exponents, getattr(law, name), strict=True))
            for name in ("exponents_low", "exponents_high")}
    return dataclasses.replace(law, **ends)


def shifted(by, which):
    """One exponent off by `by`, its interval with it."""
    def fit(*args, **kwargs):
        law = fit_power_law(*args, **kwargs)
        moved = {name: tuple(v + by * (i == which) for i, v in enumerate(getattr(law, name)))
                 for name in ("exponents", "exponents_low", "exponents_high")}
        return dataclasses.replace(law, **moved)

    return fit


def best_on_the_grid(lr, loss, seed):
    """The mistake that bowls are there against: each seed's best rate of the grid, as if it were the vertex."""
    fitted = fit_bowl(lr, loss, seed)
    rates, losses = np.asarray(lr), np.asarray(loss)
    grid = [math.log2(rates[np.asarray(seed) == s][losses[np.asarray(seed) == s].argmin()]) for s in fitted.seeds]
    return dataclasses.replace(fitted, vertices=tuple(grid))


def all_reproduced(claim, estimate, **_):
    return dataclasses.make_dataclass("Told", ["verdict"])("reproduced")


def test_the_kits_own_machinery_recovers_the_truth():
    control = spine_recovers(seed=11)
    assert control.passed and control.name == SPINE and "horizon_tokens: -0.50" in control.detail, control.detail


def test_it_recovers_another_truth_too():
    task = QuadraticTask(bias_exponent=0.47, noise_tokens=100_000.0, initial_excess=3.0)
    control = spine_recovers(seed=12, task=task, draws=20)
    assert control.passed and "for -0.32" in control.detail, control.detail


@pytest.mark.parametrize("broken", [{"fit": narrow}, {"fit": shifted(0.2, 0)}, {"fit": shifted(-0.2, 1)}, {"judge_one": all_reproduced},
                                    {"bowl": best_on_the_grid}])
def test_broken_machinery_is_caught(broken):
    assert spine_recovers(seed=13, draws=24, **broken).passed is False


def test_a_sweep_that_is_refused_fails_the_control():
    def refuse(lr, loss, seed):
        raise ValueError("no bowl today")

    control = spine_recovers(seed=14, draws=20, bowl=refuse)
    assert control.passed is False and control.detail.endswith("no bowl today")
