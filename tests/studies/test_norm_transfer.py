"""Study 05 on made-up runs of a known valley over rate and batch: what goes in comes out, and what cannot be told is not."""

import dataclasses
import math
import types

import numpy as np
import pandas as pd
import pytest
from worlds import FakeRun, live

from etastar.analysis.claims import load_claims
from etastar.recipe import AdamW
from etastar.studies import layer_groups
from etastar.studies import norm_transfer as study
from etastar.studies import norm_transfer_grids as grids
from etastar.studies import norm_transfer_measures as measures
from etastar.studies.norm_transfer_design import GROUPS, NORM_TRANSFER, Valley
from etastar.studies.norm_transfer_grids import Grids, arm_of
from etastar.studies.norm_transfer_measures import PUBLISHED_GROWTH

PLAN = dataclasses.replace(  # the cpu preset with more arms, about the valleys of the made-up world
    NORM_TRANSFER["cpu"], adamw_tokens=(), momentum=0.1, layer_tokens=2**16,
    layers=(("scion", "everywhere", 1), ("scion", "everywhere", 4)),
    scion=Valley(2**16, 512, -2.4, batch_of_tokens=0.45, rate_of_batch=0.6, rate_of_tokens=-0.55),
    adamw=Valley(2**16, 90, -7.6, batch_of_tokens=0.45, rate_of_batch=0.6, rate_of_tokens=-0.55))


class Run(FakeRun):
    """A made-up run that knows its norm, and its curve where norms were logged."""

    @property
    def observed(self):
        logged = self.recipe.total_steps * self.recipe.batch_tokens in LOGGED and self.recipe.batch_tokens in PLAN.growth_batches
        return types.SimpleNamespace(norms_every_tokens=64 if logged else None)

    @property
    def curve(self):
        steps = np.arange(1, self.recipe.total_steps + 1)
        reach = np.log2(self.recipe.peak_lr * steps)
        powers, norms = zip(*PUBLISHED_GROWTH.items(), strict=True)
        return pd.DataFrame({"step": steps, "norm_output": 2.0 ** (np.interp(reach, powers, norms) + self.offset)})


LOGGED = {1024 * batch for batch in PLAN.growth_batches} | {512 * PLAN.growth_batches[0]}


def world(norm_slope=0.0, lr_of_tokens=-0.28, batch_of_tokens=0.45, lr_of_batch=0.6, noise=0.003, seed=0, offset=-0.1, moved=None,
          best_batch=512.0, plan=PLAN):
    """Runs of a design whose loss is a bowl in (log rate, log batch) that moves with the tokens, with the norm's slope as given.

    `moved` maps (group, octaves) to nats that such a ratio adds.
    """
    rng, shift, runs = np.random.default_rng(seed), {}, []
    for r in dict.fromkeys(recipe for cell in plan.cells for recipe in plan.recipes(cell)):
        valley = plan.adamw if isinstance(r.optimizer, AdamW) else plan.scion
        octaves = math.log2(r.horizon_tokens / 2**16)
        w = math.log2(r.batch_tokens / (best_batch if valley is plan.scion else 90.0)) - batch_of_tokens * octaves
        rate = (-2.4 if valley is plan.scion else -7.6) + lr_of_tokens * octaves + lr_of_batch * w
        v = math.log2(r.peak_lr) - rate
        loss = 3.0 - 0.1 * octaves + 0.03 * v**2 + 0.03 * w**2 + shift.setdefault(r.seed, rng.normal(0, 0.03)) + rng.normal(0, noise)
        loss += sum((moved or {}).get((g, math.log2(ratio)), 0.0) for g, ratio in zip(GROUPS, r.lr_ratios, strict=True))
        run = Run(r, loss)
        run.offset = offset + rng.normal(0, 0.01)
        run.norm = 4.5 + norm_slope * octaves + 0.7 * v - 0.1 * w + rng.normal(0, 0.02)
        runs.append(run)
    return runs


