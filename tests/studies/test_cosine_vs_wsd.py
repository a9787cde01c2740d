"""Study 01 on made-up runs with known truths: what goes in comes out, and what cannot be told is not."""

import dataclasses
import math

import numpy as np
import pytest
from worlds import FakeRun, live

import etastar as es
from etastar.analysis.board import Board, verdicts
from etastar.analysis.claims import load_claims
from etastar.studies import cosine_vs_wsd as study
from etastar.studies import find_study, resolve_preset
from etastar.studies.designs import COSINE_VS_WSD, VERDICT_SEED
from etastar.studies.measured import beyond_edges, losses

PLAN = COSINE_VS_WSD["cpu"]
BEST = {"cos10": -6.0, "cos0": -6.0, "wsd20": -6.6}


def world(effect, noise=0.002, diverged=(), seed=0, steps=None):
    """Runs of the cpu preset in a world where each arm has its own bowl and an effect on the loss."""
    rng = np.random.default_rng(seed)
    shift, runs = {}, []
    for recipe in study.recipes("cpu"):
        arm, x = study.arm_of(recipe), math.log2(recipe.peak_lr)
        short = recipe.horizon_tokens < PLAN.horizon_tokens
        loss = 3.8 + effect.get(arm, 0.0) + 0.03 * (x - BEST.get(arm, -6.0)) ** 2 + 0.18 * short
        loss += shift.setdefault(recipe.seed, rng.normal(0, 0.02)) + rng.normal(0, noise)
        runs.append(FakeRun(recipe, float("nan") if (arm, x) in diverged else loss))
    return runs


EFFECT = {"cos0": -0.03, "wsd20": 0.0, "cycle_1.25": 0.03, "cycle_2.00": 0.1, "cycle_0.50_hold": 0.05, "cycle_0.75_hold": 0.0}


def verdict_of(measured):
    return live(study, measured).verdict


def test_a_known_world_is_read_back():
    measured = study.measure(world(EFFECT))
    slope = 0.18 / math.log(2)
    assert measured.slope.mean() == pytest.approx(-slope, rel=0.05)
    assert measured.contrasts["cos0 − cos10"].per_seed.mean() == pytest.approx(-0.03, abs=0.004)
    assert measured.contrasts["lr: wsd20 − cos0"].per_seed.mean() == pytest.approx(-0.6, abs=0.1)
    assert measured.bowls["wsd20"].best_log2_lr == pytest.approx(-6.6, abs=0.1)
    told = verdict_of(measured)
    assert told["wsd20_matches_cos10"] == told["cos0_beats_cos10"] == "reproduced"
    assert told["cycle_2.00_worse"] == told["cycle_0.50_hold_worse"] == "reproduced"
    assert told["cycle_0.75_hold_worse"] == "inconclusive"
    assert told["wsd_branch_no_worse_20"] == "untested"
    assert all(c.passed for c in study.controls(measured))


def test_the_other_way_round_differs_at_this_scale():
    told = verdict_of(study.measure(world({"cos0": 0.05, "wsd20": 0.15})))
    assert told["cos0_beats_cos10"] == told["wsd20_matches_cos10"] == "differs at this scale"


def test_changing_one_run_moves_every_number_that_stands_on_it():
    runs = world(EFFECT)
    before = study.measure(runs)
    i = next(i for i, r in enumerate(runs) if study.arm_of(r.recipe) == "cos0")
    runs[i] = dataclasses.replace(runs[i], val_loss=runs[i].val_loss + 0.01)
    after = study.measure(runs)
    assert after.bowls["cos0"].best_loss != before.bowls["cos0"].best_loss
    assert (after.contrasts["cos0 − cos10"].per_seed != before.contrasts["cos0 − cos10"].per_seed).any()
    assert after.bowls["cos10"] == before.bowls["cos10"]
    one, other = (live(study, m).estimate for m in (before, after))
    assert one["cos0_beats_cos10"] != other["cos0_beats_cos10"] and one["wsd_lr_half_of_cos10"] == other["wsd_lr_half_of_cos10"]


