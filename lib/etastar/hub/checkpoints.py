"""Checkpoints from the hub: pinned to a commit, only files that hold weights or text, taken up where a download broke, checked.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME (or HF_HUB_CACHE) and HF_TOKEN are honoured as they stand when a function is called.
The hub's client is imported on first use. It keeps no half of a file between two runs, hence the parts that are gathered here.
"""

import dataclasses
import fnmatch
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused, explained
from etastar.hub.record import RECORD, HubFile, Place, Record, read_record
from etastar.hub.released import HASH, Asked, find_asked

ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "README*", "LICENSE*", "NOTICE*")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
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

    def as_dict(self) -> dict:
        """The plan in values that JSON has."""
        return {"repo": self.asked.repo, "asked": self.asked.revision, "commit": self.commit, "folder": str(self.folder),
                "files": {file.path: file.bytes for file in self.files}, "missing": [file.path for file in self.missing],
                "left_out": list(self.left_out), "bytes_total": self.bytes_total, "bytes_to_fetch": self.bytes_to_fetch,
                "free_bytes": self.free_bytes}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"{self.asked.repo} at {self.commit}: {len(self.files)} files, {_gigabytes(self.bytes_total)}, of which "
                 f"{_gigabytes(self.bytes_to_fetch)} to fetch into {self.folder} ({_gigabytes(self.free_bytes)} free)"]
        if not self.asked.is_pinned:
            reported = self.asked.released.reported_revision if self.asked.released else ""
            known = f"; it was reported to stand at {reported}" if reported and reported != self.commit else ""
            lines.append(f"{self.asked.revision} is pinned to {self.commit} there{known}")
        if self.left_out:
            lines.append(f"left on the hub, neither weights in safetensors nor text: {', '.join(self.left_out)}")
        return lines


def plan_checkpoint(name: str, folder: str | Path | None = None) -> Plan:
    """What `fetch_checkpoint` would fetch; asks the hub at most once, and not at all where the record next to a download tells.

    `name` is one of data/checkpoints.toml or OWNER/REPO@REVISION; `folder` None means the hub's own cache. Files of the right size
    count as here, their hashes are not read. Raises ValueError for a name or folder that will not do, CheckpointRefused for a
    repository without safetensors, CheckpointNotFetched where the hub does not answer or gives no access.
    """
    asked = find_asked(name)
    place = _place(asked, folder)
    record = read_record(place.record, asked.repo)
    commit = asked.revision if asked.is_pinned else record.pins.get(asked.revision, "")
    if commit in record.listings:
        files, left_out = record.listings[commit], ()
    else:
        commit, listed = _ask_hub(asked, commit or asked.revision)
        _refuse_other_commit(place, record, commit)
        files, left_out = _sort_out(asked, commit, listed)
    target = place.files(commit)
    missing = tuple(f for f in files if not _has_size(target / f.path, f.bytes))
    to_fetch = sum(f.bytes - min(f.bytes, _size(place.part(commit, f))) for f in missing)
    return Plan(asked, commit, target, files, missing, left_out, to_fetch, shutil.disk_usage(_existing(target)).free)


def fetch_checkpoint(name: str, folder: str | Path | None = None, dry_run: bool = False, tell: Callable[[str], object] | None = None,
                     progress: bool | None = None) -> Path:
    """The folder of a checkpoint, every file of it with the hash that the hub lists; what is missing is downloaded first.

    `name` is one of data/checkpoints.toml or OWNER/REPO@REVISION. A branch or tag is resolved once, told, and held to afterwards.
    `folder` None is the hub's own cache. `tell` takes what is said before a download (standard error by default); `dry_run` says
    it and downloads nothing. `progress` None shows a bar on terminals only. A part that has arrived is kept, and the same call
    goes on from there. Nothing but ALLOWED files is downloaded, nothing is unpickled, no code of the repository is run.
    Raises ValueError, CheckpointRefused (a file is not what is listed, and is named) and CheckpointNotFetched (why, and the mend).
    """
    plan = plan_checkpoint(name, folder)
    (tell or _tell)(str(plan))
    if dry_run:
        return plan.folder
    place = _place(plan.asked, folder)
    faults = {file: fault for file in plan.files if (fault := file.fault(plan.folder / file.path))}
    if faults and _offline():
        told = "; ".join(f"{file.path} {_is(fault)}" for file, fault in list(faults.items())[:3])
        raise CheckpointNotFetched(f"{plan.asked.repo} at {plan.commit[:12]} is not whole in {plan.folder}: {told}; HF_HUB_OFFLINE is "
                                   f"set: unset it and run `{plan.asked.command}`")
    _refuse_small_disk(plan, place, faults)
    if faults or _record_with(plan, place) != read_record(place.record, plan.asked.repo):
        with place.locked():
            _record_with(plan, place).write(place.record)
            _fetch_files(plan, place, list(faults), progress)
    _refuse_strangers(plan)
    return plan.folder


