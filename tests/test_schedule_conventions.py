"""Other codebases' schedules: their own formulas, evaluated step by step, against the conventions offered by name."""

import math

import numpy as np
import pytest
import torch

from etastar.schedules import WSD, Cosine

STEPS = [0, 1, 9, 10, 79, 80, 81, 99]
# T = 100, warm-up 10, linear decay 20: what each codebase's function returns at STEPS, and over all steps
PRINTED = {
    "etastar": ([0.1, 0.2, 1, 1, 1, 20 / 21, 19 / 21, 1 / 21], 85.5),
    "epfml": ([0.01, 0.109, 0.901, 1, 1, 1, 0.95, 0.05], 85.055),
    "torchtitan": ([0.1, 0.2, 1, 1, 1, 1, 0.95, 0.05], 86.0),
    "nanochat": ([0.1, 0.2, 1, 1, 1, 1, 0.95, 0.05], 86.0),
    "olmo": ([0, 0.1, 0.9, 1, 1, 1, 0.95, 0.05], 85.0),
    "fabian-sp": ([0, 0.1, 0.9, 1, 1, 0.95, 0.90, 0], 84.0),
    "lingua": ([0, 0.1, 0.9, 1, 1, 1, 0.69, 0.105], 80.103),
}
PRECISION = dict.fromkeys(PRINTED, 1e-9) | {"lingua": 5e-4}


@pytest.mark.parametrize("convention", PRINTED)
def test_printed_tables_and_sums(convention):
    floor = 0.1 if convention == "lingua" else 0.0
    schedule = WSD(warmup_steps=10, cooldown_steps=20, convention=convention, floor=floor)
    rates = schedule.lr(100, peak_lr=1.0, batch_tokens=1)
    factors, total = PRINTED[convention]
    assert rates[STEPS] == pytest.approx(factors, abs=PRECISION[convention])
    assert rates.sum() == pytest.approx(total, abs=5e-4)


def torchtitan(step, total, warmup, decay, shape, floor):
    """A virtual last step: decay progress is counted from one step later, over the same number of steps."""
    if step < warmup:
        return (step + 1) / warmup
    if step < total + 1 - decay:
        return 1.0
    progress = (step + 1 - (total + 1 - decay)) / decay
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * {"linear": 1 - progress, "1-sqrt": 1 - math.sqrt(progress), "cosine": cosine}[shape]


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
@pytest.mark.parametrize("warmup, decay, floor", [(7, 13, 0.1), (0, 50, 0.0), (20, 30, 0.5)])
def test_torchtitan_step_by_step(shape, warmup, decay, floor):
    schedule = WSD(warmup_steps=warmup, cooldown_steps=decay, shape=shape, floor=floor, convention="torchtitan")
    theirs = [torchtitan(step, 50, warmup, decay, shape, floor) for step in range(50)]
    assert schedule.lr(50, peak_lr=1.0, batch_tokens=1) == pytest.approx(theirs, abs=1e-14)


def test_fabian_sp_keeps_one_step_at_the_peak_where_nothing_is_left():
    rates = WSD(warmup_steps=4, cooldown_steps=6, convention="fabian-sp").lr(10, peak_lr=1.0, batch_tokens=1)
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-9)


def test_lingua_decays_to_its_floor_as_the_inverse_of_a_line():
    rates = WSD(cooldown_steps=4, convention="lingua", floor=0.2).lr(5, peak_lr=1.0, batch_tokens=1)
    assert rates == pytest.approx([1, 1, 1 / 2, 1 / 3, 1 / 4])


@pytest.mark.parametrize("total, warmup", [(100, 10), (50, 25), (37, 2), (20, 0)])
def test_epfml_cosine_is_torchs_one_cycle(total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=total, pct_start=warmup / total, div_factor=100, final_div_factor=0.1,
        cycle_momentum=False,
    )
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            theirs.step()
    ours = Cosine(convention="epfml", warmup_steps=warmup).lr(total, peak_lr=2e-3, batch_tokens=1)
    assert ours == pytest.approx(rates, rel=1e-12)
    assert ours[-1] == pytest.approx(2e-4)
    assert ours[0] == pytest.approx(2e-5) or warmup == 0


def test_epfml_cosine_of_warm_up_only_ends_at_the_peak():
    rates = Cosine(convention="epfml", warmup_steps=5).lr(5, peak_lr=1.0, batch_tokens=1)
    assert rates[-1] == 1.0 and np.isfinite(rates).all()
