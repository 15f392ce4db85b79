"""Building and pushing the image, with a shell script as the builder and a file as the registry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.image import builders
from launcher.image.builders import BuildOptions
from launcher.image.spec import ImageError
from trainer.errors import UserError

FAKE = """#!/bin/sh
echo "$@" >>{log}
case "$1" in
  build) shift; for word; do case "$word" in id=packages,src=*) cp "${{word#*src=}}" {log}.secret; esac; done
         echo "STEP 1"; {build} ;;
  push) echo "$@" >{log}.tag; {push} ;;
  manifest) [ -f {log}.tag ] || {{ echo "manifest unknown" >&2; exit 125; }} ;;
  image) exit 1 ;;
  login) exit 1 ;;
  history) echo '[{{"CreatedBy": "COPY trainer", "size": 7}}, {{"CreatedBy": "ENV", "size": 0}}, {{"CreatedBy": "base", "size": 9}}]' ;;
esac
"""
PUSHING = BuildOptions(registry="127.0.0.1:5000", push=True)


class Machine:
    """A folder that is the PATH, with one builder in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._log = folder / "log"
        self.output: list[str] = []
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def has(self, name: str, *, build: str = "true", push: str = "true") -> None:
        program = self._folder / name
        program.write_text(FAKE.format(log=self._log, build=build, push=push))
        program.chmod(0o755)

    def ensure(self, options: BuildOptions, **environ: str) -> builders.Built:
        return builders.ensure(options, say=self.output.append, environ={**os.environ, **environ})

    def verbs(self) -> list[str]:
        return [line.split()[0] for line in self._log.read_text().splitlines()] if self._log.exists() else []

    @property
    def secret(self) -> str:
        return self._log.with_name("log.secret").read_text()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(builders, "BUILDERS", ("podman",))  # whatever else this machine has
    return Machine(tmp_path, monkeypatch)


def test_an_image_is_built_pushed_and_looked_for(machine: Machine) -> None:
    """After the push, the registry is asked whether it has the tag."""
    machine.has("podman")
    built = machine.ensure(PUSHING)
    assert machine.verbs() == ["manifest", "image", "build", "push", "manifest", "history"]
    assert (built.built, built.pushed) == (True, True)
    assert built.image_id == f"docker:127.0.0.1:5000/aeolus-trainer:{built.digest[:16]}"
    assert [layer.size_bytes for layer in built.layers] == [9, 7]
    assert "STEP 1" in machine.output


def test_what_the_registry_has_is_not_made_again(machine: Machine) -> None:
    """The tag is a digest of the content, so an existing tag is not built again."""
    machine.has("podman")
    machine.ensure(PUSHING)
    before = len(machine.verbs())
    again = machine.ensure(PUSHING)
    assert machine.verbs()[before:] == ["manifest", "history"]
    assert (again.built, again.pushed) == (False, False)


def test_the_package_index_is_a_secret_of_the_build(machine: Machine) -> None:
    """The package index is in a file that the build mounts, and so in no argument and no layer."""
    machine.has("podman")
    machine.ensure(BuildOptions(), UV_DEFAULT_INDEX="https://me:password@example.org/simple")
    assert machine.secret == "export UV_DEFAULT_INDEX='https://me:password@example.org/simple'\n"
    assert not any("password" in line for line in machine.output)


def test_a_refused_push_is_an_error(machine: Machine) -> None:
    """The error has the registry's message, and the login command."""
    machine.has("podman", push="echo 'unauthorized: no' >&2; exit 1")
    with pytest.raises(ImageError, match="does not allow you to push") as caught:
        machine.ensure(PUSHING)
    assert "podman login 127.0.0.1:5000" in str(caught.value)


def test_a_push_that_left_nothing_is_an_error(machine: Machine) -> None:
    """If the registry does not have the tag after a successful push, that is an error."""
    machine.has("podman", push='rm -f "$(dirname "$0")/log.tag"')
    with pytest.raises(ImageError, match="does not have it"):
        machine.ensure(PUSHING)


def test_a_build_that_fails_pushes_nothing(machine: Machine) -> None:
    """After a failed build nothing is pushed."""
    machine.has("podman", build="echo 'write: no space left on device' >&2; exit 1")
    with pytest.raises(ImageError, match="disk that podman uses is full"):
        machine.ensure(PUSHING)
    assert "push" not in machine.verbs()


def test_without_a_builder_the_error_has_an_install_command(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error names the builders that were tried, and a command that installs one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="podman is not installed") as caught:
        machine.ensure(BuildOptions())
    assert "apt-get install podman" in str(caught.value)


def test_where_another_builder_would_do_it_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the requested builder is missing, the hint names one that works, but it is not used."""
    machine.has("podman")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="buildah is not installed") as caught:
        machine.ensure(BuildOptions(builder="buildah"))
    assert "--builder podman" in str(caught.value)
    assert machine.verbs() == []


def test_a_push_needs_a_registry(machine: Machine) -> None:
    """A push without a registry is refused before anything is built."""
    with pytest.raises(UserError, match="no registry to push to"):
        machine.ensure(BuildOptions(push=True))
    assert machine.verbs() == []


def test_only_the_inputs_are_the_context() -> None:
    """The context has exactly the files of the digest: no caches, no data, nothing of git."""
    names = [name for name, _ in builders.inputs(builders.ROOT, None)]
    with builders.context(builders.ROOT, None) as folder:
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert there == names
    assert not any("__pycache__" in name or name.startswith((".git", "tests", "launcher")) for name in names)
    assert "trainer/errors.py" in names
