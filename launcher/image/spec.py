"""The trainer's image as a value: its contents, its name, and the commands that build and push it. No I/O."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.errors import UserError

Builder = Literal["docker", "podman", "buildah", "gcloud"]
Action = Literal["build", "push"]
BUILDERS: tuple[Builder, ...] = ("docker", "podman", "buildah", "gcloud")
"""In order of preference."""

BASE = "docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04"
"""The same default as in the Dockerfile, which has the reason."""
NAME = "aeolus-trainer"
LOCAL = "localhost"
"""Takes the registry's place in the name of an image that stays on this machine."""
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
"""Files and folders of the checkout that the image is built from: its build context, and the input of its digest."""
SECRET = "packages"  # noqa: S105 (the name of a mount; the mounted file has the package index's address)
INDEX_VARIABLES = re.compile(
    r"(UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|INDEX_STRATEGY|INSECURE_HOST|INDEX_\w+_(USERNAME|PASSWORD))"
    r"|PIP_(INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST))"
)
"""Variables that make uv and pip use another package index: https://docs.astral.sh/uv/reference/environment/"""
DIGITS = 16
"""Hexadecimal digits of the digest in the image's tag: 64 bits."""
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$")
SHELL_QUOTE = "'\\''"
"""A single quote inside a single-quoted shell string."""

ERRORS = (
    (
        r"no space left on device|disk quota exceeded|enough free space in|os error 28",
        "the disk that {builder} uses is full",
        "building an image with CUDA takes about 20 GB: check with `df -h`, free space with `{builder} image prune`",
    ),
    (
        r"cannot connect to the docker daemon|docker daemon running",
        "the Docker daemon does not answer",
        "start it, or choose another builder with --builder podman, buildah or gcloud",
    ),
)
BUILD_ERRORS = (
    (
        (
            r"(initializing source|resolve source metadata|load metadata for|pull access denied|image not known"
            r"|pinging container registry|manifest unknown)"
        ),
        "the base image {base} cannot be pulled",
        "check its name, and that this machine can reach its registry; --base sets another Debian or Ubuntu image",
    ),
)
PUSH_ERRORS = (
    (
        (
            r"unauthori[sz]ed|authentication required|access to the resource is denied|denied:|no basic auth"
            r"|403 \(?forbidden|unable to retrieve auth token"
        ),
        "{host} does not allow you to push",
        (
            "log in first: `{builder} login {host}` (for Google: `gcloud auth configure-docker {host}`); "
            "the registry shows the tag only after the last layer is uploaded"
        ),
    ),
    (
        r"connection refused|no such host|i/o timeout|network is unreachable|TLS handshake|server gave HTTP",
        "{host} cannot be reached",
        "the image is built and stays on this machine: repeat the command to push it",
    ),
)
"""(pattern of a builder's output, error message, hint); the first match is used."""


class ImageError(UserError):
    """The image could not be built or pushed."""


class ImageSpec(BaseModel):
    """Everything that determines an image's contents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = BASE
    torch_backend: str = ""
    """uv's name of a torch build, such as `cpu`; empty means the index's default, which is CUDA 13 on PyPI."""
    flash_attention: bool = True
    files: Mapping[str, str]
    """SHA-256 of every file by its path in the build context, wheels included."""

    @property
    def arguments(self) -> dict[str, str]:
        """Build arguments, by their names in the Dockerfile."""
        flash = "yes" if self.flash_attention else "no"
        return {"BASE_IMAGE": self.base, "TORCH_BACKEND": self.torch_backend, "FLASH_ATTENTION": flash}

    @property
    def digest(self) -> str:
        """Hash of all fields. Equal digests give equal images, unless the package index or the base has changed."""
        content = json.dumps([self.arguments, sorted(self.files.items())])
        return hashlib.sha256(content.encode()).hexdigest()


def name_of(spec: ImageSpec, registry: str | None) -> str:
    """Return the image's name, `ghcr.io/me/aeolus-trainer:0123456789abcdef`.

    Raises:
        UserError: `registry` is not a valid registry name.
    """
    place = (registry or LOCAL).removeprefix("docker:").rstrip("/")
    if "://" in place or not re.fullmatch(r"[a-z0-9.\[\]:_/-]+", place):
        raise UserError(
            f"{registry!r} is not a registry name",
            hint="use lower case: ghcr.io/name, docker.io/name, region-docker.pkg.dev/project/repository or host:port",
        )
    return f"{place}/{NAME}:{spec.digest[:DIGITS]}"


def host_of(image: str) -> str:
    """Return the registry's `host` or `host:port`, which a login is for."""
    return image.partition("/")[0]


def image_id(image: str) -> str:
    """Return the image's name as SkyPilot writes it in a task's `resources:`."""
    return f"docker:{image}"


