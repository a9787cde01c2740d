"""A server on this machine that speaks the hub's HTTP protocol for model repositories, well or badly as a test asks.

`Hub.put` adds a repository at a commit; weights are kept as on the hub, in large-file storage on a second host (the CDN) to which
`resolve` redirects. `Hub.faults[file]` holds faults, one an answer with a body: ("status", code, headers), ("cut", bytes), ("short",
bytes), ("unsaid", bytes) without a length, ("stall", bytes) until `Hub.heal`, ("corrupt",), ("longer", bytes), ("no ranges",), ("page",),
("drop",). Faults that stay until `heal`: `api_fault` of the listing and `resolve_faults[file]`, each (code, headers), ("page",) or
("stall",); `lost`, listed files that are not there; `offers_other_hash`, `offers_other_commit`; `storage_is_down`.
`Hub.asked` records (method, path, first byte, token), `Hub.sent` (file, bytes of its body that were sent).
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".pkl")


class Hub:
    """Repositories by name: branches to commits, commits to files; and what was asked for."""

    def __init__(self):
        self.branches, self.commits = {}, {}
        self.gated, self.asked, self.sent = {}, [], []
        self.heal()
        self._front, self._cdn = _serve(self, _Front), _serve(self, _Cdn)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT should be."""
        return f"http://127.0.0.1:{self._front.server_port}"

    @property
    def cdn(self) -> str:
        """The host of large files."""
        return f"http://127.0.0.1:{self._cdn.server_port}"

    def put(self, repo: str, commit: str, files: dict[str, bytes], branch: str = "main") -> None:
        """Add a commit and let a branch stand at it."""
        self.branches.setdefault(repo, {})[branch] = commit
        self.commits.setdefault(repo, {})[commit] = dict(files)

    def heal(self) -> None:
        """Do well from now on; whoever was left waiting is let go."""
        if hasattr(self, "healed"):
            self.healed.set()
        self.healed = threading.Event()
        self.faults, self.resolve_faults, self.api_fault, self.storage_is_down = {}, {}, None, False
        self.lost, self.offers_other_hash, self.offers_other_commit = set(), set(), set()

    def forget(self) -> None:
        """Empty the records of what was asked and sent."""
        self.asked, self.sent = [], []

    def bodies_asked(self) -> list[tuple[str, int]]:
        """(file, first byte) of every body that was asked for, in order."""
        return [(path.rsplit("/", 1)[-1], start) for method, path, start, _ in self.asked if method == "GET" and "/api/" not in path
                and not path.startswith("/redirected/")]

    def close(self) -> None:
        """Stop answering."""
        self.healed.set()
        for server in (self._front, self._cdn):
            server.shutdown()
            server.server_close()


def _serve(hub: Hub, handler) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


class _Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _note(self, path: str) -> int:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.asked.append((self.command, path, start, self.headers.get("Authorization")))
        return start

    def _send(self, status: int, body: bytes = b"", headers: dict | None = None, told_length: int | None = None):
        self.send_response(status)
        length = len(body) if told_length is None else told_length
        for name, item in ({"Content-Length": str(length)} | (headers or {})).items():
            self.send_header(name, item)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if length != len(body):
            self.close_connection = True

    def _send_fault(self, fault: tuple) -> None:
        """An answer that is no answer."""
        match fault:
            case ("page",):
                self._send(200, b"<html>Log in to this network</html>", {"Content-Type": "text/html"})
            case ("drop",):
                self.close_connection = True
                self.connection.close()
            case ("stall",):
                self.close_connection = True
                self.hub.healed.wait(30)
            case _:
                self._send(fault[0], b"{}", fault[1])

    def _send_file(self, name: str, body: bytes, start: int, headers: dict):
        """A body, with the next fault that is planned for it."""
        planned = self.hub.faults.get(name)
        kind, *detail = planned.pop(0) if planned and self.command == "GET" else ("",)
        if kind in ("page", "drop"):
            return self._send_fault((kind,))
        if kind == "status":
            return self._send_fault(tuple(detail))
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if kind == "longer":
            body = body + b"x" * detail[0]
        status = 206 if start and kind != "no ranges" else 200
        if status == 206:
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body = body[start:]
        part = body[: detail[0]] if kind in ("cut", "short", "unsaid", "stall") else body
        if self.command == "GET":
            self.hub.sent.append((name, len(part)))
        if kind == "unsaid":
            return self._send_unsaid(part, headers)
        self._send(status, part, headers, told_length=len(body) if kind in ("cut", "stall") else None)
        if kind == "stall":
            self._send_fault(("stall",))

    def _send_unsaid(self, body: bytes, headers: dict) -> None:
        self.send_response(200)
        for name, item in (headers | {"Connection": "close"}).items():
            self.send_header(name, item)
        self.end_headers()
        self.wfile.write(body)


