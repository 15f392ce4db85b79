"""All checks of the doctor, in order, and those of this machine: environments, SkyPilot, image builder, disk.

The other checks are in `bucket.py` (the bucket) and in `hub.py` (the model, the data and the Hub token).
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from launcher import settings
from launcher.cloud.protocol import Cloud
from launcher.cloud.skypilot import INSTALL, UNPRICED
from launcher.doctor.bucket import check_bucket
from launcher.doctor.findings import Check, Finding, ignore_check, run_all
from launcher.doctor.hub import check_data, check_model, check_token
from launcher.local.process import supervisor_environment
from launcher.settings import Settings
from trainer.architecture.lookup import with_login
from trainer.bucket.address import canonical
from trainer.bucket.byte_streams import ignore_progress
from trainer.errors import UserError
from trainer.recipe import Recipe, load

SKYPILOT_TIMEOUT_S = 120.0
"""SkyPilot's import takes seconds, the start of its server half a minute, and every cloud is asked over the network."""
LOCAL = "local"
FIND_WORKER_PYTHON = "from trainer.supervisor.workers import worker_python; print(worker_python())"
PRINT_VERSIONS = (
    "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('torch', 'trl')), sep=', ')"
)
MIN_FREE_GB = 5.0
"""Enough for a tiny run's packages, caches and checkpoints. `plan` and the supervisor check what a large run needs."""
ERROR_LINE = re.compile(r"^[\w.]*(Error|NotFound\w*): ")
"""The last line of a Python traceback."""
WANDB_KEY = "WANDB_API_KEY"


def check_all(  # noqa: PLR0913 (a recipe, a place, and the callbacks)
    recipe: str | None,
    *,
    overrides: tuple[str, ...] = (),
    infra: tuple[str, ...],
    checkpoints: str | None,
    environ: Mapping[str, str],
    cloud: Cloud,
    on_start: Callable[[int], None] = ignore_progress,
    on_done: Callable[[str], None] = ignore_check,
) -> list[Finding]:
    """Check everything that a run requires, and return the findings in the order of setting it up.

    Args:
        recipe: name or file of a recipe; None skips the checks that need one.
        overrides: `key=value` changes of the recipe, as for `submit`.
        infra: where the run is to run; empty means the settings' value.
        checkpoints: folder of runs; None means the settings' value.
        environ: environment variables of this process.
        cloud: SkyPilot, or a stand-in.
        on_start: called with the number of checks.
        on_done: called with the name of every check that has ended.
    """
    try:
        site = settings.load(environ)
    except UserError as error:  # every other check depends on the settings
        return [Finding(name="settings", status="failed", detail=error.message, hint=error.hint)]
    environ = with_login(environ)
    recipe_or_finding = _load_recipe(recipe, overrides)
    loaded = recipe_or_finding if isinstance(recipe_or_finding, Recipe) else None
    checks = [
        *_machine_checks(site, environ, infra=infra or site.infra, cloud=cloud),
        _bucket_check(site, checkpoints, infra=infra or site.infra),
        *_token_checks(loaded, environ),
        Check("recipe", partial(_recipe_finding, recipe_or_finding)),
        *(_input_checks(loaded, environ) if loaded else ()),
    ]
    on_start(len(checks))
    return run_all(checks, environ=environ, on_done=on_done)


def check_settings(environ: Mapping[str, str]) -> Finding:
    """Report where the settings come from; they have been read successfully before."""
    path = settings.settings_file(environ)
    detail = str(path) if path.exists() else f"no file at {path}: defaults and environment variables apply"
    return Finding(name="settings", status="ok", detail=detail)


def check_launcher_python() -> Finding:
    """Report the Python that runs the launcher."""
    return Finding(
        name="launcher", status="ok", detail=f"Python {platform.python_version()}, {sys.executable}"
    )


def check_trainer_python(site: Settings, environ: Mapping[str, str], *, needed: bool) -> Finding:
    """Check the Python with torch that a run on this machine would start its workers with."""
    environment = supervisor_environment(environ, trainer_python=site.trainer_python)
    found = _run_python(sys.executable, FIND_WORKER_PYTHON, environment)
    if found.returncode:
        detail, hint = (
            _last_error(found.stderr),
            "run `make setup`, or set `trainer_python` to a Python with torch",
        )
        return Finding(name="trainer", status="missing", detail=detail, hint=hint, needed=needed)
    python = found.stdout.strip()
    versions = _run_python(python, PRINT_VERSIONS, environment)
    if versions.returncode:
        detail = f"{python}: {_last_error(versions.stderr)}"
        hint = "`make setup` creates an environment with all packages"
        return Finding(name="trainer", status="missing", detail=detail, hint=hint, needed=needed)
    return Finding(name="trainer", status="ok", detail=f"{versions.stdout.strip()}, {python}", needed=needed)


def check_skypilot() -> Finding:
    """Check whether SkyPilot is installed, without importing it."""
    try:
        version = importlib.metadata.version("skypilot")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="SkyPilot", status="missing", detail="not installed", hint=INSTALL)
    return Finding(name="SkyPilot", status="ok", detail=version)


def check_clouds(cloud: Cloud, infra: tuple[str, ...]) -> list[Finding]:
    """Check that SkyPilot's API server answers, and which clouds it can use; one usable cloud is enough.

    Raises:
        UserError: SkyPilot is not installed, or its server does not answer.
    """
    enabled = cloud.enabled(infra)
    any_enabled = any(why is None for why in enabled.values())
    server = Finding(name="SkyPilot's server", status="ok", detail="answers")
    return [server, *(_cloud_finding(name, why, needed=not any_enabled) for name, why in enabled.items())]


