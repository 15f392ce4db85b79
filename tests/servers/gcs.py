"""Google Cloud Storage over real sockets: what obstore uses of its XML API, with generations and ETags.

Also the metadata server of a Google machine, which hands out the token that the store asks for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

TOKEN = "ya29.not-a-real-token"
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
PAGE_KEYS = 50  # the store has 1,000: a test should see more than one page


class Stored(NamedTuple):
    """An object in its newest generation."""

    data: bytes
    generation: int
    written: datetime

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.md5(self.data).hexdigest()}"',
            "Last-Modified": format_datetime(self.written, usegmt=True),
            "x-goog-generation": str(self.generation),
        }


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


def refusal(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>stand-in</Message></Error>".encode())


class GCS:
    """The objects of all buckets, and what each request does to them."""

    def __init__(self) -> None:
        self.buckets: set[str] = set()
        self.tokens_given = 0
        self._objects: dict[tuple[str, str], Stored] = {}
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._lock = threading.Lock()

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        address = urlsplit(path)
        if address.path == TOKEN_PATH:
            return self._token(headers)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(401, "AuthenticationRequired")
        if bucket not in self.buckets:
            return refusal(404, "NoSuchBucket")
        with self._lock:
            if not key:
                return self._list(bucket, query)
            if "uploads" in query or "uploadId" in query:
                return self._multipart(method, (bucket, key), query, body)
            return self._object(method, (bucket, key), headers, body)

    def _token(self, headers: Mapping[str, str]) -> Answer:
        if headers.get("Metadata-Flavor") != "Google":
            return refusal(403, "Forbidden")
        self.tokens_given += 1
        text = json.dumps({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        return Answer(200, text.encode(), {"Content-Type": "application/json"})

    def _object(self, method: str, key: tuple[str, str], headers: Mapping[str, str], body: bytes) -> Answer:
        there = self._objects.get(key)
        if method == "PUT":
            wanted = headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                return refusal(412, "PreconditionFailed")
            return Answer(200, headers=self._store(key, body).headers)
        if there is None:
            return refusal(404, "NoSuchKey")
        if method == "DELETE":
            del self._objects[key]
            return Answer(204)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range") or ""):
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(there.data))
            span = f"bytes {start}-{end - 1}/{len(there.data)}"
            return Answer(206, there.data[start:end], {**there.headers, "Content-Range": span})
        return Answer(200, there.data, there.headers)

    def _store(self, key: tuple[str, str], data: bytes) -> Stored:
        stored = self._objects[key] = Stored(data, next(self._generations), datetime.now(UTC))
        return stored

    def _multipart(self, method: str, key: tuple[str, str], query: Mapping[str, str], body: bytes) -> Answer:
        if "uploads" in query:
            upload = f"upload-{next(self._generations)}"
            self._uploads[upload] = {}
            result = f"<UploadId>{upload}</UploadId>"
            return Answer(
                200, f"<InitiateMultipartUploadResult>{result}</InitiateMultipartUploadResult>".encode()
            )
        parts = self._uploads.get(query["uploadId"])
        if parts is None:
            return refusal(404, "NoSuchUpload")
        if method == "PUT":
            parts[int(query["partNumber"])] = body
            return Answer(200, headers={"ETag": _etag(body)})
        del self._uploads[query["uploadId"]]
        if method == "DELETE":
            return Answer(204)
        return self._complete(key, parts, body.decode())

    def _complete(self, key: tuple[str, str], parts: Mapping[int, bytes], wanted: str) -> Answer:
        numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", wanted)]
        etags = re.findall(r"<ETag>(.*?)</ETag>", wanted)
        if not numbers or [_etag(parts.get(number, b"")) for number in numbers] != etags:
            return refusal(400, "InvalidPart")
        stored = self._store(key, b"".join(parts[number] for number in numbers))
        etag = f"<ETag>{escape(stored.headers['ETag'])}</ETag>"
        text = f"<CompleteMultipartUploadResult>{etag}</CompleteMultipartUploadResult>"
        return Answer(200, text.encode(), stored.headers)

    def _list(self, bucket: str, query: Mapping[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", "")
        entries: dict[str, str] = {}
        for (owner, key), stored in sorted(self._objects.items()):
            if owner != bucket or not key.startswith(prefix):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            name = prefix + head + delimiter if found else key
            if name > after:
                entries[name] = _prefix(name) if found else _contents(name, stored)
        names = list(entries)[:PAGE_KEYS]
        text = "".join(entries[name] for name in names)
        if len(entries) > PAGE_KEYS:
            text += f"<NextContinuationToken>{escape(names[-1])}</NextContinuationToken>"
        return Answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _prefix(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"


def _contents(name: str, stored: Stored) -> str:
    return (
        f"<Contents><Key>{escape(name)}</Key><Size>{len(stored.data)}</Size>"
        f"<LastModified>{stored.written.strftime('%Y-%m-%dT%H:%M:%S.%fZ')}</LastModified>"
        f"<ETag>{escape(stored.headers['ETag'])}</ETag></Contents>"
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gcs: GCS

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.gcs.handle(self.command, self.path, self.headers, body)  # type: ignore[arg-type]
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any  # noqa: N815 (names that http.server looks for)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        """Say nothing."""


@contextmanager
def gcs_server() -> Iterator[tuple[GCS, str]]:
    """A store on a free port of this machine, and its `host:port`."""
    gcs = GCS()
    handler = type("Handler", (_Handler,), {"gcs": gcs})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield gcs, f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def gcs_environ(host: str) -> dict[str, str]:
    """The variables with which any process reaches the server, as one with a token of its own."""
    return {"GOOGLE_BASE_URL": f"http://{host}", "GOOGLE_BEARER_TOKEN": TOKEN}
