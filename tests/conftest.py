"""Stores that several tests need: a folder, an S3 server, and an S3 server that misbehaves."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.s3 import FaultyS3, environ, make_bucket, s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server; one for all tests of this process."""
    with s3_server() as url:
        yield url


def _reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environ(endpoint).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new S3 bucket; this process and those it starts can reach it."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_endpoint, name)
    _reach(monkeypatch, s3_endpoint)
    return f"s3://{name}/runs"


@pytest.fixture
def faulty_s3(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The proxy before the server of `s3`; from now on `s3` goes through it."""
    with FaultyS3(s3_endpoint) as proxy:
        _reach(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place for runs: a folder, then an S3 bucket."""
    return str(tmp_path / "bucket") if request.param == "folder" else str(request.getfixturevalue("s3"))
