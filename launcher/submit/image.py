"""The image that a submission's machines start from: named, or made from this checkout when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.image.spec import host_of
from launcher.settings import Settings
from trainer.errors import UserError

AUTO = "auto"
USERNAME, PASSWORD, SERVER = "SKYPILOT_DOCKER_USERNAME", "SKYPILOT_DOCKER_PASSWORD", "SKYPILOT_DOCKER_SERVER"
"""How SkyPilot wants the login of a private registry:
https://docs.skypilot.co/en/v0.14.1/examples/docker-containers.html#private-registries"""


class Container(NamedTuple):
    """An image by name, and what is to be done before a machine can start from it."""

    image: str | None = None
    """None: the machine's own system, on which the pinned packages are installed."""
    wishes: BuildOptions | None = None
    """To be built and pushed with, unless the registry has it."""


def container(wanted: str | None, site: Settings, *, own: bool) -> Container:
    """The image of a submission.

    Args:
        wanted: what `--image` says; the settings hold for rented machines only.
        site: the settings.
        own: the machines are not rented.

    Raises:
        UserError: an image is to be made, and no registry is named; or it cannot be made here.
    """
    named = wanted or (None if own else site.image)
    if named != AUTO:
        return Container(named)
    wishes = BuildOptions(registry=site.registry, push=True)
    return Container(builders.image_name(wishes), wishes)


def login(image: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets with which a machine pulls the image; none where the shell has none.

    Raises:
        UserError: a name without a password, or the other way round.
    """
    given = {name: environ[name] for name in (USERNAME, PASSWORD, SERVER) if environ.get(name)}
    if not image or not given:
        return {}
    if missing := [name for name in (USERNAME, PASSWORD) if name not in given]:
        raise UserError(
            f"{' and '.join(given)} without {' and '.join(missing)}: no registry takes half a login",
            hint="set both, or neither for an image that everybody can pull",
        )
    return {SERVER: host_of(image.removeprefix("docker:")), **given}
