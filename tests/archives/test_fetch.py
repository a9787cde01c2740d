"""Fetching from a host that cuts, corrupts and refuses: what arrives is whole, what does not is named."""

import json
import warnings

import pytest

import etastar as es
from etastar import archives, cli
from etastar.archives import NotFetched, fetch, fetch_archives, find_archive, locate

BODY = bytes(range(256)) * 1000
FILES = {"data/a.json": BODY, "data/b=1.json": BODY[::-1]}


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(fetch.time, "sleep", waited.append)
    return waited


def states(files):
    return {f.path: f.state for f in files}


def test_files_are_downloaded_into_the_mirrors_layout_and_then_left_alone(listed, host, tmp_path):
    archive = listed(FILES)
    host.files = dict(FILES)
    assert set(states(fetch_archives(progress=False)).values()) == {"downloaded"}
    folder = tmp_path / "cache" / "archives" / archive.folder
    assert (folder / "data/a.json").read_bytes() == BODY and (folder / "data/b=1.json").read_bytes() == BODY[::-1]
    assert not list(folder.rglob("*.part"))
    host.asked.clear()
    assert set(states(fetch_archives(progress=False)).values()) == {"cache"} and not host.asked


def test_a_cut_connection_is_taken_up_where_it_broke(listed, host, waits):
    archive = listed(FILES)
    host.files, host.faults = dict(FILES), {"data/a.json": [("cut", 100_000), ("cut", 50_000)]}
    assert states(fetch_archives(progress=False))["data/a.json"] == "downloaded"
    assert [start for path, start in host.asked if path == "data/a.json"] == [0, 100_000, 150_000]
    assert locate(archive).paths["data/a.json"].read_bytes() == BODY


def test_a_download_goes_on_after_the_process_ended(listed, host, tmp_path):
    archive = listed(FILES)
    host.files = dict(FILES)
    part = tmp_path / "cache" / "archives" / archive.folder / "data/a.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BODY[:70_000])
    fetch_archives(progress=False)
    assert ("data/a.json", 70_000) in host.asked and locate(archive).paths["data/a.json"].read_bytes() == BODY


def test_a_host_without_ranges_sends_all_again(listed, host, waits):
    archive = listed(FILES)
    host.files, host.faults = dict(FILES), {"data/a.json": [("cut", 1000), ("no ranges", None)]}
    assert states(fetch_archives(progress=False))["data/a.json"] == "downloaded"
    assert locate(archive).paths["data/a.json"].read_bytes() == BODY


def test_a_wrong_checksum_is_refused_named_and_removed(listed, host, tmp_path):
    archive = listed(FILES)
    host.files, host.faults = dict(FILES), {"data/a.json": [("corrupt", None)]}
    refused = [f for f in fetch_archives(progress=False) if not f.here]
    assert [f.state for f in refused] == ["refused"] and "data/a.json" in refused[0].reason and "sha256" in refused[0].reason
    assert not list((tmp_path / "cache" / "archives" / archive.folder).rglob("a.json*"))
    assert states(fetch_archives(progress=False))["data/a.json"] == "downloaded"


def test_a_longer_body_is_refused_without_reading_it_all(listed, host):
    listed(FILES)
    host.files = FILES | {"data/a.json": BODY * 20}
    assert states(fetch_archives(progress=False))["data/a.json"] == "refused"


def test_retry_after_is_kept_and_a_missing_file_asked_for_once(listed, host, waits):
    listed(FILES)
    host.files, host.faults = {"data/a.json": BODY}, {"data/a.json": [("status", (429, {"Retry-After": "7"})), ("status", (503, {}))]}
    files = {f.path: f for f in fetch_archives(progress=False)}
    assert files["data/a.json"].state == "downloaded" and waits == [7.0, 1.0]
    assert files["data/b=1.json"].state == "failed" and "404" in files["data/b=1.json"].reason
    assert sum(path == "data/b=1.json" for path, _ in host.asked) == 1


