"""A stand-in for the hub's HTTP API, as far as uploading a dataset needs it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {"hf_writes": "write", "hf_reads": "read"}


class Hub:
    """``repos``: what was uploaded, {name: {path: bytes}}; ``private``: their names; ``asked``: all calls."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.broken = ""  # a part of the address that answers 500
        self.url = ""

    def answer(self, path: str, role: str | None, body: bytes) -> tuple[int, Any]:
        self.asked.append(path)
        if self.broken and self.broken in path:
            return 500, {"error": "the disk is full"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if role is None:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if role != "write":
            return 403, {"error": "This token may not write"}
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            if name in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/datasets/{name}"}
            assert told["type"] == "dataset"
            self.repos[name] = {}
            hidden = (
                told.get("private") or told.get("visibility") == "private"
            )  # as older clients say, and newer
            self.private |= {name} if hidden else set()
            return 200, {"url": f"{self.url}/datasets/{name}", "id": name, "name": name}
        _, _, kind, user, repo, action, *_ = path.split("/")
        name = f"{user}/{repo}"
        assert kind == "datasets" and name in self.repos, path
        if action == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
        at = f"{self.url}/datasets/{name}/commit/{'0' * 40}"
        return 200, {"commitUrl": at, "commitOid": "0" * 40, "success": True}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            status, told = hub.answer(self.path.partition("?")[0], TOKENS.get(token), body)
            text = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _reply

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
