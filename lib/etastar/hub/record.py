"""What should lie on the disk: a checkpoint's files by size and hash, and the record of them that is kept next to the download."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from etastar.engine.folders import ALONE, lock_at_once, wait_for_lock

RECORD = "etastar-checkpoint.json"


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of a repository: `path` in it, `bytes`, and the hash the hub lists: sha256 for large files, git's sha1 for small ones."""

    path: str
    bytes: int
    sha256: str = ""
    git_sha1: str = ""

    def has_size(self, path: Path) -> bool:
        """Whether there is a file of the right size at `path`."""
        return path.is_file() and path.stat().st_size == self.bytes

    def fault(self, path: Path) -> str:
        """What is wrong with the copy at `path`, empty where it is the listed file; reads all of it."""
        if not path.is_file():
            return "missing"
        if path.stat().st_size != self.bytes:
            return f"{path.stat().st_size} bytes in place of {self.bytes}"
        expected = self.sha256 or self.git_sha1
        found = self._hash(path)
        kind = "sha256" if self.sha256 else "git sha1"
        return "" if found == expected else f"{kind} {found} in place of {expected}"

    def _hash(self, path: Path) -> str:
        start = b"" if self.sha256 else f"blob {self.bytes}\0".encode()
        algorithm = "sha256" if self.sha256 else "sha1"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(algorithm, start)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Record:
    """Kept next to a download: the commits that branches were pinned to, and the files of every commit fetched there."""

    repo: str
    pins: dict[str, str]
    listings: dict[str, tuple[HubFile, ...]]

    def commit_of(self, revision: str) -> str:
        """The commit that a branch or tag was pinned to, empty where it was not; a full hash is its own."""
        return revision if revision in self.listings else self.pins.get(revision, "")

    def with_commit(self, asked: str, commit: str, files: tuple[HubFile, ...]) -> "Record":
        """The record once `asked` (a branch, or the commit itself) stands for `commit` with these files."""
        pins = self.pins if asked == commit else self.pins | {asked: commit}
        return dataclasses.replace(self, pins=pins, listings=self.listings | {commit: files})

    def write(self, path: Path) -> None:
        """Put it at `path`, whole or not at all."""
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        os.replace(part, path)


def read_record(path: Path, repo: str) -> Record:
    """The record at `path`, an empty one where there is none; ValueError where it cannot be read or is of another repository."""
    if not path.exists():
        return Record(repo, {}, {})
    try:
        body = json.loads(path.read_text())
        listings = {commit: tuple(HubFile(**file) for file in files) for commit, files in body["listings"].items()}
        found = Record(body["repo"], dict(body["pins"]), listings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and fetch again with the network on") from None
    if found.repo != repo:
        raise ValueError(f"{path.parent} holds {found.repo}, not {repo}; name another folder")
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a checkpoint goes: one `folder` of the user's, or (None) `storage`, its place in the hub's own cache."""

    folder: Path | None
    storage: Path

    @property
    def record(self) -> Path:
        """The record's path."""
        return (self.folder or self.storage) / RECORD

    def files(self, commit: str) -> Path:
        """The folder of a commit's files: where the hub's client looks for them too, if the place is its cache."""
        return self.folder or self.storage / "snapshots" / commit

    def blob(self, file: HubFile) -> Path | None:
        """Where the hub's cache keeps a file once for all commits that have it, which link to it; None in a folder of the user's."""
        return None if self.folder else self.storage / "blobs" / (file.git_sha1 or file.sha256)

    def has(self, commit: str, file: HubFile) -> bool:
        """Whether a file of a commit is here, by its size."""
        blob = self.blob(file)
        return file.has_size(self.files(commit) / file.path) or (blob is not None and file.has_size(blob))

    @property
    def parts(self) -> Path:
        """The folder of what has arrived in part."""
        return (self.folder / ".cache" if self.folder else self.storage) / "etastar-parts"

    def part(self, commit: str, file: HubFile) -> Path:
        """Where a file of a commit is gathered until it is whole and has its hash."""
        return self.parts / commit / f"{file.path}.part"

    def bytes_to_fetch(self, commit: str, files: Iterable[HubFile]) -> int:
        """What these files lack beyond their parts."""
        return sum(file.bytes - min(file.bytes, size_of(self.part(commit, file))) for file in files)

    @contextlib.contextmanager
    def locked(self, tell: Callable[[str], object]):
        """Two processes never write the same part; the second says that it waits."""
        self.parts.mkdir(parents=True, exist_ok=True)
        with open(self.parts / ".lock", "w") as lock:
            if not lock_at_once(lock, ALONE):
                tell(f"another process is fetching into {self.folder or self.storage}; this one goes on when it has ended")
                wait_for_lock(lock)
            yield


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