class _Front(_Answering):
    def _answer(self):
        path = unquote(self.path.split("?")[0])
        start = self._note(path)
        if path.startswith("/api/models/"):
            return self._tell_repository(path.removeprefix("/api/models/"))
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        files = self.hub.commits.get(repo, {}).get(commit)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound" if repo not in self.hub.commits else "RevisionNotFound"})
        if self.hub.gated.get(repo) and self.headers.get("Authorization") != f"Bearer {self.hub.gated[repo]}":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        if name in self.hub.resolve_faults:
            return self._send_fault(self.hub.resolve_faults[name])
        if name not in files or name in self.hub.lost:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._resolve(name, files[name], commit, start)

    def _resolve(self, name: str, body: bytes, commit: str, start: int):
        told = b"something else" if name in self.hub.offers_other_hash else body
        headers = {"X-Repo-Commit": "e" * 40 if name in self.hub.offers_other_commit else commit}
        storage = "http://127.0.0.1:9" if self.hub.storage_is_down else self.hub.cdn
        if not name.endswith(LARGE):
            return self._send_file(name, body, start, headers | {"ETag": f'"{git_sha1(told)}"'})
        self.hub.asked[-1] = (self.command, "/redirected" + self.path, start, self.headers.get("Authorization"))
        return self._send(302, b"", headers | {"Location": f"{storage}/{sha256(body)}/{name}", "X-Linked-Size": str(len(body)),
                                               "X-Linked-ETag": f'"{sha256(told)}"'})

    def _tell_repository(self, rest: str):
        kind = "/tree/" if "/tree/" in rest else "/revision/"
        repo, _, revision = rest.partition(kind)
        if self.hub.api_fault:
            return self._send_fault(self.hub.api_fault)
        if repo not in self.hub.commits:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.branches[repo].get(revision, revision)
        files = self.hub.commits[repo].get(commit)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if kind == "/tree/":
            return self._send(200, json.dumps([_entry(*item) for item in files.items()]).encode(), {"Content-Type": "application/json"})
        body = {"id": repo, "sha": commit, "private": False, "tags": [], "siblings": [_sibling(*item) for item in files.items()]}
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


class _Cdn(_Answering):
    def _answer(self):
        start = self._note(self.path)
        digest, _, name = self.path.removeprefix("/").partition("/")
        for files in (files for commits in self.hub.commits.values() for files in commits.values()):
            if name in files and sha256(files[name]) == digest:
                return self._send_file(name, files[name], start, {"ETag": f'"{digest[:32]}"'})
        return self._send(404)


def _sibling(name: str, body: bytes) -> dict:
    told = {"rfilename": name, "size": len(body), "blobId": git_sha1(body)}
    return told | ({"lfs": {"size": len(body), "sha256": sha256(body), "pointerSize": 134}} if name.endswith(LARGE) else {})


def _entry(name: str, body: bytes) -> dict:
    told = {"type": "file", "path": name, "size": len(body), "oid": git_sha1(body)}
    return told | ({"lfs": {"size": len(body), "oid": sha256(body), "pointerSize": 134}} if name.endswith(LARGE) else {})


def sha256(body: bytes) -> str:
    """Hash of a file in large-file storage."""
    return hashlib.sha256(body).hexdigest()


def git_sha1(body: bytes) -> str:
    """Hash of a file in git."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
