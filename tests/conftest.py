"""Stores that several tests need: folders, S3, GCS, an S3 that knows no conditions, and one that misbehaves."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.gcs import GCS, gcs_environ, gcs_server
from tests.servers.rclone import BUCKET, rclone_server
from tests.servers.s3 import FaultyS3, environ, make_bucket, s3_server

# A machine that is slow, because other tests run beside these, is not a fault of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server; one for all tests of this process."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def gcs_host() -> Iterator[tuple[GCS, str]]:
    """A stand-in for GCS and its `host:port`; one for all tests of this process."""
    with gcs_server() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `rclone serve s3`; one for all tests of this process."""
    with rclone_server(tmp_path_factory.mktemp("rclone")) as url:
        yield url


def reach(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """From now on this process and those it starts have these credentials, and no others."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "GCE_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new S3 bucket; this process and those it starts can reach it."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_endpoint, name)
    reach(monkeypatch, environ(s3_endpoint))
    return f"s3://{name}/runs"


@pytest.fixture
def faulty_s3(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The proxy before the server of `s3`; from now on `s3` goes through it."""
    with FaultyS3(s3_endpoint) as proxy:
        reach(monkeypatch, environ(proxy.url))
        yield proxy


@pytest.fixture
def gcs(gcs_host: tuple[GCS, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new GCS bucket, reached with a token."""
    server, host = gcs_host
    name = f"test-{uuid.uuid4().hex[:12]}"
    server.buckets.add(name)
    reach(monkeypatch, gcs_environ(host))
    return f"gs://{name}/runs"


@pytest.fixture
def rclone(rclone_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty place in a store that takes no conditional create."""
    reach(monkeypatch, environ(rclone_endpoint))
    return f"s3://{BUCKET}/test-{uuid.uuid4().hex[:12]}/runs"


@pytest.fixture(params=["folder", "s3", "gcs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place for runs, in each kind of store."""
    folder = str(tmp_path / "bucket")
    return folder if request.param == "folder" else str(request.getfixturevalue(request.param))
