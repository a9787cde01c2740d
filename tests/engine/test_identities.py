"""Bits through the public surface: branch = straight, resumed = uninterrupted, slot = solo, whoever the neighbours are."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import etastar as es
from etastar.engine.checkpoint import split_state
from etastar.engine.plan import Node, controls, prefix_hash
from etastar.engine.slots import SlotStack
from etastar.engine.store import Store
from etastar.schedules import Table
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, recipe, wsd

FAST = dict(progress=False)


def end_node(r):
    return Node(r.trunk_id, r.total_steps, prefix_hash(controls(r)).hexdigest()[:16])


def bits(run):
    """All that a run ends with: parameters and moments, the curve, the validation loss."""
    state = run.store.node_state(end_node(run.recipe))
    curve = run.curve[["step", "lr", "train_loss", "grad_norm"]].to_numpy()
    return state, curve, run.val_loss


def assert_same_bits(a, b):
    (state_a, curve_a, val_a), (state_b, curve_b, val_b) = bits(a), bits(b)
    assert state_a.keys() == state_b.keys()
    for name in state_a:
        assert torch.equal(state_a[name], state_b[name]), name
    assert np.array_equal(curve_a, curve_b, equal_nan=True)
    assert val_a == val_b


def random_tables(count=6, length=18, seed=None):
    rng = random.Random(seed)
    shared = [rng.uniform(0.2, 1.0) for _ in range(length)]
    made = []
    for _ in range(count):
        cut = rng.randrange(1, length)
        factors = tuple(shared[:cut] + [rng.uniform(0.0, 1.0) for _ in range(rng.randrange(1, length))])
        changes = [(step * BATCH, rng.choice([0.5, 0.95, 0.999])) for step in range(1, len(factors)) if rng.random() < 0.2]
        made.append(recipe(len(factors), peak_lr=2**-5, schedule=Table(factors=factors), beta2_changes=changes))
    return made


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Each run trained alone, from the first step, in a store of its own."""
    root = tmp_path_factory.mktemp("straight")
    done = {}

    def alone(r):
        if r.run_id not in done:
            (done[r.run_id],) = es.run([r], store=root / r.run_id, backend="inline", **FAST)
        return done[r.run_id]

    return alone


SWEEP = [recipe(40, schedule=wsd(8)), recipe(40, schedule=wsd(8, "1-sqrt")), recipe(24, schedule=wsd(4)), recipe(16),
         recipe(24, schedule=wsd(4), peak_lr=2**-7), recipe(24, schedule=wsd(4), seed=3)]


@pytest.mark.parametrize("layout", [dict(backend="inline"), dict(workers=2), dict(backend="inline", slots=4),
                                    dict(workers=2, slots=3)], ids=str)
def test_a_branch_equals_the_straight_run(layout, straight, tmp_path):
    for run in es.run(SWEEP, store=tmp_path, **layout, **FAST):
        assert run.status == "done"
        assert_same_bits(run, straight(run.recipe))


def beta2_after(*changes):
    """Changes of beta2 given in steps."""
    return tuple((step * BATCH, beta2) for step, beta2 in changes)


CHANGED = [recipe(40, beta2_changes=beta2_after((20, 0.99))), recipe(40), recipe(30, schedule=wsd(4), beta2_changes=beta2_after((26, 0.5))),
           recipe(40, beta2_changes=beta2_after((11, 0.95), (20, 0.99), (32, 0.999))),  # no change, the first one's, another
           recipe(40, schedule=wsd(8), beta2_changes=beta2_after((20, 0.99), (24, 0.95))),
           *(recipe(24, seed=s, beta2_changes=beta2_after((5 + 4 * s, 0.999))) for s in range(1, 4))]


@pytest.mark.parametrize("layout", [dict(backend="inline"), dict(workers=2), dict(backend="inline", slots=4)], ids=str)
def test_a_branch_whose_beta2_changes_equals_the_straight_run_beside_any_neighbour(layout, straight, tmp_path):
    runs = es.run(CHANGED, store=tmp_path, **layout, **FAST)
    for run in runs:
        assert_same_bits(run, straight(run.recipe))
    assert len({run.val_loss for run in runs}) == len(runs)


