"""What a newcomer meets first agrees with itself: pyproject, lock, environment, Makefile; no trace of one machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import etastar
from etastar.fingerprint import TRAIN_PACKAGES, VALIDATION_PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = {"help", "setup", "reproduce", "test", "test-all", "lint", "lab", "data", "report", "bench", "clean"}
FORBIDDEN = tuple("/work/ /opt/ /root/ /home/ pypi.org pythonhosted index-url find-links".split())
GENERATED = set(".git .venv runs results build dist .ruff_cache .pytest_cache .hypothesis __pycache__".split())


def _locked() -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {_plain(requirement.name): requirement for requirement in found}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(requirement: Requirement) -> Version:
    return Version(next(iter(requirement.specifier)).version)


def _project_files() -> list[Path]:
    return [path for path in ROOT.rglob("*") if path.is_file() and not GENERATED & set(path.relative_to(ROOT).parts)
            and not any(part.endswith(".egg-info") for part in path.parts)]  # fmt: skip


def test_every_line_of_the_lock_is_one_exact_version_sorted_by_name():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    exact = re.compile(r'[a-z0-9-]+==[0-9][\w.]*( ; python_version >= "3\.12")?')
    assert [line for line in lines if not exact.fullmatch(line)] == []
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_the_lock_names_no_accelerator_package():
    assert [name for name in _locked() if name.startswith(("nvidia", "cuda", "triton"))] == []


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"],
                                  *PROJECT["optional-dependencies"]["eval"]])
def test_the_lock_satisfies_what_the_project_asks_for(text):
    wanted = Requirement(text)
    locked = _locked()
    assert _plain(wanted.name) in locked, f"{wanted.name} is not locked"
    assert _version(locked[_plain(wanted.name)]) in wanted.specifier


def test_every_source_of_the_default_corpus_is_locked():
    assert {_plain(name) for name in (*TRAIN_PACKAGES, *VALIDATION_PACKAGES)} - set(_locked()) == set()


def test_the_build_backend_is_locked_too():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    (wanted,) = map(Requirement, build["requires"])
    assert _version(_locked()[wanted.name]) in wanted.specifier


def test_the_conda_environment_installs_the_same_lock():
    text = (ROOT / "environment.yml").read_text()
    assert re.findall(r"^ +- (.+)$", text, flags=re.MULTILINE) == [
        "conda-forge", "python=3.11", "pip", "pip:", "-r requirements.lock", "-e ."]  # fmt: skip


def test_version_licence_and_pythons_are_told_once():
    assert PROJECT["version"] == etastar.__version__
    assert f"## {etastar.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["requires-python"] == ">=3.11"
    text = (ROOT / "LICENSE").read_text()
    assert (
        "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text and len(text.splitlines()) > 195
    )


def test_the_command_and_the_files_it_needs_are_packaged():
    assert PROJECT["scripts"] == {"etastar": "etastar.cli:main"}
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["etastar"]
    package = ROOT / "lib" / "etastar"
    packaged = {path for pattern in globs for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == packaged


def test_make_lists_every_target_with_what_it_does():
    told = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", told, flags=re.MULTILINE))
    assert set(listed) == TARGETS
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.search(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)[1].split()) == TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS - {"help", "setup", "clean"}))
def test_every_other_target_sets_itself_up(target):
    assert re.search(rf"^{target}: \$\(STAMP\) ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_reproduce_passes_its_variables_on():
    command = ["make", "--no-print-directory", "-n", "reproduce", "PRESET=smoke", "STUDY=02_cooldown", "MINUTES=5"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.rstrip().endswith("reproduce --preset smoke --study 02_cooldown --minutes 5")
    plain = subprocess.run(command[:4], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plain.rstrip().endswith("reproduce --preset auto --study all")


def test_without_a_fitting_python_setup_says_so(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "test", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "etastar needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_what_the_readme_tells_newcomers():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.findall(r"^make .+$", script.read_text(), flags=re.MULTILINE) == [
        "make test", "make lint", "make reproduce PRESET=smoke"]  # fmt: skip


def test_importing_the_package_is_light():
    code = ("import sys, etastar; "
            "assert not {'torch', 'papermill', 'tyro', 'matplotlib', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "lib")}, check=True)


def test_no_file_names_a_folder_of_one_machine_or_a_package_host():
    found = []
    for path in _project_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text and path != Path(__file__)]
    assert found == []
