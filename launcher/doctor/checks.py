"""The checks for a recipe and a place, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from launcher import settings
from launcher.cloud.protocol import Cloud
from launcher.doctor import bucket, hub, machine
from launcher.doctor.check import Check, Finding, run_all
from launcher.settings import Settings
from trainer.architecture.hub_login import with_login
from trainer.bucket.address import canonical
from trainer.errors import UserError
from trainer.recipe import Recipe, load

SKYPILOT_S = 120.0
"""Its import alone takes seconds, its server half a minute to start, and each cloud is asked over the network."""
LOCAL = "local"


def look(  # noqa: PLR0913 (a recipe, a place, and what is asked)
    recipe: str | None,
    *,
    overrides: tuple[str, ...] = (),
    infra: tuple[str, ...],
    checkpoints: str | None,
    environ: Mapping[str, str],
    cloud: Cloud,
    done: Callable[[str], object] = str,
    began: Callable[[int], object] = int,
) -> list[Finding]:
    """Everything that a run needs, in the order in which one would set it up.

    Args:
        recipe: its name or file; None: what no recipe is needed for.
        overrides: `key=value`, as for `submit`.
        infra: where it is to run; empty: as the settings say.
        checkpoints: where it is to be kept; None: as the settings say.
        environ: of this process.
        cloud: SkyPilot, or a stand-in.
        done: hears each check's name as it ends.
        began: hears how many there are.
    """
    try:
        site = settings.load(environ)
    except UserError as error:
        return [Finding(name="settings", status="failed", said=error.message, hint=error.hint)]
    environ = with_login(environ)
    read = _recipe(recipe, overrides)
    loaded = read if isinstance(read, Recipe) else None
    checks = [
        *_machine(site, environ, infra=infra or site.infra, cloud=cloud),
        *_store(site, checkpoints, infra=infra or site.infra),
        *_tokens(loaded, environ),
        Check("recipe", lambda: _about(read) if isinstance(read, Recipe) else read),
        *(_inputs(loaded, environ) if loaded else ()),
    ]
    began(len(checks))
    return run_all(checks, environ=environ, done=done)


def _machine(
    site: Settings, environ: Mapping[str, str], *, infra: tuple[str, ...], cloud: Cloud
) -> list[Check]:
    at_home = LOCAL in infra
    checks = [
        Check("settings", lambda: machine.settings(environ)),
        Check("launcher", machine.launcher_python),
        Check(
            "trainer",
            lambda: machine.trainer_python(site, environ, needed=at_home),
            needed=at_home,
            limit_s=60,
        ),
        Check("disk", lambda: machine.disk({"scratch": machine.scratch()}, needed=at_home), needed=at_home),
    ]
    if at_home:
        skipped = Finding(
            name="SkyPilot", status="skipped", said="a run on this machine needs no cloud", needed=False
        )
        return [*checks, Check("SkyPilot", lambda: skipped)]
    return [
        *checks,
        Check("SkyPilot", machine.skypilot),
        Check("SkyPilot's server", lambda: machine.clouds(cloud, infra), limit_s=SKYPILOT_S),
        Check("builder", machine.builder, needed=False),
    ]


def _store(site: Settings, checkpoints: str | None, *, infra: tuple[str, ...]) -> list[Check]:
    def look() -> list[Finding]:
        address = canonical(checkpoints or site.checkpoints, Path.cwd())
        return bucket.look(address, elsewhere=LOCAL not in infra)

    return [Check("bucket", look, limit_s=60)]


def _tokens(recipe: Recipe | None, environ: Mapping[str, str]) -> list[Check]:
    reports = str(recipe.trainer_args.get("report_to") or "") if recipe else ""
    return [
        Check("W&B token", lambda: machine.wandb(environ, needed="wandb" in reports)),
        Check("Hub token", lambda: hub.token(environ), needed=False),
    ]


def _inputs(recipe: Recipe, environ: Mapping[str, str]) -> list[Check]:
    mixture = recipe.dataset_mixture
    sources = {(each.id, each.revision): each for each in (*mixture.datasets, *mixture.test_datasets)}
    return [
        Check("model", lambda: hub.model(recipe, environ), limit_s=40),
        *(Check("data", partial(hub.data, source, environ)) for source in sources.values()),
    ]


def _recipe(name: str | None, overrides: tuple[str, ...]) -> Recipe | Finding:
    if name is None:
        said = "none was named: neither its model nor its data were looked at"
        return Finding(name="recipe", status="skipped", said=said, needed=False)
    try:
        return load(name, overrides).recipe
    except UserError as error:
        return Finding(name="recipe", status="failed", said=error.message, hint=error.hint)


def _about(recipe: Recipe) -> Finding:
    said = f"{recipe.name}: {recipe.method}, {recipe.global_batch_size} sequences a step"
    return Finding(name="recipe", status="ok", said=said)
