"""What a fetch of a checkpoint would do: which commit, which of its files, where to, how many bytes; the hub is asked at most once."""

import dataclasses
import fnmatch
import shutil
from collections.abc import Iterable
from pathlib import Path

from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused, explained
from etastar.hub.record import RECORD, HubFile, Place, Record, read_record
from etastar.hub.released import HASH, Asked, find_asked
from etastar.hub.settings import cache, endpoint, is_offline

ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "README*", "LICENSE*", "NOTICE*")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")  # may run what they please when they are opened, so they never are
BEGUN = (".cache", f"{RECORD}.part")  # what a fetch leaves that was killed before it wrote its record
TIMEOUT_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a fetch would do: the files at `commit`, which are `missing` in `folder`, and the hub's other files, which stay there."""

    asked: Asked
    commit: str
    folder: Path
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    left_out: tuple[str, ...]
    bytes_to_fetch: int
    free_bytes: int

    @property
    def bytes_total(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def called(self) -> str:
        """Repository and commit, as messages name them."""
        return f"{self.asked.repo} at {self.commit[:12]}"

    def as_dict(self) -> dict:
        """The plan in values that JSON has."""
        return {"repo": self.asked.repo, "asked": self.asked.revision, "commit": self.commit, "folder": str(self.folder),
                "files": {file.path: file.bytes for file in self.files}, "missing": [file.path for file in self.missing],
                "left_out": list(self.left_out), "bytes_total": self.bytes_total, "bytes_to_fetch": self.bytes_to_fetch,
                "free_bytes": self.free_bytes}

    def __str__(self) -> str:
        lines = [f"{self.asked.repo} at {self.commit}: {len(self.files)} files, {gigabytes(self.bytes_total)}, of which "
                 f"{gigabytes(self.bytes_to_fetch)} to fetch into {self.folder} ({gigabytes(self.free_bytes)} free)"]
        if not self.asked.is_pinned:
            reported = self.asked.released.reported_revision if self.asked.released else ""
            known = f"; it was reported to stand at {reported}" if reported and reported != self.commit else ""
            lines.append(f"{self.asked.revision} is pinned to {self.commit} there{known}")
        if self.left_out:
            lines.append(f"left on the hub, neither weights in safetensors nor text: {', '.join(self.left_out)}")
        return "\n".join(lines)


def plan_checkpoint(name: str, folder: str | Path | None = None) -> Plan:
    """What `fetch_checkpoint` would fetch; asks the hub at most once, and not at all where the record next to a download tells.

    `name` is one of data/checkpoints.toml or OWNER/REPO@REVISION; `folder` None means the hub's own cache. Files of the right size
    count as here, their hashes are not read. Raises ValueError for a name or folder that will not do, CheckpointRefused for a
    repository without safetensors, CheckpointNotFetched where the hub does not answer or gives no access.
    """
    asked = find_asked(name)
    place = place_of(asked, folder)
    record = read_record(place.record, asked.repo)
    commit = record.commit_of(asked.revision)
    listed = record.listings.get(commit)
    if listed is None:
        commit, listed = _ask_hub(asked, commit or asked.revision)
    files, left_out = _sort_out(asked, commit, listed)
    refuse_other_commit(place, record, commit)
    missing = tuple(file for file in files if not place.has(commit, file))
    free_bytes = shutil.disk_usage(next(f for f in (place.files(commit), *place.files(commit).parents) if f.is_dir())).free
    return Plan(asked, commit, place.files(commit), files, missing, left_out, place.bytes_to_fetch(commit, missing), free_bytes)


def place_of(asked: Asked, folder: str | Path | None = None) -> Place:
    """Where a checkpoint goes; ValueError for a folder that holds what no fetch put there."""
    own = None if folder is None else Path(folder).expanduser().absolute()
    if own and own.is_dir() and not (own / RECORD).exists() and any(path.name not in BEGUN for path in own.iterdir()):
        raise ValueError(f"{own} holds files that no fetch put there; name an empty folder or one that is not there yet")
    return Place(own, cache() / ("models--" + asked.repo.replace("/", "--")))


def refuse_other_commit(place: Place, record: Record, commit: str) -> None:
    """ValueError where a folder of the user's holds another commit already; the hub's cache holds any number of them."""
    others = [known for known in record.listings if known != commit]
    if place.folder and others:
        raise ValueError(f"{place.folder} holds {record.repo} at {others[0]}, not {commit}; name another folder")


def is_allowed(path: str) -> bool:
    """Whether a file of a repository is ever downloaded: weights in safetensors or text, at its top."""
    plain = "/" not in path and path != RECORD and not path.lower().endswith(PICKLED)
    return plain and any(fnmatch.fnmatchcase(path, pattern) for pattern in ALLOWED)


def gigabytes(count: int) -> str:
    """A number of bytes for eyes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


def _ask_hub(asked: Asked, revision: str) -> tuple[str, list[HubFile]]:
    """(commit, all files of it) by one request."""
    from huggingface_hub import HfApi

    if is_offline():
        raise CheckpointNotFetched(f"HF_HUB_OFFLINE is set, and there is no record here of the files of {asked.repo} at {revision}; "
                                   f"unset it and run `{asked.command}` once")
    with explained(asked.repo, revision, endpoint()):
        info = HfApi(endpoint=endpoint()).model_info(asked.repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    if not HASH.fullmatch(info.sha or "") or (HASH.fullmatch(revision) and info.sha != revision):
        raise CheckpointRefused(f"{endpoint()} answers for {asked.repo} at {revision} with the commit {info.sha!r}; check HF_ENDPOINT")
    return info.sha, [_listed(asked.repo, sibling) for sibling in info.siblings or ()]


def _listed(repo: str, sibling) -> HubFile:
    path, lfs = sibling.rfilename, sibling.lfs
    if path.startswith("/") or ".." in Path(path).parts or "\\" in path:
        raise CheckpointRefused(f"{repo} lists {path!r}, which would lie outside its folder")
    return HubFile(path, sibling.size, sha256=lfs.sha256) if lfs else HubFile(path, sibling.size, git_sha1=sibling.blob_id or "")


def _sort_out(asked: Asked, commit: str, listed: Iterable[HubFile]) -> tuple[tuple[HubFile, ...], tuple[str, ...]]:
    """(files to have, names of those to leave), or CheckpointRefused where there is nothing that the kit would open."""
    wanted = {f.path: f for f in listed if is_allowed(f.path)}
    left_out = tuple(f.path for f in listed if f.path not in wanted)
    if not any(path.endswith(".safetensors") for path in wanted):
        pickled = [path for path in left_out if path.lower().endswith(PICKLED)]
        reason = (f"its weights are {', '.join(pickled[:3])}: to read such a file can run whatever code it holds, so the kit never opens "
                  "one; ask its owner for safetensors") if pickled else "it holds no *.safetensors file"
        raise CheckpointRefused(f"{asked.repo} at {commit[:12]} is refused: {reason}")
    for path, sha256 in (asked.released.sha256 if asked.released else {}).items():
        if path not in wanted or wanted[path].sha256 not in ("", sha256):
            raise CheckpointRefused(f"{path} of {asked.repo} at {commit[:12]} is refused: the hub does not list it with sha256 {sha256}, "
                                    "as data/checkpoints.toml does")
        wanted[path] = dataclasses.replace(wanted[path], sha256=sha256)
    unhashed = [f.path for f in wanted.values() if not (f.sha256 or f.git_sha1) or f.bytes is None]
    if unhashed:
        raise CheckpointRefused(f"{endpoint()} lists {', '.join(unhashed[:3])} of {asked.repo} without size or hash; check HF_ENDPOINT")
    return tuple(wanted.values()), left_out
