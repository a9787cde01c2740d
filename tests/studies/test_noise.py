"""The noise atlas: its recipes vary what they say, its figures are whole, and runs that are stored are read without being trained."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar import plots
from etastar.archives import archive
from etastar.studies import noise

NOISE = {"seed": 0.01, "order": 0.02, "own": 0.002}


class FakeRun:
    def __init__(self, recipe, val_loss):
        self.recipe, self.val_loss = recipe, val_loss


def world(preset="cpu", seed=0):
    """Losses with a bowl at 2^−6, a shift by parameters and by order that arms share, and a little of their own."""
    rng, shifts = np.random.default_rng(seed), {}

    def shift(what, of, sd):
        return shifts.setdefault((what, of), rng.normal(0, sd))

    runs = []
    for recipe in noise.recipes(preset):
        x = math.log2(recipe.peak_lr)
        common = shift("seed", recipe.seed, NOISE["seed"]) + shift("order", recipe.resolved_data_seed, NOISE["order"])
        runs.append(FakeRun(recipe, 4 + 0.04 * (x + 6) ** 2 + common + rng.normal(0, NOISE["own"])))
    return runs


@pytest.fixture(scope="module")
def atlas():
    return noise.measure(world("night"))


@pytest.mark.parametrize("preset", noise.DESIGNS)
def test_recipes_are_fresh_distinct_and_vary_one_seed_at_a_time(preset):
    plan, recipes = noise.DESIGNS[preset], noise.recipes(preset)
    assert len({r.run_id if preset != "gpu" else r.to_json() for r in recipes}) == len(recipes)
    assert min(r.seed for r in recipes) == noise.FIRST_SEED and min(r.resolved_data_seed for r in recipes) == noise.FIRST_SEED
    whole = [r for r in recipes if r.execution == plan.execution]
    middle = [r for r in whole if noise.arm_of(r) == noise.ARMS[0] and r.total_steps == plan.steps and r.model == plan.model
              and r.peak_lr == 2.0**plan.centre]
    varied = [(r.seed - noise.FIRST_SEED, r.resolved_data_seed - noise.FIRST_SEED) for r in middle]
    n = range(1, plan.seed_count)
    assert sorted(varied) == sorted([(0, 0), *((i, 0) for i in n), *((0, i) for i in n), *((i, i) for i in n)])
    assert len(recipes) - len(whole) == len(plan.parts) and {r.model.width for r in recipes} == {plan.model.width, *plan.widths}
    assert all(r.schedule.warmup_steps <= max(1, 0.05 * r.total_steps) for r in recipes)


def test_a_cpu_atlas_costs_about_three_million_tokens():
    from etastar.engine.plan import build_segments

    segments = build_segments(noise.recipes("cpu"), lambda trunk: {})
    assert 2e6 < 768 * sum(s.stop - s.start for s in segments) < 3.2e6


def test_minutes_change_seeds_and_unknown_presets_are_refused():
    few, many = (len(noise.recipes("night", minutes=m)) for m in (9.0, 90.0))
    assert few < len(noise.recipes("night")) < many
    for call, said in ((lambda: noise.recipes("paper"), "no preset 'paper'; known: smoke, cpu"),
                       (lambda: noise.recipes("cpu", minutes=-1.0), "minutes must be positive")):
        with pytest.raises(ValueError, match=said):
            call()


def test_known_noise_is_measured_by_source_and_rates_by_their_bowl(atlas):
    middle = atlas.table[(atlas.table.arm == noise.ARMS[0]) & (atlas.table.peak_lr == 2.0 ** noise.DESIGNS["night"].centre)]
    assert middle.relative_lr.iloc[0] == pytest.approx(2 ** (noise.DESIGNS["night"].centre + 6), rel=0.05)
    at = middle[(middle.width == 32) & (middle.horizon_tokens == 512 * 768)].set_index("source")
    for source, sd in (("seed", math.hypot(NOISE["seed"], NOISE["own"])), ("order", math.hypot(NOISE["order"], NOISE["own"])),
                       ("both", math.hypot(*NOISE.values())), ("rerun", NOISE["own"])):
        assert at.loc[source, "sd_low"] < sd * 1.3 and at.loc[source, "sd_high"] > sd / 1.3, source
    assert at.loc["both", "df"] == 9 and at.loc["rerun", "df"] == 3


def test_the_deviation_to_plan_with_is_the_paired_one_at_one_rate(atlas):
    alone, paired = (atlas.sd_for(32, 512 * 768, 0.6, paired=p) for p in (False, True))
    assert alone.sd == pytest.approx(math.hypot(*NOISE.values()), rel=0.5) and paired.sd == pytest.approx(NOISE["own"] * 2**0.5, rel=0.5)
    with pytest.raises(ValueError, match="within 3 octaves"):
        atlas.sd_for(4096, 512 * 768)
    with pytest.raises(ValueError, match="no two arms"):
        noise.measure(world("cpu")[:4]).sd_for(32, 112 * 768, paired=True)


def test_arms_are_told_by_schedule_and_optimizer_not_by_scale():
    base = noise.DESIGNS["cpu"].recipe(5000)
    assert noise.arm_of(base) == noise.arm_of(base.replace(horizon_tokens=2 * base.horizon_tokens, peak_lr=0.1)) == "linear 20 %"
    others = [base.replace(optimizer=es.AdamW(beta2=0.99)), base.replace(beta2_changes=((768 * 90, 0.99),)),
              base.replace(schedule=es.Constant(warmup_steps=5)), base.replace(schedule=es.Cosine(floor=0.0, warmup_steps=5))]
    assert len({noise.arm_of(r) for r in [base, *others]}) == 5


def test_a_store_of_any_runs_is_read_and_not_trained_into(tmp_path):
    plan = noise.DESIGNS["smoke"]
    losses = {5000: 4.0, 5001: 4.1, 5002: None}
    for seed, loss in losses.items():
        recipe = plan.recipe(seed)
        es_store = _store(tmp_path)
        es_store.write_run(recipe, {}, {"val_loss": loss, "status": "done" if loss else "diverged"})
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    row = noise.from_store(tmp_path).table.iloc[0]
    assert (row.source, row.n, row.diverged) == ("both", 2, 1) and row.sd == pytest.approx(0.1 / math.sqrt(2))
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="no finished runs"):
        noise.from_store(tmp_path / "nothing")


def _store(path):
    from etastar.engine.store import Store

    return Store(path)


def test_figures_show_every_cell_and_name_their_axes(atlas):
    drawn = noise.figures(atlas)
    levels, pairs = drawn["noise"], drawn["pairing"]
    scales = {(r.width, r.horizon_tokens) for r in atlas.table.itertuples()}
    assert len(levels.axes) == len(scales)
    shown = sum(len(line.get_xdata()) for ax in levels.axes for line in ax.get_lines())
    assert shown == len(atlas.table)
    assert all("nats per token" in ax.get_ylabel() for ax in (levels.axes[0], *pairs.axes)) and pairs.axes[0].get_xlabel()
    points = [line for line in pairs.axes[0].get_lines() if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == len(atlas.pairs)
    with pytest.raises(ValueError, match="no column 'source'"):
        plots.noise_levels(pd.DataFrame({"x": [1]}))
    with pytest.raises(ValueError, match="two finite runs"):
        plots.noise_levels(atlas.table.assign(df=0))


def test_what_is_said_is_computed(atlas):
    said = noise.interpretation(atlas)
    both = atlas.table[atlas.table.source == "both"].sd
    assert f"- both: {both.median():.2g} nats at the median of {len(both)} cells" in said
    louder = noise.NoiseAtlas(atlas.runs, atlas.table.assign(sd=2 * atlas.table.sd), atlas.pairs)
    assert noise.interpretation(louder) != said
    json.dumps(said)


@pytest.mark.archive
def test_published_rerun_noise_has_its_interval(skip_if_not_fetched):
    with skip_if_not_fetched():
        archive("haegele")
        row = noise.published().iloc[0]
    assert row.sd == pytest.approx(0.0012, abs=1e-4) and row.sd_low < row.sd < row.sd_high and row.sd_high < 0.0025


@pytest.mark.slow
def test_a_smoke_atlas_is_trained_and_plain_reruns_do_not_stray(tmp_path):
    runs = noise.run("smoke", store=tmp_path, backend="inline", progress=False)
    atlas = noise.measure(runs)
    assert set(atlas.table.source) == {"seed", "order", "both", "rerun"} and np.isfinite(atlas.table.sd).all()
    parts = atlas.table.set_index("source").loc["rerun", "sd"]
    assert parts < 1e-3 < atlas.table.set_index("source").loc["seed", "sd"].max()
