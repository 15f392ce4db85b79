"""`rclone serve s3`: an S3 server that takes every write, also one that is conditional on nothing being there."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import wait_until
from tests.servers.ports import answers
from tests.servers.s3 import ACCESS

BUCKET = "bucket"
RCLONE = Path(sys.executable).with_name("rclone")


@contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """An S3 server over `folder`, in which it makes one bucket, `BUCKET`; its URL."""
    (folder / BUCKET).mkdir()  # the server does not see what others make later
    port = _free_port()
    keys = f"{ACCESS['AWS_ACCESS_KEY_ID']},{ACCESS['AWS_SECRET_ACCESS_KEY']}"
    command = [RCLONE, "serve", "s3", folder, "--addr", f"127.0.0.1:{port}", "--auth-key", keys]
    command += [
        "--config",
        "",
        "--vfs-cache-mode",
        "off",
        "--vfs-write-wait",
        "0s",
        "--dir-cache-time",
        "24h",  # with 0 s rclone 1.75.2 was seen to spin for minutes (vfs.Dir.cacheCleanup)
        "--log-level",
        "ERROR",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None, "rclone serve s3", timeout_s=30)
        assert process.poll() is None, "rclone serve s3 did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
