"""Study 04 on made-up runs of a known valley: what goes in comes out, and what cannot be told is not."""

import math

import numpy as np
import pytest
from worlds import FakeRun, live

import etastar as es
from etastar.analysis.board import Board, verdicts
from etastar.analysis.claims import load_claims
from etastar.studies import power_law_measures as measures
from etastar.studies import power_laws as study
from etastar.studies.power_law_design import COOLDOWN, POWER_B, POWER_LAWS
from etastar.studies.power_law_measures import FIXED, LAW, POWER, Grid, arm_of, kind_of

PLAN = POWER_LAWS["cpu"]
BEST = -8.3  # log2 rate at the middle horizon, the main batch and width
PARTS = ("horizon_exponent", "batch_exponent", "lr_transfers_over_width")


def world(horizon=-0.51, batch=1.0, width=0.0, noise=0.002, seed=0, power=0.0, cosine=0.02, preset="cpu", skew=0.0):
    """Runs of a preset: the best rate of WSD is a power law of the cell, the other schedules cost so many nats more than tuned WSD."""
    rng, runs, shift = np.random.default_rng(seed), [], {}
    for r in study.recipes(preset):
        plan, w, tokens = POWER_LAWS[preset], r.model.width, r.horizon_tokens
        octaves = math.log2(tokens / plan.middle_tokens), math.log2(r.batch_tokens / plan.batch_tokens), math.log2(w / plan.model.width)
        best = BEST + horizon * octaves[0] + batch * octaves[1] + width * octaves[2]
        u = math.log2(r.peak_lr) - best
        cost = 0.03 * u**2 + skew * u**3
        if kind_of(r) == "cosine":
            cost = cosine
        elif kind_of(r).startswith("power"):
            at = math.log2(float(r.schedule.rate_at(tokens / 4, batch_tokens=r.batch_tokens, eta_max=math.inf)))
            at_setting = plan.power_rate + POWER_B * math.log2(plan.knob_tokens / 4 / plan.middle_tokens)
            knobs = (tokens, w, r.batch_tokens) == (plan.knob_tokens, plan.model.width, plan.batch_tokens)
            cost = power + 0.02 * knobs * (at - at_setting) ** 2 + 0.3 * (r.schedule.b - POWER_B) ** 2
        loss = 4.0 - 0.25 * math.log(tokens / plan.middle_tokens) + cost
        runs.append(FakeRun(r, loss + shift.setdefault(r.seed, rng.normal(0, 0.02)) + rng.normal(0, noise)))
    return runs


@pytest.mark.parametrize("preset", POWER_LAWS)
def test_every_preset_keeps_the_rules_of_design(preset):
    plan, recipes = POWER_LAWS[preset], study.recipes(preset)
    assert len(set(recipes)) == len(recipes) and min(r.seed for r in recipes) >= 6000
    wsd = [r for r in recipes if kind_of(r) == "wsd"]
    assert {r.batch_tokens for r in wsd} == {plan.batch_tokens, *(b for b, _ in plan.batches)}
    if preset != "smoke":
        assert min(r.total_steps for r in recipes) >= 256 and plan.warmup_steps <= 0.05 * min(r.total_steps for r in recipes)
        assert plan.horizons[-1] >= 16 * plan.horizons[0]
        batches = [plan.batch_tokens, *(b for b, _ in plan.batches)]
        assert max(batches) >= 16 * min(batches)


def test_the_power_schedule_is_below_its_cap_for_four_fifths_of_every_run_at_the_one_setting():
    own = Grid.of(world()).power
    capped = [(r.lr() == r.peak_lr).mean() for r in study.recipes("cpu") if r.schedule == own]
    assert len(capped) >= 5 * PLAN.seed_count and max(capped) <= 0.2


def test_turning_b_moves_no_rate_at_a_quarter_of_the_run_and_an_end_by_an_octave():
    turned = measures.sensitivity(Grid.of(world()))
    by_b = turned[turned.knob == "b"].groupby("value").octaves.first()
    assert by_b.round(2).to_dict() == {-1.01: -0.92, -0.51: 0.0, -0.01: 0.92}
    assert sorted(turned[turned.knob == "η_p"].value.unique()) == [-1.0, 0.0, 1.0]


def test_arms_are_told_from_their_recipes():
    kinds = {kind_of(r) for r in study.recipes("night")}
    assert {"wsd", "wsd to 10 %", "wsd to a fixed rate", "wsd, warm-up 5 %", "wsd, no decay", "cosine"} < kinds
    first = study.recipes("cpu")[0]
    assert arm_of(first) == "wsd, batch 128, width 32"
    assert first.schedule == es.WSD(**COOLDOWN, warmup_steps=12)


def test_the_exponents_of_a_known_valley_come_back():
    m = study.measure(world(horizon=-0.4, batch=0.7, width=-0.2))
    table = m.tables["exponents"].set_index("along").exponent
    assert table["horizon"] == pytest.approx(-0.4, abs=0.03) and table["batch"] == pytest.approx(0.7, abs=0.05)
    assert table["width"] == pytest.approx(-0.2, abs=0.1)
    slopes = m.tables["local_slopes"]
    assert slopes[slopes.along == "horizon"].slope.mean() == pytest.approx(-0.4, abs=0.05) and len(slopes) == 4 + 3 + 2
    assert m.contrasts["horizon exponent, batch growing"].per_seed.mean() == pytest.approx(-0.4 + 0.571 * 0.7, abs=0.05)
    assert m.contrasts["lr: widest − narrowest"].per_seed.mean() == pytest.approx(-0.4, abs=0.2)
    assert abs(m.contrasts["predicted − best at the longest"].per_seed.mean()) < 0.25


