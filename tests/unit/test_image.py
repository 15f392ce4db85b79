"""The trainer's image as a value: its name, its commands, and the errors made from a builder's output."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from launcher.image import spec as images
from launcher.image.spec import Builder, ImageSpec
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / images.DOCKERFILE).read_text()
RECIPE = ImageSpec(base="debian:12", torch_backend="cpu", files={"trainer/fit.py": "a1"})
NAME = f"ghcr.io/me/aeolus-trainer:{RECIPE.digest[:16]}"
PACKAGE_OF = {"yaml": "pyyaml"}
LOADED_BY_LIBRARIES = {"bitsandbytes", "gguf", "tensorboard", "wandb"}
ARGUMENTS = [
    *("--build-arg", "BASE_IMAGE=debian:12"),
    *("--build-arg", "TORCH_BACKEND=cpu"),
    *("--build-arg", "FLASH_ATTENTION=yes"),
]


@pytest.mark.parametrize(
    "change",
    [
        {"base": "debian:13"},
        {"torch_backend": ""},
        {"flash_attention": False},
        {"files": {"trainer/fit.py": "b2"}},
        {"files": {"trainer/other.py": "a1"}},
        {"files": {}},
    ],
)
def test_whatever_goes_in_names_the_image(change: dict[str, object]) -> None:
    """Another base, argument, file or content gives another tag."""
    assert RECIPE.model_copy(update=change).digest != RECIPE.digest


def test_the_order_of_files_does_not_name_it() -> None:
    """The order of the files does not change the tag."""
    files = {"a": "1", "b": "2"}
    turned = dict(reversed(files.items()))
    assert ImageSpec(files=files).digest == ImageSpec(files=turned).digest


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        (None, "localhost/aeolus-trainer"),
        ("ghcr.io/me", "ghcr.io/me/aeolus-trainer"),
        ("127.0.0.1:5000/", "127.0.0.1:5000/aeolus-trainer"),
        ("europe-docker.pkg.dev/project/repo", "europe-docker.pkg.dev/project/repo/aeolus-trainer"),
    ],
)
def test_a_registry_is_the_front_of_the_name(registry: str | None, name: str) -> None:
    """Every host works, with a port or a path; the tag is the digest."""
    assert images.name_of(RECIPE, registry) == f"{name}:{RECIPE.digest[:16]}"


def test_an_address_with_a_scheme_is_no_registry() -> None:
    """Image names have no scheme, and the error has examples."""
    with pytest.raises(UserError, match="not a registry name"):
        images.name_of(RECIPE, "https://ghcr.io/me")


@pytest.mark.parametrize(
    ("builder", "command"),
    [
        ("docker", ["docker", "build", "--progress=plain"]),
        ("podman", ["podman", "build", "--layers"]),
        ("buildah", ["buildah", "build", "--layers"]),
    ],
)
def test_a_build_is_a_command(builder: Builder, command: list[str]) -> None:
    """Every builder gets the same arguments, secret, file and context."""
    built = images.build_command(builder, NAME, RECIPE, "/context", secret="/private/packages")
    secret = ["--secret", "id=packages,src=/private/packages"]
    assert built == [
        *command,
        *ARGUMENTS,
        *secret,
        "-f",
        "/context/docker/Dockerfile",
        "-t",
        NAME,
        "/context",
    ]


def test_google_builds_the_same_and_pushes_by_itself() -> None:
    """Cloud Build gets Docker's command, and the name of the image to push."""
    steps = images.cloudbuild(NAME, RECIPE)
    assert steps["steps"][0]["args"] == images.build_command("docker", NAME, RECIPE, ".", secret=None)[1:]
    assert steps["images"] == [NAME]
    submitted = images.build_command("gcloud", NAME, RECIPE, "/c", secret=None)
    assert submitted == ["gcloud", "builds", "submit", "/c", "--config=/c/cloudbuild.json"]


@pytest.mark.parametrize(
    ("builder", "host", "plain"),
    [
        ("podman", "127.0.0.1:5000", True),
        ("buildah", "localhost:5000", True),
        ("docker", "127.0.0.1:5000", False),
        ("podman", "ghcr.io", False),
        ("podman", "127.0.0.1.example.org", False),
    ],
)
def test_only_loopback_may_go_without_tls(builder: Builder, host: str, plain: bool) -> None:
    """Only a registry on this machine is used without TLS; Docker does so by itself."""
    name = f"{host}/aeolus-trainer:1"
    assert ("--tls-verify=false" in images.push_command(builder, name)) is plain
    assert (f'"{host}"\ninsecure = true' in images.registries_config(builder, name)) is plain


