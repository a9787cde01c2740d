"""Operator norms logged while runs train: those of the weights that are handed out, the same in a branch as in a straight run, and no
bit of the training changes."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import etastar as es
from etastar.engine.norm_log import slot_norms, weight_norms
from etastar.engine.run import find_run
from etastar.engine.slots import SlotStack
from etastar.engine.store import Store, parquet, read_parquet
from etastar.model.decoder import init_parameters, stack, unstack
from etastar.model.norms import operator_norms
from etastar.observe import LOGS
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, counted, interrupted_after, recipe, trained_alone, wsd

FAST = dict(progress=False, backend="inline")
OBSERVE = es.Observe(norms_every_tokens=5 * BATCH)
TRUNK, BRANCH = recipe(22), recipe(22, schedule=wsd(9))
COLUMNS = list(LOGS["norms"])


def expected(decoder) -> list[float]:
    """The three numbers by the table of all norms."""
    table = operator_norms(decoder)
    return [table.norm[table.role == role].max() for role in ("embedding", "hidden", "output")]


def logged(run) -> pd.DataFrame:
    return run.curve.set_index("step")[COLUMNS].dropna()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return trained_alone(tmp_path_factory.mktemp("straight"), observe=OBSERVE, **FAST)


def assert_same_curve(run, other):
    assert run.observed == other.observed == OBSERVE
    pd.testing.assert_frame_equal(run.curve, other.curve, check_exact=True)


@pytest.mark.parametrize("changes", [{}, dict(model=es.Model(width=32, depth=2, head_dim=16, context=32, kv_heads=1, tied=False)),
                                     dict(optimizer=es.ScheduleFreeAdamW(), peak_lr=2**-5)], ids=["tied", "untied", "Schedule-Free"])
def test_what_is_logged_is_worked_out_again_from_the_models(changes, tmp_path):
    long = recipe(13, **changes)
    (run,) = es.run([long], store=tmp_path, observe=OBSERVE, **FAST)
    assert logged(run).index.tolist() == [5, 10, 13]  # and at the end
    np.testing.assert_allclose(logged(run).loc[13], expected(run.model()), rtol=1e-6)
    for steps in (5, 10):
        (short,) = es.run([long.replace(horizon_tokens=steps * BATCH)], store=tmp_path / str(steps), **FAST)
        np.testing.assert_allclose(logged(run).loc[steps], expected(short.model()), rtol=1e-6)
    if long.model.tied:
        assert (logged(run).norm_output / logged(run).norm_embedding).to_numpy() == pytest.approx(np.full(3, 32.0))


def test_logging_changes_neither_id_nor_bit(straight, tmp_path):
    (plain,) = es.run([BRANCH], store=tmp_path, **FAST)
    seen = straight(BRANCH)
    assert plain.run_id == seen.run_id and plain.val_loss == seen.val_loss
    assert plain.curve.drop(columns=COLUMNS).equals(seen.curve.drop(columns=COLUMNS)) and plain.curve[COLUMNS].isna().all(axis=None)
    ours, theirs = plain.model().parameters_by_name(), seen.model().parameters_by_name()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", [
    pytest.param(FAST, id="inline"), pytest.param(FAST | dict(slots=3), id="stack"),
    pytest.param(dict(progress=False, workers=2), id="workers", marks=pytest.mark.slow)])
def test_branches_log_what_straight_runs_do_and_each_its_own_end(layout, straight, tmp_path):
    early = recipe(8)  # ends on the trunk's way, between two logged steps
    sweep = [TRUNK, BRANCH, early, recipe(22, peak_lr=2**-7), recipe(22, schedule=wsd(9, "1-sqrt"))]
    runs = es.run(sweep, store=tmp_path, observe=OBSERVE, **layout)
    for run in runs:
        assert_same_curve(run, straight(run.recipe))
    assert logged(runs[0]).index.tolist() == [5, 10, 15, 20, 22] and logged(runs[2]).index.tolist() == [5, 8]


def test_an_interrupted_run_goes_on_with_what_it_logged(straight, tmp_path):
    with interrupted_after(12):
        es.run([BRANCH], store=tmp_path, observe=OBSERVE, snapshot_seconds=0.0, **FAST)
    (run,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, snapshot_seconds=0.0, **FAST)
    assert_same_curve(run, straight(BRANCH))


def test_a_run_that_ends_where_a_state_was_stored_has_its_last_norms(straight, tmp_path):
    first, again = recipe(8), recipe(8, schedule=es.WSD(warmup_steps=4, cooldown_fraction=0.0))
    assert first.run_id != again.run_id and (first.lr() == again.lr()).all()
    es.run([first], store=tmp_path, observe=OBSERVE, **FAST)
    (run,) = es.run([again], store=tmp_path, observe=OBSERVE, **FAST)  # not a step is left
    assert_same_curve(run, straight(first))


def test_a_run_that_was_not_logged_so_is_trained_again_and_only_then(tmp_path, monkeypatch):
    steps = counted(monkeypatch)
    for observe, trained in ((es.Observe(), 13), (OBSERVE, 26), (OBSERVE, 26), (es.Observe(), 26),
                             (es.Observe(norms_every_tokens=4 * BATCH), 39)):
        (run,) = es.run([recipe(13)], store=tmp_path, observe=observe, **FAST)
        assert sum(steps) == trained
    assert logged(run).index.tolist() == [4, 8, 12, 13]


def test_a_diverged_run_keeps_what_it_logged_and_its_neighbours_theirs(straight, tmp_path):
    wild = recipe(22, peak_lr=1e30, schedule=es.Constant(warmup_steps=0), optimizer=es.AdamW(clip_norm=None), seed=9)
    often = es.Observe(norms_every_tokens=BATCH)
    runs = es.run([wild, BRANCH], store=tmp_path, observe=often, slots=2, **FAST)
    assert [run.status for run in runs] == ["diverged", "done"]
    last = runs[0].curve.iloc[-1]
    assert np.isnan(last.train_loss) and last[COLUMNS].isna().all()
    assert runs[0].curve[COLUMNS].iloc[:-1].notna().all(axis=None) and len(runs[0].curve) > 1
    pd.testing.assert_frame_equal(logged(runs[1]).loc[[5, 10, 15, 20, 22]], logged(straight(BRANCH)), check_exact=True)


def test_a_store_from_before_there_were_norms_is_read_and_gone_on_with(tmp_path):
    (trunk,) = es.run([TRUNK], store=tmp_path, **FAST)
    for record in [*tmp_path.glob(".nodes/*/*/meta.json"), trunk.path / "summary.json"]:
        body = json.loads(record.read_text())
        name = next(n for n in ("chunk.parquet", "metrics.parquet") if n in body["files"])
        data = parquet(read_parquet((record.parent / name).read_bytes()).drop(columns=COLUMNS))
        (record.parent / name).write_bytes(data)
        body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        body.pop("norms_every_tokens", None)
        record.write_text(json.dumps(body))
    old = find_run(tmp_path, TRUNK.run_id)
    assert old.curve.columns.tolist() == trunk.curve.columns.tolist() and old.curve[COLUMNS].isna().all(axis=None)
    longer, steps = recipe(26), Store(tmp_path).stored_nodes(TRUNK.trunk_id, es.Observe())
    (run,) = es.run([longer], store=tmp_path, **FAST)
    assert steps and run.curve.columns.tolist() == trunk.curve.columns.tolist() and run.curve.train_loss[:22].equals(old.curve.train_loss)


def test_slots_are_logged_as_each_alone_is_bit_for_bit():
    stacked = SlotStack(recipe(), prepare(CORPUS), slots=3)
    for slot in range(3):
        stacked.load(slot, recipe(seed=slot), None)
    together = slot_norms(stacked, [2, 0, 1])
    for slot, found in zip((2, 0, 1), together, strict=True):
        alone = SlotStack(recipe(), prepare(CORPUS))
        alone.load(0, recipe(seed=slot), None)
        assert slot_norms(alone, [0]) == [found]


def test_on_a_gpu_all_slots_are_worked_out_at_once_and_those_that_are_due_are_given():
    stacked = SlotStack(recipe(), prepare(CORPUS), slots=3)
    for slot in range(3):
        stacked.load(slot, recipe(seed=slot), None)
    as_if = SimpleNamespace(device=torch.device("cuda"), flat=stacked.flat, optimizer=stacked.optimizer, model=stacked.model)
    np.testing.assert_allclose(slot_norms(as_if, [2, 0]), slot_norms(stacked, [2, 0]), rtol=1e-10)


def test_a_stack_worked_out_at_once_and_in_parts_is_that_of_each_run(monkeypatch):
    model = es.Model(width=288, depth=2, head_dim=16, kv_heads=2, ffn_width=32, tied=False)  # beyond what is worked out exactly
    runs = [init_parameters(model, 50, es.SP(init_std=0.02 * (seed + 1)), seed) for seed in range(2)]
    found = weight_norms(stack(runs), model)
    for slot, params in enumerate(runs):
        table = operator_norms(params)
        wanted = [table.norm[table.role == role].max() for role in ("embedding", "hidden", "output")]
        np.testing.assert_allclose(found[slot], wanted, rtol=1e-5)
        np.testing.assert_allclose(weight_norms(stack([unstack(stack(runs), slot)]), model)[0], found[slot], rtol=1e-12)
    monkeypatch.setattr("etastar.engine.norm_log.HELD_BYTES", 1)
    torch.testing.assert_close(weight_norms(stack(runs), model), found, rtol=1e-12, atol=0)


def test_norms_are_due_as_other_cadences_are_and_part_of_what_is_covered():
    with pytest.raises(ValueError, match="norms_every_tokens must be at least 1; got 0"):
        es.Observe(norms_every_tokens=0)
    assert [step for step in range(1, 13) if OBSERVE.log_due("norms", step, 2 * BATCH)] == [3, 5, 8, 10]
    assert OBSERVE.covers(es.Observe()) and OBSERVE.covers(OBSERVE) and not es.Observe().covers(OBSERVE)
    assert not es.Observe(norms_every_tokens=BATCH).covers(OBSERVE)
    assert es.Observe.from_meta({"kind": "end", "val_every_tokens": 7}).norms_every_tokens is None


def test_a_sweep_tells_the_time_spent_on_norms(tmp_path):
    es.run([TRUNK], store=tmp_path, observe=OBSERVE, **FAST)
    assert json.loads((tmp_path / "sweeps.jsonl").read_text())["norms"] > 0
