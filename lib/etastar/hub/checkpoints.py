"""Checkpoints from the hub: pinned to a commit, only files that hold weights or text, taken up where a download broke, checked.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME (or HF_HUB_CACHE) and HF_TOKEN are honoured as they stand when a function is called.
The hub's client is imported on first use.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from etastar.hub.download import download
from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused
from etastar.hub.plan import Plan, is_allowed, place_of, plan_checkpoint
from etastar.hub.record import HubFile, read_record
from etastar.hub.released import find_asked
from etastar.hub.settings import is_offline


def fetch_checkpoint(name: str, folder: str | Path | None = None, dry_run: bool = False, tell: Callable[[str], object] | None = None,
                     progress: bool | None = None) -> Path:
    """The folder of a checkpoint, every file of it with the hash that the hub lists; what is missing is downloaded first.

    `name` is one of data/checkpoints.toml or OWNER/REPO@REVISION. A branch or tag is resolved once, told, and held to afterwards.
    `folder` None is the hub's own cache, of which the files that are there are used. `tell` takes what is said before a download
    (standard error by default); `dry_run` says it and downloads nothing. `progress` None shows a bar on terminals only. A part that has
    arrived is kept, and the same call goes on from there. Only files of `plan.ALLOWED` are downloaded, nothing is unpickled, no code of
    the repository is run.
    Raises ValueError, CheckpointRefused (a file is not what is listed, and is named) and CheckpointNotFetched (why, and the mend).
    """
    plan, tell = plan_checkpoint(name, folder), tell or _tell
    tell(str(plan))
    if dry_run:
        return plan.folder
    place = place_of(plan.asked, folder)
    faults = {file: fault for file in plan.files if (fault := file.fault(plan.folder / file.path))}
    if faults and is_offline():
        raise CheckpointNotFetched(f"{plan.called} is not whole in {plan.folder}: {_listed(faults)}; HF_HUB_OFFLINE is set: unset it and "
                                   f"run `{plan.asked.command}`")
    if wrong := {file: fault for file, fault in faults.items() if fault != "missing"}:
        tell(f"removed and fetched again: {_listed(wrong)}")
    record = read_record(place.record, plan.asked.repo)
    if faults or record != record.with_commit(plan.asked.revision, plan.commit, plan.files):
        download(plan, place, list(faults), tell, progress)
    _refuse_strangers(plan)
    return plan.folder


def find_fetched(name: str | Path) -> Path:
    """The folder of a checkpoint that is on this machine: one with config.json itself, or what was fetched into the hub's cache.

    `name` is a folder, a name of data/checkpoints.toml, or OWNER/REPO[@REVISION]. Nothing is asked of the network; files are looked at
    by size, and `fetch_checkpoint` reads their hashes. Raises ValueError with the command that fetches it where it is not here or not
    whole.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    try:
        asked = find_asked(str(name))
    except ValueError as error:
        raise ValueError(f"there is no folder {folder} with a config.json, and {error}") from None
    place = place_of(asked)
    record = read_record(place.record, asked.repo)
    commit = record.commit_of(asked.revision)
    if commit not in record.listings:
        raise ValueError(f"there is no folder {folder} with a config.json, and {asked.repo} at {asked.revision} was not fetched into "
                         f"{place.storage.parent}; `{asked.command}` fetches it (name its folder if it was fetched into one)")
    missing = {file: "missing" for file in record.listings[commit] if not file.has_size(place.files(commit) / file.path)}
    if missing:
        raise ValueError(f"{asked.repo} at {commit[:12]} is not whole in {place.files(commit)}: {_listed(missing)}; `{asked.command}` "
                         "goes on with it")
    return place.files(commit)


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


def _listed(faults: dict[HubFile, str]) -> str:
    told = [f"{file.path} {'is' if fault == 'missing' else 'has'} {fault}" for file, fault in faults.items()]
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")


def _refuse_strangers(plan: Plan) -> None:
    """A file beside the listed ones that a loader would read."""
    listed = {file.path for file in plan.files}
    strangers = [path.name for path in sorted(plan.folder.iterdir()) if is_allowed(path.name) and path.name not in listed]
    if strangers:
        raise CheckpointRefused(f"{plan.folder} holds {', '.join(strangers[:3])}, which {plan.called} does not have; remove it")


def _tell(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