def fetch_command(options) -> dict:
    """Body of `etastar fetch checkpoint NAME [--folder FOLDER] [--dry-run]`: what to show; `options` are the parsed words."""
    if len(options.names) != 1:
        raise ValueError("fetch checkpoint needs one NAME of data/checkpoints.toml or OWNER/REPO@REVISION; "
                         f"got {' '.join(options.names) or 'none'}")
    if options.dry_run:
        plan = plan_checkpoint(options.names[0], options.folder)
        return {"checkpoint": plan.as_dict() if options.json else str(plan)}
    folder = fetch_checkpoint(options.names[0], options.folder)
    return {"checkpoint": {"folder": str(folder)} if options.json else f"whole and checked in {folder}"}


def _place(asked: Asked, folder: str | Path | None) -> Place:
    own = None if folder is None else Path(folder).expanduser().absolute()
    if own and own.is_dir() and not (own / RECORD).exists() and any(own.iterdir()):
        raise ValueError(f"{own} holds files that no fetch put there; name an empty folder or one that is not there yet")
    return Place(own, _cache() / ("models--" + asked.repo.replace("/", "--")))


def _refuse_other_commit(place: Place, record: Record, commit: str) -> None:
    others = [known for known in record.listings if known != commit]
    if place.folder and others:
        raise ValueError(f"{place.folder} holds {record.repo} at {others[0]}, not {commit}; name another folder")


