"""Checkpoints fetched by the real client from a hub on this machine, found again, and held to what was listed."""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from etastar.hub import released
from etastar.hub.checkpoints import fetch_command, find_fetched
from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused
from etastar.hub.record import RECORD, HubFile
from etastar.hub.released import find_asked, load_released
from hub_server import git_sha1, sha256
from small_checkpoint import COMMIT, FILES, FIRST, LATER, REPO, SECOND, WEIGHTS, contents, fetch, only_error


def test_a_checkpoint_is_fetched_whole_into_a_folder_and_then_found_without_the_hub(hub, tmp_path):
    folder, told = fetch(folder=tmp_path / "here")
    assert folder == tmp_path / "here" and contents(folder) == FILES
    assert f"{REPO} at {COMMIT}: 7 files" in told and "0.61 GB" not in told and "0.614" in told
    hub.asked.clear()
    assert fetch(folder=folder)[0] == folder and not hub.asked


def test_in_the_hubs_cache_the_hubs_client_finds_it_too(hub, tmp_path):
    from huggingface_hub import snapshot_download

    folder, _ = fetch()
    assert folder == tmp_path / "hf/hub/models--owner--small/snapshots" / COMMIT and contents(folder) == FILES
    found = snapshot_download(REPO, revision=COMMIT, cache_dir=tmp_path / "hf/hub", local_files_only=True)
    assert Path(found) == folder


def test_a_dry_run_tells_the_size_and_neither_writes_nor_fetches(hub, tmp_path):
    folder, told = fetch(dry_run=True, folder=tmp_path / "here")
    assert f"{sum(map(len, FILES.values())) / 1e6:.3f} MB, of which" in told and not folder.exists() and not hub.bodies_asked()


def test_a_branch_is_resolved_once_told_and_held_to(hub, tmp_path):
    folder, told = fetch(f"{REPO}@main")
    assert f"main is pinned to {COMMIT}" in told and folder.name == COMMIT
    hub.put(REPO, LATER, FILES | {"config.json": b"{}"})
    assert fetch(REPO)[0].name == COMMIT
    other, _ = fetch(f"{REPO}@{LATER}")
    assert (other / "config.json").read_bytes() == b"{}" and fetch(REPO)[0].name == COMMIT


def test_a_folder_holds_one_commit_of_one_repository(hub, tmp_path):
    hub.put(REPO, LATER, FILES)
    hub.put("owner/other", COMMIT, FILES)
    fetch(folder=tmp_path / "here")
    only_error(ValueError, COMMIT, LATER, "another folder", name=f"{REPO}@{LATER}", folder=tmp_path / "here")
    only_error(ValueError, REPO, "owner/other", name=f"owner/other@{COMMIT}", folder=tmp_path / "here")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    only_error(ValueError, "no fetch put there", folder=tmp_path / "full")


