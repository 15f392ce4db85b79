"""`python -m launcher build`: build the trainer's image and push it to a registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.errors import ExitCode

if TYPE_CHECKING:
    from launcher.image.builders import BuildOptions, Built


@click.command(short_help="Build the trainer's image.")
@click.option("--push", is_flag=True, help="Push the image, unless the registry has this tag.")
@click.option(
    "--registry",
    metavar="HOST/PATH",
    help="For example ghcr.io/NAME, docker.io/NAME, REGION-docker.pkg.dev/PROJECT/REPOSITORY or HOST:PORT."
    "  [default: from settings]",
)
@click.option(
    "--builder",
    type=click.Choice(["docker", "podman", "buildah", "gcloud"]),
    help="Build tool.  [default: the first that works, except gcloud, which costs money]",
)
@click.option("--base", metavar="IMAGE", help="Base image, Debian or Ubuntu.  [default: NVIDIA's CUDA 13]")
@click.option(
    "--torch",
    "torch_backend",
    metavar="NAME",
    default="",
    help="Build of torch: cpu, cu130 …  [default: CUDA 13]",
)
@click.option(
    "--flash-attention/--no-flash-attention",
    default=True,
    help="Install FlashAttention, which needs a GPU.  [default: yes]",
)
@click.option(
    "--wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of wheels that take precedence over the package index.",
)
@click.option("--remember", is_flag=True, help="Write the image to the settings, so that `submit` uses it.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object to stdout, and the log to stderr."
)
def build(*, as_json: bool, remember: bool, **options: Any) -> int:
    """Build the image from the trainer of this checkout.

    The tag is a digest of the contents, so an image that the registry already has is not built again.
    To use another package index, set uv's or pip's variables (UV_DEFAULT_INDEX, PIP_INDEX_URL …); they are
    not stored in the image.
    """
    from launcher import render
    from launcher.image import builders
    from launcher.settings import write_setting

    built = builders.ensure(_build_options(options), lambda line: click.echo(line, err=True))
    settings_file = write_setting(os.environ, "image", built.image) if remember else None
    if as_json:
        written = {"remembered_in": str(settings_file) if settings_file else None}
        click.echo(render.to_json({**built.model_dump(mode="json"), **written}))
    else:
        _print(built)
    if settings_file:
        click.echo(f"{settings_file}: image = {built.image!r}", err=True)
    return ExitCode.DONE


def _build_options(options: dict[str, Any]) -> BuildOptions:
    from launcher import settings
    from launcher.image.builders import BuildOptions

    site = settings.load(os.environ)
    set_options = {key: value for key, value in options.items() if value is not None}
    return BuildOptions.model_validate({"registry": site.registry, **set_options})


def _print(built: Built) -> None:
    from launcher import render

    for layer in built.layers:
        click.echo(f"{render.size(layer.size_bytes):>10}  {_shorten(layer.step)}", err=True)
    done = [word for word, did in (("built", built.built), ("pushed", built.pushed)) if did]
    click.echo(f"{' and '.join(done) or 'nothing to do'} in {render.duration(built.seconds)}", err=True)
    click.echo(f"image_id: {built.image_id}")


def _shorten(step: str) -> str:
    plain = " ".join(step.replace("/bin/sh -c", "").replace("#(nop)", "").split())
    return plain if len(plain) <= 100 else f"{plain[:99]}…"
