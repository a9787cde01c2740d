"""The store: whole files or none, damage found and named, nothing finished lost."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

import etastar as es
from etastar.engine import store as stores
from etastar.engine.checkpoint import Damaged, write_whole
from etastar.engine.run import find_run
from etastar.engine.store import Store, StoreError
from tiny import BATCH, recipe, wsd

FAST = dict(backend="inline", progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    return path, es.run([recipe(20, schedule=wsd(4)), recipe(10)], store=path, **FAST)


@pytest.fixture
def store(finished, tmp_path):
    """A copy that a test may damage."""
    import shutil

    shutil.copytree(finished[0], tmp_path / "store")
    return tmp_path / "store", [find_run(Store(tmp_path / "store"), r.run_id) for r in finished[1]]


def test_the_folder_of_a_run(finished):
    path, (run, _) = finished
    assert run.path == path / run.recipe.run_id
    assert sorted(os.listdir(run.path)) == ["metrics.parquet", "model.safetensors", "provenance.json", "recipe.json",
                                            "summary.json", "validation.safetensors"]
    assert es.Recipe.from_json((run.path / "recipe.json").read_text()) == run.recipe
    provenance = json.loads((run.path / "provenance.json").read_text())
    assert {"torch", "commit", "cpu", "corpus_fingerprint", "lr_sha256"} <= set(provenance)


def test_the_curve_holds_the_rate_applied_at_each_step(finished):
    _, (run, _) = finished
    assert list(run.curve.step) == list(range(1, 21))
    assert (run.curve.lr.to_numpy() == run.recipe.lr()).all()
    assert list(run.curve.tokens) == [BATCH * s for s in range(1, 21)]
    assert run.curve.val_loss.iloc[-1] == run.val_loss and run.curve.val_loss.iloc[:-1].isna().all()


def test_the_model_of_a_run_gives_its_validation_loss(finished):
    from etastar.engine.slots import VALIDATION_TOKENS
    from etastar.text.batches import validation_batches
    from etastar.text.corpora import prepare

    _, (run, _) = finished
    model, losses = run.model(), []
    for tokens_BxT, _documents in validation_batches(prepare(run.recipe.corpus), 32, max_tokens=VALIDATION_TOKENS):
        tokens = torch.from_numpy(tokens_BxT)
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(tokens), -1).mean(1))
    assert float(torch.cat(losses).mean()) == pytest.approx(run.val_loss, abs=1e-5)
    assert run.validation.loss.mean() == pytest.approx(run.val_loss, abs=1e-6)


def test_a_table_of_runs(finished):
    path, runs = finished
    table = Store(path).table().set_index("run_id")
    assert set(table.index) == {r.run_id for r in runs}
    assert table.loc[runs[0].run_id, "val_loss"] == runs[0].val_loss
    assert table.loc[runs[1].run_id, "horizon_tokens"] == 10 * BATCH


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.parquet", "summary.json"])
def test_a_truncated_file_is_named_before_training_and_nothing_else_is_lost(store, name, monkeypatch):
    path, (broken, whole) = store
    file = broken.path / name
    file.write_bytes(file.read_bytes()[:-7])
    monkeypatch.setattr("etastar.engine.slots.SlotStack.train", lambda *a: pytest.fail("trained before the check"))
    with pytest.raises(Damaged, match=rf"{name}.*gc --damaged"):
        es.run([broken.recipe, whole.recipe], store=path, **FAST)
    monkeypatch.undo()
    done = Store(path).collect_garbage(damaged=True)
    assert len(done) == 1 and broken.run_id in done[0]
    again = es.run([broken.recipe, whole.recipe], store=path, **FAST)
    assert [r.val_loss for r in again] == [broken.val_loss if name != "summary.json" else again[0].val_loss, whole.val_loss]


def test_a_flipped_bit_is_found_when_the_file_is_read(store):
    _, (run, _) = store
    data = bytearray((run.path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (run.path / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(Damaged, match="sha256"):
        run.model()


def test_a_truncated_state_is_named_before_training(store):
    path, (run, _) = store
    state = next(path.glob(".nodes/*/*/state.safetensors"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(Damaged, match="state.safetensors has 100 bytes"):
        es.run([recipe(40, schedule=wsd(8))], store=path, **FAST)
    Store(path).collect_garbage(damaged=True)
    assert es.run([recipe(40, schedule=wsd(8))], store=path, **FAST)[0].status == "done"


def test_a_write_that_dies_half_way_leaves_no_run(tmp_path, monkeypatch):
    def die(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "replace_folder", die)
    with pytest.raises(OSError, match="No space left"):
        es.run([recipe(4)], store=tmp_path, **FAST)
    monkeypatch.undo()
    assert Store(tmp_path).run_ids() == []
    assert es.run([recipe(4)], store=tmp_path, **FAST)[0].status == "done"


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    usage = stores.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda p: usage._replace(free=1000))
    with pytest.raises(StoreError, match="0 MiB free but the plan needs"):
        es.run([recipe(4)], store=tmp_path, **FAST)


def test_a_store_that_cannot_be_made_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write to the store"):
        es.run([recipe(4)], store=tmp_path / "file" / "runs", **FAST)


def test_threads_of_one_process_prepare_a_store_and_write_a_file_at_once(tmp_path):
    def use(number):
        for _ in range(50):
            Store(tmp_path / "store").prepare()
            write_whole(tmp_path / "file", bytes([number]) * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))  # raises what a thread raised
    assert os.listdir(tmp_path / "store") == [".nodes"] and (tmp_path / "file").stat().st_size == 100


def test_a_store_in_use_is_told(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    with store.locked(), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        es.run([recipe(4)], store=tmp_path, **FAST)


def test_a_corpus_changed_under_a_store_is_told_and_its_runs_stay(store, monkeypatch):
    path, (run, _) = store
    monkeypatch.setattr("etastar.recipe.fingerprint", lambda corpus: "another" * 4)
    with pytest.raises(StoreError, match="has changed under the store"):
        es.run([recipe(12)], store=path, **FAST)
    assert find_run(Store(path), run.run_id).val_loss == run.val_loss


def test_gc_keeps_runs_and_a_later_branch_is_replayed(store):
    path, (run, _) = store
    Store(path).collect_garbage(states=True)
    assert not (path / ".nodes").exists()
    branch = run.branch_recipe(at_tokens=8 * BATCH, schedule=es.WSD(cooldown_fraction=1.0), horizon_tokens=10 * BATCH)
    assert es.run([branch], store=path, **FAST)[0].status == "done"
    assert isinstance(run.curve, pd.DataFrame)


def test_an_unknown_run_id_is_told(finished):
    with pytest.raises(ValueError, match="no run 'nope'"):
        find_run(Store(finished[0]), "nope")


@pytest.mark.parametrize("wrong, said", [(dict(backend="cluster"), 'known: "local"'), (dict(workers=0), "at least 1"),
                                         (dict(device="cuda"), "sees no GPU")])
def test_bad_arguments_are_told(tmp_path, wrong, said):
    if wrong.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match=said):
        es.run([recipe(4)], store=tmp_path, **({"progress": False} | wrong))


def test_no_recipes_is_told(tmp_path):
    with pytest.raises(ValueError, match="no recipes"):
        es.run([], store=tmp_path)


def test_a_horizon_longer_than_the_corpus_is_told(tmp_path):
    with pytest.raises(ValueError, match="repeat"):
        es.run([recipe(100_000)], store=tmp_path, **FAST)
