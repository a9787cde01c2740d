"""Everything that goes wrong in a fetch: one line that says what and why, and a rerun that sends what is missing and no more."""

import argparse
import copy
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from etastar.hub import plan
from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused
from etastar.hub.record import RECORD
from hub_server import sha256
from small_checkpoint import BYTES, COMMIT, FILES, FIRST, REPO, SECOND, WEIGHTS, contents, fetch, only_error

BEFORE = len(FILES["config.json"])  # what has arrived when FIRST is asked for
LOGIN = "whether the network asks for a login"
LIMIT = (429, {"Retry-After": "7"})
NO_REPOSITORY, NO_REVISION = ((404, {"X-Error-Code": code}) for code in ("RepoNotFound", "RevisionNotFound"))
GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})

# What is wrong with the hub, the error and words of it, and the bytes that are kept.
FAULTS = {
    "no such repository": (dict(api_fault=NO_REPOSITORY), CheckpointNotFetched, "no such repository, or it is private; HF_TOKEN", 0),
    "no such revision": (dict(api_fault=NO_REVISION), CheckpointNotFetched, f"no revision '{COMMIT}'; commits/main", 0),
    "401 to the listing": (dict(api_fault=(401, {})), CheckpointNotFetched, "HF_TOKEN; no token is set", 0),
    "403 to the listing": (dict(api_fault=(403, {})), CheckpointNotFetched, "refuses access (403); HF_TOKEN", 0),
    "429 to the listing": (dict(api_fault=LIMIT), CheckpointNotFetched, "limits the rate; asks to wait 7 s; HF_TOKEN", 0),
    "503 to the listing": (dict(api_fault=(503, {})), CheckpointNotFetched, "fault of its own (503)", 0),
    "418 to the listing": (dict(api_fault=(418, {})), CheckpointNotFetched, "answered 418", 0),
    "a page for the listing": (dict(api_fault=("page",)), CheckpointNotFetched, f"does not speak the hub's protocol; {LOGIN}", 0),
    "no listing in time": (dict(api_fault=("stall",)), CheckpointNotFetched, "did not answer; run the same command again", 0),
    "a listed file is lost": (dict(lost={FIRST}), CheckpointNotFetched, "lists this file and does not have it", BEFORE),
    "gated file": (dict(resolve_faults={FIRST: GATED}), CheckpointNotFetched, f"gated; accept its terms; {REPO}; HF_TOKEN", BEFORE),
    "401 to a file": (dict(resolve_faults={FIRST: (401, {})}), CheckpointNotFetched, "HF_TOKEN", BEFORE),
    "429 to a file": (dict(resolve_faults={FIRST: LIMIT}), CheckpointNotFetched, "limits the rate; asks to wait 7 s", BEFORE),
    "500 to a file": (dict(resolve_faults={FIRST: (500, {})}), CheckpointNotFetched, "fault of its own (500)", BEFORE),
    "a page for a file": (dict(resolve_faults={FIRST: ("page",)}), CheckpointRefused, f"neither its hash nor its commit; {LOGIN}", BEFORE),
    "no file in time": (dict(resolve_faults={FIRST: ("stall",)}), CheckpointNotFetched, "did not answer", BEFORE),
    "another hash": (dict(offers_other_hash={FIRST}), CheckpointRefused, f"{sha256(b'something else')}; {sha256(WEIGHTS)}", BEFORE),
    "another commit": (dict(offers_other_commit={FIRST}), CheckpointRefused, f"of commit {'e' * 40}; HF_ENDPOINT", BEFORE),
    "no storage host": (dict(storage_is_down=True), CheckpointNotFetched, "http://127.0.0.1:9 did not answer", BEFORE),
    "403 of the storage host": (dict(faults={FIRST: [("status", 403, {})]}), CheckpointNotFetched, "refuses access (403)", BEFORE),
    "429 of the storage host": (dict(faults={FIRST: [("status", *LIMIT)] * 6}), CheckpointNotFetched, "limits the rate; 7 s", BEFORE),
    "500 of the storage host": (dict(faults={FIRST: [("status", 500, {})]}), CheckpointNotFetched, "fault of its own (500)", BEFORE),
    "a page of the storage host": (dict(faults={FIRST: [("page",)]}), CheckpointNotFetched,
                                   "35 bytes in place of 307200; asks for a login", BEFORE),
    "a connection that is dropped": (dict(faults={FIRST: [("drop",)] * 6}), CheckpointNotFetched, "or the connection was cut", BEFORE),
    "a connection cut mid-file": (dict(faults={FIRST: [("cut", 100_000)] + [("drop",)] * 6}), CheckpointNotFetched,
                                  "or the connection was cut", BEFORE + 100_000),
    "a body that stops coming": (dict(faults={FIRST: [("stall", 100_000)] + [("stall", 0)] * 6}), CheckpointNotFetched,
                                 "did not answer", BEFORE + 100_000),
    "a truncated body": (dict(faults={FIRST: [("short", 1000)]}), CheckpointNotFetched, "1000 bytes in place of 307200", BEFORE),
    "a truncated body without a length": (dict(faults={FIRST: [("unsaid", 1000)]}), CheckpointNotFetched, "another number of bytes",
                                          BEFORE + 1000),
    "too long a body": (dict(faults={FIRST: [("longer", 1000)]}), CheckpointNotFetched, "308200 bytes in place of 307200", BEFORE),
    "wrong content of a small file": (dict(faults={"config.json": [("corrupt",)]}), CheckpointRefused, "config.json; git sha1; removed", 0),
    "wrong content": (dict(faults={FIRST: [("corrupt",)]}), CheckpointRefused, "sha256; it was removed", BEFORE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_a_rerun_sends_what_is_missing(hub, monkeypatch, name):
    planned, kind, words, kept = FAULTS[name]
    for what, fault in planned.items():
        setattr(hub, what, copy.deepcopy(fault))
    with monkeypatch.context() as impatient:
        impatient.setattr("etastar.hub.plan.TIMEOUT_SECONDS", 0.2)
        impatient.setattr("etastar.hub.download.TIMEOUT_SECONDS", 0.2)
        impatient.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        told = only_error(kind, REPO, *words.split("; "))
    assert (FIRST in told) == (kept > 0)
    hub.heal()
    hub.forget()
    folder, _ = fetch()
    assert contents(folder) == FILES and sum(count for _, count in hub.sent) == BYTES - kept
    assert not list(folder.parents[1].rglob("*.part"))


def test_a_cut_body_is_taken_up_where_it_broke(hub):
    hub.faults = {FIRST: [("cut", 100_000), ("cut", 50_000)]}
    folder, _ = fetch()
    assert [start for name, start in hub.bodies_asked() if name == FIRST] == [0, 100_000, 150_000]
    assert contents(folder) == FILES and sum(count for _, count in hub.sent) == BYTES


def test_a_plan_counts_what_has_arrived_of_a_file(hub):
    hub.faults = {SECOND: [("cut", 100_000)] + [("drop",)] * 6}
    only_error(CheckpointNotFetched, SECOND)
    _, told = fetch()
    assert f"{(BYTES - BEFORE - len(WEIGHTS) - 100_000) / 1e6:.3f} MB to fetch" in told


@pytest.mark.parametrize("faults", [[("cut", 100_000), ("no ranges",)], [("cut", 100_000)] + [("drop",)] * 6])
def test_a_host_that_ignores_ranges_sends_all_again(hub, faults):
    hub.faults = {FIRST: faults}
    if len(faults) > 2:
        only_error(CheckpointNotFetched, FIRST)
        hub.faults = {FIRST: [("no ranges",)]}
    assert contents(fetch()[0]) == FILES and sum(count for _, count in hub.sent) == BYTES + 100_000


def test_a_part_that_went_bad_is_fetched_from_its_start_by_the_same_call(hub, tmp_path):
    hub.faults = {FIRST: [("cut", 100_000)] + [("drop",)] * 6}
    only_error(CheckpointNotFetched, FIRST)
    (part,) = (tmp_path / "hf").rglob(f"{FIRST}.part")
    part.write_bytes(bytes(100_000))  # as after a power failure
    hub.heal()
    assert contents(fetch()[0]) == FILES


def test_a_rate_limit_is_waited_out_as_long_as_the_host_asks(hub, waits):
    hub.faults = {FIRST: [("status", *LIMIT)]}
    assert contents(fetch()[0]) == FILES and waits == [8.0]  # the client adds a second


def test_a_gated_repository_opens_to_a_token(hub, monkeypatch):
    hub.gated = {REPO: "hf_mine"}
    only_error(CheckpointNotFetched, "gated", f"{hub.endpoint}/{REPO}", "no token is set")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert contents(fetch()[0]) == FILES


def test_the_token_goes_to_the_hub_and_not_to_the_storage_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.faults = {FIRST: [("cut", 100_000)]}
    fetch()
    stored = {f"/{sha256(body)}/{name}" for name, body in FILES.items() if name.endswith(".safetensors")}
    tokens = {to_storage: {token for _, path, _, token in hub.asked if (path in stored) == to_storage} for to_storage in (True, False)}
    assert tokens == {True: {None}, False: {"Bearer hf_secret"}} and stored < {path for _, path, _, _ in hub.asked}


def test_an_address_that_is_none_is_named(hub, monkeypatch):
    for address in ("http://127.0.0.1:9", "127.0.0.1", "ftp://127.0.0.1"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        only_error(CheckpointNotFetched, address, "did not answer", "HF_ENDPOINT")


# -- this machine -----------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: argparse.Namespace(free=500_000))
    only_error(CheckpointNotFetched, "needs 0.614 MB more", "0.500 MB are free", "HF_HOME")
    assert not hub.bodies_asked()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_disk_that_is_full_half_way_is_told_and_a_rerun_completes(hub, tmp_path):
    part = tmp_path / "here/.cache/etastar-parts" / COMMIT / f"{FIRST}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # every write there fails as on a full disk
    only_error(CheckpointNotFetched, FIRST, "the disk is full; free some space", folder=tmp_path / "here")
    part.unlink()
    hub.forget()
    assert contents(fetch(folder=tmp_path / "here")[0]) == FILES and sum(count for _, count in hub.sent) == BYTES - BEFORE


def test_a_folder_that_cannot_be_written_is_named_with_the_mend(hub, tmp_path, monkeypatch):
    (file := tmp_path / "file").write_text("mine")
    only_error(CheckpointNotFetched, str(file), "cannot be written (Not a directory)", "HF_HOME", folder=file / "here")
    with monkeypatch.context() as mounted:
        mounted.setattr("etastar.hub.record.os.replace", _read_only)  # chmod stops nobody who tests as root
        only_error(CheckpointNotFetched, RECORD, "cannot be written (Read-only file system)", "HF_HOME", folder=tmp_path / "here")
    assert contents(fetch(folder=tmp_path / "here")[0]) == FILES


def _read_only(source, target):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))


def test_a_whole_checkpoint_is_found_where_nothing_can_be_written(hub, tmp_path, monkeypatch):
    folder, _ = fetch(folder=tmp_path / "here")
    monkeypatch.setattr("etastar.hub.record.os.replace", _read_only)
    monkeypatch.setattr("etastar.hub.record.Place.locked", lambda place, tell: 1 / 0)
    assert fetch(folder=folder)[0] == folder


CHILD = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
from huggingface_hub import constants
from etastar.hub.checkpoints import fetch_checkpoint
constants.DOWNLOAD_CHUNK_SIZE = 10_000
fetch_checkpoint(sys.argv[1], tell=lambda line: print(line, flush=True), progress=False)
print("whole", flush=True)
"""


@pytest.fixture
def children(hub):
    """Starts processes that fetch from the hub."""
    started = []

    def start():
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "lib"), "HF_TOKEN_PATH": os.devnull}
        started.append(subprocess.Popen([sys.executable, "-c", CHILD, f"{REPO}@{COMMIT}"], stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL, env=environment))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate(timeout=30)


def _wait_until(is_so, seconds=30):
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if is_so():
            return
        waiting.wait(0.02)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_half_way_is_taken_up_by_the_next(hub, children, tmp_path, how):
    hub.faults = {FIRST: [("stall", 100_000)]}
    child = children()
    _wait_until(lambda: any(part.stat().st_size == 100_000 for part in (tmp_path / "hf").rglob("*.part")))
    child.send_signal(how)
    assert child.wait(timeout=30) != 0 and "whole" not in child.stdout.read()
    hub.heal()
    hub.forget()
    assert contents(fetch()[0]) == FILES and hub.bodies_asked()[0] == (FIRST, 100_000)
    assert sum(count for _, count in hub.sent) == BYTES - BEFORE - 100_000


def test_two_processes_at_once_fetch_every_file_once_and_the_second_says_that_it_waits(hub, children):
    hub.faults = {FIRST: [("stall", 100_000), ("",)]}
    first = children()
    _wait_until(lambda: (FIRST, 100_000) in hub.sent)
    second = children()
    told = [second.stdout.readline() for _ in range(2)]
    assert "another process is fetching into" in told[1]
    hub.heal()
    assert first.wait(timeout=30) == 0 == second.wait(timeout=30) and second.stdout.read() == "whole\n"
    assert sorted(hub.bodies_asked()) == sorted([(name, 0) for name in FILES] + [(FIRST, 100_000)])
    assert sum(count for _, count in hub.sent) == BYTES
