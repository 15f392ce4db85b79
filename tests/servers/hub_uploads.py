"""As much of the Hugging Face Hub as an upload asks for, over HTTP on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WEIGHTS = ".safetensors"


class Hub:
    """What was asked of it."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.url = ""
        self.large: dict[str, bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._note()
        self._answer(200, {"id": "org/name", "siblings": [], "sha": "0" * 40, "private": True})

    def do_PUT(self) -> None:
        """A large file, to the address that the batch named; no token goes there."""
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        self._note()
        if self.hub.refuses:
            self._answer(403, {"error": "Forbidden: no write access"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append({key: asked.get(key) for key in ("name", "organization", "visibility")})
            self._answer(200, {"url": f"{self.hub.url}/org/name", "id": "org/name", "name": "org/name"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(WEIGHTS) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **each,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}"}},
                }
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(200, {})

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        url = f"{self.hub.url}/org/name/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def _note(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, what: dict[str, Any]) -> None:
        data = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
