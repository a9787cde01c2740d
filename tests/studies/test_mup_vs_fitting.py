"""Study 06 on made-up runs of known valleys: what goes in comes out, and what cannot be told is not."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from worlds import FakeRun, live

import etastar as es
from etastar.analysis.claims import load_claims
from etastar.studies import head_to_head
from etastar.studies import mup_vs_fitting as study
from etastar.studies.head_to_head import FITTED, TRANSFERRED
from etastar.studies.mup_vs_fitting_design import FFN_MULTIPLE, MUP_VS_FITTING
from etastar.studies.mup_vs_fitting_grids import Bowls, Grid, arm_of, kind_of, scaling_of

PLAN = MUP_VS_FITTING["cpu"]
BEST = -6.4  # log2 rate of the base at the widths' horizon


ALL = dataclasses.replace(PLAN, decay_times=(3.0,), decay_width=64, grain_width=32)  # what two cores leave to the night


@pytest.fixture
def every_part(monkeypatch):
    """The cpu preset with decay and granularity."""
    monkeypatch.setitem(MUP_VS_FITTING, "all", ALL)


@dataclasses.dataclass
class Run(FakeRun):
    curve = pd.DataFrame()


@dataclasses.dataclass(frozen=True)
class World:
    """Octaves of the best rate per octave of width, tokens and depth, and by what else differs; nats that a parametrization costs."""

    sp_width: float = -0.8
    mup_width: float = 0.0
    tokens: float = -0.35
    bend: float = 0.0
    sp_depth: float = -0.25
    completep_depth: float = 0.0
    coupled: float = 0.6
    experts: float = 0.0
    finer: float = 0.0
    mup_cost: float = 0.0
    module_gain: float = 0.0
    skew: float = 0.004
    preset: str = "cpu"

    def best(self, r) -> float:
        """Log2 best rate of a recipe."""
        plan, scaling, mixture = MUP_VS_FITTING[self.preset], scaling_of(r), r.model.mixture
        wider, longer = math.log2(r.model.width / plan.model.width), math.log2(r.horizon_tokens / plan.width_tokens)
        deeper = math.log2(r.model.depth / plan.model.depth)
        at = BEST + (self.sp_width if scaling == "sp" else self.mup_width) * wider + self.tokens * longer + self.bend * longer**2
        at += (self.sp_depth if scaling == "sp" else self.completep_depth) * deeper
        if mixture:
            same = mixture.experts_per_token == plan.experts_per_token
            at += self.experts * math.log2(mixture.experts / plan.experts) if same else self.finer
        return at + self.coupled * ("coupled" in kind_of(r))

    def loss(self, r) -> float:
        """Nats of a recipe without noise: a bowl on a floor that falls with tokens and size."""
        plan, u = MUP_VS_FITTING[self.preset], math.log2(r.peak_lr) - self.best(r)
        floor = 3.0 - 0.25 * math.log(r.horizon_tokens / plan.width_tokens) - 0.1 * math.log(r.model.width / plan.model.width)
        moved = self.module_gain * sum(r != 1 for r in r.lr_ratios) * (not r.model.qk_norm)
        return floor + self.mup_cost * (scaling_of(r) == "mup") + 0.04 * u**2 + self.skew * u**3 - moved

    def runs(self, noise=0.001, seed=0) -> list[Run]:
        """All runs of the preset."""
        rng, shift = np.random.default_rng(seed), {}
        return [Run(r, self.loss(r) + shift.setdefault(r.seed, rng.normal(0, 0.02)) + rng.normal(0, noise))
                for r in study.recipes(self.preset)]


@pytest.mark.parametrize("preset", MUP_VS_FITTING)
def test_every_preset_keeps_the_rules_of_design(preset):
    plan, recipes = MUP_VS_FITTING[preset], study.recipes(preset)
    assert len(set(recipes)) == len(recipes) and min(r.seed for r in recipes) >= 9000
    active = [r.model.resolved_ffn_width * (r.model.mixture.experts_per_token if r.model.mixture else 1) for r in recipes]
    assert active == [FFN_MULTIPLE * r.model.width for r in recipes]
    if preset != "smoke":
        assert min(r.total_steps for r in recipes) >= 256 and plan.warmup_steps <= 0.05 * min(r.total_steps for r in recipes)
        assert plan.target_tokens >= head_to_head.LEAST_TOKENS * min(plan.proxy_tokens)


def test_at_the_base_mup_and_sp_are_one_model_and_it_is_trained_once():
    base = [r for r in study.recipes("cpu") if (r.model.width, r.model.depth, kind_of(r)) == (16, 2, "")]
    assert {scaling_of(r) for r in base} == {"sp", "completep"}  # CompleteP starts its projections back otherwise
    from etastar.model.parametrization import numbers, scalars

    mup = PLAN.parametrization_of(dataclasses.replace(PLAN.arm("mup", 32), width=16))
    assert isinstance(mup, es.MuP) and scalars(mup, base[0].model) == scalars(PLAN.parametrization, base[0].model)
    assert numbers(mup, base[0].model, 257) == numbers(PLAN.parametrization, base[0].model, 257)


def test_known_drifts_come_back(every_part):
    m = study.measure(World(-0.7, 0.1, sp_depth=-0.3, completep_depth=0.05, experts=-0.25, finer=0.6, coupled=0.3, preset="all").runs())
    found = {name: c.per_seed.mean() for name, c in m.contrasts.items()}
    assert found["mup: drift over width"] == pytest.approx(2 * 0.1, abs=0.06)
    assert found["sp: drift over width"] == pytest.approx(2 * -0.7, abs=0.06)
    assert found["sp − mup: drift over width"] == pytest.approx(2 * -0.8, abs=0.08)
    assert found["mixture, mup: drift over width"] == pytest.approx(2 * 0.1, abs=0.15)
    assert found["completep: drift over depth"] == pytest.approx(2 * 0.05, abs=0.15)
    assert found["sp: drift over depth"] == pytest.approx(2 * -0.3, abs=0.15)
    assert found["mixture, mup: drift over experts"] == pytest.approx(2 * -0.25, abs=0.15)
    assert found["mixture, mup: drift over fineness"] == pytest.approx(0.6, abs=0.15)
    assert found["coupled − independent"] == pytest.approx(0.3, abs=0.15)


def test_what_holds_in_the_world_is_reproduced_and_what_does_not_is_not(every_part):
    board = live(study, study.measure(World(preset="all").runs()))
    assert board.verdict["mup_lr_constant_over_width"] == board.verdict["sp_lr_drifts_over_width"] == "reproduced"
    assert board.verdict["decay_must_be_independent"] == board.verdict["completep_lr_constant_over_depth"] == "reproduced"
    assert board.verdict["fitting_predicts_lr"] == board.verdict["transfer_predicts_lr"] == "reproduced"
    moved = World(mup_width=-0.45, sp_width=-0.45, coupled=0.0, completep_depth=0.4, skew=0.0, preset="all")
    other = live(study, study.measure(moved.runs()))
    assert other.verdict["mup_lr_constant_over_width"] == "differs at this scale"
    assert other.verdict["completep_lr_constant_over_depth"] == "differs at this scale"
    assert "reproduced" not in set(other.verdict[["sp_lr_drifts_over_width", "decay_must_be_independent", "transfer_predicts_lr"]])


def test_exponents_of_a_known_world_come_back_and_do_not_count_over_a_short_range():
    m = study.measure(World(tokens=-0.4).runs())
    assert m.contrasts["sp: horizon exponent"].per_seed.mean() == pytest.approx(-0.4, abs=0.03)
    assert m.contrasts["mup: horizon exponent"].per_seed.mean() == pytest.approx(-0.4, abs=0.03)
    assert "8-fold range" in m.contrasts["sp: horizon exponent"].short and "token tables" in m.contrasts["sp: size exponent"].short
    bent = study.measure(World(bend=0.05).runs())
    assert bent.contrasts["sp: horizon curvature"].per_seed.mean() == pytest.approx(0.1, abs=0.03)


def test_predictions_are_exact_in_a_world_of_power_laws_and_miss_where_it_bends():
    exact = study.measure(World(skew=0.0).runs(noise=0.0)).tables["methods"].set_index("method")
    assert exact.octaves[TRANSFERRED] == pytest.approx(0.0, abs=0.02) and exact.regret[TRANSFERRED] == pytest.approx(0.0, abs=1e-4)
    assert abs(exact.octaves[FITTED]) < 0.35  # width is not quite a power of the parameters, tables being part of them
    assert exact.octaves["transferred, no horizon rule"] == pytest.approx(2 * 0.35, abs=0.02)
    kept = exact.octaves["base's rate kept, SP"]
    assert kept == pytest.approx(2 * 0.35 + 2 * 0.8, abs=0.02) and exact.regret["base's rate kept, SP"] > 0.1
    bent = study.measure(World(bend=0.1, skew=0.0).runs(noise=0.0)).tables["methods"].set_index("method")
    assert bent.octaves[TRANSFERRED] == pytest.approx(-0.6, abs=0.05)  # 0.1 (x² at 3 octaves) less the line through 0 and 1


def test_a_parametrization_that_costs_is_told_from_a_prediction_that_misses():
    m = study.measure(World(mup_cost=0.02, skew=0.0).runs(noise=0.0005))
    means = {name: m.contrasts[name].per_seed.mean() for name in ("fitted − transferred", "sp − mup, both tuned",
                                                                   "fitted − transferred: regret")}
    assert means["sp − mup, both tuned"] == pytest.approx(-0.02, abs=0.001)
    assert means["fitted − transferred"] == pytest.approx(means["sp − mup, both tuned"] + means["fitted − transferred: regret"], abs=1e-9)


def test_no_seed_is_judged_on_a_prediction_it_had_a_part_in():
    runs = World().runs(noise=0.0)
    before = study.measure(runs).tables["target"].set_index(["method", "seed"]).log2_lr
    first = min(r.recipe.seed for r in runs)
    for r in runs:  # the first seed's proxies are best elsewhere
        if r.recipe.seed == first and r.recipe.model.width <= 16 and r.recipe.horizon_tokens <= 2**16:
            r.val_loss += 0.05 * math.log2(r.recipe.peak_lr)
    after = study.measure(runs).tables["target"].set_index(["method", "seed"]).log2_lr
    moved = (before - after).unstack("seed").loc[[FITTED, TRANSFERRED]]
    assert (moved[first].abs() < 0.02).all()  # of the curvature alone, which seeds share
    assert (moved.drop(columns=first).loc[FITTED] > 0.1).all()


def test_search_flops_are_those_of_the_proxies_and_fitting_can_be_cut_to_transfers():
    methods = study.measure(World().runs()).tables["methods"].set_index("method").search_flops
    assert methods["base's rate kept, SP"] < methods[TRANSFERRED] < methods[FITTED]
    assert methods["fitted, at transfer's FLOPs"] <= methods[TRANSFERRED]


def test_proxies_are_an_eighth_of_the_target_and_a_quarter_of_its_tokens():
    m = study.measure(World().runs())
    grid = Grid.of(World().runs())
    width, tokens = grid.target
    assert (width, tokens) == (PLAN.target_width, PLAN.target_tokens)
    size = {arm: rows.params.iloc[0] for arm, rows in m.frame.groupby("arm")}
    assert size[grid.arm("sp", width)] >= 8 * size[grid.arm("sp")] and PLAN.target_tokens >= 4 * max(PLAN.proxy_tokens)


def test_a_rate_beyond_the_grid_costs_at_least_what_its_edge_does():
    runs = World().runs(noise=0.0)
    m = study.measure(runs)
    names = {name: (name.split(", ")[0] + ", " + name.split(", ")[1], PLAN.target_tokens) for name in m.bowls if name == "sp, 64×2"}
    bowls = Bowls.of(dataclasses.replace(m, bowls={n: m.bowls[n] for n in names}), names, m.frame)
    cell = ("sp, 64×2", PLAN.target_tokens)
    edge = math.log2(bowls.rows[cell].peak_lr.max())
    at = [bowls.loss_at(*cell, PLAN.first_seed, edge + octaves) for octaves in (0.0, 1.0, 2.0)]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1]) and at[1] - at[0] > 0.04


def test_a_diverged_run_leaves_the_rest_standing():
    runs = World().runs()
    for r in runs:
        if r.recipe.peak_lr == max(x.recipe.peak_lr for x in runs if x.recipe.model.width == 64 and scaling_of(x.recipe) == "sp") and (
                r.recipe.model.width == 64 and scaling_of(r.recipe) == "sp"):
            r.val_loss = math.nan
    assert "mup: drift over width" in study.measure(runs).contrasts


def test_every_claim_has_a_contrast_and_smoke_only_shows_the_machinery():
    assert set(study.CONTRASTS) == set(load_claims(study.STUDY))
    m = study.measure(World(preset="smoke").runs())
    assert not m.counts and "machinery" in study.interpretation(m, [])
    assert set(live(study, m).verdict) == {"untested"}


def test_the_night_preset_speaks_of_every_claim():
    m = study.measure(World(preset="night", module_gain=0.01).runs())
    lacking = {claim for claim, name in study.CONTRASTS.items() if name not in m.contrasts}
    assert lacking == {"steplaw_size_exponent", "three_rates_suffice", "rate_bends_over_size", "dense_rule_holds_for_moe"}  # archives do
    assert m.contrasts["modules: plain − QK-norm"].per_seed.mean() < -0.002


def test_arms_are_told_from_their_recipes():
    names = {arm_of(r) for r in study.recipes("night")}
    assert {"sp, 16×2", "mup, 128×2", "completep, 16×32", "mup, 64×2, 4 experts top 2", "mup, 32×2, 16 experts top 8"} <= names
    assert any(name.endswith("coupled") for name in names) and any("QK-norm, output 2^2" in name for name in names)