def test_beta2_changes_after_the_very_step(straight):
    """Step by step on a stack that is told by hand, with the product of all beta2 written out."""
    changed = CHANGED[3]
    stack = SlotStack(changed, prepare(CORPUS))
    stack.load(0, changed.replace(beta2_changes=()), None)
    for step, lr in enumerate(changed.lr()):
        if step == 20:
            stack.optimizer.set_beta2(0, 0.99, since=20, carried=0.95**20)
        if step == 32:
            stack.optimizer.set_beta2(0, 0.999, since=32, carried=0.95**20 * 0.99**12)
        stack.train(np.array([[lr]]))
    told = split_state(straight(changed).store.node_state(end_node(changed)))
    for by_hand, by_run in zip(stack.state(0)[:2], told[:2], strict=True):
        assert by_hand.keys() == by_run.keys() and all(torch.equal(tensor, by_run[name]) for name, tensor in by_hand.items())


@pytest.mark.parametrize("stop", [19, 20, 21, 35])
def test_what_is_resumed_goes_on_with_the_beta2_in_force(stop, straight, tmp_path, monkeypatch):
    changed, observe = CHANGED[3], es.Observe(val_every_tokens=BATCH)  # so that every step ends a stretch
    taken, train = [], SlotStack.train

    def until_stop(stack, lr_MxS):
        taken.append(int(stack.step_M[0]))
        if taken == [*range(stop + 1)]:
            raise KeyboardInterrupt
        return train(stack, lr_MxS)

    monkeypatch.setattr(SlotStack, "train", until_stop)
    with pytest.raises(KeyboardInterrupt):
        es.run([changed], store=tmp_path, backend="inline", observe=observe, **FAST)
    (run,) = es.run([changed], store=tmp_path, backend="inline", observe=observe, **FAST)
    assert taken == [*range(stop + 1), *range(stop, 40)]
    assert_same_bits(run, straight(changed))


def test_random_controls_shared_and_refilled_equal_the_straight_run(straight, tmp_path):
    recipes = random_tables(seed=time.time_ns() % 10_000)
    for run in es.run(recipes, store=tmp_path, backend="inline", slots=2, **FAST):
        assert_same_bits(run, straight(run.recipe))


