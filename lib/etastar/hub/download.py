"""The files of a plan brought into their place: what is here is used, a part goes on from its end, nothing stays unless it has its hash.

The hub's client is used for every request; it keeps no half of a file between two runs, hence the parts that are gathered here.
"""

import os
from collections.abc import Callable
from pathlib import Path

from etastar.hub.faults import CheckpointNotFetched, CheckpointRefused, explained
from etastar.hub.plan import TIMEOUT_SECONDS, Plan, gigabytes, refuse_other_commit
from etastar.hub.record import HubFile, Place, read_record, size_of
from etastar.hub.settings import endpoint

HEX = set("0123456789abcdef")


def download(plan: Plan, place: Place, files: list[HubFile], tell: Callable[[str], object], progress: bool | None) -> None:
    """Write the record and bring these files, one process at a time; a file that is not the listed one is removed first.

    Raises CheckpointRefused for what the host sends in its stead, CheckpointNotFetched for everything else that goes wrong.
    """
    with explained(plan.asked.repo, plan.commit, endpoint()), place.locked(tell):
        record = read_record(place.record, plan.asked.repo)
        refuse_other_commit(place, record, plan.commit)
        record.with_commit(plan.asked.revision, plan.commit, plan.files).write(place.record)
        wanted = [file for file in files if not _is_here(plan, place, file)]
        _refuse_small_disk(plan, place, wanted)
        _fetch(plan, place, wanted, progress)


def _is_here(plan: Plan, place: Place, file: HubFile) -> bool:
    """Whether a file is in its place: brought by another process meanwhile, or by the hub's client, for this commit or another."""
    target, blob = plan.folder / file.path, place.blob(file)
    if not file.fault(target):
        return True
    target.unlink(missing_ok=True)  # no loader finds it if the download fails
    if blob is None or file.fault(blob):
        return False
    _link(place, plan.commit, file)
    return True


def _refuse_small_disk(plan: Plan, place: Place, files: list[HubFile]) -> None:
    needed = place.bytes_to_fetch(plan.commit, files)
    if needed > plan.free_bytes:
        raise CheckpointNotFetched(f"{plan.asked.repo} needs {gigabytes(needed)} more in {plan.folder}, and {gigabytes(plan.free_bytes)} "
                                   "are free there; free some space, name another folder, or set HF_HOME to one on a larger disk")


def _fetch(plan: Plan, place: Place, files: list[HubFile], progress: bool | None) -> None:
    from tqdm import tqdm

    with tqdm(total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc=plan.asked.repo,
              disable=None if progress is None else not progress) as bar:
        for file in files:
            with explained(plan.asked.repo, plan.commit, endpoint(), file.path):
                _gather(plan, place, file, bar)
                _accept(plan, place, file)


def _gather(plan: Plan, place: Place, file: HubFile, bar) -> None:
    """All bytes of a file in its part, with their hash; or CheckpointRefused, and the part is removed.

    The part of an earlier call may be what is wrong (a machine that lost power, another host), so the file is tried from its start then.
    """
    part = place.part(plan.commit, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    _refuse_offer(plan, file)
    while True:
        if size_of(part) > file.bytes:
            part.unlink()
        had = size_of(part)
        _append(plan, part, file, bar)
        fault = file.fault(part)
        if not fault:
            return
        part.unlink(missing_ok=True)
        if not had:
            raise CheckpointRefused(f"{file.path} of {plan.called} is refused: {fault}; it was removed; run the same command again, and if "
                                    "it comes to this once more do not trust the host")
        bar.update(-file.bytes)


def _append(plan: Plan, part: Path, file: HubFile, bar) -> None:
    """The bytes of a file that its part lacks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    had = size_of(part)
    with open(part, "ab") as out:
        if had == file.bytes:
            bar.update(had)
        else:
            http_get(_url(plan, file), out, resume_size=had, headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                     expected_size=file.bytes, displayed_filename=file.path, tqdm_class=_share_of(bar, plan, file))


def _url(plan: Plan, file: HubFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(plan.asked.repo, file.path, revision=plan.commit, endpoint=endpoint())


def _refuse_offer(plan: Plan, file: HubFile) -> None:
    """CheckpointRefused, before a byte of it is fetched, where the host says that it has another file or commit, or says neither."""
    from huggingface_hub import get_hf_file_metadata

    offered = get_hf_file_metadata(_url(plan, file), timeout=TIMEOUT_SECONDS, endpoint=endpoint(), retry_on_errors=True)
    if not offered.etag or not offered.commit_hash:
        raise CheckpointRefused(f"{file.path} of {plan.called} is refused: {endpoint()} names neither its hash nor its commit, as a hub "
                                "does; check HF_ENDPOINT and whether the network asks for a login")
    expected = file.sha256 or file.git_sha1
    is_hash = len(offered.etag) == len(expected) and set(offered.etag) <= HEX  # small files of the list have a hash of the other kind
    if (is_hash and offered.etag != expected) or offered.commit_hash != plan.commit:
        raise CheckpointRefused(f"{file.path} of {plan.called} is refused: the host offers {offered.etag} of commit {offered.commit_hash}, "
                                f"and {expected} is listed; check HF_ENDPOINT")


def _share_of(bar, plan: Plan, file: HubFile):
    """A progress bar of one file, in the form the hub's client makes its bars: adds to the bar of all, and refuses another length.

    The client makes it when it knows the length and before it writes, so that nothing is kept of an error page or of another file.
    """

    class Share:
        def __init__(self, *_, initial=0, total=None, **__):
            if total not in (None, file.bytes):
                raise CheckpointNotFetched(f"{file.path} of {plan.called} was not fetched: the host sends {total} bytes in place of "
                                           f"{file.bytes}; run the same command again (a network that asks for a login sends its own page)")
            bar.update(initial)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count=1):
            bar.update(count)

    return Share


def _accept(plan: Plan, place: Place, file: HubFile) -> None:
    """Put a gathered file in its place; in the hub's cache as its client does, so that other commits that have it share it."""
    target = place.blob(file) or plan.folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(place.part(plan.commit, file), target)
    if place.blob(file):
        _link(place, plan.commit, file)


def _link(place: Place, commit: str, file: HubFile) -> None:
    target, link = place.files(commit) / file.path, place.part(commit, file).with_suffix(".link")
    for folder in (target.parent, link.parent):
        folder.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(place.blob(file), target.parent))
    os.replace(link, target)
