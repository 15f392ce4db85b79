"""`python -m launcher build`: the trainer's image, made and pushed by whatever builder is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.errors import ExitCode

if TYPE_CHECKING:
    from launcher.image.builders import BuildOptions, Built


@click.command(short_help="Build the trainer's image.")
@click.option("--push", is_flag=True, help="Push it, unless the registry has this tag.")
@click.option(
    "--registry",
    metavar="HOST/PATH",
    help="As in ghcr.io/NAME, docker.io/NAME, REGION-docker.pkg.dev/PROJECT/REPOSITORY, HOST:PORT.  [default: settings]",
)
@click.option(
    "--builder",
    type=click.Choice(["docker", "podman", "buildah", "gcloud"]),
    help="[default: the first that is here; gcloud, which costs money, only by name]",
)
@click.option("--base", metavar="IMAGE", help="A Debian or Ubuntu to build on.  [default: NVIDIA's CUDA 13]")
@click.option("--torch", "torch_backend", metavar="NAME", default="", help="cpu, cu130 …  [default: CUDA 13]")
@click.option("--flash-attention/--no-flash-attention", default=True, help="Of no use without a GPU.")
@click.option(
    "--wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of wheels that are taken rather than the index's.",
)
@click.option("--remember", is_flag=True, help="`submit` uses this image from now on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; the rest on stderr.")
def build(*, as_json: bool, remember: bool, **options: Any) -> int:
    """Build the image with the trainer as it lies here, named by what goes into it.

    Where the registry has that name nothing is done. Another package index is taken from uv's and pip's
    own variables (UV_DEFAULT_INDEX, PIP_INDEX_URL …) and leaves no trace in the image.
    """
    from launcher import render
    from launcher.image import builders
    from launcher.settings import remember as write

    made = builders.ensure(_wishes(options), lambda line: click.echo(line, err=True))
    where = write(os.environ, "image", made.image) if remember else None
    if as_json:
        about = {"remembered_in": str(where) if where else None}
        click.echo(render.to_json({**made.model_dump(mode="json"), **about}))
    else:
        _print(made)
    if where:
        click.echo(f"{where}: image = {made.image!r}", err=True)
    return ExitCode.DONE


def _wishes(options: dict[str, Any]) -> BuildOptions:
    from launcher import settings
    from launcher.image.builders import BuildOptions

    site = settings.load(os.environ)
    given = {key: value for key, value in options.items() if value is not None}
    return BuildOptions.model_validate({"registry": site.registry, **given})


def _print(made: Built) -> None:
    from launcher import render

    for layer in made.layers:
        click.echo(f"{render.size(layer.size_bytes):>10}  {_short(layer.step)}", err=True)
    done = [word for word, did in (("built", made.built), ("pushed", made.pushed)) if did]
    click.echo(f"{' and '.join(done) or 'nothing to do'} in {render.duration(made.seconds)}", err=True)
    click.echo(f"image_id: {made.image_id}")


def _short(step: str) -> str:
    plain = " ".join(step.replace("/bin/sh -c", "").replace("#(nop)", "").split())
    return plain if len(plain) <= 100 else f"{plain[:99]}…"
