"""What data/archives.toml lists: every published file the kit reads, by address, size, sha256 and licence."""

import dataclasses
import json
import tomllib
from pathlib import Path
from urllib.parse import quote, urlsplit

MANIFEST = Path(__file__).resolve().parents[3] / "data" / "archives.toml"


@dataclasses.dataclass(frozen=True)
class File:
    """One published file: `path` inside its repository, `bytes`, `sha256` in hex."""

    path: str
    bytes: int
    sha256: str

    def __post_init__(self):
        if self.path.startswith("/") or ".." in Path(self.path).parts:
            raise ValueError(f"an archive's file must lie inside its repository; got {self.path!r}")


@dataclasses.dataclass(frozen=True)
class Archive:
    """The files of one repository at one commit that a reader knows; `url` is the folder they are downloaded from."""

    name: str
    source: str
    commit: str
    url: str
    licence: str
    paper: str
    what: str
    files: tuple[File, ...]

    @property
    def folder(self) -> str:
        """Where the files lie inside a mirror or the cache: github/OWNER/REPO/COMMIT."""
        return f"github/{urlsplit(self.source).path.strip('/')}/{self.commit}"

    def address(self, file: File, code_host: str | None = None) -> str:
        """A file's URL, on another host of the same layout where `code_host` names one."""
        base = self.url if code_host is None else code_host.rstrip("/") + urlsplit(self.url).path
        return base.rstrip("/") + "/" + quote(file.path)


def load_manifest(path: Path | None = None) -> dict[str, Archive]:
    """Archives by name, as data/archives.toml lists them; FileNotFoundError where there is no such file."""
    path = Path(path or MANIFEST)
    if not path.exists():
        raise FileNotFoundError(f"no list of archives at {path}: it is part of a source checkout")
    body = tomllib.loads(path.read_text())
    return {name: Archive(name, **(fields | {"files": tuple(File(**f) for f in fields["files"])})) for name, fields in body.items()}


def find_archive(name: str, manifest: dict[str, Archive] | None = None) -> Archive:
    """The archive of that name; ValueError names those there are."""
    manifest = load_manifest() if manifest is None else manifest
    if name not in manifest:
        raise ValueError(f"no archive {name!r}; there are {', '.join(manifest)}")
    return manifest[name]


def to_toml(archives) -> str:
    """The text of a manifest that load_manifest reads back as these archives."""
    blocks = []
    for a in archives:
        fields = [f"{key} = {json.dumps(getattr(a, key), ensure_ascii=False)}"
                  for key in ("source", "commit", "url", "licence", "paper", "what")]
        files = [f'  {{path = {json.dumps(f.path)}, bytes = {f.bytes}, sha256 = "{f.sha256}"}},' for f in a.files]
        blocks.append("\n".join([f"[{a.name}]", *fields, "files = [", *files, "]"]))
    return "\n\n".join(blocks) + "\n"
