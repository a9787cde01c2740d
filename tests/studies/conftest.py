import pytest


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither a mirror nor a cache has a published archive."""
    monkeypatch.setenv("ETASTAR_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
