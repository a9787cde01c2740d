"""A corpus as one compressed file, for a machine that has neither its sources nor a network.

The file is a line of JSON (format, fingerprint, declared corpus, sizes, sha256 of the rest) and an xz stream of the token
files one after another. Point ETASTAR_TOKENS at it and the corpus it declares is read from it.
"""

import hashlib
import json
import lzma
from pathlib import Path

from etastar.fingerprint import FORMAT, describe, exported_header, fingerprint
from etastar.text.corpora import FILES, cache_folder, prepare


def export_tokens(corpus, path) -> Path:
    """Write the token files of a corpus to one file; returns its path."""
    prepare(corpus)
    name = fingerprint(corpus)
    folder = cache_folder() / "corpora" / name[:32]
    meta = json.loads((folder / "meta.json").read_text())
    body = lzma.compress(b"".join((folder / file).read_bytes() for file in FILES if file in meta["bytes"]), preset=6)
    header = {"format": FORMAT, "fingerprint": name, "corpus": describe(corpus), "meta": meta,
              "sha256": hashlib.sha256(body).hexdigest()}
    path = Path(path)
    path.write_bytes(json.dumps(header).encode() + b"\n" + body)
    return path


def unpack_tokens(path, folder: Path) -> dict:
    """Write the token files of an exported corpus into a folder; ValueError where the file is not as it was written."""
    header = exported_header(path)
    with open(path, "rb") as file:
        file.readline()
        body = file.read()
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise ValueError(f"{path} is damaged: its contents do not have the sha256 it names; copy it again")
    data, at = lzma.decompress(body), 0
    for name in FILES:
        if name in header["meta"]["bytes"]:
            size = header["meta"]["bytes"][name]
            (folder / name).write_bytes(data[at : at + size])
            at += size
    return {key: header["meta"][key] for key in ("vocab", "entropy_floor", "bytes_per_token")}