@pytest.mark.parametrize(
    ("action", "line", "message"),
    [
        ("build", "write /x: no space left on device", "the disk that podman uses is full"),
        (
            "build",
            "E: You don't have enough free space in /var/cache/apt/archives/.",
            "the disk that podman uses is full",
        ),
        ("push", "writing blob: no space left on device", "the disk that podman uses is full"),
        (
            "build",
            "Error: creating build container: initializing source docker://debian:12: pinging container registry",
            "the base image debian:12 cannot be pulled",
        ),
        (
            "build",
            "ERROR: failed to solve: debian:12: failed to resolve source metadata for docker.io/library/debian:12",
            "the base image debian:12 cannot be pulled",
        ),
        ("push", "denied: requested access to the resource is denied", "ghcr.io does not allow you to push"),
        (
            "push",
            "Error: writing blob: unauthorized: authentication required",
            "ghcr.io does not allow you to push",
        ),
        (
            "push",
            "pinging container registry ghcr.io: dial tcp: connection refused",
            "ghcr.io cannot be reached",
        ),
        (
            "build",
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock",
            "the Docker daemon does not answer",
        ),
        ("build", "g++: fatal error", "podman could not build ghcr.io/me/aeolus-trainer"),
    ],
)
def test_a_failure_becomes_an_error_with_a_hint(action: images.Action, line: str, message: str) -> None:
    """An error has what happened, the builder's own line, and a hint if the cause is known."""
    error = images.to_error(["before", line], action=action, builder="podman", image=NAME, base="debian:12")
    assert error.message.startswith(message)
    assert line in error.message
    assert error.hint or "could not build" in message


def test_only_the_package_index_is_handed_to_the_build() -> None:
    """Only the package index's variables are passed to the build, as quoted shell lines."""
    environ = {
        "UV_DEFAULT_INDEX": "https://a:it's@host",
        "UV_CACHE_DIR": "/c",
        "HF_TOKEN": "t",
        "PIP_INDEX_URL": "",
    }
    assert images.secret_lines(environ) == [r"export UV_DEFAULT_INDEX='https://a:it'\''s@host'"]


def test_the_dockerfile_has_the_arguments_that_it_is_given() -> None:
    """Names and defaults of the arguments are equal in the Dockerfile and in the launcher."""
    stated = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
    stated.pop("UV")
    assert stated == ImageSpec(files={}).arguments


def test_the_digest_is_of_what_the_dockerfile_copies() -> None:
    """The digest covers exactly what the Dockerfile copies."""
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for word in line.split()
    }
    assert copied == set(images.INPUTS) - {images.DOCKERFILE}


def test_the_ignore_file_lets_through_what_is_copied() -> None:
    """A build by hand, with the checkout as its context, uses the same files."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    passed = {line[1:] for line in lines if line.startswith("!")}
    assert passed == {*images.INPUTS, images.WHEELS} - {images.DOCKERFILE}


def test_the_image_has_the_pins_that_the_tests_ran_with() -> None:
    """The image has the same package versions as the environment that the tests ran in."""
    tested = pins("trainer.txt")
    image = pins("image.txt")
    assert image.items() <= tested.items()
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    assert {re.split(r"[=<>;]", line)[0].strip() for line in direct} - {"torch"} <= image.keys()


def test_the_image_is_asked_for_what_the_trainer_imports() -> None:
    """The image's requirements are what the trainer imports, and what its libraries load if a recipe asks for it."""
    named = (ROOT / "requirements" / "image.in").read_text().splitlines()[1:]
    imported = {PACKAGE_OF.get(name, name.replace("_", "-")) for name in third_party_imports()}
    assert set(named) == imported | LOADED_BY_LIBRARIES


def test_no_address_of_a_package_index_is_written_down() -> None:
    """The Dockerfile names no package index, because its address may contain a password."""
    assert not re.search(r"index-url|--index|pypi\.|simple/", DOCKERFILE)


def third_party_imports() -> set[str]:
    """Return the top-level third-party packages that the trainer's modules import."""
    nodes = [
        node for path in (ROOT / "trainer").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"trainer"}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[a-z0-9._-]+==", line))
