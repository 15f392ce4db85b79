"""The trainer's image as a value: what goes into it, its name, and the commands that make and push it. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.errors import UserError

Builder = Literal["docker", "podman", "buildah", "gcloud"]
Doing = Literal["build", "push"]
BUILDERS: tuple[Builder, ...] = ("docker", "podman", "buildah", "gcloud")
"""In the order in which they are looked for."""

BASE = "docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04"
"""The Dockerfile's own default, which says why."""
NAME = "aeolus-trainer"
LOCAL = "localhost"
"""The registry's place in the name of an image that is to stay on this machine."""
DOCKERFILE = "docker/Dockerfile"
WHEELS = "docker/wheels"
INPUTS = (
    DOCKERFILE,
    "docker/cpu_adam.py",
    "docker/aeolus.pth",
    "requirements/torch.txt",
    "requirements/image.txt",
    "requirements/flash.txt",
    "jobs/recipes",
    "trainer",
)
"""Files and folders of the checkout that go into the image: they are its context, and its digest."""
SECRET = "packages"  # noqa: S105 (the name of a mount: the file in it has the package index's address)
INDEX_VARIABLES = re.compile(
    r"(UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|INDEX_STRATEGY|INSECURE_HOST|INDEX_\w+_(USERNAME|PASSWORD))"
    r"|PIP_(INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST))"
)
"""What tells uv and pip of another index: https://docs.astral.sh/uv/reference/environment/"""
DIGITS = 16
"""Of the digest, in the tag: 64 bits."""
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$")


class ImageError(UserError):
    """An image that could not be built, or not be pushed."""


class ImageSpec(BaseModel):
    """All that decides what is in an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = BASE
    torch_backend: str = ""
    """uv's name of a build of torch, such as `cpu`; empty: as the index has it, which is CUDA 13 on PyPI."""
    flash_attention: bool = True
    files: Mapping[str, str]
    """Path in the context -> SHA-256 of what is in it, wheels included."""

    @property
    def arguments(self) -> dict[str, str]:
        """Build arguments, by the names that the Dockerfile has for them."""
        flash = "yes" if self.flash_attention else "no"
        return {"BASE_IMAGE": self.base, "TORCH_BACKEND": self.torch_backend, "FLASH_ATTENTION": flash}

    @property
    def digest(self) -> str:
        """Of everything above: equal digests are equal images, but for what the index and the base move."""
        told = json.dumps([self.arguments, sorted(self.files.items())])
        return hashlib.sha256(told.encode()).hexdigest()


def name_of(recipe: ImageSpec, registry: str | None) -> str:
    """`ghcr.io/me/aeolus-trainer:0123456789abcdef`; raises UserError for what is no registry."""
    place = (registry or LOCAL).removeprefix("docker:").rstrip("/")
    if "://" in place or not re.fullmatch(r"[a-z0-9.\[\]:_/-]+", place):
        raise UserError(
            f"{registry!r} is no registry",
            hint="in lower case: ghcr.io/name, docker.io/name, region-docker.pkg.dev/project/repository or host:port",
        )
    return f"{place}/{NAME}:{recipe.digest[:DIGITS]}"


def host_of(image: str) -> str:
    """The registry's `host` or `host:port`: what one logs in to."""
    return image.partition("/")[0]


def image_id(image: str) -> str:
    """SkyPilot's word for it, in `resources:` of a task."""
    return f"docker:{image}"


def build_command(
    builder: Builder, image: str, recipe: ImageSpec, context: str, *, secret: str | None
) -> list[str]:
    """Build the context's Dockerfile; `secret` is the file that names the package index.

    gcloud builds on Google's machines and pushes by itself; it reads its steps from `cloudbuild`.
    """
    if builder == "gcloud":
        return ["gcloud", "builds", "submit", context, f"--config={context}/cloudbuild.json"]
    command = {
        "docker": ["docker", "build", "--progress=plain"],
        "podman": ["podman", "build", "--layers"],
        "buildah": ["buildah", "build", "--layers"],
    }[builder]
    for key, value in recipe.arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    if secret:
        command += ["--secret", f"id={SECRET},src={secret}"]
    return [*command, "-f", f"{context}/{DOCKERFILE}", "-t", image, context]


def cloudbuild(image: str, recipe: ImageSpec) -> dict[str, Any]:
    """Steps for Google Cloud Build: https://docs.cloud.google.com/build/docs/build-config-file-schema."""
    words = build_command("docker", image, recipe, ".", secret=None)[1:]
    step = {"name": "gcr.io/cloud-builders/docker", "args": words, "env": ["DOCKER_BUILDKIT=1"]}
    return {"steps": [step], "images": [image], "timeout": "5400s", "options": {"diskSizeGb": 100}}


