"""Where downloads, tokenized corpora and measured speeds are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`ETASTAR_CACHE`, or `etastar` in the user's cache folder; not created here."""
    given = os.environ.get("ETASTAR_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "etastar"
