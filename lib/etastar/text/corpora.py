"""From a corpus to token files: built once, kept in the cache folder by content, memory-mapped ever after."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from etastar.cache import cache_folder
from etastar.fingerprint import TOKENS_FILE, describe, exported_header, fingerprint
from etastar.text.synthetic import DOCUMENT_TOKENS, source_of

FILES = ("train.bin", "validation.bin", "validation_starts.bin", "tokenizer.json")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """A corpus as tokens: uint16 arrays for training and validation, and where validation documents start (int64).

    `entropy_floor` is the least possible loss in nats per token where it is known.
    """

    train: np.ndarray
    validation: np.ndarray
    validation_starts: np.ndarray
    vocab: int
    fingerprint: str
    tokenizer_path: Path | None
    entropy_floor: float | None
    bytes_per_token: float | None

    @property
    def train_tokens(self) -> int:
        """Tokens for training."""
        return len(self.train)

    @property
    def validation_tokens(self) -> int:
        """Tokens held out."""
        return len(self.validation)


@functools.lru_cache(maxsize=16)
def prepare(corpus) -> TokenSet:
    """The tokens of a corpus, built on first use; ValueError for sources that are missing, changed or too small.

    A process that finds another at work on the same corpus waits for it. A cache folder whose files are not as long as
    recorded is built again.
    """
    name = fingerprint(corpus)
    folder = cache_folder() / "corpora" / name[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{name[:32]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _place(folder, corpus, name)
    return _open(folder)


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all((folder / file).stat().st_size == size for file, size in meta["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _place(folder: Path, corpus, name: str) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    exported = os.environ.get(TOKENS_FILE)
    if exported and exported_header(exported)["fingerprint"] == name:
        from etastar.text.export import unpack_tokens

        meta = unpack_tokens(exported, partial)
    else:
        meta = _build(partial, corpus)
    sizes = {file: (partial / file).stat().st_size for file in FILES if (partial / file).exists()}
    shas = {file: hashlib.sha256((partial / file).read_bytes()).hexdigest() for file in sizes}
    meta |= {"fingerprint": name, "corpus": describe(corpus), "bytes": sizes, "sha256": shas}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    os.replace(partial, folder)


def _open(folder: Path) -> TokenSet:
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = folder / "tokenizer.json"
    return TokenSet(np.memmap(folder / "train.bin", np.uint16, "r"), np.memmap(folder / "validation.bin", np.uint16, "r"),
                    np.fromfile(folder / "validation_starts.bin", np.int64), meta["vocab"], meta["fingerprint"],
                    tokenizer if tokenizer.exists() else None, meta["entropy_floor"], meta["bytes_per_token"])


def _build(folder: Path, corpus) -> dict:
    """Write the token files of a corpus; returns what meta.json says of them."""
    if corpus.source == "synthetic":
        return _build_synthetic(folder, corpus)
    from etastar.text.sources import documents
    from etastar.text.tokenizer import train_tokenizer

    found = documents(corpus)
    train, held_out = [text for text, out in found if not out], [text for text, out in found if out]
    if not train or not held_out:
        raise ValueError(f"corpus {corpus.source!r} has {len(train)} documents to train on and {len(held_out)} held out; "
                         "it needs some of each: give more, or longer, documents")
    train = _prefix(train, corpus.max_bytes)
    tokenizer = train_tokenizer(train, corpus.vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    train_tokens, _ = _encode(tokenizer, train)
    validation, starts = _encode(tokenizer, _prefix(held_out, _VALIDATION_BYTES))
    _write(folder, train_tokens, validation, starts)
    return {"vocab": corpus.vocab, "entropy_floor": None,
            "bytes_per_token": sum(len(text.encode()) for text in train) / len(train_tokens)}


_VALIDATION_BYTES = 4_000_000


def _prefix(texts: list[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return texts
    kept, taken = [], 0
    for text in texts:
        if taken >= max_bytes:
            break
        kept.append(text)
        taken += len(text.encode())
    return kept


def _encode(tokenizer, texts: list[str], batch: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the documents, each followed by the end-of-text token, and where each starts."""
    parts, starts, at = [], [], 0
    end = np.zeros(1, np.uint16)
    for i in range(0, len(texts), batch):
        for encoding in tokenizer.encode_batch_fast(texts[i : i + batch]):
            starts.append(at)
            parts += [np.array(encoding.ids, dtype=np.uint16), end]
            at += len(encoding) + 1
    return np.concatenate(parts), np.array(starts, dtype=np.int64)


def _build_synthetic(folder: Path, corpus) -> dict:
    source, train_tokens, validation_tokens = source_of(corpus)
    validation = source.tokens(validation_tokens, stream=1)
    _write(folder, source.tokens(train_tokens, stream=0), validation, np.arange(0, len(validation), DOCUMENT_TOKENS))
    return {"vocab": corpus.vocab, "entropy_floor": source.entropy_rate(), "bytes_per_token": None}


def _write(folder: Path, train: np.ndarray, validation: np.ndarray, starts: np.ndarray) -> None:
    train.astype(np.uint16).tofile(folder / "train.bin")
    validation.astype(np.uint16).tofile(folder / "validation.bin")
    starts.astype(np.int64).tofile(folder / "validation_starts.bin")
