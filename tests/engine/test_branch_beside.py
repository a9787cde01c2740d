"""Branches that leave a run which is still training, or was killed, while its sweep has the store: the bits of all stay theirs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import etastar as es
from etastar import cli
from etastar.engine import dispatch, execute, folders
from etastar.engine.beside import Beside
from etastar.engine.store import Store, StoreError
from test_identities import assert_same_bits
from tiny import BATCH, recipe

FAST = dict(backend="inline", progress=False)
TRUNK, LONG = recipe(300), recipe(4000, repeat=True)
SCRIPT = """
import sys, etastar as es
sys.path.insert(0, {tests!r})
from test_branch_beside import {trunk}
es.run([{trunk}], store={store!r}, progress=False, snapshot_seconds=0.02, {how})
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Each run trained alone, from the first step, in a store of its own."""
    root, done = tmp_path_factory.mktemp("straight"), {}

    def alone(r):
        if r.run_id not in done:
            (done[r.run_id],) = es.run([r], store=root / r.run_id, **FAST)
        return done[r.run_id]

    return alone


@pytest.fixture
def sweep(tmp_path):
    """Starts a sweep in another process and gives it back when a snapshot is stored."""
    started = []

    def start(trunk="TRUNK", how="backend='inline'"):
        script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path), trunk=trunk, how=how)
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        started.append(process)
        while not list(tmp_path.glob(".nodes/*/*/meta.json")):
            assert process.poll() is None
            time.sleep(0.005)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def cooldown(trunk, at, steps=20):
    return trunk.branch_recipe(at_tokens=at * BATCH, schedule=es.WSD(cooldown_fraction=1.0), horizon_tokens=(at + steps) * BATCH)


def test_two_branches_at_once_beside_a_running_sweep_and_all_have_the_bits_of_the_straight_run(sweep, straight, tmp_path, capsys):
    process = sweep()
    os.kill(process.pid, signal.SIGSTOP)  # it stays at work for as long as this test needs
    trunk = es.find_run(tmp_path, TRUNK.run_id)
    assert (trunk.status, trunk.recipe) == ("running", TRUNK) and 0 < trunk.stored_tokens < TRUNK.horizon_tokens
    for asked in (lambda: trunk.val_loss, lambda: trunk.model()):
        with pytest.raises(ValueError, match="not finished .now running"):
            asked()
    with pytest.raises(StoreError, match=rf"in use by process {process.pid}.*beside=True"):
        es.run([recipe(4)], store=tmp_path, **FAST)
    with pytest.raises(StoreError, match=f"in use by process {process.pid}; clean it up when"):
        Store(tmp_path).collect_garbage(states=True)
    at, runs = trunk.stored_tokens // BATCH, []

    def branch(**told):
        (run,) = es.run([cooldown(trunk, at + 5 * bool(told))], store=tmp_path, beside=True, **(FAST | told))
        runs.append(run)

    threads = [threading.Thread(target=branch, kwargs=told) for told in ({"progress": True}, {})]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(runs) == 2 and process.poll() is None  # all of that with the sweep at work
    assert f"the {5 * BATCH:,} before it are trained here, from the state after {at * BATCH:,}, " in capsys.readouterr().err
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=120) == 0
    for run in (*runs, es.find_run(tmp_path, TRUNK.run_id)):
        assert_same_bits(run, straight(run.recipe))
    assert not Store(tmp_path).unfinished() and not list(tmp_path.glob(".beside/*/")) and trunk.status == "finished"
    assert Store(tmp_path).collect_garbage()


@pytest.mark.parametrize("how", ["backend='inline'", pytest.param("workers=1", marks=pytest.mark.slow)])
def test_a_branch_from_a_killed_trunk_and_the_trunk_goes_on(how, sweep, straight, tmp_path):
    process = sweep(how=how)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.kill()
    process.wait()
    with Store(tmp_path).locked():  # once its worker, which nobody told, has saved and left
        assert not [pid for pid in workers if "\nState:\tZ" not in _told_of(pid)]
    trunk = es.find_run(tmp_path, TRUNK.run_id)
    assert trunk.status == "interrupted"
    stored = trunk.stored_tokens // BATCH
    for at in (max(1, stored - 2), stored + 30):  # before what the trunk reached, and beyond
        (branch,) = es.run([cooldown(trunk, at)], store=tmp_path, beside=True, **FAST)
        assert_same_bits(branch, straight(branch.recipe))
    assert Store(tmp_path).collect_garbage() and trunk.status == "interrupted"  # gc leaves what can go on
    (done,) = es.run([TRUNK], store=tmp_path, **FAST)
    assert_same_bits(done, straight(TRUNK))


def _told_of(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "\nState:\tZ"


@pytest.mark.slow
def test_a_trunk_and_branches_in_its_wake_keep_their_bits(sweep, straight, tmp_path):
    process = sweep("LONG", "workers=1")
    trunk, runs = es.find_run(tmp_path, LONG.run_id), []

    def branch(behind):
        at = trunk.stored_tokens // BATCH - behind
        runs.extend(es.run([cooldown(trunk, at)], store=tmp_path, beside=True, workers=1, progress=False))

    for _ in range(2):
        threads = [threading.Thread(target=branch, args=(behind,)) for behind in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert process.poll() is None and len(runs) == 4
    assert process.wait(timeout=300) == 0
    for run in [*runs, es.find_run(tmp_path, LONG.run_id)]:
        assert_same_bits(run, straight(run.recipe))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A store whose trunk of 60 steps stopped at the snapshot after 40."""
    def stop(worker, slot, job):
        snapshot(worker, slot, job)
        if job.step >= 40:
            raise RuntimeError("stopped")

    path, snapshot = tmp_path_factory.mktemp("stopped"), dispatch.Worker._snapshot
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="stopped"):
        patched.setattr("etastar.engine.worker.POLL_SECONDS", 0.0)  # step by step
        patched.setattr(dispatch.Worker, "_snapshot", stop)
        es.run([recipe(60)], store=path, snapshot_seconds=0.0, **FAST)
    return path