def test_slot_order_and_number_do_not_matter(tmp_path):
    recipes = [recipe(12, seed=s, peak_lr=2 ** -(5 + s % 3)) for s in range(8)]
    forward = es.run(recipes, store=tmp_path / "a", backend="inline", slots=8, **FAST)
    backward = es.run(recipes[::-1], store=tmp_path / "b", backend="inline", slots=8, **FAST)[::-1]
    solo = es.run(recipes, store=tmp_path / "c", backend="inline", slots=1, **FAST)
    for a, b, c in zip(forward, backward, solo, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


def test_a_slot_driven_to_nan_changes_no_bit_of_its_neighbours(straight, tmp_path):
    wild = recipe(24, peak_lr=1e30, schedule=es.Constant(warmup_steps=0), optimizer=es.AdamW(clip_norm=None), seed=9)
    calm = [recipe(24, seed=s) for s in range(3)]
    runs = es.run([calm[0], wild, *calm[1:]], store=tmp_path, backend="inline", slots=4, **FAST)
    assert [r.status for r in runs] == ["done", "diverged", "done", "done"]
    assert np.isnan(runs[1].val_loss) and np.isnan(runs[1].curve.train_loss.iloc[-1])
    assert len(runs[1].curve) < 24
    with pytest.raises(ValueError, match="diverged after"):
        runs[1].model()
    for run in (runs[0], *runs[2:]):
        assert_same_bits(run, straight(run.recipe))


def test_runs_that_stand_on_a_diverged_trunk_have_diverged(tmp_path):
    wild = dict(peak_lr=1e30, optimizer=es.AdamW(clip_norm=None))
    recipes = [recipe(30, schedule=wsd(6), **wild), recipe(60, schedule=wsd(12), **wild), recipe(12)]
    for _ in range(2):
        runs = es.run(recipes, store=tmp_path, workers=2, **FAST)
        assert [r.status for r in runs] == ["diverged", "diverged", "done"]


def test_a_second_run_trains_nothing(tmp_path, monkeypatch):
    first = es.run(SWEEP[:2], store=tmp_path, backend="inline", **FAST)
    monkeypatch.setattr("etastar.engine.slots.SlotStack.train", lambda *a: pytest.fail("trained again"))
    again = es.run(SWEEP[:2], store=tmp_path, backend="inline", **FAST)
    assert [r.val_loss for r in first] == [r.val_loss for r in again]


def test_observing_changes_no_bit(straight, tmp_path):
    (run,) = es.run([SWEEP[0]], store=tmp_path, backend="inline", observe=es.Observe(val_every_tokens=7 * BATCH), **FAST)
    assert_same_bits(run, straight(run.recipe))
    assert run.curve.val_loss.notna().sum() == 40 // 7 + 1


def test_branching_a_finished_run_equals_the_straight_run(straight, tmp_path):
    (trunk,) = es.run([recipe(32)], store=tmp_path, backend="inline", **FAST)
    branch = trunk.branch_recipe(at_tokens=16 * BATCH, schedule=es.WSD(cooldown_fraction=1.0), horizon_tokens=20 * BATCH)
    (run,) = es.run([branch], store=tmp_path, backend="inline", **FAST)
    by_wsd = straight(recipe(20, schedule=wsd(4)))
    state_a, state_b = run.store.node_state(end_node(run.recipe)), by_wsd.store.node_state(end_node(by_wsd.recipe))
    assert all(torch.equal(state_a[name], state_b[name]) for name in state_b)
    assert run.val_loss == by_wsd.val_loss


def test_snapshots_do_not_change_a_bit_and_are_resumed_from(straight, tmp_path):
    (run,) = es.run([SWEEP[0]], store=tmp_path, backend="inline", snapshot_seconds=0.0, **FAST)
    assert_same_bits(run, straight(run.recipe))
    chunks = list((tmp_path / ".nodes").glob("*/*/chunk.parquet"))
    assert len(chunks) > 1  # it was saved on the way
    assert len(list((tmp_path / ".nodes").glob("*/*/state.safetensors"))) == 1  # and cleaned up after itself


SCRIPT = """
import signal, sys, etastar as es
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
sys.path.insert(0, {tests!r})
from test_identities import LONG
es.run(LONG, store={store!r}, workers=2, progress=False, snapshot_seconds=0.3)
"""
LONG = [recipe(1400, schedule=wsd(200)), recipe(1400, schedule=wsd(200, "1-sqrt")), recipe(700, schedule=wsd(100)),
        *(recipe(700, seed=s, schedule=wsd(100)) for s in range(4, 10))]


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_sweep_ends_with_the_same_bits(straight, tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path))
    seed = time.time_ns() % 100_000
    rng = random.Random(seed)
    killed = 0
    while killed < 10:
        began = len(list(tmp_path.glob(".nodes/*/*/meta.json")))
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while process.poll() is None and len(list(tmp_path.glob(".nodes/*/*/meta.json"))) == began:
            time.sleep(0.02)  # until it has trained and saved something
        try:
            process.wait(timeout=rng.uniform(0.0, 1.0))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            killed += 1
            if rng.random() < 0.5:
                os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice and leave
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1.0)
    for run in es.run(LONG, store=tmp_path, workers=2, progress=False):
        assert_same_bits(run, straight(run.recipe))
    assert killed == 10, f"only {killed} kills hit the sweep (seed {seed})"
    assert not list((tmp_path / ".partial").glob("*")) or Store(tmp_path).collect_garbage()


@pytest.mark.slow
def test_ctrl_c_saves_where_every_run_stands_and_the_sweep_goes_on_from_there(straight, tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path)).replace("snapshot_seconds=0.3", "snapshot_seconds=1e9")
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".nodes/*/*/meta.json")):
        time.sleep(0.02)
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1] and process.returncode != 0
    kinds = [json.loads(path.read_text())["kind"] for path in tmp_path.glob(".nodes/*/*/meta.json")]
    assert "snapshot" in kinds
    for run in es.run(LONG[:2], store=tmp_path, workers=2, progress=False):
        assert_same_bits(run, straight(run.recipe))
