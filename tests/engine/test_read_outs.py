"""Averages read out while runs train: no bit changes, a branch's compose with its trunk's, and what is resumed has them too."""

import json

import numpy as np
import pytest
import torch

import etastar as es
from etastar.engine.plan import Node, prefix_hash
from etastar.engine.read_outs import read_averages
from etastar.engine.slots import SlotStack
from etastar.engine.store import Damaged, Store
from etastar.optim.averaging import ema_decay
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, counted, interrupted_after, recipe, trained_alone, wsd

FAST = dict(progress=False, backend="inline")
OBSERVE = es.Observe(ema_horizon_tokens=(3 * BATCH, 20 * BATCH), average_every_tokens=5 * BATCH)
TRUNK, BRANCH = recipe(30), recipe(30, schedule=wsd(9))


def weights(decoder):
    return {name: p.detach() for name, p in decoder.parameters_by_name().items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trajectory(r):
    """The evaluated weights after every step, in float64."""
    stack = SlotStack(r, prepare(CORPUS))
    stack.load(0, r, None)
    made = []
    for lr in r.lr():
        stack.train(np.array([[lr]]))
        made.append({name: tensor.double() for name, tensor in stack.weights(0).items()})
    return made


def mean(found):
    return {name: sum(w[name] for w in found) / len(found) for name in found[0]}


def assert_near(decoder, expected):
    for name, tensor in weights(decoder).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return trained_alone(tmp_path_factory.mktemp("straight"), observe=OBSERVE, **FAST)


def assert_same_read_outs(run, other):
    assert run.val_loss == other.val_loss and run.observed == other.observed == OBSERVE
    assert run.averages().equals(other.averages())
    for tokens in OBSERVE.ema_horizon_tokens:
        assert_same(weights(run.averaged_model("ema", horizon_tokens=tokens)), weights(other.averaged_model("ema", horizon_tokens=tokens)))
    for name in ("swa", "lawa"):
        assert_same(weights(run.averaged_model(name, windows=6)), weights(other.averaged_model(name, windows=6)))


def test_observing_changes_neither_id_nor_bit(straight, tmp_path):
    (plain,) = es.run([BRANCH], store=tmp_path, **FAST)
    seen, lr = straight(BRANCH), BRANCH.lr()
    assert plain.run_id == seen.run_id and plain.val_loss == seen.val_loss
    assert plain.curve.equals(seen.curve)
    assert_same(weights(plain.model()), weights(seen.model()))
    end = Node(BRANCH.trunk_id, len(lr), prefix_hash(lr).hexdigest()[:16])
    states = [run.store.node_state(end) for run in (plain, seen)]
    assert_same(states[0], {name: t for name, t in states[1].items() if not name.startswith("average/")})
    assert len(states[1]) == len(states[0]) + 3 * len(weights(plain.model()))


@pytest.mark.parametrize("r", [BRANCH, recipe(30, optimizer=es.ScheduleFreeAdamW(), peak_lr=2**-5)], ids=["AdamW", "Schedule-Free"])
def test_every_read_out_is_the_average_it_says_of_the_weights_that_are_validated(r, straight):
    run, seen = straight(r), trajectory(r)
    for tokens in OBSERVE.ema_horizon_tokens:
        decay, ema = ema_decay(tokens, BATCH), seen[0]
        for w in seen[1:]:
            ema = {name: decay * ema[name] + (1 - decay) * w[name] for name in ema}
        assert_near(run.averaged_model("ema", horizon_tokens=tokens), ema)
    assert_near(run.averaged_model("swa", windows=1), mean(seen[25:]))
    assert_near(run.averaged_model("swa", windows=4), mean(seen[10:]))
    assert_near(run.averaged_model("lawa", windows=4), mean([seen[14], seen[19], seen[24], seen[29]]))
    assert_same(weights(run.averaged_model("lawa", windows=1)), weights(run.model()))
    assert_near(run.averaged_model("swa", windows=2, to_tokens=22 * BATCH), mean(seen[10:20]))  # any later window composes
    assert_near(run.averaged_model("lawa", windows=2, to_tokens=20 * BATCH), mean([seen[14], seen[19]]))


def test_the_table_has_every_read_out_on_two_halves_of_validation(straight):
    run = straight(BRANCH)
    table = run.averages()
    assert table.read_out.tolist() == ["final", "ema", "ema"] + ["swa"] * 6 + ["lawa"] * 6
    assert table.horizon_tokens.dropna().tolist() == [3 * BATCH, 20 * BATCH] and table.windows.dropna().tolist() == [1, 2, 3, 4, 5, 6] * 2
    assert (table.to_tokens == 30 * BATCH).all()
    assert (table.from_tokens[table.read_out == "swa"] == [(30 - 5 * k + 1) * BATCH for k in range(1, 7)]).all()
    assert (table.from_tokens[table.read_out == "lawa"] == [(30 - 5 * k + 5) * BATCH for k in range(1, 7)]).all()
    final = table.iloc[0]
    assert final.val_loss == run.val_loss == table.val_loss[table.read_out == "lawa"].iloc[0]
    rank = run.validation.document.rank(method="dense")  # 1, 2, …: documents take turns
    for name, half in (("val_loss_a", rank % 2 == 1), ("val_loss_b", rank % 2 == 0)):
        assert half.any() and final[name] == pytest.approx(run.validation.loss[half].astype("float64").mean())
    assert table.val_loss.nunique() == len(table) - 1


@pytest.mark.parametrize("layout", [FAST, FAST | dict(slots=3), dict(progress=False, workers=2)], ids=["inline", "stack", "workers"])
def test_read_outs_of_branches_are_those_of_straight_runs(layout, straight, tmp_path):
    sweep = [TRUNK, BRANCH, recipe(30, schedule=wsd(9, "1-sqrt")), recipe(30, peak_lr=2**-7),
             recipe(30, beta2_changes=((22 * BATCH, 0.5),))]
    for run in es.run(sweep, store=tmp_path, observe=OBSERVE, **layout):
        assert_same_read_outs(run, straight(run.recipe))
    shared = [path for path in (tmp_path / ".nodes").glob("*-windows-*/*") if int(path.name[:8]) <= 20]
    assert len(shared) == 2 * 4  # two trunks' windows before any branch, each once


def test_a_finished_trunk_is_branched_with_its_averages_and_without_training_it_again(straight, tmp_path, monkeypatch):
    (trunk,) = es.run([recipe(21)], store=tmp_path, observe=OBSERVE, **FAST)
    steps = counted(monkeypatch)
    (run,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    assert_same_read_outs(run, straight(BRANCH))
    assert sum(steps) == 30 - 21
    windows = list((tmp_path / ".nodes").glob("*-windows-*/*"))
    assert len(windows) == 6 and trunk.averages().windows.max() == 4


def test_an_interrupted_run_goes_on_with_its_averages(straight, tmp_path, monkeypatch):
    with interrupted_after(17):
        es.run([BRANCH], store=tmp_path, observe=OBSERVE, snapshot_seconds=0.0, **FAST)
    steps = counted(monkeypatch)
    (run,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, snapshot_seconds=0.0, **FAST)
    assert_same_read_outs(run, straight(BRANCH))
    assert sum(steps) < 30


def test_a_run_observed_otherwise_is_replayed_with_the_same_bits_and_only_then(straight, tmp_path, monkeypatch):
    (plain,) = es.run([BRANCH], store=tmp_path, **FAST)
    steps = counted(monkeypatch)
    (seen,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    assert sum(steps) == 30  # an EMA goes back to the first step, which no state without it does
    assert_same_read_outs(seen, straight(BRANCH))
    assert_same(weights(plain.model()), weights(seen.model()))
    for less in (OBSERVE, es.Observe(), es.Observe(ema_horizon_tokens=(20 * BATCH,)), es.Observe(average_every_tokens=5 * BATCH)):
        es.run([BRANCH], store=tmp_path, observe=less, **FAST)
    assert sum(steps) == 30
    (again,) = es.run([BRANCH], store=tmp_path, observe=es.Observe(average_every_tokens=10 * BATCH), **FAST)
    assert sum(steps) == 60 and again.averages().windows.max() == 3
    assert_near(again.averaged_model("swa", windows=1), {n: t.double() for n, t in weights(seen.averaged_model("swa", windows=2)).items()})


def test_lost_windows_are_said_and_made_again(straight, tmp_path):
    (run,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    Store(tmp_path).collect_garbage(states=True)
    with pytest.raises(Damaged, match="is missing; es.run"):
        run.averages()
    assert_same(weights(run.averaged_model("ema", horizon_tokens=20 * BATCH)),
                weights(straight(BRANCH).averaged_model("ema", horizon_tokens=20 * BATCH)))
    (again,) = es.run([BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    assert_same_read_outs(again, straight(BRANCH))


def test_what_was_not_observed_is_refused_by_name(straight, tmp_path):
    (plain,) = es.run([recipe(8)], store=tmp_path, **FAST)
    assert plain.averages().read_out.tolist() == ["final"] and "observed" in plain.summary and not plain.summary["observed"]
    for run, asked in ((plain, dict(read_out="swa", windows=1)), (straight(BRANCH), dict(read_out="swa", windows=7)),
                       (straight(BRANCH), dict(read_out="swa")), (straight(BRANCH), dict(read_out="ema", horizon_tokens=BATCH)),
                       (straight(BRANCH), dict(read_out="lawa", windows=2, to_tokens=9 * BATCH)), (plain, dict(read_out="swaa"))):
        with pytest.raises(ValueError, match=rf"has no '{asked['read_out']}' of"):
            run.averaged_model(**asked)


def test_a_diverged_run_has_no_averages_and_its_neighbours_keep_theirs(straight, tmp_path):
    wild = recipe(30, peak_lr=1e30, schedule=es.Constant(warmup_steps=0), optimizer=es.AdamW(clip_norm=None), seed=9)
    runs = es.run([wild, BRANCH], store=tmp_path, observe=OBSERVE, slots=2, **FAST)
    assert [run.status for run in runs] == ["diverged", "done"]
    with pytest.raises(ValueError, match="diverged after"):
        runs[0].averages()
    assert_same_read_outs(runs[1], straight(BRANCH))
    assert es.run([wild], store=tmp_path, observe=OBSERVE, **FAST)[0].status == "diverged"


@pytest.mark.parametrize("wrong", [dict(average_every_tokens=0), dict(ema_horizon_tokens=(0,)), dict(ema_horizon_tokens=(5, 5)),
                                   dict(val_every_tokens=0)], ids=str)
def test_impossible_read_outs_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        es.Observe(**wrong)


def test_an_observe_survives_json_and_older_metadata():
    assert es.Observe.from_meta(json.loads(json.dumps({"kind": "end", **OBSERVE.to_meta()}))) == OBSERVE
    assert es.Observe.from_meta({"kind": "end", "val_every_tokens": 7}) == es.Observe(val_every_tokens=7)
    assert OBSERVE.covers(es.Observe()) and not es.Observe().covers(OBSERVE)
    for more in (es.Observe(val_every_tokens=7), es.Observe(ema_horizon_tokens=(1,)), es.Observe(average_every_tokens=7)):
        assert more.covers(more) and not OBSERVE.covers(more) and not es.Observe().covers(more)
    assert es.Observe(val_every_tokens=7, average_every_tokens=5).covers(es.Observe(val_every_tokens=7))


def test_what_was_validated_is_kept(tmp_path, monkeypatch):
    (run,) = es.run([TRUNK], store=tmp_path, observe=OBSERVE, **FAST)
    assert run.lacks_averages() == 2 + 2 * 6 and run.lacks_averages((1, 3)) == 2 + 2 * 2
    some = run.averages((1, 3))
    assert run.lacks_averages((1, 3)) == 0 and run.lacks_averages() == 2 * 4
    monkeypatch.setattr("etastar.engine.run.validate", None)  # nothing is left to be worked out
    assert run.averages((1, 3)).equals(some) and set(some.windows.dropna()) == {1, 3}
    (tmp_path / ".averages" / f"{run.run_id}.json").write_text("{")
    assert run.lacks_averages((1, 3)) == 6


def test_averages_of_many_runs_side_by_side_are_those_of_each(tmp_path):
    runs = es.run([TRUNK, BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    many = read_averages(runs, (2, 5), workers=2)
    assert not any(run.lacks_averages((2, 5)) for run in runs)
    (tmp_path / ".averages" / f"{BRANCH.run_id}.json").unlink()
    for run in runs:
        one = run.averages((2, 5))
        found = many[many.run_id == run.run_id].drop(columns="run_id").reset_index(drop=True)
        spans = ["read_out", "horizon_tokens", "windows", "from_tokens", "to_tokens"]
        assert found[spans].equals(one[spans])
        assert np.allclose(found.val_loss, one.val_loss, rtol=1e-6) and run.averages().val_loss[0] == run.val_loss


def test_a_process_that_cannot_read_a_run_says_so(tmp_path):
    runs = es.run([TRUNK, BRANCH], store=tmp_path, observe=OBSERVE, **FAST)
    for run in runs:
        (run.path / "averages.safetensors").write_bytes(b"short")
    with pytest.raises(RuntimeError, match=r"(?s)status 1:.*averages.safetensors has 5 bytes"):
        read_averages(runs, (1, 2, 3), workers=2)
