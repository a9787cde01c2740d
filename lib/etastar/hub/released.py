"""What data/checkpoints.toml lists: the released checkpoints the kit knows by name, and how any other one is asked for."""

import dataclasses
import re
import tomllib
from pathlib import Path

LIST = Path(__file__).resolve().parents[3] / "data" / "checkpoints.toml"
HASH = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHORT_HASH = re.compile(r"[0-9a-f]{7,39}")


@dataclasses.dataclass(frozen=True)
class Released:
    """A released checkpoint; numbers called `about` are rounded and decide nothing, `sha256` (by file) is enforced where given.

    `revision` is a full commit hash, or a branch that the first fetch resolves and pins; `architecture` is config.json's model_type.
    `batch_tokens`, `horizon_tokens` and `cooldown_fraction` are those it was trained with.
    """

    name: str
    repo: str
    former_repo: str
    revision: str
    reported_revision: str
    licence: str
    paper: str
    what: str
    batch_tokens: int
    horizon_tokens: float
    cooldown_fraction: float
    architecture: str
    params_about: float
    stored_as: str
    bytes_about: float
    shard_bytes_about: tuple[float, ...]
    notes: tuple[str, ...]
    sha256: dict[str, str]

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"etastar fetch checkpoint {self.name}"

    def minutes_about(self, megabits_per_second: float) -> float:
        """How long the download takes at this speed of the network."""
        if not megabits_per_second > 0:
            raise ValueError(f"a network's speed is above 0 megabits a second; got {megabits_per_second}")
        return self.bytes_about * 8 / (megabits_per_second * 1e6) / 60


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checkpoint somebody asked for: `revision` is a full commit hash, a branch or a tag; `released` where the list knows it."""

    repo: str
    revision: str
    released: Released | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit hash."""
        return HASH.fullmatch(self.revision) is not None

    @property
    def command(self) -> str:
        """The command that asks for the same."""
        return self.released.command if self.released else f"etastar fetch checkpoint {self.repo}@{self.revision}"


def load_released(path: Path | None = None) -> dict[str, Released]:
    """Released checkpoints by name, as data/checkpoints.toml lists them; FileNotFoundError where there is no such file."""
    path = Path(path or LIST)
    if not path.exists():
        raise FileNotFoundError(f"no list of checkpoints at {path}: it is part of a source checkout; name one as OWNER/REPO@REVISION")
    return {name: _released(name, fields) for name, fields in tomllib.loads(path.read_text(encoding="utf-8")).items()}


def _released(name: str, fields: dict) -> Released:
    return Released(name, **(fields | {key: tuple(fields[key]) for key in ("notes", "shard_bytes_about")}))


def find_asked(name: str, path: Path | None = None) -> Asked:
    """A name of the list (in any case), OWNER/REPO (its branch main) or OWNER/REPO@REVISION; ValueError for anything else."""
    if "/" not in name:
        known = load_released(path)
        found = {key.lower(): released for key, released in known.items()}.get(name.lower())
        if found is None:
            raise ValueError(f"no checkpoint {name!r}; there are {', '.join(known)}, and any OWNER/REPO@REVISION of the hub")
        return Asked(found.repo, found.revision, found)
    repo, _, revision = name.partition("@")
    if not _REPO.fullmatch(repo) or "@" in revision or (name.endswith("@")):
        raise ValueError(f"a checkpoint is a name of data/checkpoints.toml or OWNER/REPO@REVISION; got {name!r}")
    if _SHORT_HASH.fullmatch(revision):
        raise ValueError(f"{revision} looks like a shortened commit; the hub takes all 40 digits: {repo}@<full hash>")
    return Asked(repo, revision or "main")
