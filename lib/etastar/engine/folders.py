"""What a store stands on: folders put in place by one rename, and files that one process or several hold locked."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

ALONE, TOGETHER = fcntl.LOCK_EX, fcntl.LOCK_SH


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a folder into place; one that is already there holds the same bits and makes way."""
    if not add_folder(partial, final):
        if not _exchange(partial, final):
            old = partial.with_name(f".{partial.name}.old")
            os.rename(final, old)
            os.rename(partial, final)
            os.rename(old, partial)
        _sync(final.parent)
        shutil.rmtree(partial, ignore_errors=True)  # what was there before
    with contextlib.suppress(OSError):
        partial.parent.rmdir()  # when nobody else is writing


def add_folder(partial: Path, final: Path) -> bool:
    """Rename a folder to where nothing is yet; False, and nothing done, where something is."""
    _sync(partial)
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    _sync(final.parent)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither a reader nor a kill finds nothing; False where the system has no such step."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; -100: paths are from the working folder; 2: swap
    return swap is not None and swap(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(file: Path, other: Path) -> None:
    """Give a file a second name, which keeps it when the first is dropped; copied where the file system has no links."""
    try:
        os.link(file, other)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, other)


def lock_at_once(file, how: int) -> bool:
    """Lock an open file ALONE or TOGETHER if that can be had at once; it is free when the file is closed by all who inherited it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file) -> None:
    """Lock an open file ALONE, after whoever has it for a moment."""
    fcntl.flock(file, ALONE)


def is_alive(process: str) -> bool:
    """Whether a process that left its id in a lock is there; a lock without one is being taken right now."""
    try:
        os.kill(int(process or os.getpid()), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
