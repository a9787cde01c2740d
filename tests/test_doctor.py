import copy
import json

import pytest

from etastar import doctor as room
from etastar.doctor import doctor, format_doctor, locked_versions


@pytest.fixture(scope="module")
def found():
    return doctor()


@pytest.fixture
def healthy(found):
    """A machine with nothing to complain of, whatever this one is like."""
    told = copy.deepcopy(found)
    told["packages"] = {"locked": 2, "differing": {}, "missing": []}
    told["cpu"] |= {"cores_by_cgroup": None, "memory_gb": 16.0}
    told["execution"] |= {"workers": 2}
    told |= {"gemm_gflops": 90.0, "gpu": {"name": "x", "memory_gb": 80}}
    for folder in told["folders"].values():
        folder |= {"writable": True, "free_gb": 50.0}
    return told


def test_the_facts_are_json_and_plausible(found):
    assert json.loads(json.dumps(found)) == found
    assert 1 <= found["execution"]["workers"] <= found["cpu"]["cores_of_machine"]
    assert 0.5 < found["gemm_gflops"] < 2000
    assert found["execution"]["threads"] == 1 and found["execution"]["reasons"]
    text = format_doctor(found)
    for name in ("python", "torch", "packages", "cpu", "gpu", "compiler", "store", "cache", "corpora", "execution"):
        assert f"\n{name:>10}  " in f"\n{text}"


def test_a_healthy_machine_gets_no_warning(healthy):
    assert room._warnings(healthy) == []
    assert "warnings  none" in format_doctor(healthy | {"warnings": []})


def test_each_trouble_is_named_with_its_mend(healthy):
    def told(**changes):
        (warning,) = room._warnings(copy.deepcopy(healthy) | changes)
        return warning

    packages = {"locked": 2, "differing": {"numpy": {"locked": "2.4.6", "installed": "2.0.0"}}, "missing": ["tqdm"]}
    assert "numpy 2.0.0 (locked 2.4.6), tqdm missing" in told(packages=packages)
    assert "make setup" in told(packages=packages)
    assert "--workers 1" in told(cpu=healthy["cpu"] | {"memory_gb": 1.0})
    assert "only 3 GFLOP/s" in told(gemm_gflops=3.0)
    folders = copy.deepcopy(healthy["folders"])
    folders["cache"]["writable"] = False
    assert "cannot be written; choose another with ETASTAR_CACHE" in told(folders=folders)
    folders = copy.deepcopy(healthy["folders"])
    folders["store"]["free_gb"] = 1.0
    assert "only 1.0 GB free" in told(folders=folders) and "--store" in told(folders=folders)


def test_a_folder_to_be_made_is_judged_by_its_parent(tmp_path):
    there = room._folder(tmp_path / "a" / "b")
    assert not there["exists"] and there["writable"] and there["free_gb"] > 0
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o777)
    assert not room._folder(tmp_path / "file" / "below")["writable"]


def test_installed_packages_are_held_against_the_lock(tmp_path):
    import numpy

    lock = tmp_path / "requirements.lock"
    lock.write_text(
        f"# comment\nnumpy=={numpy.__version__}\npytest==0.0.1\nno-such-package==1.0\n"
        'aiohttp==1.0 ; python_version >= "3.99"\n'
    )
    told = room._packages(lock)
    assert list(told["differing"]) == ["pytest"] and told["missing"] == ["no-such-package"]
    assert told["locked"] == 3
    assert locked_versions(lock)["numpy"] == numpy.__version__


def test_corpora_in_the_cache_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path))
    assert room._corpora() == []
    for name, text in (
        ("ab", json.dumps({"corpus": {"source": "python", "vocab": 512}, "bytes": {"train.bin": 200}})),
        ("cd", "{"),
    ):
        (tmp_path / "corpora" / name).mkdir(parents=True)
        (tmp_path / "corpora" / name / "meta.json").write_text(text)
    whole, broken = room._corpora()
    assert (whole["source"], whole["vocab"], whole["train_tokens"]) == ("python", 512, 100)
    assert "damaged" in broken["source"]
