"""Study 02 on made-up runs with known truths: arms are told apart, what goes in comes out, and what cannot be told is not."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from worlds import FakeRun, live

import etastar as es
from etastar.analysis.board import Board, verdicts
from etastar.analysis.claims import load_claims
from etastar.studies import cooldown as study
from etastar.studies.designs import COOLDOWN, COOLDOWN_SEED
from etastar.studies.measured import beyond_edges, losses
from etastar.studies.results import design_table

PLAN = COOLDOWN["cpu"]
BEST = {"cos10": -6.4, "linear 10 %": -7.0, "linear 20 %": -7.0, "linear 40 %": -7.0}


def world(effect, noise=0.001, best=None, diverged=(), seed=0, slope=0.2):
    """Runs of the cpu preset: a bowl an arm, an effect an arm (a number or a function of the octaves from the middle rate)."""
    rng, shift, runs, best = np.random.default_rng(seed), {}, [], BEST | (best or {})
    for recipe in study.recipes("cpu"):
        arm, x = study.arm_of(recipe), math.log2(recipe.peak_lr)
        told = effect.get((arm, recipe.horizon_tokens), effect.get(arm, 0.0))
        loss = 3.8 + (told(x - PLAN.centre) if callable(told) else told) + 0.03 * (x - best.get(arm, -7.0)) ** 2
        loss -= slope * math.log(recipe.horizon_tokens / PLAN.horizon_tokens)
        loss += shift.setdefault(recipe.seed, rng.normal(0, 0.02)) + rng.normal(0, noise)
        runs.append(FakeRun(recipe, float("nan") if arm in diverged else loss))
    return runs


def falling(before, after, shares):
    return pd.DataFrame({"share": shares, "val_loss": [before.val_loss + 0.1 * max(0, -s) - 0.1 * min(s, 1) for s in shares]})


def measured_of(runs, between=falling):
    return study.measure(runs, between=between)


@pytest.mark.parametrize("preset", COOLDOWN)
def test_arms_are_told_from_their_recipes(preset):
    plan = COOLDOWN[preset]
    for c in study.cells(plan):
        assert study.arm_of(study.arm_recipe(plan, c.arm, c.rates[-1], c.horizon_tokens, 1)) == c.arm
    with pytest.raises(ValueError, match="is no arm of study 02_cooldown"):
        study.arm_of(plan.recipe(es.LinearToZero(warmup_steps=3), 0.01, plan.horizon_tokens, 1))


@pytest.mark.parametrize("preset", COOLDOWN)
def test_every_preset_keeps_the_rules_of_design(preset):
    plan, recipes = COOLDOWN[preset], study.recipes(preset)
    assert len(set(recipes)) == len(recipes) and plan.horizon_steps % (2 * plan.windows) == 0
    assert plan.warmup_steps <= 0.05 * plan.horizon_steps and all(seed >= COOLDOWN_SEED for seed in plan.all_seeds)
    if preset != "smoke":
        assert plan.horizon_steps // 2 >= 256 and len(plan.offsets) >= 5 and {10, 20, 40} <= set(plan.tuned)
        shortest = min(np.count_nonzero(np.diff(r.lr()[plan.warmup_steps - 1:])) for r in recipes
                       if study.arm_of(r) not in ("constant",))
        assert shortest >= 10


def test_cooldowns_of_a_trunk_share_all_that_came_before():
    recipes = [study.arm_recipe(PLAN, arm, PLAN.middle, PLAN.horizon_tokens, 1) for arm in ("constant", "linear 20 %", "square 20 %")]
    at = study._before(PLAN.horizon_tokens, PLAN.batch_tokens) // PLAN.batch_tokens
    rates = [r.lr() for r in recipes]
    assert at == 410 and all((r[:at] == rates[0][:at]).all() for r in rates) and rates[1][at] != rates[2][at]
    assert len({r.trunk_id for r in recipes}) == 1


def test_continuations_leave_a_finished_run():
    tokens = PLAN.horizon_tokens * 5 // 4
    rewarm, again, trunk = (study.arm_recipe(PLAN, arm, PLAN.middle, tokens, 1) for arm in ("rewarm 0.3", "wsd-s", "linear 20 %"))
    steps = PLAN.horizon_steps
    for made, arm in ((rewarm, "cos10"), (again, "linear 20 %")):
        finished = study.arm_recipe(PLAN, arm, PLAN.middle, PLAN.horizon_tokens, 1)
        assert (made.lr()[:steps] == finished.lr()).all() and made.trunk_id == finished.trunk_id
    assert rewarm.lr()[steps:].max() == pytest.approx(0.3 * PLAN.middle) and again.lr()[steps:].max() == pytest.approx(PLAN.middle)
    assert (trunk.lr()[PLAN.warmup_steps:steps] == PLAN.middle).all() and trunk.lr()[steps] < PLAN.middle
    assert all(r.lr()[-1] < 0.02 * PLAN.middle for r in (rewarm, again, trunk))


def test_beta2_rises_where_the_cooldown_begins():
    recipe = study.arm_recipe(PLAN, "linear 20 %, β2 0.999", PLAN.middle, PLAN.horizon_tokens, 1)
    falls = int(np.argmax(np.diff(recipe.lr()) < 0)) + 1
    assert (recipe.beta2()[:falls] == 0.95).all() and (recipe.beta2()[falls:] == 0.999).all()


EFFECT = {
    "linear 10 %": 0.0, "linear 20 %": -0.03, "linear 40 %": -0.03, "1-sqrt 20 %": lambda o: -0.04 - 0.01 * o, "linear 5 %": 0.03,
    ("linear 5 %", PLAN.horizon_tokens // 2): 0.06, "square 20 %": 0.0, "exponential 2.5 %": 0.05, "1-sqrt 50 %": 0.02,
    "linear 20 %, β2 0.999": -0.05, "wsd-s": -0.03, "rewarm 0.1": 0.05, "rewarm 0.3": 0.02, "rewarm 1": 0.04,
}


def test_a_known_world_is_read_back():
    measured = measured_of(world(EFFECT))
    c = {name: contrast.per_seed.mean() for name, contrast in measured.contrasts.items()}
    assert measured.slope.mean() == pytest.approx(-0.2, rel=0.05)
    assert c["linear 20 % − cos10"] == pytest.approx(-0.03 - 0.03 * 0.15**2, abs=0.002)
    assert c["linear 40 % − linear 20 %"] == pytest.approx(0, abs=0.003)
    assert c["lr: linear 40 % − linear 10 %"] == pytest.approx(0.0, abs=0.1)
    assert c["1-sqrt 20 % − linear 20 %"] == pytest.approx(-0.01, abs=0.002)
    assert c["1-sqrt 20 % − linear 20 %, highest − lowest rate"] == pytest.approx(-0.03, abs=0.004)
    assert c["linear 5 % − 20 %, whole − half horizon"] == pytest.approx(-0.03, abs=0.003)
    assert c["1-sqrt 20 % − other shapes"] == pytest.approx(-0.04, abs=0.003)
    assert c["continued trunk − re-warmed cosine"] == pytest.approx(-0.05 - 0.03 * 0.75**2, abs=0.003)  # re-warmed at cosine's own rate
    assert c["rise between the weights"] == 0
    told = live(study, measured).verdict
    for claim in ("cooldown_20_passes_cos10", "plateau_after_20", "sqrt_beats_linear", "cooldown_10_no_worse", "sqrt_gain_grows_with_lr",
                  "short_cooldown_gains_with_horizon", "sqrt_below_other_shapes", "minicpm_2.5_falls_short", "beta2_raised_helps",
                  "cosine_shape_beats_sqrt_50", "between_falls_smoothly", "wsd_beats_rewarmed_cosine", "wsds_no_worse_than_wsd",
                  "lr_transfers_over_lengths"):
        assert told[claim] == "reproduced", claim
    assert told["five_percent_on_the_long_run"] == "untested"
    assert all(control.passed for control in study.controls(measured))


def test_the_other_way_round_is_said_so():
    turned = {"linear 20 %": 0.05, "linear 40 %": 0.0, "1-sqrt 20 %": 0.09, "lowered-linear 20 %": 0.1}
    told = live(study, measured_of(world(turned, best={"linear 40 %": -6.0}))).verdict
    for claim in ("cooldown_20_passes_cos10", "plateau_after_20", "sqrt_beats_linear", "lowered_linear_beats_linear",
                  "lr_transfers_over_lengths"):
        assert told[claim] == "differs at this scale", claim


def test_how_far_to_rewarm_is_chosen_on_other_seeds():
    runs = world({"rewarm 0.1": 0.0, "rewarm 0.3": 0.001, "rewarm 1": 0.3}, noise=0.0)
    lucky = next(r for r in runs if study.arm_of(r.recipe) == "rewarm 1" and r.recipe.seed == PLAN.some_seeds[0])
    lucky.val_loss -= 10.0  # its own seed may not choose it, the others may: 10 less in a mean of three
    before = measured_of(world({"rewarm 0.1": 0.0, "rewarm 0.3": 0.001, "rewarm 1": 0.3}, noise=0.0))
    after = measured_of(runs)
    name = "continued trunk − re-warmed cosine"
    assert after.contrasts[name].per_seed[0] == before.contrasts[name].per_seed[0]
    assert (after.contrasts[name].per_seed[1:] < before.contrasts[name].per_seed[1:]).all()


def test_an_edge_is_looked_for_among_the_seeds_of_the_bowl():
    def more(runs):
        return beyond_edges(runs, losses(runs, study.arm_of), ("linear 20 %",))

    runs = world({"linear 20 %": lambda octaves: -0.1 * octaves})  # falls to the right: the upper edge is best
    made = more(runs)
    assert {r.seed for r in made} == set(PLAN.seeds) and all(r.peak_lr == pytest.approx(PLAN.grid[-1] * 2**0.75) for r in made)
    for r in runs:
        if r.recipe.seed not in PLAN.seeds:
            r.val_loss -= 5.0  # seeds at the middle rate alone, however lucky, do not make it the best
    assert more(runs) == made


def test_a_barrier_between_the_weights_is_seen():
    def barrier(before, after, shares):
        return falling(before, after, shares).assign(val_loss=lambda f: f.val_loss + 0.2 * (f.share == 0.5))

    measured = measured_of(world(EFFECT), barrier)
    assert measured.contrasts["rise between the weights"].per_seed == pytest.approx(0.175, abs=1e-6)
    assert live(study, measured).verdict["between_falls_smoothly"] == "differs at this scale"


def test_a_diverged_run_is_not_dropped_silently():
    table = live(study, measured_of(world(EFFECT, diverged=("cosine 50 %",))))
    assert table.verdict["cosine_shape_beats_sqrt_50"] == "untested" and "diverged" in table.reason["cosine_shape_beats_sqrt_50"]


def test_runs_too_small_to_count_are_not_judged():
    measured = dataclasses.replace(measured_of(world(EFFECT)), steps=64)
    assert set(live(study, measured).verdict) == {"untested"} and study.controls(measured) == []
    assert "machinery" in study.interpretation(measured, [])


def test_figures_and_words_come_from_the_measurements():
    measured = measured_of(world(EFFECT))
    findings = [f for f in study.judge(measured) if f.evidence == "live"]
    made = study.figures(measured, Board(verdicts(findings), tuple(study.controls(measured))))
    assert {"bowls", "length_by_rate", "shapes", "line_between_weights", "continued", "verdicts"} == set(made)
    text = study.interpretation(measured, findings)
    assert f"{measured.bowls['linear 20 %'].best_loss:.4f}" in text and f"{measured.params:,}" in text
    table = study.lengths(measured)
    assert set(table.fraction) == {0.05, 0.1, 0.2, 0.4} and (table[table.fraction == 0.2].difference == 0).all()


def test_the_design_told_by_arm():
    table = design_table(study.recipes("cpu"), study.arm_of).set_index(["arm", "horizon_tokens"])
    assert table.loc["linear 20 %", PLAN.horizon_tokens].tolist() == [512, 20, 5, 8]  # steps, runs, rates, seeds
    assert table.runs.sum() == len(study.recipes("cpu")) and not table.index.duplicated().any()


def test_every_claim_has_its_contrast():
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))


def test_the_power_plan():
    table = study.power("cpu").set_index("contrast")
    assert table.loc["linear 20 % − cos10", "seeds"] == len(PLAN.all_seeds) and table.detectable_nats.gt(0).all()
    assert study.design("cpu").resolve(0.002)["seeds"] > PLAN.seed_count
