"""The list of published files: what it must hold, and that it is read as it is written."""

import re

import pytest

from etastar.archives.manifest import File, find_archive, load_manifest, to_toml


def test_every_published_file_has_address_size_checksum_and_licence():
    listed = load_manifest()
    assert list(listed) == ["haegele", "multi_power_law", "steplaw", "steplaw_moe", "chinchilla", "gadre"]
    for archive in listed.values():
        assert re.fullmatch(r"[0-9a-f]{40}", archive.commit) and archive.licence and archive.paper and archive.files
        assert archive.url.startswith("https://raw.githubusercontent.com/") and archive.commit in archive.url
        assert all(f.bytes > 0 and re.fullmatch(r"[0-9a-f]{64}", f.sha256) for f in archive.files)
    assert {name: len(a.files) for name, a in listed.items()} == {
        "haegele": 236, "multi_power_law": 28, "steplaw": 2, "steplaw_moe": 1, "chinchilla": 1, "gadre": 104}


def test_a_manifest_is_read_as_it_is_written(tmp_path):
    listed = load_manifest()
    (tmp_path / "again.toml").write_text(to_toml(listed.values()))
    assert load_manifest(tmp_path / "again.toml") == listed


def test_addresses_escape_what_a_url_may_not_hold():
    gadre = find_archive("gadre")
    address = gadre.address(gadre.files[0])
    assert "%3D" in address and address.startswith(gadre.url)
    assert gadre.address(gadre.files[0], "http://127.0.0.1:1/").startswith(f"http://127.0.0.1:1/mlfoundations/scaling/{gadre.commit}/")


def test_unknown_names_and_paths_outside_the_repository_are_refused():
    with pytest.raises(ValueError, match="no archive 'nope'; there are haegele"):
        find_archive("nope")
    for path in ("../up", "/etc/passwd"):
        with pytest.raises(ValueError, match="inside its repository"):
            File(path, 1, "0" * 64)
