"""The trial of the designed schedule on made-up runs: the planted best arm wins, peaks are others' choice, designs are what is trained."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from worlds import FakeRun

from etastar import Cosine, InverseSqrt, LinearToZero, Power, Table
from etastar.analysis.designed_schedule import design_schedule
from etastar.analysis.schedule_laws import MultiPowerLaw
from etastar.studies import designed as study

PLAN = study.PRESETS["smoke"]
TRUTH = MultiPowerLaw(2.8, 0.5, 0.5, 20.0, 2.0, 0.6, 0.6)
PEAKS = (2**-7.75, 2**-7.0, 2**-6.25)


@dataclasses.dataclass
class CurvedRun(FakeRun):
    """A run of a known law: `val_loss` at its end and its curve before; half B lies 0.01 above half A; "swa 2" gains 0.05."""

    noise: float = 0.0

    @property
    def curve(self):
        steps = np.arange(1, self.recipe.total_steps + 1)
        return pd.DataFrame({"step": steps, "lr": self.recipe.lr(), "val_loss": TRUTH.predict(self.recipe.lr(), steps - 1) + self.noise})

    def halves(self):
        return {"val_loss": self.val_loss, "val_loss_a": self.val_loss - 0.005, "val_loss_b": self.val_loss + 0.005}

    def lacks_averages(self, windows):
        return 0

    def averages(self, windows):
        rows = [("final", None, None, 0.0, 0.0), ("ema", 6144, None, 0.04, 0.0), ("swa", None, 2, 0.05, 0.0), ("swa", None, 4, 0.0, 0.9)]
        frame = pd.DataFrame(rows, columns=["read_out", "horizon_tokens", "windows", "gain", "gain_b"])
        loss = self.val_loss - frame.gain
        return frame.assign(val_loss_a=loss - 0.005, val_loss_b=loss + 0.005 - frame.gain_b).astype(
            {"horizon_tokens": "Int64", "windows": "Int64"})


def world(extra=lambda recipe: 0.0):
    """What stands in for training: last losses of the law, a shift a seed, and what `extra` adds to a recipe's."""
    def run(recipes, store=None, observe=None, **options):
        return [CurvedRun(r, float(TRUTH.predict(r.lr(), [r.total_steps - 1])[0]) + 0.01 * (r.seed % 5) + extra(r)) for r in recipes]
    return run


def trial_of(monkeypatch, extra=lambda recipe: 0.0):
    monkeypatch.setattr("etastar.engine.execute.run", world(extra))
    return study.trial("smoke")


