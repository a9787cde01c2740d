"""Study 03 on made-up runs with known truths: spans are chosen on half A, losses come from half B, and arms are told apart."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from worlds import FakeRun, live

import etastar as es
from etastar.analysis.board import Board, verdicts
from etastar.analysis.claims import load_claims
from etastar.studies import averaging as study
from etastar.studies import cooldown
from etastar.studies.designs import COOLDOWN

PLAN = COOLDOWN["cpu"]
BEST = {"constant": -7.5, "cos10": -6.4, "linear 20 %": -7.0}
GAIN = {("swa", 1): 0.02, ("swa", 2): 0.06, ("swa", 4): 0.08, ("swa", 8): 0.05, ("lawa", 1): 0.0, ("lawa", 2): 0.05, ("lawa", 4): 0.07,
        ("lawa", 8): 0.04}
EMA = (0.03, 0.06, 0.05)


@dataclasses.dataclass
class ObservedRun(FakeRun):
    """A run with averages of known worth: `gain` of the read-outs below its loss; half B lies 0.01 above half A."""

    observed: es.Observe = es.Observe()
    gain: dict = dataclasses.field(default_factory=dict)
    evaluations: tuple = ()

    def halves(self):
        return {"val_loss": self.val_loss, "val_loss_a": self.val_loss - 0.005, "val_loss_b": self.val_loss + 0.005}

    def averages(self, windows):
        tokens, every = self.recipe.horizon_tokens, PLAN.window_tokens
        rows = [{"read_out": "final", "horizon_tokens": None, "windows": None, "from_tokens": tokens, "gain": 0.0}]
        rows += [{"read_out": "ema", "horizon_tokens": h, "windows": None, "from_tokens": 768, "gain": g}
                 for h, g in zip(self.observed.ema_horizon_tokens, self.gain["ema"], strict=True)]
        rows += [{"read_out": kind, "horizon_tokens": None, "windows": k, "from_tokens": tokens - k * every + 768,
                  "gain": self.gain[kind, k]} for kind in ("swa", "lawa") for k in windows]
        frame = pd.DataFrame(rows).assign(to_tokens=tokens)
        loss = self.val_loss - frame.gain
        return frame.assign(val_loss=loss, val_loss_a=loss - 0.005, val_loss_b=loss + 0.005).astype(
            {"horizon_tokens": "Int64", "windows": "Int64"})

    @property
    def curve(self):
        tokens = np.arange(1, 9) * PLAN.evaluation_tokens
        return pd.DataFrame({"tokens": tokens, "val_loss": self.evaluations})


SF = {"schedule-free 0.9/0.95": 0.06, "schedule-free 0.9/0.99": 0.05, "schedule-free 0.95/0.95": 0.05, "schedule-free 0.95/0.99": 0.01,
      "schedule-free 0.95/0.99, no warm-up": 0.04}


def world(noise=0.001, seed=0, effect=None, gain=None, slope=0.2):
    rng, shift, runs = np.random.default_rng(seed), {}, []
    effect = {"constant": 0.1, "cos10": 0.0, "linear 20 %": -0.01} | SF | (effect or {})
    gains = {"constant": GAIN | {"ema": EMA}, "cos10": {k: 0.015 for k in GAIN} | {"ema": (0.01,) * 3},
             "linear 20 %": {k: -0.01 for k in GAIN} | {"ema": (-0.02,) * 3}} | (gain or {})
    observed = set(cooldown.recipes_of(PLAN, cooldown.observed_cells(PLAN)))
    averages = es.Observe(average_every_tokens=PLAN.window_tokens, ema_horizon_tokens=(12288, 24576, 49152))
    for recipe in study.recipes("cpu"):
        arm, x = study.arm_of(recipe), math.log2(recipe.peak_lr)
        loss = 3.8 + effect[arm] + (0.03 * (x - BEST[arm]) ** 2 if arm in BEST else 0.0)
        loss -= slope * math.log(recipe.horizon_tokens / PLAN.horizon_tokens)
        loss += shift.setdefault(recipe.seed, rng.normal(0, 0.02)) + rng.normal(0, noise)
        wobble = rng.choice([-1, 1]) * (0.02 if arm == "constant" else 0.002) * np.cos(np.pi * np.arange(8)) * rng.uniform(0.9, 1.1)
        end = 0.01 if arm == "schedule-free 0.9/0.95" else -0.5 / 6
        evaluations = tuple(loss + wobble + np.r_[np.linspace(0.5, 0, 7), end])
        observe = averages if recipe in observed else es.Observe()
        if arm.startswith("schedule-free") or (arm == "constant" and recipe.peak_lr == PLAN.middle):
            observe = dataclasses.replace(observe, val_every_tokens=PLAN.evaluation_tokens)
        runs.append(ObservedRun(recipe, loss, observe, gains.get(arm, {}), evaluations))
    return runs


def read(runs, windows):
    return pd.concat([r.averages(windows).assign(run_id=r.run_id) for r in runs], ignore_index=True)


def measured_of(runs):
    return study.measure(runs, read=read)


def test_a_known_world_is_read_back():
    measured = measured_of(world())
    chosen = measured.tables["chosen"].query("arm == 'constant'")
    assert set(chosen[chosen.read_out == "swa"].span) == set(chosen[chosen.read_out == "lawa"].span) == {0.25}  # 4 windows of 16
    assert set(chosen[chosen.read_out == "ema"].span) == {1 / 16}
    c = {name: contrast.per_seed.mean() for name, contrast in measured.contrasts.items()}
    off = 0.03 * 0.5**2  # the trunk's own best rate is half an octave below the cooldown's
    assert c["swa − linear 20 %"] == pytest.approx(0.03 + off, abs=0.003)
    assert c["swa − cos10"] == pytest.approx(0.02 + off - 0.03 * 0.15**2, abs=0.003)
    assert c["ema − swa"] == pytest.approx(0.02) and c["lawa − swa"] == pytest.approx(0.01)
    assert c["cos10 swa − cos10"] == pytest.approx(-0.015) and c["linear 20 % averaged − linear 20 %"] == pytest.approx(0.01)
    assert c["linear 20 % − schedule-free"] == pytest.approx(-0.02, abs=0.003)
    assert c["schedule-free 0.9/0.95 − schedule-free 0.95/0.99"] == pytest.approx(0.05, abs=0.003)
    assert c["schedule-free: warm-up − none"] == pytest.approx(-0.03, abs=0.003)
    assert c["schedule-free: β1 0.95 − 0.9"] == pytest.approx(-0.025, abs=0.003)
    assert c["schedule-free: β2 0.99 − 0.95"] == pytest.approx(-0.025, abs=0.003)
    told = live(study, measured).verdict
    for claim in ("swa_short_of_cooldown", "swa_short_of_cos10", "schedule_free_short_of_cooldown", "cosine_averaged_gains",
                  "averaging_after_cooldown_hurts", "ema_worse_than_swa", "schedule_free_betas_matter", "schedule_free_wants_warmup",
                  "schedule_free_is_steadier"):
        assert told[claim] == "reproduced", claim
    assert told["lawa_beats_swa"] == "differs at this scale"
    assert all(control.passed for control in study.controls(measured))


def test_the_share_recovered_is_of_the_cooldown_of_the_same_trunk():
    measured = measured_of(world(noise=0.0))
    x = PLAN.centre
    drop = 0.11 + 0.03 * ((x + 7.5) ** 2 - (x + 7.0) ** 2)
    assert measured.contrasts["share recovered"].per_seed == pytest.approx([0.08 / drop] * len(PLAN.all_seeds), rel=1e-6)


def test_spans_are_chosen_on_half_a_and_reported_on_half_b():
    runs = world(noise=0.0)
    trunk = next(r for r in runs if study.arm_of(r.recipe) == "constant")
    plain = trunk.averages

    class Turned(ObservedRun):
        def averages(self, windows):
            found = super().averages(windows)
            better = (found.read_out == "swa") & (found.windows == 1)
            return found.assign(val_loss_b=found.val_loss_b - 0.5 * better)  # half B alone thinks one window is best

    turned = [Turned(**vars(r)) if study.arm_of(r.recipe) == "constant" else r for r in runs]
    assert plain((1,)) is not None
    before, after = measured_of(runs), measured_of(turned)
    assert (before.tables["chosen"].span == after.tables["chosen"].span).all()
    assert after.contrasts["swa − cos10"].per_seed == pytest.approx(before.contrasts["swa − cos10"].per_seed)
    better = study.choose_spans(study.read_outs(turned, read).assign(val_loss_a=lambda f: f.val_loss_b))
    assert (better.query("arm == 'constant' and read_out == 'swa'").span == 1 / 16).all()


def test_every_loss_is_that_of_half_b():
    measured = measured_of(runs := world())
    by_id = {r.run_id: r for r in runs}
    for row in measured.frame[measured.frame.run_id.isin(by_id)].itertuples():
        assert row.loss == by_id[row.run_id].val_loss + 0.005


def test_the_best_betas_are_chosen_on_other_seeds():
    loss = pd.DataFrame({"a": [1.0, 1.0, 1.0], "b": [0.0, 2.0, 2.0]}, index=[7, 8, 9])
    assert study.chosen_on_others(loss).tolist() == [1.0, 1.0, 1.0]
    loss = pd.DataFrame({"a": [1.0, 1.0, 1.0], "b": [0.5, 0.5, float("nan")]}, index=[7, 8, 9])
    assert study.chosen_on_others(loss).tolist()[:2] == [1.0, 1.0] and math.isnan(study.chosen_on_others(loss)[9])


def test_scatter_is_about_a_straight_line():
    wide = pd.DataFrame([[9.0, 4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 0.0, 0.0, 1.0]], columns=[1, 2, 3, 4, 5])
    assert study.scatter(wide).tolist() == pytest.approx([0.0, 0.5], abs=1e-12)


@pytest.mark.parametrize("preset", COOLDOWN)
def test_every_preset_has_what_its_claims_need(preset):
    plan, recipes = COOLDOWN[preset], study.recipes(preset)
    arms = {study.arm_of(r) for r in recipes}
    assert set(SF) <= arms and {"constant", "cos10", "linear 20 %"} <= arms
    assert set(cooldown.recipes_of(plan, cooldown.observed_cells(plan))) <= set(recipes) & set(cooldown.recipes(preset))
    assert max(study.COUNTS) <= plan.windows and plan.horizon_tokens % plan.windows == 0


def test_runs_too_small_to_count_are_not_judged():
    measured = dataclasses.replace(measured_of(world()), steps=64)
    assert set(live(study, measured).verdict) == {"untested"} and study.controls(measured) == []
    assert "machinery" in study.interpretation(measured, [])


def test_figures_and_words_come_from_the_measurements():
    measured = measured_of(world())
    findings = [f for f in study.judge(measured) if f.evidence == "live"]
    made = study.figures(measured, Board(verdicts(findings), tuple(study.controls(measured))))
    assert {"averages", "evaluation_curves", "differences", "verdicts"} == set(made)
    text = study.interpretation(measured, findings)
    assert "swa over 25.0% of the run" in text and f"{measured.params:,}" in text


def test_every_claim_has_its_contrast():
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))


def test_the_power_plan():
    table = study.power("cpu").set_index("contrast")
    assert table.loc["swa − cos10", "seeds"] == len(PLAN.all_seeds) and table.detectable_nats.gt(0).all()
