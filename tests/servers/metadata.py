"""A stand-in for Google's metadata server, over a real socket, that misbehaves on request."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

ROOT = "/computeMetadata/v1/"


class Asked(NamedTuple):
    """A request as it came in."""

    key: str
    query: dict[str, str]
    flavor: str | None


class MetadataServer:
    """Values by key, each with an ETag that changes when the value does; `wait_for_change` waits for that."""

    def __init__(self, *, spot: bool = True, flavor: str | None = "Google") -> None:
        self.values = {
            "instance/preempted": "FALSE",
            "instance/scheduling/preemptible": "TRUE" if spot else "FALSE",
        }
        self.flavor = flavor
        self.asked: list[Asked] = []
        self.busy = 0
        """So many requests are answered 503 first."""
        self.hangs = 0
        """So many requests are never answered."""
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def host(self) -> str:
        """What GCE_METADATA_HOST is to be."""
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def preempt(self) -> None:
        with self._changed:
            self.values["instance/preempted"] = "TRUE"
            self._changed.notify_all()

    def waiting(self) -> bool:
        """Whether somebody has asked to be told of a change."""
        return any("wait_for_change" in asked.query for asked in list(self.asked))

    def etag(self, key: str) -> str:
        return f"etag-of-{self.values[key]}"

    def misbehaves(self) -> str:
        with self._changed:
            if self.hangs:
                self.hangs -= 1
                return "hangs"
            if self.busy:
                self.busy -= 1
                return "busy"
        return ""

    def hang(self) -> None:
        self._closed.wait()

    def wait_for_change(self, key: str, etag: str, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.etag(key) != etag or self._closed.is_set(), timeout_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    stand_in: MetadataServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are gone are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        stand_in = self.server.stand_in
        address = urlsplit(self.path)
        key = address.path.removeprefix(ROOT)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        stand_in.asked.append(Asked(key, query, self.headers.get("Metadata-Flavor")))
        match stand_in.misbehaves():
            case "hangs":
                stand_in.hang()
                return
            case "busy":
                self._send(503, "busy", "")
                return
        if self.headers.get("Metadata-Flavor") != "Google" or key not in stand_in.values:
            self._send(404 if key not in stand_in.values else 403, "", "")
            return
        if query.get("wait_for_change") == "true":
            stand_in.wait_for_change(key, query.get("last_etag", "0"), float(query.get("timeout_sec", "300")))
        self._send(200, stand_in.values[key], stand_in.etag(key))

    def _send(self, status: int, text: str, etag: str) -> None:
        self.send_response_only(status)
        if self.server.stand_in.flavor:
            self.send_header("Metadata-Flavor", self.server.stand_in.flavor)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        """Say nothing."""