def test_an_optimum_at_the_edge_is_extended_and_not_judged():
    shifted = [dataclasses.replace(r, val_loss=r.val_loss - 0.3 * math.log2(r.recipe.peak_lr)) if study.arm_of(r.recipe) == "cos10" else r
               for r in world(EFFECT)]
    more = beyond_edges(shifted, losses(shifted, study.arm_of), study.BOWL_ARMS)
    top = 2.0 ** (PLAN.centre + PLAN.offsets[-1])
    assert {study.arm_of(r) for r in more} == {"cos10"} and len(more) == PLAN.seed_count
    assert all(r.peak_lr == pytest.approx(top * 2**0.75) for r in more)
    measured = study.measure(shifted)
    assert "cos10" in measured.refused and "cos10" not in measured.bowls
    told = live(study, measured)
    assert told.loc["cos0_beats_cos10", "verdict"] == "untested" and "edge" in told.loc["cos0_beats_cos10", "reason"]


def test_a_diverged_cycle_is_not_dropped_silently():
    told = live(study, study.measure(world(EFFECT, diverged={("cycle_2.00", PLAN.centre)})))
    assert told.loc["cycle_2.00_worse", "verdict"] == "untested" and "diverged" in told.loc["cycle_2.00_worse", "reason"]


def test_runs_too_small_to_count_are_not_judged():
    measured = dataclasses.replace(study.measure(world(EFFECT)), steps=64)
    assert set(verdict_of(measured)) == {"untested"} and study.controls(measured) == []
    assert "machinery" in study.interpretation(measured, [])


def test_figures_and_words_come_from_the_measurements():
    measured = study.measure(world(EFFECT))
    board = Board(verdicts(study.judge(measured)), tuple(study.controls(measured)))
    made = study.figures(measured, board)
    assert {"schedules", "bowls", "differences", "verdicts"} == set(made)
    text = study.interpretation(measured, study.judge(measured))
    assert f"{measured.bowls['cos0'].best_loss:.4f}" in text and f"{measured.params:,}" in text


@pytest.mark.parametrize("preset", COSINE_VS_WSD)
def test_every_preset_keeps_the_rules_of_design(preset):
    plan = COSINE_VS_WSD[preset]
    assert plan.warmup_steps <= 0.05 * plan.horizon_steps
    assert all(seed >= VERDICT_SEED for seed in plan.seeds + plan.branch_seeds)
    if preset != "smoke":
        assert plan.horizon_steps // 2 >= 256 and 0.2 * plan.horizon_steps / 2 >= 10 and len(plan.offsets) >= 5


def test_every_claim_has_its_contrast():
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))


def test_arms_are_told_from_their_schedules():
    for recipe in study.recipes("night")[:40]:
        assert study.arm_of(recipe) in (*study.BOWL_ARMS, *study.CYCLES)
    stranger = study.recipes("smoke")[0].replace(schedule=es.LinearToZero(warmup_steps=3))
    with pytest.raises(ValueError, match="is no arm of study"):
        study.arm_of(stranger)


@pytest.mark.parametrize("minutes, seeds, steps", [(12.0, 8, 512), (3.0, 2, 512), (0.75, 2, 128)])
def test_minutes_scale_seeds_first_then_the_horizon(minutes, seeds, steps):
    plan = PLAN.scaled(minutes)
    assert (plan.seed_count, plan.horizon_steps) == (seeds, steps)
    with pytest.raises(ValueError, match="minutes must be positive"):
        PLAN.scaled(0)


def test_names_of_studies_and_presets():
    assert find_study("01") is find_study("cosine_vs_wsd") is find_study("01_cosine_vs_wsd") is study
    with pytest.raises(ValueError, match="unknown study 'nope'; known: all, 01_cosine_vs_wsd"):
        find_study("nope")
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        resolve_preset("huge")
    assert resolve_preset("auto") in ("cpu", "gpu")


def test_the_power_plan():
    table = study.power("cpu").set_index("contrast")
    assert table.loc["cos0 − cos10", "seeds"] == PLAN.seed_count
    told = study.design("cpu").resolve(0.002)
    assert told["seeds"] > PLAN.seed_count and told["minutes"] == pytest.approx(PLAN.minutes * told["seeds"] / PLAN.seed_count)
