"""Build and push the trainer's image with docker, podman, buildah or gcloud."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from launcher.image import spec as images
from launcher.image.spec import BASE, BUILDERS, INPUTS, WHEELS, Builder, ImageError, ImageSpec
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 200
"""Last lines of a builder's output that an error message is made from."""
Say = Callable[[str], None]


class BuildOptions(BaseModel):
    """The options of `launcher build`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str | None = None
    """For example `ghcr.io/me`; None leaves the image on this machine."""
    push: bool = False
    builder: Builder | None = None
    """None means the first builder that works."""
    base: str = BASE
    torch_backend: str = ""
    flash_attention: bool = True
    wheels: Path | None = None
    """Folder of wheels that take precedence over the package index."""


class Layer(BaseModel):
    """One layer of an image."""

    model_config = ConfigDict(frozen=True)

    step: str
    size_bytes: int


class Built(BaseModel):
    """The image, and what was done to have it."""

    model_config = ConfigDict(frozen=True)

    image: str
    image_id: str
    digest: str
    builder: Builder
    built: bool
    pushed: bool
    seconds: float
    layers: tuple[Layer, ...] = ()
    """The lowest layer first."""


def ensure(
    options: BuildOptions, say: Say, *, environ: Mapping[str, str] = os.environ, root: Path = ROOT
) -> Built:
    """Build the image of this checkout, and push it if the options ask for it, unless it exists already.

    Raises:
        ImageError: it could not be built or pushed; the registry then does not show the tag.
        UserError: no builder works, or an option is invalid.
    """
    started = time.monotonic()
    _check(options, root)
    spec = make_spec(root, options)
    image = images.name_of(spec, options.registry)
    builder = find_builder(options.builder, say=say)
    work = _ImageBuild(builder, image, spec, {**environ, "DOCKER_BUILDKIT": "1"}, say)
    built = pushed = False
    if options.push and work.is_in_registry():
        say(f"{images.host_of(image)} already has the image")
    else:
        if built := not work.is_local():
            work.build(root, options)
        else:
            say(f"{builder} already has the image")
        if pushed := options.push and builder != "gcloud":
            work.push()
    return Built(
        image=image,
        image_id=images.image_id(image),
        digest=spec.digest,
        builder=builder,
        built=built,
        pushed=pushed or (built and builder == "gcloud"),
        seconds=time.monotonic() - started,
        layers=work.layers(),
    )


def image_name(options: BuildOptions, *, root: Path = ROOT) -> str:
    """Return the name that `ensure` gives the image of this checkout, without building it.

    Raises:
        UserError: an option is invalid.
    """
    _check(options, root)
    return images.name_of(make_spec(root, options), options.registry)


def make_spec(root: Path, options: BuildOptions) -> ImageSpec:
    """Return the spec of the image from the files of the checkout."""
    files = images.hash_files((name, path.read_bytes()) for name, path in inputs(root, options.wheels))
    return ImageSpec(
        base=options.base,
        torch_backend=options.torch_backend,
        flash_attention=options.flash_attention,
        files=files,
    )


def inputs(root: Path, wheels: Path | None) -> list[tuple[str, Path]]:
    """Return the files of the build context as sorted pairs: path in the context, file."""
    found = [
        (str(path.relative_to(root)), path)
        for name in INPUTS
        for path in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    found += [(f"{WHEELS}/{path.name}", path) for path in (wheels.glob("*.whl") if wheels else ())]
    return sorted(found)


@contextlib.contextmanager
def context(root: Path, wheels: Path | None) -> Iterator[Path]:
    """Make a temporary folder with exactly the inputs, so that the build uses what the digest covers."""
    with tempfile.TemporaryDirectory(prefix="aeolus-image-") as name:
        folder = Path(name)
        (folder / WHEELS).mkdir(parents=True)
        for path_in_context, path in inputs(root, wheels):
            target = folder / path_in_context
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o644)
        yield folder


def find_builder(requested: Builder | None, *, say: Say) -> Builder:
    """Return the requested builder, else the first one that works; raises UserError if there is none."""
    problems = []
    for name in [requested] if requested else BUILDERS:
        if not (problem := _problem(name, requested=name == requested)):
            say(f"building with {name}")
            return name
        problems.append(problem)
    others = [name for name in BUILDERS if requested and not _problem(name, requested=False)]
    raise UserError(
        f"no image can be built: {'; '.join(problems)}",
        hint=f"use `--builder {others[0]}`, which is installed"
        if others
        else "install one with `apt-get install podman`; it needs no daemon",
    )


def _problem(name: Builder, *, requested: bool) -> str | None:
    """Return why a builder cannot be used; None if it can."""
    if shutil.which(name) is None:
        return f"{name} is not installed"
    if (
        name == "docker"
        and subprocess.run(["docker", "version"], capture_output=True, check=False).returncode
    ):
        return "the Docker daemon does not answer"
    if name == "gcloud" and not requested:
        return "gcloud builds on Google's machines, which costs money: it is used only with --builder gcloud"
    return None


def _check(options: BuildOptions, root: Path) -> None:
    if not (root / images.DOCKERFILE).is_file():
        raise UserError(f"no {images.DOCKERFILE} in {root}", hint="run this in a checkout of the repository")
    if (options.push or options.builder == "gcloud") and not options.registry:
        raise UserError(
            "no registry to push to",
            hint='set `registry = "ghcr.io/NAME"` in the settings, or $AEOLUS_REGISTRY, or `build --registry`',
        )
    if options.wheels and not options.wheels.is_dir():
        raise UserError(f"the folder of wheels {options.wheels} does not exist", hint="check `--wheels`")


class _ImageBuild:
    """Runs one builder's commands for one image."""

    def __init__(
        self, builder: Builder, image: str, spec: ImageSpec, environ: Mapping[str, str], say: Say
    ) -> None:
        self._builder: Builder = builder
        self._image = image
        self._spec = spec
        self._environ = dict(environ)
        self._say = say

    def is_in_registry(self) -> bool:
        """Return whether the registry has the tag; raises ImageError if a login is missing, before a long build."""
        done = self._query_registry()
        if images.is_in_registry(done.returncode, done.stderr):
            return True
        login = images.login_command(self._builder, images.host_of(self._image))
        error = self._to_error([done.stderr.strip()], "push")
        if login and "log in" in (error.hint or "") and self._run(login).returncode != 0:
            raise error
        return False

    def is_local(self) -> bool:
        if self._builder == "gcloud":
            return False
        return self._run(images.local_command(self._builder, self._image)).returncode == 0

    def build(self, root: Path, options: BuildOptions) -> None:
        self._say(f"building {self._image} on {self._spec.base}")
        with context(root, options.wheels) as folder, tempfile.TemporaryDirectory() as private:
            secret = None
            if lines := images.secret_lines(self._environ):
                path = Path(private) / images.SECRET  # only this user can read the folder (mode 0700)
                path.write_text("\n".join(lines) + "\n")
                secret = str(path)
            if self._builder == "gcloud":
                steps = images.cloudbuild(self._image, self._spec)
                (folder / "cloudbuild.json").write_text(json.dumps(steps))
            self._stream(
                images.build_command(self._builder, self._image, self._spec, str(folder), secret=secret),
                "build",
            )

    def push(self) -> None:
        self._say(f"pushing {self._image}")
        self._stream(images.push_command(self._builder, self._image), "push")
        if not self.is_in_registry():
            raise ImageError(
                f"{self._image} was pushed, but {images.host_of(self._image)} does not have it",
                hint="repeat the command: it pushes what is missing",
            )

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers; empty for buildah and gcloud, which do not list them."""
        if self._builder not in {"docker", "podman"}:
            return ()
        output_format = ["json"] if self._builder == "podman" else ["{{json .}}", "--human=false"]
        command = [self._builder, "history", "--no-trunc", "--format", *output_format, self._image]
        return _parse_layers(self._run(command).stdout)

    def _query_registry(self) -> subprocess.CompletedProcess[str]:
        command = images.remote_command(self._builder, self._image)
        if not (text := images.registries_config(self._builder, self._image)):
            return self._run(command)
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as config:
            config.write(text)
            config.flush()
            if self._builder == "buildah":  # it ignores the environment variable
                command[1:1] = ["--registries-conf", config.name]
            return self._run(command, CONTAINERS_REGISTRIES_CONF=config.name)

    def _run(self, command: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**self._environ, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def _stream(self, command: Sequence[str], action: images.Action) -> None:
        """Run a command and pass on its output line by line; raises ImageError, made from the last lines."""
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with subprocess.Popen(
            command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                self._say(tail[-1])
        if process.returncode != 0:
            raise self._to_error(list(tail), action)

    def _to_error(self, lines: list[str], action: images.Action) -> ImageError:
        return images.to_error(
            lines, action=action, builder=self._builder, image=self._image, base=self._spec.base
        )


def _parse_layers(output: str) -> tuple[Layer, ...]:
    """Parse a history, newest step first: podman prints one list, docker one object per line.

    Steps that added no file have no size and are left out.
    """
    if output.startswith("["):
        rows = json.loads(output)
    else:
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    sizes = [(str(row.get("CreatedBy", "")), int(row.get("Size") or row.get("size") or 0)) for row in rows]
    return tuple(Layer(step=step, size_bytes=size) for step, size in reversed(sizes) if size)