@pytest.fixture(scope="module")
def found():
    """A trial in the world of the law."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trial_of(monkeypatch)


def frame_of(losses: dict) -> pd.DataFrame:
    """arm → rows of losses (seed, peak)."""
    return pd.DataFrame([{"arm": arm, "peak_lr": lr, "seed": 7000 + s, "loss": loss, "predicted": 3.0 + (arm != study.DESIGNED) * 0.02}
                         for arm, table in losses.items() for s, row in enumerate(table) for lr, loss in zip(PEAKS, row, strict=True)])


def test_the_planted_best_arm_wins_by_what_was_planted():
    noise = np.random.default_rng(0).normal(0, 0.001, (len(study.ARMS), 4, 3))
    bowl = np.array([0.03, 0.0, 0.02])
    for best in study.ARMS:
        frame = frame_of({arm: 3.8 + bowl + noise[n] - (0.05 if arm == best else 0.0) + 0.1 * np.arange(4)[:, None]
                          for n, arm in enumerate(study.ARMS)})
        table = study.summarize(frame).set_index("arm")
        assert table.loss.idxmin() == best and set(table.best_peak_lr) == {2**-7.0} and not table.edge.any()
        others = table.drop(index=study.REFERENCE)
        planted = np.where(others.index == best, -0.05, 0.05 * (best == study.REFERENCE))
        assert others.difference.to_numpy() == pytest.approx(planted, abs=0.003)
        assert (others.low < others.difference).all() and (others.difference < others.high).all()
        assert others.verdict[best] == "lower" if best != study.REFERENCE else set(others.verdict) == {"higher"}
        assert table.predicted_difference[study.DESIGNED] == pytest.approx(-0.02) and math.isnan(table.difference[study.REFERENCE])


def test_the_interval_is_students_over_paired_seeds():
    reference = [[9.0, 3.0 + 0.1 * s, 9.0] for s in range(4)]
    arm = [[9.0, 3.0 + 0.1 * s + d, 9.0] for s, d in enumerate((0.01, 0.02, 0.03, 0.04))]
    row = study.summarize(frame_of({study.DESIGNED: arm, study.REFERENCE: reference})).set_index("arm").loc[study.DESIGNED]
    half = 3.182446 * np.std([0.01, 0.02, 0.03, 0.04], ddof=1) / 2  # t of 3 degrees of freedom
    assert (row.difference, row.low, row.high) == pytest.approx((0.025, 0.025 - half, 0.025 + half), abs=1e-6)


def test_a_seed_is_judged_at_the_peak_that_the_other_seeds_chose():
    lucky = [[2.0, 3.0, 4.0], [5.0, 3.0, 4.0], [5.0, 3.0, 4.0]]  # the first seed's own choice would be its first peak
    table = study.summarize(frame_of({study.DESIGNED: lucky, study.REFERENCE: [[4.0, 3.0, 4.0]] * 3})).set_index("arm")
    assert table.loss[study.DESIGNED] == pytest.approx(3.0) and table.difference[study.DESIGNED] == pytest.approx(0.0)


def test_at_equal_peaks_arms_meet_the_reference_seed_by_seed():
    frame = frame_of({study.DESIGNED: [[3.0, 3.1, 3.2], [4.0, 4.1, 4.2]], study.REFERENCE: [[3.1, 3.1, 3.1], [4.1, 4.1, 4.1]]})
    frame = frame[~((frame.arm == study.REFERENCE) & (frame.peak_lr == PEAKS[2]))].sample(frac=1, random_state=0)
    at = study.at_equal_peaks(frame).set_index("peak_lr").difference
    assert dict(at) == pytest.approx({PEAKS[0]: -0.1, PEAKS[1]: 0.0})
    assert study.at_equal_peaks(frame).predicted_difference.to_numpy() == pytest.approx([-0.02, -0.02])


def test_an_arm_that_never_was_trained_to_the_end_is_refused():
    table = [[3.0, 3.0, 3.0], [math.nan] * 3]
    with pytest.raises(ValueError, match=r"^designed: some seed is missing or diverged at every peak"):
        study.summarize(frame_of({study.DESIGNED: table, study.REFERENCE: [[3.0] * 3] * 2}))


def test_in_a_world_of_the_law_the_design_wins_as_predicted(found):
    table = found.table.set_index("arm")
    assert table.loss[study.DESIGNED] < min(table.loss[study.REFERENCE], table.loss[study.LINE])
    row = table.loc[study.DESIGNED]
    assert row.difference < 0 and row.difference == pytest.approx(row.predicted_difference, abs=0.003)
    assert math.isnan(table.predicted[study.AVERAGED]) and (table.seeds == PLAN.seed_count).all()
    assert set(found.curves.curve) == {"cosine to 10 %", study.REFERENCE} and len(found.curves) == 2 * PLAN.horizon_steps


def test_the_recipe_trains_the_rates_of_the_design(found):
    assert set(PLAN.grid) <= set(found.designs)
    for lr, design in found.designs.items():
        recipe = study.recipe(PLAN, study.DESIGNED, lr, 7000, found.designs)
        assert isinstance(recipe.schedule, Table) and recipe.lr() == pytest.approx(design.rates, abs=0.51e-5 * lr)
        astray = {lr: dataclasses.replace(design, rates=design.rates * (1 - 1e-10))}
        assert study.recipe(PLAN, study.DESIGNED, lr, 7000, astray).run_id == recipe.run_id
        assert design.rates.max() == pytest.approx(lr) and len(design.rates) == PLAN.horizon_steps
        rows = found.frame[(found.frame.arm == study.DESIGNED) & (found.frame.peak_lr == lr)]
        assert rows.predicted.to_numpy() == pytest.approx([design.predicted_loss] * PLAN.seed_count, abs=1e-4)
        on_half_b = TRUTH.predict(design.rates, [PLAN.horizon_steps - 1])[0] + 0.01 * (rows.seed % 5) + 0.005
        assert rows.loss.to_numpy() == pytest.approx(on_half_b.to_numpy(), abs=1e-4)
    assert found.design is found.designs[found.table.set_index("arm").best_peak_lr[study.DESIGNED]]


def test_an_arm_best_at_its_edge_gets_a_peak_beyond_and_the_design_is_made_anew(monkeypatch):
    found = trial_of(monkeypatch, lambda r: 0.5 * (math.log2(r.peak_lr) + 8.5) ** 2 if isinstance(r.schedule, Table) else 0.0)
    beyond = min(found.designs)
    assert math.log2(beyond) == pytest.approx(math.log2(PLAN.grid[0]) - 1.5)  # two steps below the first of the grid
    assert found.designs[beyond].rates.max() == pytest.approx(beyond)
    anew = design_schedule(found.designs[beyond].law, PLAN.horizon_steps, beyond, PLAN.warmup_steps)
    assert (found.designs[beyond].rates == anew.rates).all()
    assert set(found.frame[found.frame.arm == study.DESIGNED].peak_lr) == set(found.designs)


def test_the_average_is_chosen_on_half_a_and_reported_on_half_b(found):
    rows = found.frame[found.frame.arm == study.AVERAGED]
    assert set(rows.average) == {"swa 2"} and found.frame.average.isna().sum() == len(found.frame) - len(rows)
    rates = [study.recipe(PLAN, study.AVERAGED, lr, 7000, {}).lr() for lr in rows.peak_lr]
    law = [TRUTH.predict(lr, [PLAN.horizon_steps - 1])[0] for lr in rates]
    assert rows.loss.to_numpy() == pytest.approx(np.array(law) + 0.01 * (rows.seed % 5) - 0.05 + 0.005)


@pytest.mark.parametrize("preset", study.PRESETS)
def test_every_arm_has_its_schedule_its_peaks_and_fresh_seeds(preset):
    plan = study.PRESETS[preset]
    assert max(study.PILOTS) < 1000 and plan.seeds[:2] == [7000, 7001] and len(set(plan.seeds)) == plan.seed_count
    for arm in (study.REFERENCE, study.LINE, study.POWER, study.AVERAGED):
        assert len(study.peaks(plan, arm)) == 3
        assert study.arm_of(study.recipe(plan, arm, study.peaks(plan, arm)[0], 7000, {})) == arm
    assert isinstance(study.recipe(plan, study.LINE, 0.01, 7000, {}).schedule, LinearToZero)
    assert isinstance(study.recipe(plan, study.AVERAGED, 0.01, 7000, {}).schedule, InverseSqrt)
    assert plan.horizon_steps % study.EVALUATIONS == 0 and plan.horizon_tokens % plan.windows == 0


def test_a_power_schedule_leaves_its_cap_after_a_fifth_and_comes_down_to_the_grid():
    plan = study.PRESETS["cpu"]
    assert plan.seeds == [7000, 7001, 7002, 7003] and plan.middle == 2**-7
    for lr, cap in zip(plan.grid, study.peaks(plan, study.POWER), strict=True):
        recipe = study.recipe(plan, study.POWER, cap, 7000, {})
        rates, power = recipe.lr(), recipe.schedule
        assert isinstance(power, Power) and power.b == -0.51
        assert power.rate_at(plan.horizon_tokens, batch_tokens=plan.batch_tokens, eta_max=cap) == pytest.approx(lr, rel=1e-9)
        assert (rates[plan.warmup_steps:] == cap).sum() == 102 - plan.warmup_steps and (rates[102:] < cap).all()  # of 512 steps
        assert rates[-1] < 0.02 * lr and rates[409] == pytest.approx(lr * (410 / 512) ** -0.51)


def test_the_first_part_of_a_curve_is_not_fitted():
    schedules = {"a": Cosine(floor=0.1, warmup_steps=5), "b": study.recipe(PLAN, study.REFERENCE, 0.01, 1, {}).schedule}
    step = np.arange(1, 101)
    rates = {name: s.lr(100, peak_lr=0.01, batch_tokens=1) for name, s in schedules.items()}
    curves = pd.concat([pd.DataFrame({"curve": name, "step": step, "lr": lr, "val_loss": TRUTH.predict(lr, step - 1)})
                        for name, lr in rates.items()], ignore_index=True)
    law = study.fit(curves)
    assert law.predict(rates["b"], [99])[0] == pytest.approx(TRUTH.predict(rates["b"], [99])[0], abs=1e-3)
    assert study.fit(curves.assign(val_loss=curves.val_loss + (curves.step <= 9))) == law
    assert study.fit(curves.assign(val_loss=curves.val_loss + (curves.step == 10))) != law


def test_what_cannot_be_tried_is_refused_before_training(monkeypatch):
    with pytest.raises(ValueError, match="no preset 'paper'; known: smoke, cpu, night"):
        study.trial("paper")
    with pytest.raises(ValueError, match="diverged at a peak rate of 0.011"):
        trial_of(monkeypatch, lambda r: math.nan if r.seed == 2 else 0.0)


@pytest.mark.slow
def test_a_smoke_trial_is_trained_and_trains_nothing_again(tmp_path):
    found = study.trial("smoke", store=tmp_path, backend="inline", progress=False)
    assert set(found.table.arm) == set(study.ARMS) and np.isfinite(found.table.loss).all()
    again = study.trial("smoke", store=tmp_path, backend="inline", progress=False)
    pd.testing.assert_frame_equal(found.table, again.table)