def test_waits_are_bounded():
    assert fetch._wait_seconds(0, "86400") == 60 and fetch._wait_seconds(0, "Wed, 21 Oct 2026 07:28:00 GMT") == 0.5


def test_without_network_and_cache_the_command_is_named(listed, monkeypatch, waits, capsys):
    listed(FILES)
    monkeypatch.setenv("ETASTAR_CODE_HOST", "http://127.0.0.1:9")
    assert set(states(fetch_archives(progress=False)).values()) == {"unreachable"}
    for download in (False, True):
        with pytest.raises(NotFetched, match="run `etastar fetch archives haegele`") as raised:
            es.archive("haegele", download=download)
        assert raised.value.archive == "haegele" and raised.value.command == "etastar fetch archives haegele"
    assert cli.main(["fetch", "archives", "haegele"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_many_files_do_not_each_wait_for_a_host_that_is_gone(listed, monkeypatch, waits):
    listed({f"data/{i}.json": b"x" for i in range(300)})
    monkeypatch.setenv("ETASTAR_CODE_HOST", "http://127.0.0.1:9")
    assert set(states(fetch_archives(progress=False)).values()) == {"unreachable"} and len(waits) <= 16


def test_a_mirror_is_read_in_place_and_what_it_lacks_is_told(listed, mirror, tmp_path, monkeypatch, waits, capsys):
    archive = listed(FILES)
    mirror(archive, {"data/a.json": BODY})
    monkeypatch.setenv("ETASTAR_CODE_HOST", "http://127.0.0.1:9")
    found = locate(archive)
    assert found.paths == {"data/a.json": tmp_path / "mirror" / archive.folder / "data/a.json"} and found.missing == ("data/b=1.json",)
    assert cli.main(["fetch", "archives", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["archives"] == [{"archive": "haegele", "files": 2, "here": 1, "mirror": 1, "cache": 0, "downloaded": 0, "missing": 1,
                                 "bytes_here": len(BODY)}]
    assert [m["path"] for m in told["missing"]] == ["data/b=1.json"] and told["missing"][0]["state"] == "unreachable"


def test_damaged_files_are_named_and_not_used(listed, mirror, host, tmp_path):
    archive = listed(FILES)
    host.files = dict(FILES)
    fetch_archives(progress=False)
    cached = tmp_path / "cache" / "archives" / archive.folder / "data/a.json"
    cached.write_bytes(b"!" + BODY[1:])
    with pytest.warns(UserWarning, match="a.json does not have the size and sha256"):
        assert locate(archive).missing == ("data/a.json",)
    assert not cached.exists()
    mirror(archive, {"data/a.json": BODY[:-1]})
    with pytest.warns(UserWarning, match="mirror.*a.json"):
        fetched = fetch_archives(progress=False)
    assert states(fetched)["data/a.json"] == "downloaded"
    assert (tmp_path / "mirror" / archive.folder / "data/a.json").exists()  # a mirror is not ours to clean


def test_unknown_archives_and_those_without_a_reader_are_told(listed, mirror, monkeypatch):
    listed(FILES, "steplaw")
    with pytest.raises(ValueError, match="no archive nope; there are steplaw"):
        fetch_archives(["nope"])
    monkeypatch.setattr(archives, "READERS", ("haegele",))
    with pytest.raises(ValueError, match="steplaw has no reader"):
        es.archive("steplaw")
    with pytest.raises(ValueError, match="no archive 'nope'"):
        es.archive("nope")
    assert cli.main(["fetch", "archives", "nope"]) == 2


@pytest.mark.archive
def test_what_the_mirror_or_the_cache_holds_is_as_published():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: locate(find_archive(name)) for name in ("haegele", "multi_power_law")}
    if not any(f.paths for f in found.values()):
        pytest.skip("no published files here: run `etastar fetch archives`, or name a folder of them in ETASTAR_MIRROR")
    for name, located in found.items():
        assert len(located.paths) + len(located.missing) == len(find_archive(name).files)
