"""What a corpus holds, as a hash: cheap to ask for, and different whenever a token could be.

Floor 1, standard library only: a recipe's id needs it on machines where nothing else of the text room is imported.
"""

import functools
import glob
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

FORMAT = 1  # raise when the way from documents to tokens changes

TRAIN_PACKAGES = ("transformers", "sympy", "huggingface_hub", "pygments", "mpmath", "narwhals", "rich", "prompt_toolkit",
                  "jupyterlab", "nbconvert", "jupyter_client", "tyro", "typer", "fsspec", "filelock", "papermill", "jinja2")
VALIDATION_PACKAGES = ("networkx", "ipython", "seaborn", "jupyter_server")
GENERATED = ("version.py", "_version.py", "__version__.py", "_dist_ver.py")
TOKENS_FILE = "ETASTAR_TOKENS"  # an exported token file that stands in for its corpus on a machine without the sources


def fingerprint(corpus) -> str:
    """64 hex digits that name the tokens of a corpus: its sources, its options and the tokenizer's recipe.

    python: the sha256 that each wheel recorded of its files. files: the contents. hf: repository and commit. synthetic:
    the parameters. Raises ValueError naming a missing package, pattern or commit.
    """
    exported = os.environ.get(TOKENS_FILE)
    if exported and (told := exported_header(exported)).get("corpus") == describe(corpus):
        return told["fingerprint"]
    if corpus.source == "python":  # asked for with every id, and what is installed does not change under a process
        return _python_fingerprint(json.dumps(describe(corpus)))
    return _of(describe(corpus), _content(corpus))


def describe(corpus) -> dict:
    """The declared part of a corpus as JSON: what an exported token file is matched by."""
    options = sorted([str(name), item] for name, item in corpus.options)
    return {"source": corpus.source, "vocab": corpus.vocab, "max_bytes": corpus.max_bytes, "options": options}


def exported_header(path) -> dict:
    """The first line of an exported token file; ValueError where it is not one."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(65_536))
        if header["format"] == FORMAT and {"fingerprint", "corpus", "sha256"} <= set(header):
            return header
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{TOKENS_FILE}={path} is not an exported token file of format {FORMAT}; "
                     "write one with etastar.text.export.export_tokens")


def python_files(packages) -> list[tuple[str, str, Path, str]]:
    """(package, path inside it, file, recorded sha256 in base64) of the Python sources of installed packages, sorted."""
    found = []
    for package in packages:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            raise ValueError(f"the python corpus is made of locked packages but {package!r} is not installed; "
                             "run `make setup`, or set ETASTAR_TOKENS to an exported token file") from None
        for file in files:
            if file.suffix == ".py" and file.name not in GENERATED and ".." not in file.parts and file.hash is not None:
                found.append((package, file.as_posix(), Path(file.locate()), file.hash.value))
    return sorted(found)


def matching_files(pattern: str) -> list[Path]:
    """Files of a `files:` corpus in sorted order; ValueError where there is none."""
    found = sorted(Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p))
    if not found:
        raise ValueError(f"corpus files:{pattern} matches no file (working folder {os.getcwd()})")
    return found


def hub_source(source: str) -> tuple[str, str]:
    """(repository, commit) of an `hf:REPO@COMMIT` corpus; ValueError unless the commit is all 40 hex digits."""
    repo, _, commit = source.removeprefix("hf:").partition("@")
    if not repo or len(commit) != 40 or set(commit) - set("0123456789abcdef"):
        raise ValueError(f"corpus {source!r} must pin a commit by all its 40 hex digits: hf:OWNER/NAME@COMMIT")
    return repo, commit


def _content(corpus) -> list:
    kind = corpus.source.split(":")[0]
    if kind == "files":
        return [[path.name, _file_hash(str(path), path.stat().st_size, path.stat().st_mtime_ns)]
                for path in matching_files(corpus.source.removeprefix("files:"))]
    if kind == "hf":
        return list(hub_source(corpus.source))
    return []


@functools.cache
def _python_fingerprint(described: str) -> str:
    return _of(json.loads(described), _python_content())


@functools.cache
def _python_content() -> list:
    return [[split, package, path, sha] for split, packages in (("train", TRAIN_PACKAGES), ("validation", VALIDATION_PACKAGES))
            for package, path, _, sha in python_files(packages)]


@functools.lru_cache(maxsize=100_000)
def _file_hash(path: str, size: int, mtime: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of(*parts) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()
