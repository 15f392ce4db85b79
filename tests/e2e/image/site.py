"""A machine with no Docker engine: podman and buildah that need no more than root, and a registry on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.lab.namespace import Namespace, NotToBeHad
from tests.e2e.lab.packages import SBIN, install
from tests.harness import ROOT, wait_until
from tests.servers.ports import answers, free_ports

PACKAGES = {
    "podman": "podman",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "docker-registry": "docker-registry",
}
SUITE = "bookworm"
"""The base's Debian: it has Python 3.11, as NVIDIA's Ubuntu has not."""
ROOM_GIB = 12
"""Disk that has to be free, or memory: layers, the registry's copy of them, and the store that reads it back."""
COMPRESSION = '[engine]\ncompression_format = "zstd"\n'
"""What is pushed is read back once, on this machine: speed counts, not size."""
CHECKOUT = ("launcher", "trainer", "jobs", "docker", "requirements")
REGISTRY = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
LOCKED = "auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"
TRUST = (
    'cp /usr/local/share/ca-certificates/*.crt "$1/usr/local/share/ca-certificates/" 2>/dev/null; '
    'chroot "$1" update-ca-certificates >/dev/null'
)
"""The base trusts whom this machine trusts: its way to the package index may need that."""


@contextmanager
def site() -> Iterator[Site]:
    """The means to build, and nothing left of them at the end; raises NotToBeHad."""
    folder = Path(tempfile.mkdtemp(prefix="aeolus-image-site-"))
    try:
        if (free := shutil.disk_usage(folder).free) < ROOM_GIB * 2**30:
            raise NotToBeHad(f"{free / 2**30:.0f} GiB free in {folder.parent}, {ROOM_GIB} are needed")
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot", "XDG_CONFIG_HOME": str(folder / "config")}
        environ |= {"PATH": f"{environ['PATH']}:{SBIN}", "TMPDIR": str(folder / "tmp")}
        with Namespace(environ) as inside:
            install(inside, PACKAGES)
            yield Site(inside, folder)
    finally:
        shutil.rmtree(folder)


class Site:
    """Everything below `folder`; what is started ends with the namespace."""

    def __init__(self, inside: Namespace, folder: Path) -> None:
        self.inside = inside
        self.folder = folder
        self.checkout = folder / "checkout"
        (folder / "tmp").mkdir()
        (folder / "containers.conf").write_text(COMPRESSION)
        inside.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")
        inside.environ["CONTAINERS_STORAGE_CONF"] = str(self.store("store"))
        for name in CHECKOUT:
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))

    def store(self, name: str, *, size: str = "") -> Path:
        """A place for images of its own: podman's settings for it.

        In memory where there is enough, or where it is to be of some size: it holds 100,000 small files.
        """
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        if size or psutil.virtual_memory().available > ROOM_GIB * 2**30:
            self.inside.run("mount", "-t", "tmpfs", "-o", f"size={size or '100%'}", "tmpfs", place)
        settings = self.folder / f"{name}.conf"
        lines = [
            "[storage]",
            f'driver = "{self._driver(place)}"',
            f'graphroot = "{place}/graph"',
            f'runroot = "{place}/run"',
        ]
        settings.write_text("\n".join(lines) + "\n")
        return settings

    def make_base(self, name: str) -> None:
        """A plain Debian from its packages, as an image: none can be pulled here; raises NotToBeHad."""
        archive = self.folder / "base.tar"
        words = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--include=ca-certificates"]
        words += ["--dpkgopt=force-unsafe-io", f"--customize-hook={TRUST}", SUITE, str(archive)]
        done = self.inside.run(*words, *_sources(), check=False, timeout_s=900)
        if done.returncode:
            raise NotToBeHad(f"mmdebstrap cannot make a Debian: {done.stderr[-500:]}")
        self.import_base(name)

    def import_base(self, name: str) -> None:
        self.inside.run("podman", "import", "--quiet", self.folder / "base.tar", name, timeout_s=900)

    def registry(self, name: str, *, locked: bool = False) -> str:
        """Start a registry; its `host:port`."""
        port = free_ports(name)[name]
        folder = self.folder / name
        folder.mkdir()
        (folder / "users").write_text("nobody:$2y$05$aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n")
        settings = folder / "config.yml"
        text = REGISTRY + (LOCKED if locked else "")
        settings.write_text(text.format(folder=folder, port=port, users=folder / "users"))
        with (folder / "log").open("wb") as log:
            self.inside.start("docker-registry", "serve", settings, log=log)
        wait_until(lambda: answers(port), "the registry to answer", timeout_s=120, poll_s=0.2)
        return f"127.0.0.1:{port}"

    def build(self, *words: str, timeout_s: float = 2400.0) -> subprocess.CompletedProcess[str]:
        """`python -m launcher build …` of the copied checkout, to its end."""
        command = ["env", f"PYTHONPATH={self.checkout}", sys.executable, "-m", "launcher", "build", *words]
        return self.inside.run(*command, cwd=self.checkout, check=False, timeout_s=timeout_s)

    def layers(self, image: str) -> list[str]:
        told = self.inside.run("podman", "image", "inspect", image)
        found: list[str] = json.loads(told.stdout)[0]["RootFS"]["Layers"]
        return found

    def read_back(self, image: str, *mounts: str) -> Container:
        """A container of the image as its registry gives it: nothing of the builder's own store."""
        store = self.store("read-back")
        buildah = ["env", f"CONTAINERS_STORAGE_CONF={store}", "buildah"]
        self.inside.run(*buildah, "pull", "--quiet", "--tls-verify=false", image, timeout_s=900)
        name = self.inside.run(*buildah, "from", "--pull-never", image).stdout.strip()
        return Container(
            self.inside, [*buildah, "run", *(f"--volume={mount}" for mount in mounts), name, "--"]
        )

    def _driver(self, folder: Path) -> str:
        """Overlay where the file system can carry it, else copies: slow, but it works anywhere."""
        probe = folder / "probe"
        parts = {name: probe / name for name in ("lower", "upper", "work", "merged")}
        self.inside.run("mkdir", "-p", *parts.values())
        options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
        mount = ("mount", "-t", "overlay", "overlay", "-o", options, parts["merged"])
        carries = self.inside.run(*mount, check=False).returncode == 0
        if carries:
            self.inside.run("umount", parts["merged"])
        self.inside.run("rm", "-r", probe)
        return "overlay" if carries else "vfs"


class Container:
    """A container without a runtime: the image's files as root, by chroot."""

    def __init__(self, inside: Namespace, words: list[str]) -> None:
        self._inside = inside
        self._words = words

    def run(self, *words: str, timeout_s: float = 600.0) -> str:
        return self._inside.run(*self._words, *words, timeout_s=timeout_s).stdout

    def start(self, *words: str, log: Any) -> subprocess.Popen[bytes]:
        return self._inside.start(*self._words, *words, log=log)


def _sources() -> list[Path]:
    """Where this machine has its packages from, if it is of the base's suite; none: from Debian's own servers."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    return [sources] if sources.exists() and SUITE in sources.read_text() else []


def wheels() -> Path | None:
    """The folder of wheels that pip knows and that has torch, if there is one."""
    named = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
    folder = Path(named) if named else None
    return folder if folder and any(folder.glob("torch-*.whl")) else None
