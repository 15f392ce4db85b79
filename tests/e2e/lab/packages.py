"""Debian's packages that the laboratory needs, installed where the rest of the machine does not see them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.lab.namespace import Namespace, NotToBeHad

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "rsync": "rsync",
    "curl": "curl",
}
"""Programs, and the packages that have them."""
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
NO_SERVICES = "#!/bin/sh\nexit 101\n"
"""https://people.debian.org/~hmh/invokerc.d-policyrc.d-specification.txt: nothing is to be started."""


def install(inside: Namespace, packages: Mapping[str, str] = PACKAGES) -> None:
    """Install what is missing of programs and their packages; raises NotToBeHad where that cannot be done."""
    missing = [package for program, package in packages.items() if not _has(inside, program)]
    if not missing:
        return
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        raise NotToBeHad(f"not there, and this is no Debian: {', '.join(missing)}")
    inside.run("sh", "-c", f"printf '{NO_SERVICES}' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d")
    inside.run(
        "rm", "-f", "/var/lib/man-db/auto-update"
    )  # else apt-get indexes all manual pages, for seconds
    command = (
        "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
    )
    done = inside.run("sh", "-c", f"{command} {' '.join(missing)}", check=False, timeout_s=600)
    if done.returncode != 0:
        raise NotToBeHad(f"apt-get cannot install {', '.join(missing)}: {done.stderr.strip()[-500:]}")


def _has(inside: Namespace, program: str) -> bool:
    return inside.run("sh", "-c", f"command -v {program}", check=False).returncode == 0