def test_published_exponents_are_reproduced_where_they_are_true_and_not_where_others_are():
    board = live(study, study.measure(world(noise=0.001)))
    assert board.loc[list(PARTS), "verdict"].tolist() == ["reproduced"] * 3
    assert board.loc["horizon_exponent_bjorck", "verdict"] == "differs at this scale"
    other = live(study, study.measure(world(horizon=-0.15, batch=0.5, width=-1.0, noise=0.001)))
    assert other.loc[list(PARTS), "verdict"].tolist() == ["differs at this scale"] * 3


def test_a_curved_valley_is_seen_to_be_curved():
    straight = study.measure(world(noise=0.0005)).tables["exponents"].set_index("along").loc["horizon"]
    assert straight.slope_low < 0 < straight.slope_high
    runs = world(noise=0.0005, horizon=0.0)
    for r in runs:
        if kind_of(r.recipe) == "wsd":
            x = math.log2(r.recipe.horizon_tokens / PLAN.middle_tokens)
            u = math.log2(r.recipe.peak_lr) - BEST
            r.val_loss += 0.03 * ((u - 0.1 * x**2) ** 2 - u**2)
    bent = study.measure(runs).tables["exponents"].set_index("along").loc["horizon"]
    assert bent.slope_low < 0.2 < bent.slope_high and bent.slope_low > 0


@pytest.mark.parametrize("power, cosine, verdict", [(-0.05, 0.02, "reproduced"), (0.3, 0.02, "differs at this scale")])
def test_power_against_one_rate_of_wsd(power, cosine, verdict):
    m = study.measure(world(noise=0.001, power=power, cosine=cosine))
    board = live(study, m)
    assert board.loc["power_beats_fixed_wsd", "verdict"] == verdict
    regret = m.tables["regrets"].groupby("method").regret.mean()
    assert regret[POWER] == pytest.approx(power, abs=0.01) and regret[FIXED] > 0.005  # one rate misses other horizons and batches
    assert m.contrasts[f"{POWER} − {FIXED}"].per_seed.mean() == pytest.approx((regret[POWER] - regret[FIXED]) / 0.25, rel=0.35)


def test_the_law_of_the_true_exponents_costs_nearly_nothing():
    regret = study.measure(world(noise=0.001)).tables["regrets"]
    assert regret[regret.method == LAW].regret.abs().max() < 0.03


def test_the_knobs_of_power():
    contrasts = study.measure(world(noise=0.0005)).contrasts
    assert contrasts["best b"].per_seed.mean() == pytest.approx(-0.51, abs=0.02)
    assert contrasts["a at the ends of 3 … 5"].per_seed.mean() == pytest.approx(0.02 * (math.log2(5 / 3) / 2) ** 2 / 0.25, rel=0.2)
    assert contrasts["b − a, an octave each"].per_seed.mean() == pytest.approx((0.3 * 0.5**2 / 0.92**2 - 0.02) / 0.25, rel=0.2)


def test_diverged_runs_at_the_highest_rate_are_no_hindrance():
    runs = world()
    for r in runs:
        if r.recipe.peak_lr == 2.0**-6.375 and kind_of(r.recipe) == "wsd":
            r.val_loss = math.nan
    m = study.measure(runs)
    assert m.tables["exponents"].set_index("along").exponent["horizon"] == pytest.approx(-0.51, abs=0.1)


def test_moving_one_run_moves_the_exponent():
    runs = world()
    before = study.measure(runs).contrasts["horizon exponent"].per_seed
    next(r for r in runs if r.recipe.horizon_tokens == PLAN.horizon_tokens and r.recipe.peak_lr == 2.0**-8.625).val_loss -= 0.05
    assert (study.measure(runs).contrasts["horizon exponent"].per_seed != before).any()


def test_too_small_runs_are_untested_and_the_page_says_so():
    m = study.measure(world(preset="smoke"))
    findings = study.judge(m)
    assert {f.verdict for f in findings if f.evidence == "live"} == {"untested"} and not study.controls(m)
    assert "only show that the machinery works" in study.interpretation(m, findings)
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))


def test_the_figures_and_the_words_hold_what_was_measured():
    m = study.measure(world())
    findings = study.judge(m)
    board = Board(verdicts(findings), tuple(study.controls(m)))
    assert [c.passed for c in board.controls] == [True] * 4
    made = study.figures(m, board)
    assert {"bowls_by_horizon", "best_lr_by_horizon", "best_lr_by_batch", "best_lr_by_width", "local_slopes", "regrets", "sensitivity",
            "verdicts"} <= set(made)
    said = study.interpretation(m, findings)
    row = m.tables["exponents"].iloc[0]
    assert f"{row.exponent:+.3f}" in said and f"{row.low:+.3f} … {row.high:+.3f}" in said


def test_minutes_halve_the_horizons_together():
    plan = study.design("cpu", 1.0)
    assert plan.horizon_steps < PLAN.horizon_steps
    assert plan.horizon_tokens // plan.middle_tokens == PLAN.horizon_tokens // PLAN.middle_tokens
    assert len(study.recipes("cpu", 1.0)) > 0 and plan.seed_count >= 2
    assert {"horizon exponent", "batch exponent", "power − wsd, one LR"} == set(study.power("cpu").contrast)
