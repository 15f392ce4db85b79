"""A real SkyPilot on this one machine: cluster, object store, API server, and nothing left of it at the end.

What stands in for the internet: SkyPilot's set-up of a node pipes uv's installer from the web, and has uv
download Python 3.10; on this cluster `curl` answers that one address, and uv takes the Python that runs the tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.e2e.lab.launcher import Launcher
from tests.e2e.lab.namespace import Namespace, NotToBeHad
from tests.e2e.lab.packages import SBIN, install
from tests.e2e.lab.sky import Sky
from tests.e2e.lab.slurm import Slurm
from tests.harness import ROOT, wait_until
from tests.servers.ports import free_ports
from tests.servers.rclone import RCLONE

GPUS = 32
"""Four jobs of eight GPUs at a time."""
BUCKET = "checkpoints"
BIN = Path("/usr/local/bin")
TRAINER = ROOT / ".venv-trainer" / "bin" / "python"
KEPT = ("PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
KEPT_PREFIXES = ("UV_", "PIP_")
KEPT_SUFFIXES = ("_proxy", "_PROXY")
CURL = """#!/bin/bash
for word in "$@"; do
  if [ "$word" = https://astral.sh/uv/install.sh ]; then
    echo 'mkdir -p "$UV_INSTALL_DIR" && ln -sf /usr/local/bin/uv "$UV_INSTALL_DIR/uv"'
    exit 0
  fi
done
exec {curl} "$@"
"""
UV = """#!/bin/bash
words=()
for word in "$@"; do [ "$word" = 3.10 ] && word={python}; words+=("$word"); done
export UV_SYSTEM_CERTS=1
exec {uv} "${{words[@]}}"
"""


class Lab(NamedTuple):
    """What tests use."""

    inside: Namespace
    """Where all of it is; a command that speaks to SkyPilot, such as the launcher, is run in there."""
    sky: Sky
    slurm: Slurm
    checkpoints: str
    """URI of the folder of runs."""
    secrets: dict[str, str]
    """How the bucket is reached, from here as from the cluster."""
    node_root: Path
    """What is `/` on the node, seen from here."""
    node_tmp: Path
    """The node's folder for temporary files, here as there."""
    trainer: dict[str, str]
    """What tells a task where the trainer's environment is on this cluster."""
    launcher: Launcher
    """Without the bucket; a job's own launcher has it."""


@contextmanager
def lab() -> Iterator[Lab]:
    """Bring everything up, and down again; raises NotToBeHad."""
    if not TRAINER.exists():
        raise NotToBeHad(f"no {TRAINER.relative_to(ROOT)}: make setup")
    folder = Path(tempfile.mkdtemp(prefix="aeolus-lab-", dir="/tmp"))
    try:
        environ = _environ()
        with Namespace({**environ, "PATH": f"{environ['PATH']}:{SBIN}"}) as inside:
            install(inside)
            _stand_ins(inside, folder)
            slurm = Slurm(inside, folder, gpus=GPUS)
            slurm.start({**environ, "TMPDIR": str(folder / "tmp")})
            access = _store(inside, folder)
            sky = Sky(inside, folder)
            sky.start(slurm.ssh_config())
            trainer = {"AEOLUS_TRAINER_PYTHON": str(TRAINER)}
            yield Lab(
                inside,
                sky,
                slurm,
                f"s3://{BUCKET}/runs",
                access,
                inside.root,
                folder / "tmp",
                trainer,
                Launcher(inside, folder / "state", {}),
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environ() -> dict[str, str]:
    """The cluster's environment: this process's ways to the package registry, and none of its secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_PREFIXES) or name.endswith(KEPT_SUFFIXES)
    }
    return {**kept, "USER": "root"}


def _stand_ins(inside: Namespace, folder: Path) -> None:
    (folder / "tmp").mkdir()
    curl = inside.run("sh", "-c", "command -v curl").stdout.strip()
    for name, text in {
        "curl": CURL.format(curl=curl),
        "uv": UV.format(uv=_uv(), python=Path(sys.executable).resolve()),
    }.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
        inside.run("mv", path, BIN / name)
    # What a person's shell does at its start is slow, and no part of this cluster.
    inside.run("rm", "-f", "/root/.bashrc", "/root/.profile", "/root/.bash_profile")


def _uv() -> str:
    """Uv of this machine, else the one that `make setup` puts aside where there is none."""
    if found := shutil.which("uv"):
        return found
    tools = ROOT / ".tools"
    if not (tools / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", tools], check=True)
        subprocess.run([tools / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(tools / "bin" / "uv")


def _store(inside: Namespace, folder: Path) -> dict[str, str]:
    """An S3 server on loopback; its environment variables."""
    (folder / "s3" / BUCKET).mkdir(parents=True)
    key, secret, port = secrets.token_hex(8), secrets.token_hex(16), free_ports("s3")["s3"]
    command = [RCLONE, "serve", "s3", folder / "s3", "--addr", f"127.0.0.1:{port}", "--config", ""]
    # Nobody else writes to the folder; with a time of 0 s rclone 1.75.2 was seen to lock up (vfs.Dir.cacheCleanup).
    command += ["--auth-key", f"{key},{secret}", "--vfs-cache-mode", "off", "--dir-cache-time", "24h"]
    with (folder / "s3.log").open("wb") as log:
        server = inside.start(*command, "--vfs-write-wait", "0s", log=log)
    wait_until(lambda: _listens(port) or server.poll() is not None, "rclone serve s3", timeout_s=30)
    assert server.poll() is None, (folder / "s3.log").read_text()
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
