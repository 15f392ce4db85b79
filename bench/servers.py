"""An S3 server for benchmarks: `rclone serve s3` over a folder, with keys that only this process knows."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RCLONE = str(Path(sys.executable).with_name("rclone"))
START_S = 20.0


@contextmanager
def rclone_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Serve each folder in `folder` as a bucket; gives the environment that its clients need."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    endpoint = f"http://127.0.0.1:{port}"
    command = [RCLONE, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    environ = os.environ | {"RCLONE_CONFIG": os.devnull}
    with subprocess.Popen(
        [*command, "--auth-key", f"{key},{secret}"], env=environ, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_until_it_answers(port, server)
            yield environ | _client(endpoint, key, secret) | {"BENCH_SERVER_PID": str(server.pid)}
        finally:
            server.terminate()


def _client(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """For obstore and the AWS CLI, and a remote named `s3` for rclone."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RCLONE_CONFIG_S3_TYPE": "s3",
        "RCLONE_CONFIG_S3_PROVIDER": "Rclone",
        "RCLONE_CONFIG_S3_ENDPOINT": endpoint,
        "RCLONE_CONFIG_S3_ENV_AUTH": "true",
    }


def _wait_until_it_answers(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"rclone serve s3 did not answer on port {port}")
