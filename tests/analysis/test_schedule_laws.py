"""Laws of the loss curve: by hand on short schedules, recovery of known parameters, the published scores."""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.schedule_laws import (
    PUBLISHED_MULTI_POWER,
    AnnealingLaw,
    MultiPowerLaw,
    annealing_areas,
    convex_bound,
    fit_annealing_law,
    fit_multi_power_law,
    score,
)
from etastar.archives import curves, multi_power_law
from etastar.schedules import WSD, Cosine

WARMUP = 50


def schedule(kind, steps=1600, peak=3e-3):
    x = np.clip((np.arange(steps) - WARMUP) / (steps - WARMUP), 0, 1)
    late = np.clip((x - 0.8) / 0.2, 0, 1)
    factor = {"constant": np.ones(steps), "cosine": 0.55 + 0.45 * np.cos(np.pi * x), "wsd": 1 - 0.9 * late,
              "two": np.where(x < 0.5, 1, 0.3)}[kind]
    return peak * np.minimum(factor, (np.arange(steps) + 1) / WARMUP)


def test_the_multi_power_law_by_hand():
    law = MultiPowerLaw(2.0, 0.5, 0.5, 10.0, 2.0, 0.6, 0.7)
    lr = np.array([0.1, 0.2, 0.2, 0.05])

    def gone(k, until):
        return 1 - (1 + 2.0 * lr[k] ** -0.7 * lr[k : until + 1].sum()) ** -0.6

    at_2 = 2 + 0.5 * 0.5**-0.5 + 10 * 0.1 * gone(1, 2)
    at_3 = 2 + 0.5 * 0.55**-0.5 + 10 * (0.1 * gone(1, 3) - 0.15 * gone(3, 3))
    assert law.predict(lr, [2, 3]) == pytest.approx([at_2, at_3]) and law.predict(lr, [0])[0] == pytest.approx(2 + 0.5 * 0.1**-0.5)


def test_many_steps_are_predicted_as_one_by_one():
    law, lr = PUBLISHED_MULTI_POWER["25M"], schedule("cosine", 4000)
    steps = np.arange(60, 4000, 3)
    assert law.predict(lr, steps)[::50] == pytest.approx(np.concatenate([law.predict(lr, [s]) for s in steps[::50]]))


def test_annealing_areas_are_the_papers_double_sum():
    lr, memory = np.array([0.1, 0.2, 0.2, 0.15, 0.05, 0.05]), 0.9
    area, annealing = annealing_areas(lr, memory, warmup_steps=1)
    flat = np.array([0.2, 0.2, 0.2, 0.15, 0.05, 0.05])
    for s in range(6):
        double = sum((flat[k - 1] - flat[k]) * memory ** (i - k) for i in range(1, s + 1) for k in range(1, i + 1))
        assert (area[s], annealing[s]) == pytest.approx((flat[: s + 1].sum(), double))


def test_known_annealing_parameters_are_recovered_and_judged_on_another_schedule():
    truth = AnnealingLaw(2.6, 0.43, 0.55, 0.41, 0.99, WARMUP)
    steps = np.arange(60, 1600, 20)
    fitted = fit_annealing_law([(schedule(k), steps, truth.predict(schedule(k), steps)) for k in ("constant", "cosine")], 0.99, WARMUP)
    assert [fitted.L0, fitted.A, fitted.alpha, fitted.C] == pytest.approx([truth.L0, truth.A, truth.alpha, truth.C], rel=1e-3)
    assert fitted.predict(schedule("wsd"), steps) == pytest.approx(truth.predict(schedule("wsd"), steps), abs=1e-4)


def test_a_multi_power_law_is_recovered_well_enough_to_predict_schedules_it_never_saw():
    truth = MultiPowerLaw(2.8, 0.5, 0.5, 60.0, 2.0, 0.6, 0.6)
    steps = np.arange(60, 1600, 10)
    seen = [(schedule(k), steps, truth.predict(schedule(k), steps)) for k in ("constant", "cosine", "two")]
    fitted = fit_multi_power_law(seen, block=1, every=1)
    assert score(fitted.predict(schedule("wsd"), steps), truth.predict(schedule("wsd"), steps))["mae"] < 3e-4
    for lr, at, loss in seen:
        assert score(fitted.predict(lr, at), loss)["mae"] < 1e-4


def test_losses_that_have_no_logarithm_are_refused():
    lr = schedule("cosine")
    for fit in (fit_multi_power_law, fit_annealing_law):
        with pytest.raises(ValueError, match="positive and finite"):
            fit([(lr, np.arange(60, 66), np.array([3, 2.9, np.nan, 2.8, 2.7, 2.6]))])


