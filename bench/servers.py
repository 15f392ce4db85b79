"""An S3 server for benchmarks: `rclone serve s3` over a folder, with random keys."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RCLONE = str(Path(sys.executable).with_name("rclone"))
START_S = 20.0
MIB = 2**20
MOUNT_CACHED = (
    "--vfs-cache-mode full --dir-cache-time 10s --vfs-cache-poll-interval 10s --vfs-fast-fingerprint "
    "--vfs-cache-max-size 10G --vfs-write-back 1s"
)
"""The flags of SkyPilot 0.14.1's MOUNT_CACHED (sky/data/mounting_utils.py and storage.py)."""


def touch_memory(folder: Path, mib: int) -> None:
    """Fill and free as much tmpfs as the benchmark will use.

    A virtual machine's host takes pages back that were free for a while and gives them again one by one:
    1.3 s for 1 GiB of tmpfs here, against 0.32 s for pages that were just in use.
    """
    path, data = folder / "touched", bytes(MIB)
    with path.open("wb", buffering=0) as file:
        for _ in range(mib):
            file.write(data)
    path.unlink()


@contextmanager
def mounted(root: Path, *, rclone: str = RCLONE) -> Iterator[Path]:
    """Mount a bucket as SkyPilot's MOUNT_CACHED does, from a server over this machine's tmpfs."""
    target, cache = root / "mounted", root / "mount-cache"
    target.mkdir()
    (root / "served" / "bench").mkdir(parents=True)
    with rclone_s3(root / "served", rclone=rclone) as environ:
        command = [rclone, "mount", "s3:bench", str(target), "--cache-dir", str(cache), *MOUNT_CACHED.split()]
        with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as mount:
            try:
                _wait_until(target.is_mount, mount, "rclone mount")
                yield target
            finally:
                mount.terminate()


@contextmanager
def rclone_s3(folder: Path, *, rclone: str = RCLONE) -> Iterator[dict[str, str]]:
    """Serve each folder in `folder` as a bucket, and yield the environment for its clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    endpoint = f"http://127.0.0.1:{port}"
    command = [rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    environ = os.environ | {"RCLONE_CONFIG": os.devnull}
    with subprocess.Popen(
        [*command, "--auth-key", f"{key},{secret}"], env=environ, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_until(lambda: _answers(port), server, "rclone serve s3")
            yield environ | _client(endpoint, key, secret) | {"BENCH_SERVER_PID": str(server.pid)}
        finally:
            server.terminate()


def _client(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """Return the environment for obstore and the AWS CLI, with a remote named `s3` for rclone."""
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


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if ready():
            return
        time.sleep(0.05)
    raise RuntimeError(f"{what} did not start")