@pytest.fixture(autouse=True)
def known_norms(monkeypatch):
    def norms_of(run):
        return dict(zip(grids.NORMS, (run.norm, run.norm - 0.5, run.norm / 2, run.norm / 3), strict=True))

    monkeypatch.setattr(grids, "norms_of", norms_of)


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "norms_of", lambda run: dict(zip(grids.NORMS, (run.norm, run.norm - 0.5, run.norm / 2, run.norm / 3),
                                                                 strict=True)))
        return study.measure(world())


def test_the_valley_that_went_in_comes_out(measured):
    rules = measured.tables["rules"].query("method == 'joint'").set_index(["optimizer", "rule"]).value
    for optimizer in ("scion", "adamw"):
        assert rules[optimizer, "best rate over tokens"] == pytest.approx(-0.28, abs=0.03)
        assert rules[optimizer, "best batch over tokens"] == pytest.approx(0.45, abs=0.05)
        assert rules[optimizer, "rate at a batch, over batch"] == pytest.approx(0.6, abs=0.05)
        assert rules[optimizer, "norm at the optimum"] == pytest.approx(0.0, abs=0.02)
    best = measured.tables["optima"].query("arm == 'scion, 32×2' and horizon_tokens == 65536").iloc[0]
    assert best.best_batch_tokens == pytest.approx(512, rel=0.1) and best.log2_norm == pytest.approx(4.5, abs=0.05) and not best.edge
    assert best.steps == pytest.approx(65536 / best.best_batch_tokens)


def test_a_norm_that_stays_is_inconclusive_where_optima_have_too_few_steps_and_reproduced_where_they_have_enough(measured):
    rows = live(study, measured)
    assert rows.verdict["norm_invariant_scion"] == "inconclusive" and "fewer than 256 steps" in rows.reason["norm_invariant_scion"]
    assert rows.low["norm_invariant_scion"] < 0 < rows.high["norm_invariant_scion"]
    longer = dataclasses.replace(PLAN, horizon_steps=2**14, side_tokens=2**16, layer_tokens=0, momentum=None, decayed=False, widths=())
    rows = live(study, study.measure(world(plan=longer, best_batch=256.0, batch_of_tokens=0.45)))
    assert rows.verdict["norm_invariant_scion"] == "reproduced"
    rows = live(study, study.measure(world(plan=longer, best_batch=256.0, norm_slope=0.15)))
    assert rows.verdict["norm_invariant_scion"] == "differs at this scale"


def test_the_papers_own_fit_of_the_same_runs_finds_the_norm_at_every_batch(measured):
    own = measured.tables["by_paper"].query("arm == 'scion, 32×2' and inside")
    bowls = measured.tables["fixed_batch"].query("arm == 'scion, 32×2'").set_index(["horizon_tokens", "batch_tokens"]).log2_norm
    near = [abs(row.log2_norm - bowls[row.horizon_tokens, row.batch_tokens]) for row in own.itertuples()
            if (row.horizon_tokens, row.batch_tokens) in bowls.index]
    assert len(near) >= 6 and max(near) < 0.6  # a parabola through the loss at norm 1 is not the bowl about the optimum
    assert own[own.best].groupby("horizon_tokens").size().max() == 1


def test_growth_is_judged_by_its_offset_from_the_published_curve(measured):
    rows = live(study, measured)
    assert rows.verdict["norm_growth_offset"] == "reproduced" and rows.estimate["norm_growth_offset"] == pytest.approx(-0.1, abs=0.02)
    assert live(study, study.measure(world(offset=-0.7))).verdict["norm_growth_offset"] == "differs at this scale"


