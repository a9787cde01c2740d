"""A made-up archive, a host that serves it badly on demand, and made-up runs in the published layouts."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from etastar.archives import manifest
from etastar.archives.manifest import Archive, File, to_toml

COMMIT = "0" * 40


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Lists made-up files as an archive in a manifest of its own, with an empty cache and no mirror; returns the Archive."""
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ETASTAR_MIRROR", raising=False)
    monkeypatch.delenv("ETASTAR_CODE_HOST", raising=False)
    made = {}

    def make(files: dict[str, bytes], name="haegele") -> Archive:
        entries = tuple(File(path, len(body), hashlib.sha256(body).hexdigest()) for path, body in files.items())
        made[name] = Archive(name, "https://code.example/owner/repo", COMMIT, f"https://raw.code.example/owner/repo/{COMMIT}/", "MIT",
                             "arXiv 0000.00000", "made up", entries)
        (tmp_path / "archives.toml").write_text(to_toml(made.values()))
        monkeypatch.setattr(manifest, "MANIFEST", tmp_path / "archives.toml")
        return made[name]

    return make


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Writes files of an archive into a mirror and names it in ETASTAR_MIRROR."""

    def write(archive: Archive, files: dict[str, bytes]):
        for path, body in files.items():
            target = tmp_path / "mirror" / archive.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
        monkeypatch.setenv("ETASTAR_MIRROR", str(tmp_path / "mirror"))

    return write


class Host:
    """A code host on this machine: `files` by path; `faults` by path are (kind, detail) pairs, one a request, then all is well."""

    def __init__(self):
        self.files, self.faults, self.asked = {}, {}, []

    def answer(self, request):
        path = request.path.split(COMMIT + "/")[-1].replace("%3D", "=")
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append((path, start))
        kind, detail = self.faults[path].pop(0) if self.faults.get(path) else ("", None)
        if kind == "status" or path not in self.files:
            code, headers = detail if kind else (404, {})
            request.send_response(code)
            for key, value in headers.items():
                request.send_header(key, value)
            return request.end_headers()
        body = b"x" * len(self.files[path]) if kind == "corrupt" else self.files[path]
        ranged = start and kind != "no ranges"
        request.send_response(206 if ranged else 200)
        if ranged:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:] if ranged else body
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:detail] if kind == "cut" else body)


@pytest.fixture
def host(monkeypatch):
    """A Host that ETASTAR_CODE_HOST names."""
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("ETASTAR_CODE_HOST", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def made_up_run():
    """(path, body) of a run in the layout of the haegele archive; `config` and `history` replace what it logs."""

    def make(series="sl", dataset="slimpajama", scheduler="cos", lr=0.001, steps=1000, n_layer=4, n_head=4, decay="", folder="data",
             config=None, history=None, summary=None):
        name = (f"{series + '_' if series else ''}{dataset}_llama_norm_nlayers{n_layer}_nhead{n_head}_lr{lr:g}_sched_{scheduler}_warmup100"
                f"{decay}_iter{steps}_bs50x2_ws2_seed0_data_seed1337")
        logged = {"iterations": steps, "lr": lr, "scheduler": scheduler, "dataset": dataset, "n_layer": n_layer, "n_head": n_head,
                  "batch_size": 50, "acc_steps": 2, "world_size": 2, "sequence_length": 512, "seed": 0, "data_seed": 1337,
                  "warmup_steps": 100, "model": "llama_norm", "wandb_run_prefix": series or "none"} | (config or {})
        empty = {"val": {"iter": [], "val_loss": []}, "train": {"iter": [], "train_loss": [], "train_lr": []}}
        told = {"parameters": 1000 * n_layer} | (summary or {})
        body = {"summary": told, "config": logged, "name": name, "history": empty | (history or {})}
        return f"{folder}/{name}.json", json.dumps(body).encode()

    return make
