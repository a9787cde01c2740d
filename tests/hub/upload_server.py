"""A local server that takes uploads as the hub does: create, info, validate-yaml, preupload, git-lfs batch, PUT, verify, commit."""

import base64
import hashlib
import http.server
import json
import threading

TOKEN = "hf_" + "good" * 8
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LARGE = (".safetensors", ".parquet")


class UploadServer:
    """What was asked for and what came; the next `failing_puts` uploads of large files are turned away."""

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.puts = self.failing_puts = 0
        server = self
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Answers,), {"state": server}))
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


class _Answers(http.server.BaseHTTPRequestHandler):
    state: UploadServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer(b"")

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, oid = self.rfile.read(size), self.path.split("/")[-1]
        self.state.puts += 1
        if self.state.failing_puts:
            self.state.failing_puts -= 1
            return self._send(400, {"error": "storage is not well"})
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(422, {"error": "other bytes than were announced"})
        self.state.objects[oid] = body
        self._send(200, {})

    def _answer(self, body: bytes):
        path = self.path.split("?")[0]
        self.state.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token:
            self.state.tokens.add(token)
        if token != TOKEN:
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(200, {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        if path == "/verify":
            return self._send(200 if json.loads(body)["oid"] in self.state.objects else 404, {})
        if path.endswith("/commit/main"):
            return self._commit(path.split("/", 2)[2].removesuffix("/commit/main"), body)
        name = path.removeprefix("/api/")
        if name in self.state.repos:
            return self._send(200, {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": [], "tags": []} | self.state.repos[name])
        self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _create(self, asked: dict):
        name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        url = f"{self.state.endpoint}/{name.removeprefix('models/')}"
        if asked["organization"] == "somebody-else":
            return self._send(403, {"error": "You don't have the rights to create a repo under this namespace"})
        if name in self.state.repos:
            return self._send(409, {"error": "You already created this repo", "url": url})
        self.state.repos[name] = {"private": asked.get("visibility") == "private" or bool(asked.get("private"))}
        self._send(200, {"url": url})

    def _lfs(self, wanted: dict) -> dict:
        if wanted["oid"] in self.state.objects:
            return wanted
        at = self.state.endpoint
        return wanted | {"actions": {"upload": {"href": f"{at}/put/{wanted['oid']}"}, "verify": {"href": f"{at}/verify"}}}

    def _commit(self, name: str, body: bytes):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.state.messages.append(value["summary"])
            elif line["key"] == "file":
                self.state.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.state.files[value["path"]] = self.state.objects[value["oid"]]
        url = f"{self.state.endpoint}/{name.removeprefix('models/')}/commit/{COMMIT}"
        self._send(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _send(self, status: int, body: dict, headers: dict | None = None):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
