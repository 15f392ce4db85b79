"""What a run needs of this machine: environments, SkyPilot, a builder, settings, room on the disk."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launcher.cloud.protocol import Cloud
from launcher.cloud.skypilot import INSTALL, UNPRICED
from launcher.doctor.check import Finding
from launcher.local.submit import supervisor_environment
from launcher.settings import Settings, settings_file
from trainer.errors import UserError

WHICH = "from trainer.supervisor.workers import worker_python; print(worker_python())"
VERSIONS = (
    "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('torch', 'trl')), sep=', ')"
)
LEAST_FREE_GB = 5.0
"""A tiny run's packages, caches and checkpoints; what a large one needs, `plan` and the supervisor count."""
ERROR = re.compile(r"^[\w.]*(Error|NotFound\w*): ")
WANDB_KEY = "WANDB_API_KEY"


def settings(environ: Mapping[str, str]) -> Finding:
    """Where they are from; that they can be read was seen before."""
    path = settings_file(environ)
    said = str(path) if path.exists() else f"none at {path}: defaults and the environment"
    return Finding(name="settings", status="ok", said=said)


def launcher_python() -> Finding:
    """This one."""
    return Finding(name="launcher", status="ok", said=f"Python {platform.python_version()}, {sys.executable}")


def trainer_python(site: Settings, environ: Mapping[str, str], *, needed: bool) -> Finding:
    """The Python with torch that a run on this machine would start its workers with."""
    told = supervisor_environment(environ, trainer_python=site.trainer_python)
    found = _python(sys.executable, WHICH, told)
    if found.returncode:
        said, hint = _last(found.stderr), "`make setup`, or name a Python with torch: `trainer_python`"
        return Finding(name="trainer", status="missing", said=said, hint=hint, needed=needed)
    python = found.stdout.strip()
    versions = _python(python, VERSIONS, told)
    if versions.returncode:
        said = f"{python}: {_last(versions.stderr)}"
        hint = "`make setup` makes an environment with all of it"
        return Finding(name="trainer", status="missing", said=said, hint=hint, needed=needed)
    return Finding(name="trainer", status="ok", said=f"{versions.stdout.strip()}, {python}", needed=needed)


def skypilot() -> Finding:
    """Without importing it."""
    try:
        version = importlib.metadata.version("skypilot")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="SkyPilot", status="missing", said="not installed", hint=INSTALL)
    return Finding(name="SkyPilot", status="ok", said=version)


def clouds(cloud: Cloud, infra: tuple[str, ...]) -> list[Finding]:
    """Its API server answers, and which clouds let it have machines; one of them will do.

    Raises:
        UserError: SkyPilot is not installed, or its server does not answer.
    """
    enabled = cloud.enabled(infra)
    several = any(why is None for why in enabled.values())
    server = Finding(name="SkyPilot's server", status="ok", said="answers")
    return [server, *(_cloud(name, why, needed=not several) for name, why in enabled.items())]


def _cloud(name: str, why: str | None, *, needed: bool) -> Finding:
    if why is None:
        return Finding(name=name, status="ok", said="machines can be had", needed=needed)
    own = name in UNPRICED
    hint = f"`sky check {name}`" + ("" if own else "; see https://docs.skypilot.co, Installation")
    return Finding(name=name, status="missing", said=why, hint=hint, needed=needed)


def builder() -> Finding:
    """For the trainer's image; without one, nodes install the pinned packages."""
    from launcher.image import builders

    try:
        found = builders.find(None, say=lambda _line: None)
    except UserError as error:
        return Finding(name="builder", status="missing", said=error.message, hint=error.hint, needed=False)
    return Finding(name="builder", status="ok", said=found, needed=False)


def wandb(environ: Mapping[str, str], *, needed: bool) -> Finding:
    """Whether there is a token; only a recipe with `report_to: wandb` needs it."""
    if environ.get(WANDB_KEY):
        return Finding(name="W&B token", status="ok", said=f"${WANDB_KEY} is set", needed=needed)
    said = f"${WANDB_KEY} is not set" + ("" if needed else ": no recipe at hand reports to W&B")
    hint = "https://wandb.ai/authorize has it; `export WANDB_API_KEY=…`"
    return Finding(name="W&B token", status="missing", said=said, hint=hint, needed=needed)


def disk(places: Mapping[str, Path], *, needed: bool, least_gb: float = LEAST_FREE_GB) -> Finding:
    """Free space where this machine would put things; the least counts."""
    free = {name: shutil.disk_usage(_existing(path)).free / 1e9 for name, path in places.items()}
    said = ", ".join(f"{gb:,.0f} GB free for {name}" for name, gb in free.items())
    if min(free.values()) >= least_gb:
        return Finding(name="disk", status="ok", said=said, needed=needed)
    hint = "make room, or put scratch elsewhere: $TMPDIR"
    return Finding(name="disk", status="failed", said=said, hint=hint, needed=needed)


def scratch() -> Path:
    """Where an attempt on this machine works."""
    return Path(tempfile.gettempdir())


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _python(python: str, script: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", script], env=dict(environ), capture_output=True, text=True, check=False, timeout=60
    )


def _last(text: str) -> str:
    """Of a traceback, what was raised; the rest of a message of several lines is its way out."""
    lines = text.strip().splitlines() or ["it ends without a word"]
    raised = [line for line in lines if ERROR.match(line)]
    return ERROR.sub("", (raised or lines)[-1])
