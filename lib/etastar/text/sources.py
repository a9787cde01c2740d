"""Documents of each kind of corpus: (text, held out for validation?) in a fixed order, deduplicated."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from etastar.fingerprint import TRAIN_PACKAGES, VALIDATION_PACKAGES, hub_source, matching_files, python_files

VALIDATION_SHARE = 20  # one document in so many is held out where the split goes by document
SHORTEST = 200  # bytes; shorter documents are licence stubs and empty package markers
READABLE = (".txt", ".jsonl", ".parquet")


def documents(corpus) -> list[tuple[str, bool]]:
    """All documents of a text corpus with whether each is held out; exact duplicates and very short ones dropped.

    Training documents come in the order of their hashes, so that any prefix is a fair sample. Raises ValueError naming the
    file for text that is not UTF-8, an unknown suffix or a missing text column.
    """
    kind = corpus.source.split(":")[0]
    options = dict(corpus.options)
    unknown = sorted(set(options) - ({"text_key"} if kind in ("files", "hf") else set()))
    if unknown:
        raise ValueError(f"corpus {corpus.source!r} does not know the option {', '.join(map(repr, unknown))}")
    if kind == "python":
        found = _python()
    else:
        paths = matching_files(corpus.source.removeprefix("files:")) if kind == "files" else _hub_files(corpus.source)
        found = ((text, None) for path in paths for text in _read(path, options.get("text_key", "text")))
    return _in_order(found)


def _in_order(found) -> list[tuple[str, bool]]:
    unique: dict[str, tuple[str, bool]] = {}
    for text, held_out in found:
        if len(text) >= SHORTEST:
            key = hashlib.sha256(text.encode()).hexdigest()
            by_hash = int(key[-8:], 16) % VALIDATION_SHARE == 0
            unique.setdefault(key, (text, by_hash if held_out is None else held_out))
    return [unique[key] for key in sorted(unique)]


def _python() -> Iterator[tuple[str, bool]]:
    for packages, held_out in ((VALIDATION_PACKAGES, True), (TRAIN_PACKAGES, False)):
        for package, name, path, recorded in python_files(packages):
            try:
                data = path.read_bytes()
            except OSError:
                data = None
            if data is None or _record_hash(data) != recorded:
                raise ValueError(f"{name} of the package {package} is not as its wheel recorded it, so the python corpus would "
                                 f"differ from everybody else's; reinstall it: pip install --force-reinstall --no-deps {package}")
            try:
                yield data.decode(), held_out
            except UnicodeDecodeError:
                continue  # a test fixture in another encoding; the same bytes are skipped on every machine


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _hub_files(source: str) -> list[Path]:
    """Text files of a dataset repository at a pinned commit; a snapshot that lacks one of them is refused."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    repo, commit = hub_source(source)
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=[f"*{s}" for s in READABLE]))
    except (HfHubHTTPError, OSError, ValueError) as error:  # offline, unknown, gated, no route: the client says which
        raise ValueError(f"the dataset {repo} at {commit[:12]} cannot be had: {str(error).splitlines()[0]}; "
                         "check the name, the commit and the network (HF_ENDPOINT, HF_HUB_OFFLINE)") from None
    paths = sorted(path for path in folder.rglob("*") if path.suffix in READABLE and path.is_file())
    listing = folder.parent.parent / f"etastar-{commit}.json"  # beside the snapshot, for the day there is no network
    if is_offline_mode():
        expected = json.loads(listing.read_text()) if listing.exists() else None
    else:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=commit)
        expected = sorted(name for name in names if Path(name).suffix in READABLE)
        listing.write_text(json.dumps(expected))
    have = [path.relative_to(folder).as_posix() for path in paths]
    if expected is None or set(expected) - set(have):
        missing = "its list of files" if expected is None else ", ".join(sorted(set(expected) - set(have))[:3])
        raise ValueError(f"the snapshot of {repo} at {commit[:12]} is not whole: {missing} is missing; fetch it again with the network on")
    if not paths:
        raise ValueError(f"the dataset {repo} at {commit[:12]} holds no {', '.join(READABLE)} file")
    return paths


def _read(path: Path, text_key: str) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, text_key)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    yield _text_of(json.loads(line), text_key, f"{path}:{number}")
        elif path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        else:
            raise ValueError(f"{path}: cannot read {path.suffix!r} files; known: {', '.join(READABLE)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON: {error}") from None


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    columns = pq.read_schema(path).names
    if text_key not in columns:
        raise ValueError(f"{path} has no column {text_key!r} but {columns}; name one with options=((\"text_key\", NAME),)")
    for batch in pq.ParquetFile(path).iter_batches(columns=[text_key]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _text_of(row, text_key: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        raise ValueError(f"{where} has no text under {text_key!r}; name the key with options=((\"text_key\", NAME),)")
    return row[text_key]
