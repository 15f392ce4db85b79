"""Docker, podman, buildah or gcloud, whichever is here: build the trainer's image and push it."""

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
KEPT_LINES = 200
"""Of what a builder said, for the message if it fails."""
Say = Callable[[str], None]


class BuildOptions(BaseModel):
    """What `build` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str | None = None
    """Such as `ghcr.io/me`; None keeps the image on this machine."""
    push: bool = False
    builder: Builder | None = None
    """None takes the first that is here."""
    base: str = BASE
    torch_backend: str = ""
    flash_attention: bool = True
    wheels: Path | None = None
    """Folder of wheels that go before the index's."""


class Layer(BaseModel):
    """One of an image's, the lowest first."""

    model_config = ConfigDict(frozen=True)

    step: str
    size_bytes: int


class Built(BaseModel):
    """What there is now, and what had to be done for it."""

    model_config = ConfigDict(frozen=True)

    image: str
    image_id: str
    digest: str
    builder: Builder
    built: bool
    pushed: bool
    seconds: float
    layers: tuple[Layer, ...] = ()


def ensure(
    wishes: BuildOptions, say: Say, *, environ: Mapping[str, str] = os.environ, root: Path = ROOT
) -> Built:
    """The image of this checkout: built unless the registry, or this machine, has it.

    Raises:
        ImageError: it could not be built, or not be pushed; the registry has no part of the tag.
        UserError: no builder is here, or a wish cannot be granted.
    """
    started = time.monotonic()
    _check(wishes, root)
    recipe = read(root, wishes)
    image = images.name_of(recipe, wishes.registry)
    builder = find(wishes.builder, say=say)
    work = _Work(builder, image, recipe, {**environ, "DOCKER_BUILDKIT": "1"}, say)
    built = pushed = False
    if wishes.push and work.on_registry():
        say(f"{images.host_of(image)} has it already")
    else:
        if built := not work.here():
            work.build(root, wishes)
        else:
            say(f"{builder} has it already")
        if pushed := wishes.push and builder != "gcloud":
            work.push()
    return Built(
        image=image,
        image_id=images.image_id(image),
        digest=recipe.digest,
        builder=builder,
        built=built,
        pushed=pushed or (built and builder == "gcloud"),
        seconds=time.monotonic() - started,
        layers=work.layers(),
    )


def name(wishes: BuildOptions, *, root: Path = ROOT) -> str:
    """What `ensure` would call the image of this checkout; builds nothing.

    Raises:
        UserError: a wish cannot be granted.
    """
    _check(wishes, root)
    return images.name_of(read(root, wishes), wishes.registry)


def read(root: Path, wishes: BuildOptions) -> ImageSpec:
    """Everything that goes into the image, as it lies in the checkout now."""
    files = images.sums((name, path.read_bytes()) for name, path in inputs(root, wishes.wheels))
    return ImageSpec(
        base=wishes.base,
        torch_backend=wishes.torch_backend,
        flash_attention=wishes.flash_attention,
        files=files,
    )


def inputs(root: Path, wheels: Path | None) -> list[tuple[str, Path]]:
    """The context: (path in it, file), in order."""
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
    """A folder with the inputs and nothing else, so that what is digested is what is built."""
    with tempfile.TemporaryDirectory(prefix="aeolus-image-") as name:
        folder = Path(name)
        (folder / WHEELS).mkdir(parents=True)
        for inside, path in inputs(root, wheels):
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o644)
        yield folder


def find(wanted: Builder | None, *, say: Say) -> Builder:
    """The builder that was asked for, else the first that is here and answers."""
    missing = []
    for name in [wanted] if wanted else BUILDERS:
        if not (lack := _lack(name, asked=name == wanted)):
            say(f"building with {name}")
            return name
        missing.append(lack)
    others = [name for name in BUILDERS if wanted and not _lack(name, asked=False)]
    raise UserError(
        f"no image can be built: {'; '.join(missing)}",
        hint=f"`--builder {others[0]}` will do: it is here"
        if others
        else "`apt-get install podman` will do: it needs no daemon",
    )


def _lack(name: Builder, *, asked: bool) -> str | None:
    """Why this one cannot build; None if it can."""
    if shutil.which(name) is None:
        return f"{name} is not installed"
    if (
        name == "docker"
        and subprocess.run(["docker", "version"], capture_output=True, check=False).returncode
    ):
        return "docker's engine does not answer"
    if name == "gcloud" and not asked:
        return "gcloud builds on Google's machines, for money: only with --builder gcloud"
    return None