def build_command(
    builder: Builder, image: str, spec: ImageSpec, context: str, *, secret: str | None
) -> list[str]:
    """Return the command that builds the Dockerfile of a context; `secret` is the file that names the package index.

    gcloud builds and pushes on Google's machines. It reads its steps from the file that `cloudbuild` makes.
    """
    if builder == "gcloud":
        return ["gcloud", "builds", "submit", context, f"--config={context}/cloudbuild.json"]
    command = {
        "docker": ["docker", "build", "--progress=plain"],
        "podman": ["podman", "build", "--layers"],
        "buildah": ["buildah", "build", "--layers"],
    }[builder]
    for key, value in spec.arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    if secret:
        command += ["--secret", f"id={SECRET},src={secret}"]
    return [*command, "-f", f"{context}/{DOCKERFILE}", "-t", image, context]


def cloudbuild(image: str, spec: ImageSpec) -> dict[str, Any]:
    """Return the steps for Google Cloud Build: https://docs.cloud.google.com/build/docs/build-config-file-schema."""
    arguments = build_command("docker", image, spec, ".", secret=None)[1:]
    step = {"name": "gcr.io/cloud-builders/docker", "args": arguments, "env": ["DOCKER_BUILDKIT=1"]}
    return {"steps": [step], "images": [image], "timeout": "5400s", "options": {"diskSizeGb": 100}}


def push_command(builder: Builder, image: str) -> list[str]:
    """Return the command that pushes the image.

    The registry shows the tag only after all layers are uploaded, because the manifest is pushed last
    (https://github.com/opencontainers/distribution-spec/blob/main/spec.md#push).
    """
    return [builder, "push", *_tls_options(builder, image), image]


def remote_command(builder: Builder, image: str) -> list[str]:
    """Return the command that asks the registry for the tag; `is_in_registry` interprets its result."""
    if builder == "gcloud":
        return ["gcloud", "artifacts", "docker", "images", "describe", image, "--quiet"]
    return [builder, "manifest", "inspect", image]


def registries_config(builder: Builder, image: str) -> str:
    """Return the content of $CONTAINERS_REGISTRIES_CONF that allows a registry without TLS; empty if not needed.

    Older versions of podman and buildah have no --tls-verify option for the command of `remote_command`.
    """
    if not _tls_options(builder, image):
        return ""
    return f'[[registry]]\nlocation = "{host_of(image)}"\ninsecure = true\n'


def is_in_registry(code: int, output: str) -> bool:
    """Return whether the result of `remote_command` means that the registry has the tag.

    Podman 4 and buildah 1.28 read a single image's manifest and then fail, because it is not a manifest list.
    """
    return code == 0 or re.search("single images as manifest lists|manifest is of type", output) is not None


def local_command(builder: Builder, image: str) -> list[str]:
    """Return a command that exits with 0 if the builder has the image on this machine."""
    if builder == "buildah":
        return ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
    return [builder, "image", "inspect", "--format", "{{.Id}}", image]


def login_command(builder: Builder, host: str) -> list[str] | None:
    """Return a command that exits with 0 if the builder has a login for the host; None if it has no such command."""
    return [builder, "login", "--get-login", host] if builder in {"podman", "buildah"} else None


def to_error(lines: Sequence[str], *, action: Action, builder: Builder, image: str, base: str) -> ImageError:
    """Return the error for the output of a failed build or push, with a hint if the cause is known."""
    text = "\n".join(lines)
    values = {"builder": builder, "base": base, "host": host_of(image)}
    for pattern, message, hint in (*ERRORS, *(BUILD_ERRORS if action == "build" else PUSH_ERRORS)):
        if match := re.search(pattern, text, re.IGNORECASE):
            line = _line_at(text, match.start())
            return ImageError(f"{message.format(**values)}: {line}", hint=hint.format(**values))
    tail = "\n  ".join(lines[-12:]) or "it printed nothing"
    return ImageError(f"{builder} could not {action} {image}:\n  {tail}")


def secret_lines(environ: Mapping[str, str]) -> list[str]:
    """Return the package index's variables as shell lines for the Dockerfile's steps; they do not stay in the image."""
    found = sorted((key, value) for key, value in environ.items() if INDEX_VARIABLES.fullmatch(key) and value)
    return [f"export {key}='{value.replace(chr(39), SHELL_QUOTE)}'" for key, value in found]


def hash_files(files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Return the SHA-256 of every file by its path."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in files}


def _line_at(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    return text[start:].partition("\n")[0].strip()[:400]


def _tls_options(builder: Builder, image: str) -> list[str]:
    """Return the option for a loopback registry without TLS; Docker needs none there."""
    is_loopback = LOOPBACK.match(host_of(image)) is not None
    return ["--tls-verify=false"] if is_loopback and builder in {"podman", "buildah"} else []