@pytest.fixture
def trunk(stopped, tmp_path):
    """The trunk that stopped, in a copy of its store."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return es.find_run(tmp_path, recipe(60).run_id)


def test_a_snapshot_dropped_before_it_was_linked_is_not_missed(trunk, tmp_path, monkeypatch, straight):
    take, tried = Beside.take, []

    def drop_then_take(aside, nodes):
        if not tried:  # the sweep that is running has gone on
            trunk.store.drop_state(*nodes)
        tried.append(nodes)
        return take(aside, nodes)

    monkeypatch.setattr(Beside, "take", drop_then_take)
    (branch,) = es.run([cooldown(trunk, 50)], store=tmp_path, beside=True, **FAST)
    assert len(tried) == 2 and tried[0] and not tried[1]
    assert_same_bits(branch, straight(branch.recipe))


def test_a_plan_made_before_another_sweep_ended_is_made_again(trunk, tmp_path, monkeypatch, straight):
    prepare, branch = execute.Store.prepare, cooldown(trunk, 50)
    roots = execute.prepare_sweep([branch], tmp_path).roots

    def prepare_late(store, *needed):
        store.drop_state(*roots)  # as the other passes its last snapshot
        return prepare(store, *needed)

    monkeypatch.setattr(execute.Store, "prepare", prepare_late)
    (run,) = es.run([branch], store=tmp_path, **FAST)
    assert_same_bits(run, straight(branch))


def test_a_killed_branch_goes_on_where_it_was(trunk, tmp_path, monkeypatch, straight):
    branch, finish, steps = cooldown(trunk, 45), dispatch.Worker._finish, []
    with monkeypatch.context() as patched:
        patched.setattr(dispatch.Worker, "_finish", lambda worker, slot, job, *_, **__: (worker._snapshot(slot, job), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            es.run([branch], store=tmp_path, beside=True, **FAST)
    assert es.find_run(tmp_path, branch.run_id).stored_tokens == branch.horizon_tokens > trunk.stored_tokens
    assert Store(tmp_path).collect_garbage() == []  # it may go on
    monkeypatch.setattr(dispatch.Worker, "_finish", lambda worker, slot, job, *given, **named: (
        steps.append(job.step - (job.task.parent.step if job.task.parent else 0)), finish(worker, slot, job, *given, **named))[1])
    (run,) = es.run([branch], store=tmp_path, beside=True, **FAST)
    assert steps == [0]
    assert_same_bits(run, straight(branch))


def test_windows_and_averages_come_into_the_store_with_the_branch(tmp_path):
    seen = es.Observe(average_every_tokens=10 * BATCH, ema_horizon_tokens=(5 * BATCH,))
    (trunk,) = es.run([recipe(40)], store=tmp_path, observe=seen, **FAST)
    (branch,) = es.run([cooldown(trunk, 25)], store=tmp_path, beside=True, observe=seen, **FAST)
    (alone,) = es.run([branch.recipe], store=tmp_path / "alone", observe=seen, **FAST)
    assert_same_bits(branch, alone)
    assert branch.averages().windows.max() == 4 and branch.averages().equals(alone.averages())


def test_the_same_branch_twice_at_once_is_refused(trunk, tmp_path):
    branch = cooldown(trunk, 45)
    name = execute.prepare_sweep([branch], tmp_path).name
    with Beside(Store(tmp_path), f"{name}-beside").locked(), pytest.raises(StoreError, match=f"these very runs.*process {os.getpid()}"):
        es.run([branch], store=tmp_path, beside=True, **FAST)
    with Store(tmp_path)._alone(), pytest.raises(StoreError, match="being cleaned up"):
        es.run([branch], store=tmp_path, beside=True, **FAST)
    assert es.run([branch], store=tmp_path, beside=True, **FAST)[0].status == "done"


def test_what_inherits_the_locks_of_a_killed_sweep_holds_the_store_until_it_leaves(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    with store.locked():
        orphan = subprocess.Popen(["sleep", "0.7"], pass_fds=store.lock_fds)
        assert len(store.lock_fds) == 2
    store.lock_file.write_text("999999999")  # as a kill leaves it: no process has this number
    assert orphan.poll() is None
    with Store(tmp_path).locked():
        assert orphan.poll() == 0
        with pytest.raises(StoreError, match="in use"):
            Store(tmp_path).collect_garbage()


def test_gc_forgets_what_has_ended_and_with_states_all_that_has_not(trunk, tmp_path):
    (tmp_path / ".unfinished/torn.json").write_text('{"no')
    assert Store(tmp_path).collect_garbage() == ["removed .unfinished/torn.json"]
    assert es.find_run(tmp_path, trunk.run_id).stored_tokens
    assert "removed .unfinished" in Store(tmp_path).collect_garbage(states=True)
    with pytest.raises(ValueError, match="no run"):
        es.find_run(tmp_path, trunk.run_id)


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_makes_way_for_another(tmp_path, monkeypatch, can_swap):
    if not can_swap:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    for name in ("one", "two"):
        (tmp_path / "partial" / name).mkdir(parents=True)
        (tmp_path / "partial" / name / "file").write_text(name)
        folders.replace_folder(tmp_path / "partial" / name, tmp_path / "final")
        assert (tmp_path / "final/file").read_text() == name
    assert os.listdir(tmp_path) == ["final"]
    (tmp_path / "three").mkdir()
    assert not folders.add_folder(tmp_path / "three", tmp_path / "final") and (tmp_path / "final/file").read_text() == "two"


def test_an_unfinished_run_is_listed_and_shown(trunk, tmp_path, capsys):
    assert cli.main(["runs", "list", "--unfinished", "--json", "--store", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run_id"], row["status"]) == (trunk.run_id, "interrupted")
    assert cli.main(["runs", "show", trunk.run_id, "--store", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stored_tokens"] == trunk.stored_tokens and es.Recipe.from_json(told["recipe"]) == trunk.recipe
    assert "no finished runs" in (cli.main(["runs", "list", "--store", str(tmp_path)]), capsys.readouterr().out)[1]


@pytest.mark.parametrize("at, horizon, schedule, said", [
    (45.5, 60, '{"kind": "WSD", "cooldown_fraction": 1}', "at_tokens 5824 is not a multiple of batch_tokens 128; take"),
    (61, 80, '{"kind": "WSD", "cooldown_fraction": 1}', "at_tokens 7808 lies outside the trunk's 1 … 7680 tokens"),
    (45, 40, '{"kind": "WSD", "cooldown_fraction": 1}', "at_tokens 5760 is not before the end of the run at 5120 tokens"),
    (45, 60.5, '{"kind": "WSD", "cooldown_fraction": 1}', "horizon_tokens 7744 is not a multiple of batch_tokens 128"),
    (45, 60, '{"kind": "Wsd"}', "Constant, Cosine, WSD, LinearToZero"),
    (45, 60, '{"kind": "Model", "width": 8}', "needs the kind of a schedule, one of Constant"),
    (45, 60, "WSD", "--schedule is not JSON"),
])
def test_what_no_branch_can_be_is_said_in_one_line_before_training(trunk, tmp_path, monkeypatch, capsys, at, horizon, schedule, said):
    monkeypatch.setattr("etastar.engine.slots.SlotStack.train", lambda *_: pytest.fail("trained"))
    for run_id, told in ((trunk.run_id, said), ("abc", "no run 'abc' in the store")):
        assert cli.main(["branch", run_id, "--store", str(tmp_path), "--at-tokens", str(int(at * BATCH)), "--horizon-tokens",
                         str(int(horizon * BATCH)), "--schedule", schedule]) == 2
        err = capsys.readouterr().err
        assert told in err and len(err.strip().splitlines()) == 1
