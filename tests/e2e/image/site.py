"""A machine with no Docker engine: podman and buildah that need no more than root, and a registry on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.lab.namespace import Namespace, NotToBeHad
from tests.harness import ROOT, wait_until
from tests.servers.ports import free_ports

PACKAGES = {
    "podman": "podman",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "docker-registry": "docker-registry",
}
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
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


class Site:
    """Everything below `folder`; what is started ends with the namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkout = folder / "checkout"
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot", "XDG_CONFIG_HOME": str(folder / "config")}
        environ |= {"PATH": f"{environ['PATH']}:{SBIN}", "TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir()
        self.inside = Namespace({**environ, "CONTAINERS_STORAGE_CONF": str(self.store("store"))})
        for name in CHECKOUT:
            shutil.copytree(ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))

    def store(self, name: str) -> Path:
        """A place for images of its own: podman's settings for it."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        settings = self.folder / f"{name}.conf"
        lines = [
            "[storage]",
            f'driver = "{_driver(place)}"',
            f'graphroot = "{place}/graph"',
            f'runroot = "{place}/run"',
        ]
        settings.write_text("\n".join(lines) + "\n")
        return settings

    def install(self) -> None:
        """Debian's packages, where the rest of the machine does not see them; raises NotToBeHad."""
        missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
        if missing and not Path("/etc/debian_version").exists():
            raise NotToBeHad(f"not there, and this is no Debian: {', '.join(missing)}")
        if missing:
            policy = "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d"
            command = "apt-get update -qq && apt-get install -y -qq --no-install-recommends"
            done = self.inside.run(
                "sh", "-c", f"{policy}; {command} {' '.join(missing)}", check=False, timeout_s=600
            )
            if done.returncode:
                raise NotToBeHad(f"apt-get cannot install {', '.join(missing)}: {done.stderr[-500:]}")

    def make_base(self, name: str) -> None:
        """A plain Debian from its packages, as an image: none can be pulled here; raises NotToBeHad."""
        archive = self.folder / "base.tar"
        words = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--include=ca-certificates"]
        words += ["--dpkgopt=force-unsafe-io", f"--customize-hook={TRUST}", "bookworm", str(archive)]
        sources = Path("/etc/apt/sources.list.d/debian.sources")
        done = self.inside.run(*words, *([sources] if sources.exists() else []), check=False, timeout_s=600)
        if done.returncode:
            raise NotToBeHad(f"mmdebstrap cannot make a Debian: {done.stderr[-500:]}")
        self.import_base(name)

    def import_base(self, name: str) -> None:
        self.inside.run("podman", "import", "--quiet", self.folder / "base.tar", name, timeout_s=600)

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
        host = f"127.0.0.1:{port}"
        answers = lambda: subprocess.run(["curl", "-s", f"http://{host}/v2/"], check=False).returncode == 0  # noqa: E731
        wait_until(answers, "the registry to answer", timeout_s=60, poll_s=0.2)
        return host

    def build(self, *words: str, timeout_s: float = 1500.0) -> subprocess.CompletedProcess[str]:
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


class Container:
    """A container without a runtime: the image's files as root, by chroot."""

    def __init__(self, inside: Namespace, words: list[str]) -> None:
        self._inside = inside
        self._words = words

    def run(self, *words: str, timeout_s: float = 300.0) -> str:
        return self._inside.run(*self._words, *words, timeout_s=timeout_s).stdout

    def start(self, *words: str, log: Any) -> subprocess.Popen[bytes]:
        return self._inside.start(*self._words, *words, log=log)


def _driver(folder: Path) -> str:
    """Overlay where the file system can carry it, else copies: slow, but it works anywhere."""
    probe = folder / "probe"
    parts = {name: probe / name for name in ("lower", "upper", "work", "merged")}
    for part in parts.values():
        part.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        subprocess.run(["umount", str(parts["merged"])], check=True)
    shutil.rmtree(probe, ignore_errors=True)
    return "vfs" if mounted.returncode else "overlay"


def wheels() -> Path | None:
    """The folder of wheels that pip knows and that has torch, if there is one."""
    named = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
    folder = Path(named) if named else None
    return folder if folder and any(folder.glob("torch-*.whl")) else None
