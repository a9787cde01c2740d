"""Published files on this machine: from a mirror in place, from the cache, or downloaded, never without their sha256.

ETASTAR_MIRROR names a folder laid out as github/OWNER/REPO/COMMIT/PATH; it is asked first and read in place.
ETASTAR_CACHE/archives is laid out alike and holds downloads. ETASTAR_CODE_HOST names another host than the public one.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etastar.archives.manifest import Archive, File, load_manifest
from etastar.cache import cache_folder

CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 20
ATTEMPTS = 5
SILENCE = 16  # attempts in a row without any answer after which a host counts as gone
LONGEST_WAIT_SECONDS = 60


class NotFetched(RuntimeError):
    """None of an archive's data is on this machine; `archive` names it, `command` fetches it."""

    def __init__(self, archive: str, why: str = ""):
        self.archive, self.command = archive, f"etastar fetch archives {archive}"
        super().__init__(f"archive {archive}: none of its files is here{': ' + why if why else ''}; run `{self.command}`")


class Refused(ValueError):
    """A file whose size or sha256 is not what the manifest says."""


@dataclasses.dataclass(frozen=True)
class Located:
    """Files of an archive that are on this machine and as published: `paths` by name, and the names of those `missing`."""

    paths: dict[str, Path]
    missing: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What became of one file: state is mirror, cache, downloaded, refused, failed or unreachable; `reason` where it is not here."""

    archive: str
    path: str
    bytes: int
    state: str
    reason: str = ""

    @property
    def here(self) -> bool:
        """Whether the file can be read now."""
        return self.state in ("mirror", "cache", "downloaded")


def _folders() -> list[tuple[str, Path]]:
    mirror = os.environ.get("ETASTAR_MIRROR")
    return ([("mirror", Path(mirror).expanduser())] if mirror else []) + [("cache", cache_folder() / "archives")]


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_as_published(path: Path, file: File) -> bool:
    found = path.stat()
    return found.st_size == file.bytes and _sha256(path, found.st_size, found.st_mtime_ns) == file.sha256


def _find(archive: Archive, file: File) -> tuple[str, Path] | None:
    """("mirror" or "cache", path) of a file that is here and as published; a damaged one is named, and removed from the cache."""
    for state, folder in _folders():
        path = folder / archive.folder / file.path
        if not path.is_file():
            continue
        if _is_as_published(path, file):
            return state, path
        warnings.warn(f"{path} does not have the size and sha256 that archive {archive.name} lists; it is not used", stacklevel=3)
        if state == "cache":
            path.unlink(missing_ok=True)
    return None


def locate(archive: Archive) -> Located:
    """Which of an archive's files are on this machine; nothing is downloaded, damaged files count as missing."""
    found = {f.path: _find(archive, f) for f in archive.files}
    return Located({p: at[1] for p, at in found.items() if at}, tuple(p for p, at in found.items() if not at))


def fetch_archives(names=None, code_host: str | None = None, threads: int = 8, progress: bool | None = None,
                   manifest=None) -> list[Fetched]:
    """Bring archives (all by default) into the cache unless mirror or cache has them: one Fetched a file.

    A broken download goes on where it stopped. What could not be had is told, not raised; ValueError for unknown names.
    `progress` None shows a bar on terminals only.
    """
    manifest = load_manifest() if manifest is None else manifest
    unknown = sorted(set(names or ()) - set(manifest))
    if unknown:
        raise ValueError(f"no archive {', '.join(unknown)}; there are {', '.join(manifest)}")
    wanted = [manifest[name] for name in names or manifest]
    code_host = code_host or os.environ.get("ETASTAR_CODE_HOST")
    with _one_at_a_time(), _bar(wanted, progress) as bar:
        host = _Host(code_host, bar)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(_fetch_one, archive, file, host) for archive in wanted for file in archive.files]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                host.unreachable = "stopped"
                pool.shutdown(cancel_futures=True)
                raise


def summary(files: list[Fetched]) -> list[dict]:
    """One row an archive: how many of its files are here, by where they came from, and how many are missing."""
    rows = {}
    for f in files:
        row = rows.setdefault(f.archive, {"archive": f.archive, "files": 0, "here": 0, "mirror": 0, "cache": 0, "downloaded": 0,
                                          "missing": 0, "bytes_here": 0})
        row["files"] += 1
        row["here"] += f.here
        row[f.state if f.here else "missing"] += 1
        row["bytes_here"] += f.bytes * f.here
    return list(rows.values())


