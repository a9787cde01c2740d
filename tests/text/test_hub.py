"""A dataset repository at a pinned commit, read by the real huggingface_hub client from a local server that speaks its protocol."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "data/part-0.jsonl": "\n".join(json.dumps({"text": f"row {i} " + "lorem ipsum dolor " * 40 + str(i)}) for i in range(80)).encode(),
    "notes.txt": b"A note about the data. " * 40,
    "evil.bin": b"not asked for",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """info, tree and resolve of one dataset; `broken` cuts a file short."""

    asked: list[str] = []
    missing: set[str] = set()

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.split("?")[0]
        self.asked.append(path)
        listing = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in FILES.items()]
        if path.startswith("/api/datasets/owner/name/revision/") or path == "/api/datasets/owner/name":
            info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": p} for p in FILES], "private": False, "tags": [],
                    "downloads": 0, "likes": 0}
            return self._send(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
        if path.startswith("/api/datasets/owner/name/tree/"):
            return self._send(200, json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
        prefix = f"/datasets/owner/name/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in FILES and name not in self.missing:
            data = FILES[name]
            return self._send(200, data, body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status, data, body, headers):
        self.send_response(status)
        for name, item in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, item)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked, Hub.missing = [], set()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def prepare_in_a_process(tmp_path, endpoint, source=f"hf:owner/name@{COMMIT}", **env):
    """huggingface_hub reads its settings when it is imported, hence a process of its own."""
    code = (f"from etastar.recipe import Corpus; from etastar.text.corpora import prepare; t = prepare(Corpus({source!r}, vocab=300));"
            "print(t.train_tokens, t.validation_tokens)")
    given = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "ETASTAR_CACHE": str(tmp_path / "cache"),
                          "PYTHONPATH": str(Path(__file__).parents[2] / "lib"), "HF_HUB_DISABLE_XET": "1"} | env
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_pinned_dataset_is_fetched_read_and_found_again_offline(hub, tmp_path):
    told = prepare_in_a_process(tmp_path, hub)
    assert told.returncode == 0, told.stderr
    train, validation = map(int, told.stdout.split())
    assert train > 1_000 and validation > 50
    assert not any("evil.bin" in path for path in Hub.asked)
    again = prepare_in_a_process(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1", ETASTAR_CACHE=str(tmp_path / "other"))
    assert again.returncode == 0 and again.stdout == told.stdout, again.stderr


@pytest.mark.slow
def test_a_snapshot_that_is_not_whole_is_refused(hub, tmp_path):
    assert prepare_in_a_process(tmp_path, hub).returncode == 0
    for path in (tmp_path / "hf").rglob("part-0.jsonl"):
        path.unlink()
    told = prepare_in_a_process(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1", ETASTAR_CACHE=str(tmp_path / "other"))
    assert told.returncode != 0 and "at 0123456789ab cannot be had" in told.stderr.splitlines()[-1], told.stderr


@pytest.mark.slow
def test_a_dataset_that_is_not_there_is_told_in_one_line(hub, tmp_path):
    told = prepare_in_a_process(tmp_path, hub, source=f"hf:owner/other@{COMMIT}")
    assert told.returncode != 0 and "the dataset owner/other at 0123456789ab cannot be had" in told.stderr.splitlines()[-1]
