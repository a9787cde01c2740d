"""What should lie on the disk: a checkpoint's files by size and hash, and the record of them that is kept next to the download."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path

RECORD = "etastar-checkpoint.json"


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of a repository: `path` in it, `bytes`, and the hash the hub lists: sha256 for large files, git's sha1 for small ones."""

    path: str
    bytes: int
    sha256: str = ""
    git_sha1: str = ""

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

    @property
    def parts(self) -> Path:
        """The folder of what has arrived in part."""
        return (self.folder / ".cache" if self.folder else self.storage) / "etastar-parts"

    def part(self, commit: str, file: HubFile) -> Path:
        """Where a file of a commit is gathered until it is whole and has its hash."""
        return self.parts / commit / f"{file.path}.part"

    @contextlib.contextmanager
    def locked(self):
        """Two processes never write the same part."""
        self.parts.mkdir(parents=True, exist_ok=True)
        with open(self.parts / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
