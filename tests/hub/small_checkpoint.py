"""A small checkpoint on the hub of these tests, and how they fetch it."""

import pytest

from etastar.hub.checkpoints import fetch_checkpoint
from etastar.hub.record import RECORD

REPO, COMMIT, LATER = "owner/small", "0123456789abcdef" * 2 + "01234567", "f" * 40
WEIGHTS = bytes(range(256)) * 1200
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {"config.json": b'{"model_type": "granite"}', FIRST: WEIGHTS, SECOND: WEIGHTS[::-1], "model.safetensors.index.json": b"{}",
         "tokenizer.json": b"{} ", "README.md": b"A card.", "LICENSE": b"Apache-2.0"}
BYTES = sum(map(len, FILES.values()))


def fetch(name=f"{REPO}@{COMMIT}", folder=None, **options):
    """(folder, what was told) of a fetch."""
    told = []
    path = fetch_checkpoint(name, folder, tell=told.append, progress=False, **options)
    return path, "\n".join(told)


def contents(folder):
    """Bytes by name of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != RECORD}


def only_error(kind, *words, **options):
    """The one line that a fetch ends in, which has these words."""
    with pytest.raises(kind) as caught:
        fetch(**options)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)