def _fetch_one(archive: Archive, file: File, host: "_Host") -> Fetched:
    found = _find(archive, file)
    if found:
        host.bar.update(file.bytes)
        return Fetched(archive.name, file.path, file.bytes, found[0])
    target = cache_folder() / "archives" / archive.folder / file.path
    try:
        host.download(archive.address(file, host.base), target, file)
        return Fetched(archive.name, file.path, file.bytes, "downloaded")
    except Refused as error:
        return Fetched(archive.name, file.path, file.bytes, "refused", str(error))
    except ConnectionAbortedError as error:
        return Fetched(archive.name, file.path, file.bytes, "unreachable", str(error))
    except OSError as error:
        return Fetched(archive.name, file.path, file.bytes, "failed", str(error))


class _Host:
    """Downloads from one host; once it cannot be reached at all, no further file waits for it."""

    def __init__(self, base: str | None, bar):
        self.base, self.bar = base, bar
        self.unreachable, self.answered, self.silent = "", False, 0
        self.lock = threading.Lock()

    def download(self, url: str, target: Path, file: File) -> None:
        """The file at `target` with the sha256 it should have; Refused, ConnectionAbortedError or another OSError where not."""
        part = target.with_name(target.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            if self.unreachable:
                raise ConnectionAbortedError(self.unreachable)
            try:
                self._go_on(url, part, file)
                break
            except urllib.error.HTTPError as error:
                self._heard()
                if error.code not in (408, 425, 429, 500, 502, 503, 504) or attempt == ATTEMPTS - 1:
                    raise OSError(f"{url}: {error.code} {error.reason}") from error
                time.sleep(_wait_seconds(attempt, error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                self.silent += 1
                if (not self.answered and attempt >= 1) or self.silent >= SILENCE:
                    self.unreachable = f"{urllib.request.Request(url).host} cannot be reached ({getattr(error, 'reason', error)})"
                    raise ConnectionAbortedError(self.unreachable) from error
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"{url}: {error}") from error
                time.sleep(_wait_seconds(attempt))
        self._accept(url, part, target, file)

    def _heard(self) -> None:
        self.answered, self.silent = True, 0

    def _go_on(self, url: str, part: Path, file: File) -> None:
        """One request for what is not there yet; ConnectionError where it ends too early."""
        have = part.stat().st_size if part.exists() else 0
        if have >= file.bytes > 0:  # a whole file that was not accepted yet, or one too long: the sha256 decides
            return
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            self._heard()
            resumed = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
            if have and answer.status == 206 and not resumed:
                part.unlink()
                raise ConnectionError("the host sent another range than was asked for")
            self._tell(-have if have and not resumed else 0)
            with open(part, "ab" if resumed else "wb") as out:
                self._copy(answer, out, file.bytes + 1 - out.tell())
        if part.stat().st_size < file.bytes:
            raise ConnectionError(f"the connection was cut after {part.stat().st_size} of {file.bytes} bytes")

    def _copy(self, answer, out, most: int) -> None:
        while most > 0 and (chunk := answer.read1(min(CHUNK_BYTES, most))):
            out.write(chunk)
            most -= len(chunk)
            self._tell(len(chunk))

    def _accept(self, url: str, part: Path, target: Path, file: File) -> None:
        with open(part, "rb") as body:
            sha256 = hashlib.file_digest(body, "sha256").hexdigest()
        if sha256 != file.sha256:
            size = part.stat().st_size
            part.unlink()
            raise Refused(f"{url}: {size} bytes with sha256 {sha256} in place of {file.bytes} with {file.sha256}; removed")
        os.replace(part, target)

    def _tell(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)


def _wait_seconds(attempt: int, retry_after: str | None = None) -> float:
    """The host's own wish where it is a number of seconds, else 0.5 s doubling; never more than a minute."""
    wish = float(retry_after) if retry_after and retry_after.strip().isdigit() else 0.5 * 2**attempt
    return min(wish, LONGEST_WAIT_SECONDS)


@contextlib.contextmanager
def _one_at_a_time():
    """Two processes never write the same part file."""
    folder = cache_folder() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bar(archives, progress: bool | None):
    from tqdm import tqdm

    total = sum(f.bytes for a in archives for f in a.files)
    return tqdm(total=total, unit="B", unit_scale=True, desc="archives", disable=None if progress is None else not progress)