def _ask_hub(asked: Asked, revision: str) -> tuple[str, list[HubFile]]:
    """(commit, all files of it) by one request."""
    from huggingface_hub import HfApi

    if _offline():
        raise CheckpointNotFetched(f"HF_HUB_OFFLINE is set, and there is no record here of the files of {asked.repo} at {revision}; "
                                   f"unset it and run `{asked.command}` once")
    with explained(asked.repo, revision, _endpoint()):
        info = HfApi(endpoint=_endpoint()).model_info(asked.repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    if not HASH.fullmatch(info.sha or "") or (HASH.fullmatch(revision) and info.sha != revision):
        raise CheckpointRefused(f"{_endpoint()} answers for {asked.repo} at {revision} with the commit {info.sha!r}; check HF_ENDPOINT")
    return info.sha, [_listed(asked.repo, sibling) for sibling in info.siblings or ()]


def _listed(repo: str, sibling) -> HubFile:
    path, lfs = sibling.rfilename, sibling.lfs
    if path.startswith("/") or ".." in Path(path).parts or "\\" in path:
        raise CheckpointRefused(f"{repo} lists {path!r}, which would lie outside its folder")
    return HubFile(path, sibling.size, sha256=lfs.sha256) if lfs else HubFile(path, sibling.size, git_sha1=sibling.blob_id or "")


def _sort_out(asked: Asked, commit: str, listed: list[HubFile]) -> tuple[tuple[HubFile, ...], tuple[str, ...]]:
    """(files to have, names of those to leave), or CheckpointRefused where there is nothing that the kit would open."""
    wanted = {f.path: f for f in listed if _is_allowed(f.path)}
    left_out = tuple(f.path for f in listed if f.path not in wanted)
    if not any(path.endswith(".safetensors") for path in wanted):
        pickled = [path for path in left_out if path.endswith(PICKLED)]
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
        raise CheckpointRefused(f"{_endpoint()} lists {', '.join(unhashed[:3])} of {asked.repo} without size or hash; check HF_ENDPOINT")
    return tuple(wanted.values()), left_out


def _is_allowed(path: str) -> bool:
    return "/" not in path and path != RECORD and any(fnmatch.fnmatchcase(path, pattern) for pattern in ALLOWED)


def _refuse_small_disk(plan: Plan, place: Place, faults: dict[HubFile, str]) -> None:
    needed = sum(file.bytes - min(file.bytes, _size(place.part(plan.commit, file))) for file in faults)
    if needed > plan.free_bytes:
        raise CheckpointNotFetched(f"{plan.asked.repo} needs {_gigabytes(needed)} more in {plan.folder}, and {_gigabytes(plan.free_bytes)} "
                                   "are free there; free some space, name another folder, or set HF_HOME to one on a larger disk")


def _record_with(plan: Plan, place: Place) -> Record:
    """What this place is held to from now on."""
    return read_record(place.record, plan.asked.repo).with_commit(plan.asked.revision, plan.commit, plan.files)


def _fetch_files(plan: Plan, place: Place, files: list[HubFile], progress: bool | None) -> None:
    from tqdm import tqdm

    with tqdm(total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc=plan.asked.repo,
              disable=None if progress is None else not progress) as bar:
        for file in files:
            if file.fault(plan.folder / file.path):  # another process may have brought it meanwhile
                with explained(plan.asked.repo, plan.commit, _endpoint(), file.path):
                    _gather(plan, place, file, bar)
                _accept(plan, place, file)
            else:
                bar.update(file.bytes)


def _gather(plan: Plan, place: Place, file: HubFile, bar) -> None:
    """All bytes of a file in its part, from where the last attempt stopped."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = place.part(plan.commit, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    have = _size(part)
    if have > file.bytes:
        part.unlink()
        have = 0
    url = hf_hub_url(plan.asked.repo, file.path, revision=plan.commit, endpoint=_endpoint())
    offered = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS, endpoint=_endpoint(), retry_on_errors=True)
    _refuse_offer(plan, file, offered)
    with open(part, "ab") as out:
        if have < file.bytes:
            http_get(url, out, resume_size=have, headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                     expected_size=file.bytes, displayed_filename=file.path, tqdm_class=_share_of(bar))
        else:
            bar.update(have)


def _refuse_offer(plan: Plan, file: HubFile, offered) -> None:
    """CheckpointRefused, before a byte of it is fetched, where the host says that it has another file or commit."""
    expected = file.sha256 or file.git_sha1
    is_hash = len(offered.etag or "") == len(expected) and set(offered.etag) <= set("0123456789abcdef")
    if (is_hash and offered.etag != expected) or (offered.commit_hash or plan.commit) != plan.commit:
        raise CheckpointRefused(f"{file.path} of {plan.asked.repo} at {plan.commit[:12]} is refused: the host offers {offered.etag} of "
                                f"commit {offered.commit_hash}, and {expected} is listed; check HF_ENDPOINT")


def _accept(plan: Plan, place: Place, file: HubFile) -> None:
    """Put a gathered file in its place, or remove it and say what is wrong with it."""
    part, target = place.part(plan.commit, file), plan.folder / file.path
    fault = file.fault(part)
    if fault:
        part.unlink(missing_ok=True)
        raise CheckpointRefused(f"{file.path} of {plan.asked.repo} at {plan.commit[:12]} is refused: {fault}; it was removed; run the same "
                                "command again, and if it comes to this once more do not trust the host")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)


def _refuse_strangers(plan: Plan) -> None:
    """A file beside the listed ones that a loader would read."""
    listed = {file.path for file in plan.files}
    strangers = [path.name for path in sorted(plan.folder.iterdir()) if _is_allowed(path.name) and path.name not in listed]
    if strangers:
        raise CheckpointRefused(f"{plan.folder} holds {', '.join(strangers[:3])}, which {plan.asked.repo} at {plan.commit[:12]} does not "
                                "have; remove it")


def _share_of(bar):
    """A progress bar of one file that adds to the bar of all, in the form the hub's client makes its bars."""

    class Share:
        def __init__(self, *_, initial=0, **__):
            bar.update(initial)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count=1):
            bar.update(count)

    return Share


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _offline() -> bool:
    from huggingface_hub import constants

    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or constants.is_offline_mode()


def _cache() -> Path:
    from huggingface_hub import constants

    home = os.environ.get("HF_HOME")
    given = os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else constants.HF_HUB_CACHE)
    return Path(given).expanduser().absolute()


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


def _is(fault: str) -> str:
    return f"is {fault}" if fault == "missing" else f"has {fault}"


def _tell(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
