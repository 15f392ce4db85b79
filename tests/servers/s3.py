"""S3 over real sockets: a server to talk to, and a proxy before it that misbehaves on request."""

from __future__ import annotations

import http.client
import logging
import re
import select
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, TracebackType
from typing import Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

ACCESS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server on a free port of this machine; its URL."""
    from moto.server import ThreadedMotoServer  # a second that only tests of S3 should pay

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> None:
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def environ(endpoint: str) -> dict[str, str]:
    """The variables with which any process reaches the server."""
    return {**ACCESS, "AWS_ENDPOINT_URL": endpoint}


class Seen(NamedTuple):
    """A request as it came in."""

    method: str
    key: str
    """Without the bucket; empty for listings and bulk deletes."""
    query: str
    headers: Mapping[str, str]
    """Names in lower case."""


@dataclass
class Rule:
    """What becomes of the requests whose method and key match; `hits` counts them."""

    action: Literal["hold", "answer", "cut", "reset", "truncate", "flip"]
    method: str
    key: re.Pattern[str]
    times: int | None
    status: int = 0
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What the request must carry, names in lower case."""
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def takes(self, seen: Seen) -> bool:
        wanted = re.fullmatch(self.method, seen.method) and self.key.search(seen.key)
        carried = all(seen.headers.get(name) == value for name, value in self.headers.items())
        return bool(wanted) and carried and (self.times is None or self.hits < self.times)


class FaultyS3:
    """An HTTP proxy before an S3 server, on a port of its own, for any process.

    Rules are tried in the order in which they were added, the first that matches is applied, and
    `times` bounds how often. `method` is a regex for the whole method, `key` one to be found in the
    key without its bucket.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._rules: list[Rule] = []
        self._changed = threading.Condition()
        self._held = 0
        self._requests: list[Seen] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> list[Seen]:
        """All that came in so far, in order, also what was not answered."""
        with self._changed:
            return list(self._requests)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hold(self, method: str = ".*", key: str = "", *, times: int | None = None) -> Rule:
        """Let requests wait until `release` or `clear`; those of a client that died meanwhile vanish."""
        return self._add(Rule("hold", method, re.compile(key), times))

    def answer(
        self,
        status: int,
        code: str,
        method: str = ".*",
        key: str = "",
        *,
        times: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Rule:
        """Answer with an S3 error, without asking the server, requests that carry `headers`."""
        return self._add(Rule("answer", method, re.compile(key), times, status, code, headers))

    def reset(self, method: str = ".*", key: str = "", *, times: int | None = None) -> Rule:
        """Reset the connection (RST) without asking the server."""
        return self._add(Rule("reset", method, re.compile(key), times))

    def cut(self, method: str = ".*", key: str = "", *, times: int | None = None) -> Rule:
        """Do what was asked, then close the connection instead of answering."""
        return self._add(Rule("cut", method, re.compile(key), times))

    def truncate(self, key: str = "", *, times: int | None = None) -> Rule:
        """Send half of a GET's body, then close the connection."""
        return self._add(Rule("truncate", "GET", re.compile(key), times))

    def flip_bit(self, key: str = "", *, times: int | None = None) -> Rule:
        """Change one bit in the middle of a GET's body."""
        return self._add(Rule("flip", "GET", re.compile(key), times))

    def wait_for_held(self, timeout: float, *, count: int = 1) -> bool:
        """Wait until so many requests are being held; False if the time is up, in seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held >= count, timeout)

    def release(self) -> None:
        """Let what is held go on, and hold nothing more."""
        with self._changed:
            held = [rule for rule in self._rules if rule.action == "hold"]
            self._rules = [rule for rule in self._rules if rule.action != "hold"]
        for rule in held:
            rule.released.set()

    def clear(self) -> None:
        """Behave from now on."""
        self.release()
        with self._changed:
            self._rules.clear()

    def _add(self, rule: Rule) -> Rule:
        with self._changed:
            self._rules.append(rule)
        return rule

    def rule_for(self, seen: Seen) -> Rule | None:
        """Record a request and count it for the rule that takes it."""
        with self._changed:
            self._requests.append(seen)
            rule = next((rule for rule in self._rules if rule.takes(seen)), None)
            if rule:
                rule.hits += 1
            return rule

    def wait_for_release(self, rule: Rule) -> None:
        with self._changed:
            self._held += 1
            self._changed.notify_all()
        rule.released.wait()
        with self._changed:
            self._held -= 1

    def forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            # As it came, Host included: it is part of what was signed.
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultyS3

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_any(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, unquote(address.path.lstrip("/").partition("/")[2]), address.query, headers)
        rule = proxy.rule_for(seen)
        if rule and rule.action == "hold":
            proxy.wait_for_release(rule)
            if self._client_is_gone():
                self.close_connection = True
                return
        if rule and rule.action == "answer":
            text = f"<Error><Code>{rule.code}</Code><Message>on request</Message></Error>"
            self._send(rule.status, [("Content-Type", "application/xml")], text.encode())
            return
        if rule and rule.action == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with no time to linger, the kernel sends RST
            self.close_connection = True
            return
        status, answered, data = proxy.forward(self, body)
        if rule and rule.action == "cut":
            self.close_connection = True
            return
        if rule and rule.action == "flip" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._send(status, answered, data, cut_short=rule is not None and rule.action == "truncate")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any  # noqa: N815 (names that http.server looks for)

    def _send(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut_short: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut_short else data)
        self.close_connection = self.close_connection or cut_short

    def _client_is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        """Say nothing."""
