"""A machine within this one: its own view of the file system and of the processes, and it ends as one.

What is written to `/dev/shm`, `/etc`, `/root`, `/run`, `/usr` and `/var` in there lies in memory and is seen by nobody
outside; everything that was started in there is killed by the kernel when it ends, also when the tests are
killed (pid_namespaces(7): the end of a namespace's first process is that of all its others).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Self

import psutil

from tests.harness import wait_until

PRIVATE = ("etc", "root", "run", "usr", "var")
"""Folders that Debian's packages, daemons and SkyPilot write to."""
FIRST_PROCESS = """
import pathlib, signal, subprocess, sys
def mount(*words):
    subprocess.run(["mount", *words], check=True)
layers = pathlib.Path(sys.argv[1])
mount("--make-rprivate", "/")
mount("-t", "tmpfs", "tmpfs", str(layers))
for name in sys.argv[2:]:
    for part in ("upper", "work"):
        (layers / name / part).mkdir(parents=True)
    folders = f"lowerdir=/{name},upperdir={layers}/{name}/upper,workdir={layers}/{name}/work"
    mount("-t", "overlay", "overlay", "-o", folders, f"/{name}")
mount("-t", "tmpfs", "tmpfs", "/dev/shm")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what daemons leave behind
print("ready", flush=True)
sys.stdin.read()  # until whoever made the namespace closes it, or dies
"""


class NotToBeHad(Exception):
    """What this machine lacks for the laboratory."""


class Namespace:
    """Mounts and processes of their own; needs root on Linux with overlayfs.

    Raises:
        NotToBeHad: on entering, with what is missing.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)
        """Of everything that is run in there; may be changed."""
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NotToBeHad("a file system of its own needs root on Linux")
        if missing := [program for program in ("unshare", "nsenter", "mount") if not shutil.which(program)]:
            raise NotToBeHad(f"no {', '.join(missing)} (Debian's util-linux)")
        self._layers = Path(tempfile.mkdtemp(prefix="aeolus-layers-"))
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, "-c", FIRST_PROCESS, str(self._layers), *PRIVATE]
        self._outer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != "ready\n":
            _, said = self._outer.communicate()
            self._layers.rmdir()
            raise NotToBeHad(f"no file system of its own: {said.strip().splitlines()[-1:]}")
        self._first = psutil.Process(self._outer.pid).children()[0].pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._outer.stdin is not None
        self._outer.stdin.close()
        for pipe in (self._outer.stdout, self._outer.stderr):
            assert pipe is not None
            pipe.close()
        try:
            self._outer.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._outer.kill()
            self._outer.wait()
        for process in self._started:
            process.wait()
        self._layers.rmdir()

    @property
    def root(self) -> Path:
        """What is `/` in there, seen from here."""
        return Path(f"/proc/{self._first}/root")

    def run(
        self,
        *words: str | Path,
        cwd: Path = Path("/"),
        environ: Mapping[str, str] = MappingProxyType({}),
        timeout_s: float = 300.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """A command in there, to its end; a failure fails the test with what the command said."""
        done = subprocess.run(
            self._inside(words, cwd),
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert done.returncode == 0 or not check, (
            f"{words} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
        return done

    def start(self, *words: str | Path, log: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """A command in there, in the background; it ends with the namespace at the latest."""
        process = subprocess.Popen(
            self._inside(words), env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        self._started.append(process)
        return process

    def wait_for(self, *words: str | Path, says: str, timeout_s: float = 60.0) -> None:
        """Run the command until it says so."""
        wait_until(
            lambda: says in self.run(*words, check=False).stdout,
            f"{words[0]} to say {says}",
            timeout_s=timeout_s,
            poll_s=0.3,
        )

    def _inside(self, words: Sequence[str | Path], cwd: Path = Path("/")) -> list[str]:
        command = ["nsenter", "--target", str(self._first), "--mount", "--pid", f"--wdns={cwd}"]
        return [*command, *map(str, words)]
