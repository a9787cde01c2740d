"""Checkpoints fetched by the real client from a hub on this machine that cuts, corrupts, limits and refuses."""

import argparse
import json
import pickle
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from etastar.hub import checkpoints, released
from etastar.hub.checkpoints import fetch_checkpoint, fetch_command, plan_checkpoint
from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused
from etastar.hub.record import RECORD, HubFile
from etastar.hub.released import find_asked, load_released
from hub_server import Hub, git_sha1, sha256

REPO, COMMIT, LATER = "owner/small", "0123456789abcdef" * 2 + "01234567", "f" * 40
WEIGHTS = bytes(range(256)) * 1200
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {"config.json": b'{"model_type": "granite"}', FIRST: WEIGHTS, SECOND: WEIGHTS[::-1], "model.safetensors.index.json": b"{}",
         "tokenizer.json": b"{} ", "README.md": b"A card.", "LICENSE": b"Apache-2.0"}


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited."""
    waited = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    """A Hub that HF_ENDPOINT names, with REPO at COMMIT, an empty HF_HOME and no token."""
    from huggingface_hub import close_session, constants

    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HTTP_PROXY", "http_proxy",
                 "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # the grain in which the client keeps what arrived before a cut
    close_session()
    served = Hub()
    served.put(REPO, COMMIT, FILES)
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield served
    close_session()
    served.close()


def fetch(name=f"{REPO}@{COMMIT}", folder=None, **options):
    told = []
    path = fetch_checkpoint(name, folder, tell=told.append, progress=False, **options)
    return path, "\n".join(told)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != RECORD}


def only_error(kind, *words, **options):
    with pytest.raises(kind) as caught:
        fetch(**options)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)


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


def test_large_files_come_from_where_the_hub_redirects_and_the_token_is_not_carried_there(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch()
    tokens = {path.startswith("/redirected/") or not path.startswith("/" + sha256(WEIGHTS)): token for _, path, _, token in hub.asked
              if FIRST in path}
    assert tokens == {True: "Bearer hf_secret", False: None}


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


def test_a_cut_body_is_taken_up_where_it_broke(hub, waits):
    hub.faults = {FIRST: [("cut", 100_000), ("cut", 50_000)]}
    folder, _ = fetch()
    assert [start for name, start in hub.bodies_asked() if name == FIRST] == [0, 100_000, 150_000]
    assert contents(folder) == FILES


def test_a_fetch_that_broke_off_for_good_is_taken_up_by_the_next(hub, waits):
    hub.faults = {SECOND: [("cut", 100_000)] + [("drop",)] * 6}
    only_error(CheckpointNotFetched, SECOND, REPO, "did not answer, or the connection was cut", "run the same command again")
    hub.faults, hub.asked = {}, []
    folder, told = fetch()
    assert hub.bodies_asked() == [(SECOND, 100_000)] + [(name, 0) for name in list(FILES)[3:]] and contents(folder) == FILES
    assert f"{(len(WEIGHTS) - 100_000 + sum(len(FILES[n]) for n in list(FILES)[3:])) / 1e6:.3f} MB to fetch" in told


def test_two_fetches_at_once_download_every_file_once(hub):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: fetch()[0], range(2)))
    assert both[0] == both[1] and contents(both[0]) == FILES and sorted(hub.bodies_asked()) == sorted((name, 0) for name in FILES)


def test_a_host_that_ignores_ranges_sends_all_again(hub, waits):
    hub.faults = {FIRST: [("cut", 100_000), ("no ranges",)]}
    assert contents(fetch()[0]) == FILES


@pytest.mark.parametrize("fault, next_start", [("short", 1000), ("longer", 0)])
def test_a_body_of_another_length_is_refused_and_completed_by_the_next(hub, fault, next_start):
    hub.faults = {FIRST: [(fault, 1000)]}
    only_error(CheckpointNotFetched, FIRST, "another number of bytes")
    hub.asked.clear()
    assert contents(fetch()[0]) == FILES and (FIRST, next_start) in hub.bodies_asked()


@pytest.mark.parametrize("name, kind", [(FIRST, "sha256"), ("config.json", "git sha1")])
def test_wrong_content_is_refused_named_and_removed_and_completed_by_the_next(hub, tmp_path, name, kind):
    hub.faults = {name: [("corrupt",)]}
    only_error(CheckpointRefused, name, kind, "removed", folder=tmp_path / "here")
    assert name not in contents(tmp_path / "here") and not list((tmp_path / "here").rglob("*.safetensors.part"))
    assert contents(fetch(folder=tmp_path / "here")[0]) == FILES


def test_a_host_that_offers_another_hash_is_refused_before_a_byte_of_it_is_fetched(hub):
    hub.offers_other_hash = {FIRST}
    only_error(CheckpointRefused, FIRST, sha256(b"something else"), sha256(WEIGHTS))
    assert FIRST not in dict(hub.bodies_asked())
    hub.offers_other_hash = set()
    assert contents(fetch()[0]) == FILES


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


def test_files_that_the_hubs_client_fetched_before_are_checked_and_used(hub, tmp_path):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, FIRST, revision=COMMIT, cache_dir=tmp_path / "hf/hub", endpoint=hub.endpoint)
    hub.asked.clear()
    assert contents(fetch()[0]) == FILES and FIRST not in dict(hub.bodies_asked())


def test_a_rate_limit_is_waited_out_as_long_as_the_host_asks(hub, waits):
    hub.faults = {FIRST: [("status", 429, {"Retry-After": "7"})]}
    assert contents(fetch()[0]) == FILES and waits == [8.0]  # the client adds a second


def test_a_rate_limit_that_stays_is_told_and_a_rerun_completes(hub, waits):
    hub.faults = {"config.json": [("status", 429, {"Retry-After": "7"})] * 6}
    only_error(CheckpointNotFetched, "config.json", "limits the rate", "asks to wait 7 s", "HF_TOKEN", "no token is set")
    assert contents(fetch()[0]) == FILES
    hub.api_fault = (429, {"Retry-After": "31"})
    only_error(CheckpointNotFetched, "asks to wait 31 s", name="owner/other")


def test_a_gated_repository_says_where_to_accept_its_terms_and_opens_to_a_token(hub, monkeypatch):
    hub.gated = {REPO: "hf_mine"}
    only_error(CheckpointNotFetched, "gated", f"{hub.endpoint}/{REPO}", "HF_TOKEN", "no token is set")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert contents(fetch()[0]) == FILES


@pytest.mark.parametrize("name, words", [("owner/other", ("no such repository", "private", "HF_TOKEN")),
                                         (f"{REPO}@v9", ("no revision 'v9'",)), (f"{REPO}@{LATER}", ("no revision",))])
def test_what_is_not_there_is_told_in_one_line(hub, name, words):
    only_error(CheckpointNotFetched, *words, name=name)


@pytest.mark.parametrize("status, words", [(401, "refuses access (401)"), (403, "refuses access (403)"), (503, "fault of its own (503)"),
                                           (418, "answered 418")])
def test_other_answers_are_told_with_their_number(hub, status, words):
    hub.api_fault = (status, {})
    only_error(CheckpointNotFetched, words)


def test_a_listed_file_that_the_host_lost_is_named(hub):
    plan = plan_checkpoint(f"{REPO}@{COMMIT}")
    del hub.commits[REPO][COMMIT]["LICENSE"]
    place = checkpoints._place(plan.asked, None)
    checkpoints._record_with(plan, place).write(place.record)
    only_error(CheckpointNotFetched, "LICENSE", "does not have it")


def test_a_host_that_does_not_answer_is_named(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    only_error(CheckpointNotFetched, "http://127.0.0.1:9", "did not answer", "HF_ENDPOINT")


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: argparse.Namespace(free=500_000))
    only_error(CheckpointNotFetched, "needs 0.614 MB more", "0.500 MB are free", "HF_HOME")
    assert not hub.bodies_asked()


@pytest.fixture
def trap(tmp_path):
    """(a pickle that writes a file when it is read, that file)."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (sprung,)

    body = pickle.dumps(Trap())
    pickle.loads(body)
    assert sprung.exists()  # the trap works
    sprung.unlink()
    return body, sprung


