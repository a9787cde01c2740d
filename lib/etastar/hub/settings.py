"""The hub's settings as they stand when they are asked for: its client reads them once, when it is first imported."""

import os
from pathlib import Path


def endpoint() -> str:
    """Address of the hub: HF_ENDPOINT, or the hub itself."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, or was when the client was imported, which then sends nothing any more."""
    from huggingface_hub.constants import is_offline_mode

    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or is_offline_mode()


def cache() -> Path:
    """Folder of the hub's cache: HF_HUB_CACHE, or hub in HF_HOME."""
    from huggingface_hub import constants

    home = os.environ.get("HF_HOME")
    given = os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else constants.HF_HUB_CACHE)
    return Path(given).expanduser().absolute()