def push_command(builder: Builder, image: str) -> list[str]:
    """The registry shows the tag only after all of its layers: the manifest goes last
    (https://github.com/opencontainers/distribution-spec/blob/main/spec.md#push).
    """
    return [builder, "push", *_plain(builder, image), image]


def remote_command(builder: Builder, image: str) -> list[str]:
    """Asks the registry, with the builder's login, for the tag; `is_there` reads the answer."""
    if builder == "gcloud":
        return ["gcloud", "artifacts", "docker", "images", "describe", image, "--quiet"]
    return [builder, "manifest", "inspect", image]


def registries(builder: Builder, image: str) -> str:
    """For $CONTAINERS_REGISTRIES_CONF while asking: older podmans and buildahs know no --tls-verify there."""
    if not _plain(builder, image):
        return ""
    return f'[[registry]]\nlocation = "{host_of(image)}"\ninsecure = true\n'


def is_there(code: int, said: str) -> bool:
    """Podman 4 and buildah 1.28 read an image's manifest and then complain that it is no list of them."""
    return code == 0 or re.search("single images as manifest lists|manifest is of type", said) is not None


def local_command(builder: Builder, image: str) -> list[str]:
    """Ends with 0 if the builder has the image."""
    if builder == "buildah":
        return ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
    return [builder, "image", "inspect", "--format", "{{.Id}}", image]


def login_command(builder: Builder, host: str) -> list[str] | None:
    """Ends with 0 if the builder knows a login for the host; None where that cannot be asked."""
    return [builder, "login", "--get-login", host] if builder in {"podman", "buildah"} else None


def explain(lines: Sequence[str], *, doing: Doing, builder: Builder, image: str, base: str) -> ImageError:
    """What a failed build or push says, as something a user can mend."""
    text = "\n".join(lines)
    known = {"builder": builder, "base": base, "host": host_of(image)}
    for pattern, message, hint in (*ANYWHERE, *(BUILDING if doing == "build" else PUSHING)):
        if match := re.search(pattern, text, re.IGNORECASE):
            said = _line_of(text, match.start())
            return ImageError(f"{message.format(**known)}: {said}", hint=hint.format(**known))
    tail = "\n  ".join(lines[-12:]) or "it said nothing"
    return ImageError(f"{builder} could not {doing} {image}:\n  {tail}")


ANYWHERE = (
    (
        r"no space left on device|disk quota exceeded|enough free space in|os error 28",
        "the disk that {builder} works on is full",
        "an image with CUDA takes some 20 GB while it is built: `df -h` tells, `{builder} image prune` makes room",
    ),
    (
        r"cannot connect to the docker daemon|docker daemon running",
        "docker's engine does not answer",
        "start it, or choose another with --builder podman, buildah or gcloud",
    ),
)
BUILDING = (
    (
        (
            r"(initializing source|resolve source metadata|load metadata for|pull access denied|image not known"
            r"|pinging container registry|manifest unknown)"
        ),
        "the base {base} cannot be pulled",
        "is its name right, and can this machine reach its registry? --base names another Debian or Ubuntu",
    ),
)
PUSHING = (
    (
        (
            r"unauthori[sz]ed|authentication required|access to the resource is denied|denied:|no basic auth"
            r"|403 \(?forbidden|unable to retrieve auth token"
        ),
        "{host} does not let you push",
        (
            "log in first: `{builder} login {host}` (Google's: `gcloud auth configure-docker {host}`); "
            "it has no such tag until the last layer is there"
        ),
    ),
    (
        r"connection refused|no such host|i/o timeout|network is unreachable|TLS handshake|server gave HTTP",
        "{host} cannot be reached",
        "the image is on this machine: the same command again only pushes it",
    ),
)
"""What builders say -> what happened, and the way out. The first that is found counts."""


def _line_of(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    return text[start:].partition("\n")[0].strip()[:400]


def _plain(builder: Builder, image: str) -> list[str]:
    """Docker takes loopback for a place without TLS by itself; the others want to be told."""
    here = LOOPBACK.match(host_of(image)) is not None
    return ["--tls-verify=false"] if here and builder in {"podman", "buildah"} else []


def secret_lines(environ: Mapping[str, str]) -> list[str]:
    """The package index, as shell that the Dockerfile's steps read; nothing of it stays in the image."""
    named = sorted((key, value) for key, value in environ.items() if INDEX_VARIABLES.fullmatch(key) and value)
    return [f"export {key}='{value.replace(chr(39), _QUOTE)}'" for key, value in named]


_QUOTE = "'\\''"


def sums(files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Path -> SHA-256 of its bytes."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in files}
