"""Uploads by the real huggingface_hub client to a local server that speaks the hub's protocol."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from etastar.hub.push import push, push_command
from upload_server import COMMIT, TOKEN, UploadServer

MODEL_FILES = {"config.json": b'{"model_type": "granite"}', "model.safetensors": b"\x00weights" * 1000, "tokenizer.json": b"{}",
               "README.md": b"---\nlicense: apache-2.0\n---\n# A run\n"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = UploadServer()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    settings = {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
                "AGENT_HARNESSES_PATH": str(tmp_path / "home" / "harnesses.json"), "ENDPOINT": server.endpoint}
    for name, value in settings.items():  # the client reads them when it is first imported, which may have been for another test
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield server
    server.close()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, body in MODEL_FILES.items():
        (folder / name).write_bytes(body)
    return folder


def test_a_folder_is_uploaded_file_for_file_to_a_private_repository(hub, model):
    done = push(model, "me/run", message="the first")
    assert hub.files == MODEL_FILES and hub.repos == {"models/me/run": {"private": True}} and hub.messages == ["the first"]
    assert (done.commit, done.url, done.repo_type) == (COMMIT, f"{hub.endpoint}/me/run", "model")
    assert done.files == {name: len(body) for name, body in MODEL_FILES.items()} and hub.tokens == {TOKEN}


def test_nothing_but_the_allow_list_is_uploaded(hub, model, tmp_path):
    (tmp_path / "secret").write_text("the key")
    for name in (".env", "notes.txt", "pytorch_model.bin", "optimizer.pkl", "train.py", "model.safetensors.part"):
        (model / name).write_text("the key")
    (model / "runs").mkdir()
    (model / "runs" / "config.json").write_text("the key")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    done = push(model, "me/run")
    assert hub.files == MODEL_FILES and b"the key" not in b"".join(hub.objects.values())
    assert done.left_out == (".env", "LICENSE", "model.safetensors.part", "notes.txt", "optimizer.pkl", "pytorch_model.bin", "runs/",
                             "train.py")


def test_a_dry_run_lists_files_and_bytes_and_sends_nothing(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (model / "notes.txt").write_text("mine")
    told = push(model, "me/run", dry_run=True)
    assert hub.asked == [] and told.commit is None and told.files["model.safetensors"] == 8000
    assert "8,000  model.safetensors" in str(told) and "not uploaded  notes.txt" in str(told)
    assert f"{sum(map(len, MODEL_FILES.values())):,}  bytes would go to the private model me/run; nothing was sent" in str(told)


def test_without_a_token_nothing_is_asked_and_the_mend_is_told(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token to upload with.* HF_TOKEN or run `hf auth login`"):
        push(model, "me/run")
    assert hub.asked == []
    assert push(model, "me/run", token=TOKEN).commit == COMMIT


def test_a_token_of_a_login_is_found(hub, model, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN + "\n")
    assert push(model, "me/run").commit == COMMIT


def test_offline_is_said_before_anything_is_asked(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(model, "me/run")
    assert hub.asked == []


@pytest.mark.parametrize("repo, token, match", [
    ("me/run", "hf_bad", r"me/run was refused \(401\): the token is not valid"),
    ("somebody-else/run", TOKEN, r"somebody-else/run was refused \(403\): the token may not write to somebody-else")])
def test_a_refusal_of_the_hub_is_one_sentence_with_the_mend(hub, model, repo, token, match):
    with pytest.raises(ValueError, match=match):
        push(model, repo, token=token)
    assert hub.files == {} and hub.objects == {}


def test_a_hub_that_is_not_there_is_one_sentence(hub, model, monkeypatch):
    hub.close()
    with pytest.raises(ValueError, match="me/run did not get through .*the same command tries again"):
        push(model, "me/run")


def test_a_broken_upload_is_told_and_the_same_call_completes(hub, model):
    (model / "model-00001-of-00002.safetensors").write_bytes(b"the first part" * 100)
    hub.failing_puts = 1
    with pytest.raises(ValueError, match="me/run did not get through .*sends only what is not there yet"):
        push(model, "me/run")
    assert hub.files == {} and hub.puts == 2 and len(hub.objects) == 1
    push(model, "me/run")
    assert hub.puts == 3 and set(hub.files) == {*MODEL_FILES, "model-00001-of-00002.safetensors"}  # one was there and is not sent again


def test_a_public_repository_is_not_uploaded_to_unless_asked(hub, model):
    hub.repos["models/me/run"] = {"private": False}
    with pytest.raises(ValueError, match=r"the model me/run is there and public; say private=False \(--public\)"):
        push(model, "me/run")
    assert hub.files == {} and hub.objects == {}
    push(model, "me/run", private=False)
    assert hub.files == MODEL_FILES


def test_a_new_repository_is_public_where_that_is_asked(hub, model):
    push(model, "me/run", private=False)
    assert hub.repos == {"models/me/run": {"private": False}}


def test_a_table_of_runs_becomes_a_dataset_with_a_card(hub):
    table = pd.DataFrame({"run_id": ["a", "b"], "peak_lr": [0.01, 0.02], "val_loss": [2.5, float("nan")]})
    done = push(table, "me/runs")
    assert done.repo_type == "dataset" and hub.repos == {"datasets/me/runs": {"private": True}}
    assert done.url == f"{hub.endpoint}/datasets/me/runs"
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(hub.files["runs.parquet"])), table)
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["configs"] == [{"config_name": "default", "data_files": "runs.parquet"}]
    assert "2 training runs" in card and "| `peak_lr` | float64 |" in card


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_of_runs_is_uploaded_as_it_is(hub, tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    table = pd.DataFrame({"run_id": ["a"], "val_loss": [2.5]})
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path, index=False)
    push(path, "me/runs")
    assert set(hub.files) == {"README.md", f"runs{suffix}"} and hub.files[f"runs{suffix}"] == path.read_bytes()


def test_a_store_is_uploaded_as_its_table(hub, tmp_path):
    folder = tmp_path / "store" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"run_id": folder.name, "status": "done", "val_loss": 2.5, "files": {}}))
    push(folder.parent, "me/runs")
    assert pd.read_parquet(io.BytesIO(hub.files["runs.parquet"])).val_loss.tolist() == [2.5]


def test_a_corpus_of_files_is_uploaded_without_its_folder(hub, tmp_path):
    corpus = '{"kind":"Corpus","source":"files:/data/me/texts/*.txt","vocab":300}'
    given = pd.DataFrame({"run_id": ["a", "b"], "corpus": [corpus, None]})
    push(given, "me/runs")
    told = pd.read_parquet(io.BytesIO(hub.files["runs.parquet"])).corpus
    assert told[0] == '{"kind":"Corpus","source":"files:*.txt","vocab":300}' and pd.isna(told[1]) and given.corpus[0] == corpus


@pytest.mark.parametrize("name", ["README.md", "config.json", "etastar.json"])
@pytest.mark.parametrize("where", ["home", "working folder", "its own"])
def test_a_file_that_names_a_folder_of_this_machine_is_refused(hub, model, name, where):
    own = {"home": Path.home() / "texts", "working folder": Path.cwd(), "its own": model}[where]
    (model / name).write_text(json.dumps({"_name_or_path": str(own)}))
    with pytest.raises(ValueError, match=f"{name} names /.*a folder of this machine; take it out"):
        push(model, "me/run", dry_run=True)
    (model / name).write_text(json.dumps({"_name_or_path": f"x{Path.home()}less"}))
    push(model, "me/run", dry_run=True)


def test_a_table_that_names_a_folder_of_this_machine_is_refused(hub, tmp_path):
    pd.DataFrame({"run_id": ["a"], "log": [str(Path.home() / "log.txt")]}).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ValueError, match="column log names /.*a folder of this machine"):
        push(tmp_path / "runs.csv", "me/runs")
    assert hub.asked == []


def test_settings_of_the_hub_count_as_they_stand_when_something_is_uploaded(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # as it was when the client was imported
    assert push(model, "me/run").commit == COMMIT
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(model, "me/run")


def test_what_is_neither_model_nor_table_is_refused(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(ValueError, match="is not the folder of a model: it needs config.json and model.safetensors"):
        push(tmp_path, "me/run")
    with pytest.raises(ValueError, match="neither the folder of a model nor a table"):
        push(tmp_path / "config.json", "me/run")
    with pytest.raises(ValueError, match="no runs"):
        push(pd.DataFrame({"run_id": []}), "me/run")
    for name in ("run", "me/my/run", "me/run..json"):
        with pytest.raises(ValueError):
            push(tmp_path, name, dry_run=True)
    assert hub.asked == []


def test_the_command_tells_what_was_sent(hub, model):
    options = dict(what=str(model), repo_id="me/run", public=True, message=None, dry_run=False)
    told = json.loads(push_command(argparse.Namespace(**options, json=True)))
    assert told["commit"] == COMMIT and told["private"] is False and hub.messages == ["model by etastar"]
    assert hub.repos == {"models/me/run": {"private": False}} and told["files"] == {n: len(b) for n, b in MODEL_FILES.items()}
    said = push_command(argparse.Namespace(**options, json=False))
    assert f"bytes to the public model me/run: {hub.endpoint}/me/run at {COMMIT}" in said


def test_the_hubs_settings_of_a_fresh_process_are_honoured(hub, model, tmp_path):
    code = f"from etastar.hub.push import push; print(push({str(model)!r}, 'me/run').commit)"
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
                        "PYTHONPATH": str(Path(__file__).parents[2] / "lib")}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert told.stdout.strip() == COMMIT, told.stderr
    assert hub.files == MODEL_FILES
