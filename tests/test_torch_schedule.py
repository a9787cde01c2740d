"""Schedules in torch training loops, and against the schedulers of torch and transformers."""

import numpy as np
import pytest
import torch

from etastar.schedules import WSD, Constant, Cosine, InverseSqrt, LinearToZero, MultiStep, Power
from etastar.torch_schedule import to_lambda_lr


def make_optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def applied(optimizer, scheduler, steps):
    """The rate of each group at each of the optimizer's steps: (steps, groups)."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("schedule", [WSD(warmup_steps=5, cooldown_fraction=0.3), Cosine(), Power(cooldown_steps=7)])
@pytest.mark.parametrize("peak", [0.02, 1 / 3, 3e-4])
def test_every_step_has_the_schedules_rate_to_the_bit(schedule, peak):
    optimizer = make_optimizer(peak)
    scheduler = to_lambda_lr(schedule, optimizer, 40, batch_tokens=2**20)
    expected = schedule.lr(40, peak_lr=peak, batch_tokens=2**20)
    rates = applied(optimizer, scheduler, 45)[:, 0]
    assert np.array_equal(rates[:40], expected)
    assert (rates[40:] == expected[-1]).all()


def test_a_peak_given_counts_whatever_the_optimizers_rate():
    optimizer = make_optimizer(1.0, 1.0)
    rates = applied(optimizer, to_lambda_lr(LinearToZero(), optimizer, 4, peak_lr=0.5), 4)
    assert rates == pytest.approx(np.array([[0.4] * 2, [0.3] * 2, [0.2] * 2, [0.1] * 2]))


def test_groups_keep_their_ratio_to_the_peak():
    optimizer = make_optimizer(0.8, 0.2)
    rates = applied(optimizer, to_lambda_lr(LinearToZero(), optimizer, 3, peak_lr=0.8), 3)
    assert rates == pytest.approx(np.array([[0.6, 0.15], [0.4, 0.1], [0.2, 0.05]]))


def test_groups_that_differ_need_a_peak():
    with pytest.raises(ValueError, match=r"different rates \[0.8, 0.2\]; give peak_lr"):
        to_lambda_lr(Constant(), make_optimizer(0.8, 0.2), 3)


def test_a_second_scheduler_replaces_the_first():
    optimizer = make_optimizer(0.5)
    to_lambda_lr(Constant(warmup_steps=2), optimizer, 4)
    rates = applied(optimizer, to_lambda_lr(Constant(warmup_steps=2), optimizer, 4, peak_lr=0.5), 3)
    assert rates[:, 0].tolist() == [0.25, 0.5, 0.5]


def test_state_dict_resumes():
    first, second = make_optimizer(0.3), make_optimizer(0.3)
    schedule = Cosine(warmup_steps=3)
    running, resumed = to_lambda_lr(schedule, first, 10), to_lambda_lr(schedule, second, 10)
    applied(first, running, 4)
    resumed.load_state_dict(running.state_dict())
    second.load_state_dict(first.state_dict())
    assert np.array_equal(applied(second, resumed, 6)[:, 0], schedule.lr(10, peak_lr=0.3, batch_tokens=1)[4:])


# --- transformers warms up from 0 and would reach the floor at step T: ours at s of T is theirs at s + 1 of T + 1 ---

TOTAL, WARMUP = 60, 12
TRANSFORMERS = {
    "constant_schedule_with_warmup": ({}, Constant(warmup_steps=WARMUP)),
    "inverse_sqrt_schedule": ({}, InverseSqrt(warmup_steps=WARMUP)),
    "linear_schedule_with_warmup": ({"num_training_steps": TOTAL + 1}, LinearToZero(warmup_steps=WARMUP)),
    "cosine_schedule_with_warmup": ({"num_training_steps": TOTAL + 1}, Cosine(floor=0, warmup_steps=WARMUP)),
    "cosine_with_min_lr_schedule_with_warmup": (
        {"num_training_steps": TOTAL + 1, "min_lr_rate": 0.1},
        Cosine(warmup_steps=WARMUP),
    ),
}


def theirs(name, **given):
    transformers = pytest.importorskip("transformers")
    optimizer = make_optimizer(0.25)
    scheduler = getattr(transformers, f"get_{name}")(optimizer, num_warmup_steps=WARMUP, **given)
    return applied(optimizer, scheduler, TOTAL + 1)[:, 0]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_schedules_shifted_by_one_step(name):
    given, ours = TRANSFORMERS[name]
    assert ours.lr(TOTAL, peak_lr=0.25, batch_tokens=1) == pytest.approx(theirs(name, **given)[1:], abs=1e-14)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_transformers_wsd_shifted_by_one_step(shape):
    given = {"num_training_steps": TOTAL + 1, "num_decay_steps": 20 + 1, "decay_type": shape}
    ours = WSD(warmup_steps=WARMUP, cooldown_steps=20, shape=shape)
    assert ours.lr(TOTAL, peak_lr=0.25, batch_tokens=1) == pytest.approx(theirs("wsd_schedule", **given)[1:], abs=1e-14)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_transformers_wsd_is_the_olmo_convention_without_a_shift(shape):
    given = {"num_training_steps": TOTAL, "num_decay_steps": 20, "decay_type": shape}
    ours = WSD(warmup_steps=WARMUP, cooldown_steps=20, shape=shape, convention="olmo")
    rates = ours.lr(TOTAL, peak_lr=0.25, batch_tokens=1)
    assert rates == pytest.approx(theirs("wsd_schedule", **given)[:TOTAL], abs=1e-14)


# --- torch's own ---

TORCH = {
    "cosine": (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=41, eta_min=0.025), Cosine(), 1),
    "linear": (lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=41, power=1.0), LinearToZero(), 1),
    "steps": (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [32, 36], gamma=10**-0.5), MultiStep(), 0),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_schedulers(name):
    make, ours, shift = TORCH[name]
    optimizer = make_optimizer(0.25)
    rates = applied(optimizer, make(optimizer), 41)[:, 0]
    assert ours.lr(40, peak_lr=0.25, batch_tokens=1) == pytest.approx(rates[shift : shift + 40], rel=1e-11)
