"""`etastar tune`: plans from a made-up speed, planted optima read back, and the whole way on a tiny corpus of files."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from worlds import FakeRun

import etastar as es
from etastar import cli, plots
from etastar.analysis.read_runs import read_runs
from etastar.analysis.units import UnitWarning
from etastar.engine.plan import build_segments
from etastar.model.shapes import flops_per_token
from etastar.tune import Plan, Question, make_plan, tune
from etastar.tune import carry_out as steps
from etastar.tune.answer import answer, extrapolated, law_lines
from etastar.tune.plan import LEAST_DRIFT, SCOUT_LOG2, SCOUT_SEED, VERTEX_SD, _widths
from etastar.tune.question import Ladder

CORPUS = es.Corpus("synthetic", vocab=512)
ASKED = Question(es.Model(width=128, depth=2, head_dim=32, context=64), CORPUS, 2**24, 2**12)
EPOCH = 2**26
MAIN = Ladder(32, 512, tuple(2**k for k in range(17, 22)))
SIDES = (Ladder(32, 1024, MAIN.horizons[:-1]), Ladder(64, 512, MAIN.horizons[:-1]))
PLAN = Plan(ASKED, (MAIN, *SIDES), 4, 600.0, 1.0, 1.0, 0.5)
LAW = {"horizon_tokens": -0.4, "batch_tokens": 0.7, "width": -0.8}  # planted exponents
AT = {"horizon_tokens": 2**20, "batch_tokens": 512, "width": 32}  # where the best log2 rate is −7


def seconds_of(recipes, flops_a_second=1e11):
    """A machine that takes 0.2 ms a step and so long a FLOP."""
    segments = build_segments(list(recipes))
    flops = sum(s.tokens * flops_per_token(s.recipe.model, s.recipe.corpus.vocab)["exact"] for s in segments)
    return flops / flops_a_second + 2e-4 * sum(s.stop - s.start for s in segments)


def best_log2(horizon_tokens, batch_tokens, width, law=None):
    at = {"horizon_tokens": horizon_tokens, "batch_tokens": batch_tokens, "width": width}
    return -7 + sum(e * math.log2(at[name] / AT[name]) for name, e in (law or LAW).items())


def world(plan, noise=0.0, rng=None, best=best_log2, offset=0.0, curved=0.0):
    """Runs of a plan in a world of skewed bowls; a seed's vertex has the sd `noise` in octaves in every cell."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for ladder in plan.ladders:
        for horizon in ladder.horizons:
            middle = best(ladder.horizons[len(ladder.horizons) // 2], ladder.batch_tokens, ladder.width) + offset
            for seed in plan.seeds:
                vertex = best(horizon, ladder.batch_tokens, ladder.width) + curved * math.log2(horizon / 2**19) ** 2 + noise * rng.normal()
                for k in ladder.offsets:
                    x = middle + k - vertex
                    rows.append({"arm": ladder.name, "peak_lr": 2.0 ** (middle + k), "seed": seed, "horizon_tokens": horizon,
                                 "loss": 4 - 0.05 * math.log2(horizon) + 0.03 * x**2 + 0.002 * x**3 + 0.02 * (seed % 7)})
    return pd.DataFrame(rows).assign(status="done", run_id=[str(i) for i in range(len(rows))])


# -- planning ----------------------------------------------------------------------------------------------------------


def test_more_budget_buys_more_and_a_narrower_expected_interval():
    plans = [make_plan(ASKED, 60.0 * minutes, EPOCH, seconds_of) for minutes in (6, 30, 150, 750)]
    assert all(plan.seconds <= plan.budget_seconds for plan in plans)
    expected = [plan.expected_octaves for plan in plans]
    assert expected == sorted(expected, reverse=True) and expected[0] > 2 * expected[-1]
    tokens = [plan.seed_count * sum(sum(ladder.horizons) for ladder in plan.ladders) for plan in plans]
    assert tokens == sorted(tokens) and plans[-1].ladders[0].horizons[-1] > plans[0].ladders[0].horizons[-1]
    assert plans[-1].seed_count > plans[0].seed_count or len(plans[-1].ladders[0].horizons) > len(plans[0].ladders[0].horizons)


def test_a_plan_is_told_by_its_recipes():
    plan = make_plan(ASKED, 1200.0, EPOCH, seconds_of)
    recipes = plan.recipes({ladder.name: -7.0 for ladder in plan.ladders})
    assert seconds_of([*plan.scouts(), *plan.recipes(plan.unscouted)]) == plan.seconds
    assert {plan.ladder_of(r) for r in recipes} == {ladder.name for ladder in plan.ladders}
    assert min(r.total_steps for r in recipes) >= ASKED.least_steps and max(r.horizon_tokens for r in recipes) <= ASKED.horizon_tokens
    assert {r.seed for r in recipes} == set(plan.seeds) and {r.seed for r in plan.scouts()} == {SCOUT_SEED}
    assert all(r.schedule.warmup_steps <= r.total_steps / 19 for r in recipes)  # a twentieth, to the nearest step
    assert sum(s.tokens for s in build_segments(recipes)) < 0.75 * sum(r.horizon_tokens for r in recipes)  # trunks are shared
    assert len(plan.scouts()) == len(SCOUT_LOG2) * len(plan.ladders)


def test_the_expected_interval_is_students_times_the_leverage_with_the_drift_beyond():
    alone = dataclasses.replace(ASKED, model=dataclasses.replace(ASKED.model, width=32), batch_tokens=256, small_batch_tokens=(256,))
    plan = make_plan(alone, 120.0, EPOCH, seconds_of)
    (ladder,), seeds = plan.ladders, plan.seed_count
    x = np.log2(ladder.horizons)
    leverage = math.sqrt(1 / len(x) + (24 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())  # of a line's prediction at 2^24
    fit = stats.t.ppf(0.975, seeds - 1) * VERTEX_SD * leverage / math.sqrt(seeds)
    assert plan.extrapolated == pytest.approx(1.959964 * LEAST_DRIFT * (24 - x.max()), rel=1e-6) and plan.extrapolated > 0
    assert plan.expected_octaves == pytest.approx(math.hypot(fit, plan.extrapolated), rel=1e-6)


def test_what_is_not_trained_as_asked_has_a_side_ladder_to_fit_it_by():
    def varied(question, name):
        plan = make_plan(question, 1200.0, EPOCH, seconds_of)
        return len({getattr(ladder, name) for ladder in plan.ladders})

    narrow = dataclasses.replace(ASKED, model=dataclasses.replace(ASKED.model, width=32), batch_tokens=256)
    assert varied(narrow, "width") == 1
    wide = dataclasses.replace(ASKED, model=dataclasses.replace(ASKED.model, width=512), batch_tokens=2**14)
    assert varied(wide, "width") == 2 and varied(wide, "batch_tokens") == 2
    mup = dataclasses.replace(wide, parametrization="mup")
    assert varied(mup, "width") == 1


def test_under_mup_small_runs_have_the_parametrization_and_its_base_width():
    mup = dataclasses.replace(ASKED, parametrization="mup", model=dataclasses.replace(ASKED.model, width=512))
    plan = make_plan(mup, 1200.0, EPOCH, seconds_of)
    assert plan.scouts()[0].parametrization == es.MuP(base_width=plan.ladders[0].width, init_std=0.1)
    named = make_plan(dataclasses.replace(mup, base_width=256), 1200.0, EPOCH, seconds_of)
    assert named.scouts()[0].parametrization == es.MuP(base_width=256, init_std=0.1)


def test_under_mup_small_widths_are_whole_parts_of_the_asked_one():
    mup = dataclasses.replace(ASKED, parametrization="mup", model=dataclasses.replace(ASKED.model, width=768))
    assert [widths[0] for widths in _widths(mup)] == [768, 64, 128, 256]  # 512 is none, though it has whole heads
    assert [widths[0] for widths in _widths(dataclasses.replace(mup, base_width=192))] == [768, 64]
    assert (512, 1024) not in _widths(mup) and any(512 in widths for widths in _widths(dataclasses.replace(mup, parametrization="sp")))


def test_small_batches_that_are_named_are_taken():
    plan = make_plan(dataclasses.replace(ASKED, small_batch_tokens=(1024, 256)), 3600.0, EPOCH, seconds_of)
    assert {ladder.batch_tokens for ladder in plan.ladders} == {256, 1024}


def test_a_budget_that_is_too_small_names_the_least_which_is_enough():
    with pytest.raises(ValueError, match="least plan takes about .* give --budget") as refused:
        make_plan(ASKED, 5.0, EPOCH, seconds_of)
    least = int(str(refused.value).split("--budget ")[1].split("m")[0])
    assert make_plan(ASKED, 60.0 * least, EPOCH, seconds_of).seconds <= 60 * least


@pytest.mark.parametrize("changes, said", [
    ({"horizon_tokens": 2**24 + 1}, r"not a multiple of batch_tokens 4096; take 16777216"),
    ({"model": es.Model(width=128, depth=2, head_dim=32, context=100)}, "not a multiple of the context 100; take 4100"),
    ({"horizon_tokens": 2**15}, "no room for 3 shorter ones"),
    ({"parametrization": "ntk"}, "known: sp, mup"),
    ({"small_batch_tokens": (512,)}, "give a second, 2048 for example"),
    ({"small_batch_tokens": (100, 64)}, "multiples of the context 64"),
])
def test_a_question_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(ASKED, **changes)


def test_a_corpus_too_short_for_three_horizons_is_refused():
    with pytest.raises(ValueError, match="one epoch of 'synthetic' has 50,000 tokens, too few for 3 horizons of 256 steps"):
        make_plan(ASKED, 600.0, 50_000, seconds_of)


def test_no_horizon_is_longer_than_an_epoch():
    plan = make_plan(ASKED, 60.0 * 750, 2**20, seconds_of)
    assert max(h for ladder in plan.ladders for h in ladder.horizons) <= 2**20


# -- the answer --------------------------------------------------------------------------------------------------------


def test_a_planted_law_is_read_back():
    found = answer(PLAN, world(PLAN))
    told = dict(zip(found.exponents.regressor, found.exponents.exponent, strict=True))
    assert told == pytest.approx(LAW, abs=0.02)
    assert math.log2(found.peak_lr) == pytest.approx(best_log2(2**24, 2**12, 128), abs=0.1)
    assert found.slope == pytest.approx(-0.4, abs=0.02)
    assert found.extrapolation == {"horizon_tokens": 8.0, "batch_tokens": 4.0, "width": 2.0}
    assert found.warnings == () and len(found.cells) == 13


def test_the_interval_is_the_fits_and_the_drift_at_right_angles():
    found = answer(PLAN, world(PLAN, noise=0.1))
    fit = math.log2(found.fit_high / found.peak_lr)
    beyond = 1.959964 * math.hypot(3 * found.drift["horizon_tokens"], 2 * LEAST_DRIFT, 1 * LEAST_DRIFT)
    assert math.log2(found.peak_lr_high / found.peak_lr) == pytest.approx(math.hypot(fit, beyond), rel=1e-5)
    assert found.peak_lr_low * found.peak_lr_high == pytest.approx(found.peak_lr**2)
    near = extrapolated(found.law, found.cells, {"horizon_tokens": 2**21, "batch_tokens": 512, "width": 32}, found.drift)
    assert near["peak_lr_high"] == pytest.approx(near["fit_high"])  # nothing is added where the runs are


def test_a_bend_is_seen_told_and_widens_the_interval():
    straight, bent = answer(PLAN, world(PLAN, noise=0.02)), answer(PLAN, world(PLAN, noise=0.02, curved=0.08))
    assert any("the exponent itself changes by +0.1" in said for said in bent.warnings) and not straight.warnings
    assert bent.drift["horizon_tokens"] == pytest.approx(bent.slope - bent.exponents.exponent[0])
    assert bent.slope == pytest.approx(-0.4 + 0.08 * 2, abs=0.03)  # 0.08 k² at k = 0 and 2: its chord over the longest three
    assert straight.drift["horizon_tokens"] == LEAST_DRIFT
    assert bent.peak_lr_high / bent.peak_lr_low > straight.peak_lr_high / straight.peak_lr_low


def test_the_intervals_cover_the_planted_optimum():
    asked = 4 * MAIN.horizons[-1]
    alone = dataclasses.replace(ASKED, model=dataclasses.replace(ASKED.model, width=32), batch_tokens=512, horizon_tokens=asked)
    plan = Plan(alone, (Ladder(32, 512, MAIN.horizons[-4:]),), 4, 600.0, 1.0, 1.0, 0.5)
    rng, truth = np.random.default_rng(), 2.0 ** best_log2(asked, 512, 32)
    draws = [answer(plan, world(plan, noise=0.16, rng=rng)) for _ in range(60)]
    fit = sum(a.fit_low <= truth <= a.fit_high for a in draws)
    whole = sum(a.peak_lr_low <= truth <= a.peak_lr_high for a in draws)
    exponent = sum(a.exponents.low[0] <= LAW["horizon_tokens"] <= a.exponents.high[0] for a in draws)
    assert min(fit, exponent) >= 49 and whole >= fit  # a coverage of 95 % stays below 49 of 60 once in 10,000 times
    widths = np.median([[a.fit_high / a.fit_low, a.peak_lr_high / a.peak_lr_low] for a in draws], axis=0)
    assert widths[0] < 8 and widths[1] < 10 * widths[0]


def test_what_an_answer_stands_on_is_warned_of():
    far = dataclasses.replace(ASKED, horizon_tokens=2**30, optimizer=es.AdamW(weight_decay=0.01))
    plan = dataclasses.replace(PLAN, question=far, ladders=tuple(dataclasses.replace(c, horizons=c.horizons[:3]) for c in PLAN.ladders),
                               seed_count=2)
    runs = world(plan)
    side, wide = (runs.arm == ladder.name for ladder in SIDES)
    runs.loc[wide & (runs.horizon_tokens == 2**17), "loss"] = runs.peak_lr[wide]  # best at the edge of the grid
    runs.loc[side & (runs.horizon_tokens == 2**19) & (runs.peak_lr == runs.peak_lr[side].max()), "loss"] = math.nan
    said = " | ".join(answer(plan, runs, epoch_tokens=2**28).warnings)
    for part in ("no bowl for width 64, batch 512 at 131,072 tokens", "3 horizons have a bowl", "2 seeds", "2.05e+03 times the largest",
                 "runs diverged", "4 epochs of this corpus", "weight decay will matter"):
        assert part in said, (part, said)


def test_bowls_that_determine_no_law_are_named():
    runs = world(PLAN)
    runs["loss"] = runs.peak_lr  # best at the lowest rate everywhere
    with pytest.raises(ValueError, match=r"the 0 bowls there are determine no law .* add lr .* Nothing is lost"):
        answer(PLAN, runs)


def test_the_figure_has_the_bowls_and_the_line_to_the_asked_run():
    found = answer(PLAN, world(PLAN, noise=0.05))
    lines = law_lines(found)
    asked = lines[lines.arm == "asked"]
    assert asked.horizon_tokens.max() == pytest.approx(2**24) and asked.lr.iloc[-1] == pytest.approx(found.peak_lr)
    assert (asked.high / asked.low).iloc[-1] > (asked.high / asked.low).iloc[0]
    left, right = plots.tuned(found.runs, found.bowls, found.cells, lines).axes
    assert sum("tokens" in text.get_text() for text in left.texts) == len(MAIN.horizons)
    assert f"asked run: {found.peak_lr:.3g}" in right.get_legend_handles_labels()[1]
    with pytest.raises(ValueError, match="no column 'high'"):
        plots.tuned(found.runs, found.bowls, found.cells.drop(columns="high"), lines)


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch):
    """es.run by a made-up surface; counts the calls."""
    calls = []

    def run(recipes, store="runs", **options):
        calls.append(len(recipes))
        runs = []
        for r in recipes:
            x = math.log2(r.peak_lr) - best_log2(r.horizon_tokens, r.batch_tokens, r.model.width)
            runs.append(FakeRun(r, 4 - 0.05 * math.log2(r.horizon_tokens) + 0.03 * x**2 if x < 3 else math.nan))
        return runs

    monkeypatch.setattr("etastar.engine.execute.run", run)
    monkeypatch.setattr(steps, "expected_cost", lambda recipes, options: dataclasses.replace(_NO_COST, seconds=seconds_of(recipes)))
    return calls


_NO_COST = steps.Cost(runs=0, done=0, segments=0, steps=0, tokens=0, tokens_without_sharing=0, flops=0.0, disk_bytes=0, seconds=0.0,
                      workers=1)


def test_scouts_find_the_grid_and_the_same_call_goes_on_with_the_same_plan(simulated, tmp_path):
    asked = dataclasses.replace(ASKED, corpus=es.Corpus("synthetic", vocab=512, options=(("tokens", 5_000_000),)))
    told = []
    plan, found = tune(asked, 1200.0, results=tmp_path, tell=told.append)
    assert math.log2(found.peak_lr) == pytest.approx(best_log2(2**24, 2**12, 128), abs=0.05)
    assert len(simulated) <= 4 and simulated[0] == len(plan.scouts())  # grids of the scouts' centres need no extension
    assert told[0].startswith("width ") and "expected time" in told[0] and told[1].startswith("peak LR ")
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["answer"]["peak_lr"] == found.peak_lr and (tmp_path / "tune.png").exists()
    assert steps.held_plan(asked, 1200.0, tmp_path) == plan and steps.held_plan(asked, 600.0, tmp_path) is None
    assert steps.held_plan(dataclasses.replace(asked, init_std=0.02), 1200.0, tmp_path) is None


def test_only_planned_nothing_is_trained(simulated, tmp_path):
    plan, found = tune(dataclasses.replace(ASKED, corpus=es.Corpus("synthetic", vocab=512, options=(("tokens", 5_000_000),))), 1200.0,
                       results=tmp_path, plan_only=True)
    assert found is None and simulated == [] and list(tmp_path.iterdir()) == []


@pytest.fixture
def files(tmp_path):
    """A folder of 40 text files of made-up sentences."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 7))) for _ in range(60)]
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(words[j % 60] for j in np.cumsum(rng.integers(0, 4, size=3000))))
    return folder


TINY = ["--vocab", "257", "--context", "32", "--head-dim", "16", "--width", "16", "--depth", "1", "--horizon-tokens", "16384",
        "--batch-tokens", "64", "--least-steps", "32"]


@pytest.fixture
def fast(monkeypatch):
    """A machine of a known speed, so that no test times this one."""
    monkeypatch.setattr("etastar.engine.speed.measured", lambda *shape: {"start": 0, "step": 1.5e-3, "validation": 1e-3, "write": 1e-3})


@pytest.mark.slow
def test_files_are_answered_from_and_nothing_is_trained_again(files, tmp_path, fast):
    model = es.Model(width=16, depth=1, head_dim=16, context=32)
    asked = Question(model, es.Corpus(f"files:{files}/*.txt", vocab=257), 16_384, 64, least_steps=32)
    given = {"store": tmp_path / "runs", "results": tmp_path / "results", "backend": "inline", "progress": False}
    plan, found = tune(asked, 12.0, **given)
    assert found.peak_lr_low < found.peak_lr < found.peak_lr_high and 2**-13 < found.peak_lr < 1
    assert (tmp_path / "results/tune.svg").exists() and len(found.bowls) + sum("no bowl" in w for w in found.warnings) == len(
        [h for ladder in plan.ladders for h in ladder.horizons])
    with pytest.warns(UnitWarning):  # a batch of 64 tokens is meant here
        table = read_runs(tmp_path / "runs")
    assert set(found.runs.run_id) <= set(table.run) and set(table.status) <= {"done", "diverged"}
    before = (tmp_path / "runs/sweeps.jsonl").read_text()
    assert tune(asked, 12.0, **given)[1].peak_lr == found.peak_lr and (tmp_path / "runs/sweeps.jsonl").read_text() == before


def test_the_command_plans_and_says_so_as_text_or_json(files, tmp_path, monkeypatch, capsys, fast):
    monkeypatch.chdir(tmp_path)
    words = ["tune", "--corpus", f"files:{files}/*.txt", *TINY, "--budget", "2m", "--plan-only"]
    assert cli.main(words) == 0
    assert "expected 95 % interval" in (told := capsys.readouterr().out) and "expected time" in told
    assert cli.main([*words, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["answer"] is None and body["plan"]["seconds"] <= 120 and body["question"]["horizon_tokens"] == 16_384
    assert any(law["quantity"] == "peak_lr" for law in body["published"]) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, said", [
    (["--width", "100"], "not a multiple of head_dim"),
    (["--horizon-tokens", "16385"], "take 16384"),
    (["--budget", "1s"], "least plan takes about"),
    (["--corpus", "files:nowhere/*.txt"], "matches no file"),
])
def test_one_clear_line_before_anything_is_trained(files, tmp_path, monkeypatch, capsys, fast, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--corpus", f"files:{files}/*.txt", *TINY, "--budget", "14s", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_a_budget_is_written_with_its_unit(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--corpus", "synthetic", *TINY, "--budget", "30"])
    assert "write 90s, 30m or 2h" in capsys.readouterr().err
    assert [cli._seconds(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