def test_layer_groups_gain_what_was_put_in_and_never_what_one_seed_had_by_luck():
    cost = {(group, octaves): 0.05 for group in GROUPS for octaves in (-2.0, 2.0)}
    made = layer_groups.conditions(Grids.of(world(moved=cost | {("hidden", -2.0): -0.06})).frame)
    assert {(c.batch, c.horizon_tokens) for c in made} == {("B*", 2**14), ("B*", 2**16), ("4B*", 2**14), ("4B*", 2**16)}
    for condition in made:
        assert all(-0.025 < gain < -0.005 for gain in layer_groups.gain(condition))  # 0.06 of 3 nats, less what the middle rate lacks
    nothing = layer_groups.conditions(Grids.of(world(moved=cost)).frame)
    assert all(abs(layer_groups.gain(c).mean()) < 0.003 for c in nothing)
    ratios = layer_groups.ratios(made).query("log2_ratio == 2 and batch == 'B*'").groupby("group").loss_excess.mean()
    assert ratios.to_dict() == pytest.approx({group: 0.05 for group in GROUPS}, abs=0.01)


def test_every_claim_is_judged_by_a_contrast_that_the_study_can_make(measured):
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))
    never = set(study.CONTRASTS.values()) - set(measured.contrasts)
    told_elsewhere = {"scion: norm over depth", "adamw: norm over width", "adamw: norm over depth", "layers: pre-norm − everywhere"}
    assert never <= told_elsewhere | {"layers: hidden ratio"}  # of night alone; and no vertex where no group's rate matters


def test_the_controls_pass_on_honest_runs_and_the_figures_have_what_was_measured(measured):
    assert all(control.passed in (True, None) for control in study.controls(measured))
    figures = study.figures(measured)
    assert {"loss_by_norm_scion", "surfaces_adamw", "optimal_norm", "rules", "norm_growth", "invariants", "layer_groups",
            "norm_by_shape"} <= set(figures)


def test_all_presets_have_runs_whose_horizons_share_trunks_and_lie_two_octaves_apart():
    for name in ("smoke", "cpu", "night", "gpu"):
        plan = NORM_TRANSFER[name]
        assert all(long == 4 * short for short, long in zip(plan.horizons, plan.horizons[1:], strict=False))
        for arm in (plan.arm("scion"), plan.arm("adamw")):
            for tokens in plan.horizons:
                assert len(plan.batches(arm, tokens)) >= 3 and all(len(plan.rates(arm, tokens, b)) >= 3 for b in plan.batches(arm, tokens))
    assert len(NORM_TRANSFER["night"].horizons) == 5
    trunks = {(r.peak_lr, r.batch_tokens, r.horizon_tokens) for r in study.recipes("cpu") if arm_of(r) == "scion, 32×2"}
    assert sum((lr, b, 2**16) in trunks for lr, b, tokens in trunks if tokens == 2**18) >= 4
    planned = {name: study.power(name).set_index("contrast") for name in ("smoke", "cpu")}
    assert "adamw: norm slope" not in planned["smoke"].index  # at one horizon
    under = dataclasses.replace(NORM_TRANSFER["smoke"], adamw_tokens=())
    assert math.isnan(study.slope_sd(under, under.arm("adamw")))  # the best batch of so short runs is under a sequence: nothing to show
    assert 0.005 < planned["cpu"].sd_nats["scion: norm slope"] < 0.06 and planned["cpu"].seeds["scion: norm slope"] == 4
    shorter = study.design("cpu", minutes=2.0)
    assert shorter.horizons[-1] < PLAN.horizons[-1] and shorter.seed_count == 2


def test_first_reach_recovers_the_rule_of_lr_times_steps():
    rows = [{"arm": "scion, 32×2", "seed": seed, "batch_tokens": b, "horizon_tokens": d, "log2_lr": lr,
             "log2_norm": 0.8 * (lr + math.log2(d / b))} for seed in (1, 2) for b in (64, 128, 256) for d in (2**14, 2**16)
            for lr in range(-8, 3)]
    found = measures.first_reach(Grids(pd.DataFrame(rows), (32, 2)), "scion, 32×2", 4.0)
    assert found.batch.tolist() == pytest.approx([1.0, 1.0]) and found.tokens.tolist() == pytest.approx([-1.0, -1.0])
