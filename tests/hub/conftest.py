"""A hub on this machine for the tests that fetch, and traps for those that open folders."""

import pickle
from pathlib import Path

import pytest

from hub_server import Hub
from small_checkpoint import COMMIT, FILES, REPO


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited."""
    waited = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    """A Hub that HF_ENDPOINT names, with REPO at COMMIT, an empty HF_HOME and no token."""
    from huggingface_hub import close_session, constants

    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HTTP_PROXY", "http_proxy",
                 "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # the grain in which the client keeps what arrived before a cut
    close_session()
    served = Hub()
    served.put(REPO, COMMIT, FILES)
    monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield served
    close_session()
    served.close()


@pytest.fixture
def trap(tmp_path):
    """(a pickle that writes a file when it is read, code that writes it when it is run, that file)."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (sprung,)

    body, code = pickle.dumps(Trap()), f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\nclass Trap: pass\n"
    for spring in (lambda: pickle.loads(body), lambda: exec(code, {})):
        spring()
        assert sprung.exists()  # the traps work
        sprung.unlink()
    return body, code, sprung