def test_a_poisoned_file_on_the_disk_is_named_offline_and_replaced_online(hub, monkeypatch):
    folder, _ = fetch()
    (folder / SECOND).write_bytes(WEIGHTS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    only_error(CheckpointNotFetched, SECOND, sha256(WEIGHTS), sha256(WEIGHTS[::-1]), "HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert contents(fetch()[0]) == FILES


def test_offline_a_whole_snapshot_is_found_and_a_partial_or_unknown_one_is_not(hub, monkeypatch):
    folder, _ = fetch(f"{REPO}@main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(f"{REPO}@main")[0] == fetch()[0] == folder
    (folder / "tokenizer.json").unlink()
    only_error(CheckpointNotFetched, "tokenizer.json is missing", "unset it")
    only_error(CheckpointNotFetched, "no record here", "etastar fetch checkpoint owner/other@main", name="owner/other")


def test_a_snapshot_that_the_client_calls_whole_offline_is_not_taken_for_whole(hub, tmp_path, monkeypatch):
    folder = tmp_path / "hf/hub/models--owner--small/snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(FILES["config.json"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    only_error(CheckpointNotFetched, "no record here")


def _state(folder):
    """Every file and link below a folder with what it holds or points to."""
    found = {path: os.readlink(path) if path.is_symlink() else (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")
             if path.is_symlink() or path.is_file()}
    return {str(path.relative_to(folder)): held for path, held in found.items() if "etastar" not in str(path.relative_to(folder))}


@pytest.fixture
def snapshot(hub, tmp_path):
    """(folder of the cache, snapshot) that the hub's own client fetched, with a file in it that the kit would leave."""
    from huggingface_hub import snapshot_download

    hub.put(REPO, COMMIT, FILES | {"optimizer.bin": b"not ours"})
    return tmp_path / "hf/hub", Path(snapshot_download(REPO, revision=COMMIT, cache_dir=tmp_path / "hf/hub", endpoint=hub.endpoint))


def test_a_snapshot_of_the_hubs_client_is_used_and_left_as_it_was(hub, snapshot):
    cache, folder = snapshot
    before = _state(cache)
    assert (folder / FIRST).is_symlink() and (folder / "optimizer.bin").exists()
    hub.forget()
    assert fetch()[0] == folder and not hub.bodies_asked() and _state(cache) == before
    assert find_fetched(f"{REPO}@{COMMIT}") == folder


def test_a_damaged_file_of_a_snapshot_is_replaced_and_the_links_stay(hub, snapshot):
    from huggingface_hub import scan_cache_dir

    cache, folder = snapshot
    before = {name: held for name, held in _state(cache).items() if isinstance(held, str)}
    (folder / FIRST).write_bytes(WEIGHTS[::-1])  # through the link, so the blob is what is damaged
    hub.forget()
    _, told = fetch()
    assert f"removed and fetched again: {FIRST} has sha256" in told and hub.bodies_asked() == [(FIRST, 0)]
    assert {name: held for name, held in _state(cache).items() if isinstance(held, str)} == before
    assert contents(folder) == FILES | {"optimizer.bin": b"not ours"}
    told = scan_cache_dir(cache)
    assert not told.warnings and {file.file_name for repo in told.repos for r in repo.revisions for file in r.files} == {
        *FILES, "optimizer.bin"}


def test_files_that_another_commit_has_are_not_fetched_again(hub, tmp_path):
    from huggingface_hub import hf_hub_download

    hub.put(REPO, LATER, FILES | {"README.md": b"Another card."})
    hf_hub_download(REPO, FIRST, revision=LATER, cache_dir=tmp_path / "hf/hub", endpoint=hub.endpoint)
    hub.forget()
    assert contents(fetch()[0]) == FILES and FIRST not in dict(hub.bodies_asked())
    hub.forget()
    folder, told = fetch(f"{REPO}@{LATER}")
    assert contents(folder) == FILES | {"README.md": b"Another card."} and hub.bodies_asked() == [("README.md", 0)]
    assert f"of which {13 / 1e6:.3f} MB to fetch" in told


def test_settings_count_as_they_stand_when_a_checkpoint_is_fetched(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    assert hub.endpoint != constants.ENDPOINT and str(tmp_path) not in constants.HF_HUB_CACHE  # read when the client was imported
    assert fetch()[0].is_relative_to(tmp_path / "hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "mine"))
    assert fetch()[0].is_relative_to(tmp_path / "mine")


def test_what_was_fetched_is_found_by_name_without_the_network(hub, tmp_path, monkeypatch):
    listed_as(tmp_path, monkeypatch)
    folder, _ = fetch(f"{REPO}@main")
    own, _ = fetch(folder=tmp_path / "own")
    hub.close()
    for name in (REPO, f"{REPO}@main", f"{REPO}@{COMMIT}", "Small", "small", folder, str(folder)):
        assert find_fetched(name) == folder
    assert find_fetched(own) == own
    monkeypatch.chdir(own.parent)
    assert find_fetched("own") == Path("own")


@pytest.mark.parametrize("name, words", [
    (f"{REPO}@v2", f"{REPO} at v2 was not fetched into .*`etastar fetch checkpoint {REPO}@v2` fetches it"),
    ("owner/other", "no folder owner/other .*`etastar fetch checkpoint owner/other@main`"),
    ("Small", "`etastar fetch checkpoint Small`"),
    ("Large", "no folder Large with a config.json, and no checkpoint 'Large'; there are Small"),
    ("a/b/c", "no folder a/b/c with a config.json, and a checkpoint is a name")])
def test_what_was_not_fetched_is_told_with_the_command_that_fetches_it(hub, tmp_path, monkeypatch, name, words):
    listed_as(tmp_path, monkeypatch, repo="owner/unfetched")
    fetch()
    with pytest.raises(ValueError, match=words):
        find_fetched(name)


def test_what_is_not_whole_is_not_found_and_the_command_goes_on_with_it(hub):
    folder, _ = fetch()
    (folder / SECOND).unlink()
    (folder / "LICENSE").write_bytes(b"short")
    with pytest.raises(ValueError, match=f"not whole in .*: {SECOND} is missing; LICENSE .*`etastar fetch checkpoint {REPO}@{COMMIT}`"):
        find_fetched(f"{REPO}@{COMMIT}")
    fetch()
    assert find_fetched(f"{REPO}@{COMMIT}") == folder


def test_a_poisoned_file_is_gone_even_where_the_download_of_the_right_one_fails(hub, tmp_path):
    folder, _ = fetch(folder=tmp_path / "here")
    (folder / SECOND).write_bytes(WEIGHTS)
    hub.faults = {SECOND: [("status", 500, {})]}
    only_error(CheckpointNotFetched, SECOND, "(500)", folder=folder)
    assert contents(folder) == {name: body for name, body in FILES.items() if name != SECOND}
    assert contents(fetch(folder=folder)[0]) == FILES


def test_a_fetch_that_was_killed_before_its_record_is_no_foreign_folder(hub, tmp_path):
    (tmp_path / "here/.cache/etastar-parts").mkdir(parents=True)
    assert contents(fetch(folder=tmp_path / "here")[0]) == FILES


def test_weights_that_nobody_listed_beside_the_fetched_ones_are_refused(hub, tmp_path):
    folder, _ = fetch(folder=tmp_path / "here")
    (folder / "model.safetensors").write_bytes(b"a loader would prefer this one")
    only_error(CheckpointRefused, "model.safetensors", "remove it", folder=folder)


def test_a_path_that_leads_out_of_the_folder_is_refused(hub):
    hub.put(REPO, COMMIT, FILES | {"../config.json": b"{}"})
    only_error(CheckpointRefused, "../config.json", "outside")


def listed_as(tmp_path, monkeypatch, **changes):
    """data/checkpoints.toml with one made-up checkpoint in it, called Small."""
    fields = {"repo": REPO, "former_repo": "", "revision": "main", "reported_revision": "", "licence": "MIT", "paper": "", "what": "",
              "architecture": "granite", "params_about": 1e5, "stored_as": "float32", "bytes_about": 6e5, "shard_bytes_about": [],
              "notes": [], "batch_tokens": 4096, "horizon_tokens": 1e6, "cooldown_fraction": 0.2} | changes
    hashes = fields.pop("sha256", {})
    lines = [f"{key} = {json.dumps(item)}" for key, item in fields.items()] + ["[Small.sha256]"]
    (tmp_path / "list.toml").write_text("\n".join(["[Small]", *lines, *(f'"{name}" = "{item}"' for name, item in hashes.items())]))
    monkeypatch.setattr(released, "LIST", tmp_path / "list.toml")


def test_a_hash_of_the_list_is_held_to_for_large_and_small_files(hub, tmp_path, monkeypatch):
    listed_as(tmp_path, monkeypatch, sha256={FIRST: sha256(WEIGHTS), "config.json": sha256(FILES["config.json"])})
    assert contents(fetch("small")[0]) == FILES
    listed_as(tmp_path, monkeypatch, sha256={FIRST: "0" * 64})
    only_error(CheckpointRefused, FIRST, "0" * 64, "checkpoints.toml", name="Small", folder=tmp_path / "a")
    listed_as(tmp_path, monkeypatch, sha256={"config.json": "0" * 64})
    only_error(CheckpointRefused, "config.json", "0" * 64, name="Small", folder=tmp_path / "b")


def test_a_hash_that_the_list_has_later_holds_for_what_was_fetched_before(hub, tmp_path, monkeypatch):
    listed_as(tmp_path, monkeypatch)
    fetch("Small")
    listed_as(tmp_path, monkeypatch, sha256={FIRST: "0" * 64})
    only_error(CheckpointRefused, FIRST, "0" * 64, "checkpoints.toml", name="Small")
    listed_as(tmp_path, monkeypatch, sha256={"config.json": "0" * 64})
    only_error(CheckpointRefused, "config.json", "0" * 64, name="Small")


def test_a_commit_other_than_the_reported_one_is_told_and_not_refused(hub, tmp_path, monkeypatch):
    listed_as(tmp_path, monkeypatch, reported_revision=LATER)
    folder, told = fetch("Small")
    assert folder.name == COMMIT and f"reported to stand at {LATER}" in told


def test_the_command_shows_the_plan_or_the_folder(hub, tmp_path):
    words = argparse.Namespace(names=[f"{REPO}@{COMMIT}"], folder=str(tmp_path / "here"), dry_run=True, json=True)
    shown = fetch_command(words)["checkpoint"]
    assert shown["missing"] == list(FILES) and shown["bytes_to_fetch"] == sum(map(len, FILES.values())) == shown["bytes_total"]
    assert json.loads(json.dumps(shown)) == shown and not (tmp_path / "here").exists()
    words.dry_run = False
    assert fetch_command(words) == {"checkpoint": {"folder": str(tmp_path / "here")}} and contents(tmp_path / "here") == FILES
    words.names = []
    with pytest.raises(ValueError, match="needs one NAME"):
        fetch_command(words)


def test_a_damaged_record_is_named_with_its_mend(hub, tmp_path):
    fetch(folder=tmp_path / "here")
    (tmp_path / "here" / RECORD).write_text('{"repo": ')
    only_error(ValueError, RECORD, "remove it", folder=tmp_path / "here")


@pytest.mark.parametrize("name, words", [("PowerLM-4B", "PowerLM-3B, PowerMoE-3B"), ("a/b/c", "OWNER/REPO@"), ("a/b@", "OWNER/REPO@"),
                                         ("a/b@c@d", "OWNER/REPO@"), ("a/b@0123abc", "all 40 digits"), ("../b", "OWNER/REPO@")])
def test_a_name_that_will_not_do_is_refused_before_anything_is_asked(hub, name, words):
    only_error(ValueError, words, name=name)
    assert not hub.asked


def test_the_list_names_both_released_checkpoints_and_no_pin_that_nobody_published():
    dense, mixture = load_released().values()
    assert (dense.name, dense.repo, dense.architecture) == ("PowerLM-3B", "ibm-research/PowerLM-3b", "granite")
    assert (mixture.name, mixture.repo, mixture.architecture) == ("PowerMoE-3B", "ibm-research/PowerMoE-3b", "granitemoe")
    assert find_asked("powermoe-3b").released == mixture and not find_asked("PowerLM-3B").is_pinned
    scored = tomllib.loads((released.LIST.parent / "published_scores.toml").read_text())["models"]
    for one in (dense, mixture):
        assert scored[one.name]["repo"] == one.repo
        assert abs(sum(one.shard_bytes_about) - one.bytes_about) < 1e7  # the printed sizes of the parts add up
        assert 0.95 < one.bytes_about / (4 * one.params_about) < 1.05  # float32
    assert dense.minutes_about(100) == pytest.approx(14.05e9 * 8 / 1e8 / 60)


def test_hashes_are_those_of_git_and_of_sha256(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object`
    assert HubFile("hello", 6, git_sha1="ce013625030ba8dba906f756967f9e9ca394464a").fault(tmp_path / "hello") == ""
    digest = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # `sha256sum`
    assert HubFile("hello", 6, sha256=digest).fault(tmp_path / "hello") == ""
    assert HubFile("hello", 7, sha256=digest).fault(tmp_path / "hello") == "6 bytes in place of 7"


def test_neither_the_module_nor_a_name_imports_the_hubs_client():
    code = ("import sys, etastar.hub.checkpoints as c, etastar.hub.released as r; r.find_asked('PowerLM-3B');"
            "sys.exit('huggingface_hub' in sys.modules or 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