@pytest.mark.archive
@pytest.mark.parametrize("size", ["25M", "100M"])
def test_a_converged_fit_is_closer_on_the_curves_it_saw_and_no_closer_on_the_others(published, size):
    curves_ = published.get(size, {})
    if set(multi_power_law.FITTED_ON + multi_power_law.JUDGED_ON) - set(curves_):
        pytest.skip(f"published curves of {size} are missing here")
    own, theirs = fit_multi_power_law([curves_[n] for n in multi_power_law.FITTED_ON]), PUBLISHED_MULTI_POWER[size]
    assert mean_score(own, curves_, multi_power_law.FITTED_ON)["mae"] < 0.65 * mean_score(theirs, curves_, multi_power_law.FITTED_ON)["mae"]
    judged = mean_score(own, curves_, multi_power_law.JUDGED_ON)
    assert mean_score(theirs, curves_, multi_power_law.JUDGED_ON)["mae"] < judged["mae"] < 0.0055 and judged["r2"] > 0.996


def test_scores_by_hand():
    found = score([1.0, 2.1, 3.0], [1.0, 2.0, 3.0])
    assert found == pytest.approx({"r2": 1 - 0.01 / 2, "mae": 0.1 / 3, "rmse": np.sqrt(0.01 / 3), "mean_relative": 0.05 / 3,
                                   "worst_relative": 0.05})


def test_the_convex_bound_by_hand_and_without_a_last_step_at_zero():
    bound = convex_bound([1.0, 0.5], distance=2.0, gradient=3.0)
    assert bound.distance_term == pytest.approx(4 / 3)
    assert bound.noise_term == pytest.approx(9 * 1.25 / 3 + 0.5 * (1.0 / 0.5) * (9 * 1.25 / 1.5))
    assert bound.best == pytest.approx(bound.distance_term / bound.best_lr + bound.noise_term * bound.best_lr)
    assert convex_bound([1.0, 0.5, 0.0]) == convex_bound([1.0, 0.5])


def test_best_rates_of_the_convex_bound_are_those_of_the_papers_code():
    # arXiv 2501.18965, repository fabian-sp/lr-scheduling: 50,000 steps without warm-up, rates over that of a 20 % cooldown
    def bound(schedule):
        return convex_bound(schedule.lr(50_000, peak_lr=1, batch_tokens=1))

    reference = bound(WSD(cooldown_fraction=0.2, convention="fabian-sp"))
    for rate, least, other in ((0.552, 1.63, WSD(cooldown_fraction=0, convention="fabian-sp")),
                               (0.897, 1.057, WSD(cooldown_fraction=0.1, convention="fabian-sp")),
                               (1.181, 0.953, WSD(cooldown_fraction=0.4, convention="fabian-sp")),
                               (1.055, 0.984, WSD(cooldown_fraction=0.2, shape="1-sqrt", convention="fabian-sp")),
                               (1.551, 1.055, Cosine(floor=0.1)), (1.887, 0.954, Cosine(floor=0))):
        found = bound(other)
        assert found.best_lr / reference.best_lr == pytest.approx(rate, abs=6e-4), other
        assert found.best / reference.best == pytest.approx(least, abs=6e-4), other


@pytest.fixture(scope="module")
def published(skip_if_not_fetched):
    with skip_if_not_fetched():
        long = curves("multi_power_law")
    return {size: {name: (multi_power_law.learning_rates(name), c["step"].to_numpy(), c["loss"].to_numpy())
                   for name, c in of_size.groupby("curve")} for size, of_size in long.groupby("size")}


def mean_score(law, curves_, names):
    if missing := set(names) - set(curves_):
        pytest.skip(f"published curves missing here: {sorted(missing)}")
    return pd.DataFrame([score(law.predict(lr, steps), loss) for lr, steps, loss in (curves_[n] for n in names)]).mean()


@pytest.mark.archive
@pytest.mark.parametrize("size, scores", [("25M", (0.9988, 0.00376, 0.00465, 0.00110, 0.00409)),
                                          ("100M", (0.9983, 0.00435, 0.00592, 0.00142, 0.00583)),
                                          ("400M", (0.9978, 0.00484, 0.00730, 0.00168, 0.00995))])
def test_the_readmes_scores_come_back_from_its_parameters(published, size, scores):
    if size not in published:
        pytest.skip(f"no published curves of {size} here")
    found = mean_score(PUBLISHED_MULTI_POWER[size], published[size], multi_power_law.JUDGED_ON)
    assert found.iloc[0] == pytest.approx(scores[0], abs=6e-5) and found.iloc[1:].tolist() == pytest.approx(scores[1:], abs=6e-6)


@pytest.mark.archive
@pytest.mark.parametrize("size, r2, mae", [("25M", 0.9933, 0.0073), ("100M", 0.9959, 0.0062)])
def test_the_annealing_law_is_worse_on_schedules_it_never_saw(published, size, r2, mae):
    seen = [published[size][n] for n in multi_power_law.FITTED_ON if n in published.get(size, {})]
    if len(seen) < 3:
        pytest.skip(f"published curves of {size} are missing here")
    law = fit_annealing_law(seen, 0.999, multi_power_law.WARMUP_STEPS)
    found = mean_score(law, published[size], multi_power_law.JUDGED_ON)
    assert found["r2"] == pytest.approx(r2, abs=1e-4) and found["mae"] == pytest.approx(mae, abs=1e-4)
    assert found["mae"] > mean_score(PUBLISHED_MULTI_POWER[size], published[size], multi_power_law.JUDGED_ON)["mae"]