def _check(wishes: BuildOptions, root: Path) -> None:
    if not (root / images.DOCKERFILE).is_file():
        raise UserError(f"no {images.DOCKERFILE} in {root}", hint="run this from a checkout")
    if (wishes.push or wishes.builder == "gcloud") and not wishes.registry:
        raise UserError(
            "nowhere to push to",
            hint='`registry = "ghcr.io/NAME"` in the settings, or $AEOLUS_REGISTRY, or `build --registry`',
        )
    if wishes.wheels and not wishes.wheels.is_dir():
        raise UserError(f"no folder {wishes.wheels} of wheels")


class _Work:
    """One builder on one image."""

    def __init__(
        self, builder: Builder, image: str, recipe: ImageSpec, environ: Mapping[str, str], say: Say
    ) -> None:
        self._builder: Builder = builder
        self._image = image
        self._recipe = recipe
        self._environ = dict(environ)
        self._say = say

    def on_registry(self) -> bool:
        """Raises ImageError where a login is missing: sooner than after a build."""
        done = self._ask()
        if images.is_there(done.returncode, done.stderr):
            return True
        login = images.login_command(self._builder, images.host_of(self._image))
        refused = self._explain([done.stderr.strip()], "push")
        if login and "log in" in (refused.hint or "") and self._quiet(login).returncode != 0:
            raise refused
        return False

    def _ask(self) -> subprocess.CompletedProcess[str]:
        command = images.remote_command(self._builder, self._image)
        if not (text := images.registries(self._builder, self._image)):
            return self._quiet(command)
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
            settings.write(text)
            settings.flush()
            if self._builder == "buildah":  # it does not read the variable
                command[1:1] = ["--registries-conf", settings.name]
            return self._quiet(command, CONTAINERS_REGISTRIES_CONF=settings.name)

    def here(self) -> bool:
        if self._builder == "gcloud":
            return False
        return self._quiet(images.local_command(self._builder, self._image)).returncode == 0

    def build(self, root: Path, wishes: BuildOptions) -> None:
        self._say(f"building {self._image} on {self._recipe.base}")
        with context(root, wishes.wheels) as folder, tempfile.TemporaryDirectory() as private:
            secret = None
            if lines := images.secret_lines(self._environ):
                path = Path(private) / images.SECRET  # the folder is ours alone (mode 0700)
                path.write_text("\n".join(lines) + "\n")
                secret = str(path)
            if self._builder == "gcloud":
                steps = images.cloudbuild(self._image, self._recipe)
                (folder / "cloudbuild.json").write_text(json.dumps(steps))
            self._loud(
                images.build_command(self._builder, self._image, self._recipe, str(folder), secret=secret),
                "build",
            )

    def push(self) -> None:
        self._say(f"pushing {self._image}")
        self._loud(images.push_command(self._builder, self._image), "push")
        if not self.on_registry():
            raise ImageError(
                f"{self._image} was pushed, but {images.host_of(self._image)} does not have it",
                hint="the same command again pushes what is missing",
            )

    def layers(self) -> tuple[Layer, ...]:
        """As docker and podman tell; the others do not say."""
        if self._builder not in {"docker", "podman"}:
            return ()
        told = ["json"] if self._builder == "podman" else ["{{json .}}", "--human=false"]
        command = [self._builder, "history", "--no-trunc", "--format", *told, self._image]
        return _layers(self._quiet(command).stdout)

    def _quiet(self, command: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**self._environ, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def _loud(self, command: Sequence[str], doing: str) -> None:
        """Run it and pass on what it says, line by line; raises ImageError with what it said last."""
        kept: deque[str] = deque(maxlen=KEPT_LINES)
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
                kept.append(line.rstrip())
                self._say(kept[-1])
        if process.returncode != 0:
            raise self._explain(list(kept), "build" if doing == "build" else "push")

    def _explain(self, lines: list[str], doing: images.Doing) -> ImageError:
        return images.explain(
            lines, doing=doing, builder=self._builder, image=self._image, base=self._recipe.base
        )


def _layers(told: str) -> tuple[Layer, ...]:
    """The newest first: podman's list, or docker's objects a line. Steps that left no file have no size."""
    if told.startswith("["):
        rows = json.loads(told)
    else:
        rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    sizes = [(str(row.get("CreatedBy", "")), int(row.get("Size") or row.get("size") or 0)) for row in rows]
    return tuple(Layer(step=step, size_bytes=size) for step, size in reversed(sizes) if size)