def check_builder() -> Finding:
    """Check for an image builder; without one, each node installs the pinned packages."""
    from launcher.image import builders

    try:
        found = builders.find_builder(None, say=lambda _line: None)
    except UserError as error:
        return Finding(name="builder", status="missing", detail=error.message, hint=error.hint, needed=False)
    return Finding(name="builder", status="ok", detail=found, needed=False)


def check_wandb(environ: Mapping[str, str], *, needed: bool) -> Finding:
    """Check for a W&B token; only a recipe with `report_to: wandb` needs it."""
    if environ.get(WANDB_KEY):
        return Finding(name="W&B token", status="ok", detail=f"${WANDB_KEY} is set", needed=needed)
    detail = f"${WANDB_KEY} is not set" + ("" if needed else "; only recipes with `report_to: wandb` need it")
    hint = "copy it from https://wandb.ai/authorize, and `export WANDB_API_KEY=…`"
    return Finding(name="W&B token", status="missing", detail=detail, hint=hint, needed=needed)


def check_disk(folders: Mapping[str, Path], *, needed: bool, min_gb: float = MIN_FREE_GB) -> Finding:
    """Check the free space of the named folders; the smallest one decides."""
    free = {name: shutil.disk_usage(_existing(path)).free / 1e9 for name, path in folders.items()}
    detail = ", ".join(f"{gb:,.0f} GB free for {name}" for name, gb in free.items())
    if min(free.values()) >= min_gb:
        return Finding(name="disk", status="ok", detail=detail, needed=needed)
    hint = f"free at least {min_gb:g} GB, or set $TMPDIR to a folder on another disk"
    return Finding(name="disk", status="failed", detail=detail, hint=hint, needed=needed)


def _machine_checks(
    site: Settings, environ: Mapping[str, str], *, infra: tuple[str, ...], cloud: Cloud
) -> list[Check]:
    is_local = LOCAL in infra
    scratch = {"scratch": Path(tempfile.gettempdir())}  # where an attempt on this machine works
    checks = [
        Check("settings", lambda: check_settings(environ)),
        Check("launcher", check_launcher_python),
        Check(
            "trainer",
            lambda: check_trainer_python(site, environ, needed=is_local),
            needed=is_local,
            timeout_s=60,
        ),
        Check("disk", lambda: check_disk(scratch, needed=is_local), needed=is_local),
    ]
    if is_local:
        detail = "a run on this machine does not use it"
        skipped = Finding(name="SkyPilot", status="skipped", detail=detail, needed=False)
        return [*checks, Check("SkyPilot", lambda: skipped)]
    return [
        *checks,
        Check("SkyPilot", check_skypilot),
        Check("SkyPilot's server", lambda: check_clouds(cloud, infra), timeout_s=SKYPILOT_TIMEOUT_S),
        Check("builder", check_builder, needed=False),
    ]


def _bucket_check(site: Settings, checkpoints: str | None, *, infra: tuple[str, ...]) -> Check:
    def run() -> list[Finding]:
        address = canonical(checkpoints or site.checkpoints, Path.cwd())
        return check_bucket(address, from_other_machines=LOCAL not in infra)

    return Check("bucket", run, timeout_s=60)


def _token_checks(recipe: Recipe | None, environ: Mapping[str, str]) -> list[Check]:
    trackers = str(recipe.trainer_args.get("report_to") or "") if recipe else ""
    return [
        Check("W&B token", lambda: check_wandb(environ, needed="wandb" in trackers)),
        Check("Hub token", lambda: check_token(environ), needed=False),
    ]


def _input_checks(recipe: Recipe, environ: Mapping[str, str]) -> list[Check]:
    mixture = recipe.dataset_mixture
    sources = {(source.id, source.revision): source for source in (*mixture.datasets, *mixture.test_datasets)}
    return [
        Check("model", lambda: check_model(recipe, environ), timeout_s=40),
        *(Check("data", partial(check_data, source, environ)) for source in sources.values()),
    ]


def _load_recipe(name: str | None, overrides: tuple[str, ...]) -> Recipe | Finding:
    if name is None:
        detail = "no recipe was named, so no model and no data were checked"
        return Finding(name="recipe", status="skipped", detail=detail, needed=False)
    try:
        return load(name, overrides).recipe
    except UserError as error:
        return Finding(name="recipe", status="failed", detail=error.message, hint=error.hint)


def _recipe_finding(recipe: Recipe | Finding) -> Finding:
    if isinstance(recipe, Finding):
        return recipe
    detail = f"{recipe.name}: {recipe.method}, {recipe.global_batch_size} sequences per step"
    return Finding(name="recipe", status="ok", detail=detail)


def _cloud_finding(name: str, why: str | None, *, needed: bool) -> Finding:
    if why is None:
        return Finding(name=name, status="ok", detail="enabled", needed=needed)
    is_own = name in UNPRICED
    hint = f"`sky check {name}`" + ("" if is_own else "; see https://docs.skypilot.co, Installation")
    return Finding(name=name, status="missing", detail=why, hint=hint, needed=needed)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _run_python(python: str, script: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", script], env=dict(environ), capture_output=True, text=True, check=False, timeout=60
    )


def _last_error(text: str) -> str:
    """Return the message of the last exception in a traceback, else the last line of the text."""
    lines = text.strip().splitlines() or ["it ended without an error message"]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return ERROR_LINE.sub("", (errors or lines)[-1])