def test_a_pickle_beside_the_weights_is_neither_downloaded_nor_opened(hub, trap, tmp_path):
    body, sprung = trap
    code = {"pytorch_model.bin": body, "optimizer.pkl": body, "modeling_small.py": b"raise SystemExit", "old/model.safetensors": b"old"}
    hub.put(REPO, COMMIT, FILES | code)
    folder, told = fetch(folder=tmp_path / "here")
    assert contents(folder) == FILES and all(name in told for name in code)
    assert not {"pytorch_model.bin", "optimizer.pkl", "modeling_small.py"} & {path.rsplit("/")[-1] for _, path, _, _ in hub.asked}
    (folder / "pytorch_model.bin").write_bytes(body)
    opened = _opened_by(f"{REPO}@{COMMIT}", folder)
    assert str(folder / FIRST) in opened and not any(path.endswith((".bin", ".pkl")) for path in opened) and not sprung.exists()


def _opened_by(name, folder):
    """Every path that a process opens while it finds a whole checkpoint again."""
    code = ("import sys; from etastar.hub.checkpoints import fetch_checkpoint; seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
            f"fetch_checkpoint({name!r}, {str(folder)!r}); print('\\n'.join(seen))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_repository_of_pickles_alone_is_refused_with_the_reason(hub, trap):
    body, sprung = trap
    hub.put("owner/old", COMMIT, {"config.json": b"{}", "pytorch_model.bin": body})
    only_error(CheckpointRefused, "pytorch_model.bin", "can run whatever code it holds", "safetensors", name="owner/old")
    assert not hub.bodies_asked() and not sprung.exists()
    hub.put("owner/card", COMMIT, {"README.md": b"soon"})
    only_error(CheckpointRefused, "holds no *.safetensors", name="owner/card")


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
              "notes": []} | changes
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
