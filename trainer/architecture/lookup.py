"""The numbers of a recipe's model, looked up where they are: a table, a folder, a bucket, or the Hub."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.architecture import Architecture, gguf_header, hub_login, known_architecture
from trainer.errors import ModelError, Unavailable, UserError
from trainer.hardware import Shape
from trainer.recipe.model import Recipe

log = logging.getLogger(__name__)
HUB = "https://huggingface.co"
TIMEOUT_S = 5.0
DEEPEST = 4
"""Adapters upon adapters; more are a circle."""

BUSY = {408, 429}
"""Of the answers below 500, those that another try may better."""


class HubAway(Unavailable):
    """The Hub, or the way to it, failed: the same may work later."""


Fetch = Callable[[str, Mapping[str, str]], bytes]
"""The body at a URL, asked for with headers; raises OSError."""


def https_get(url: str, headers: Mapping[str, str]) -> bytes:
    """Raises OSError, of which `urllib.error.HTTPError` has the server's `code`."""
    if not url.startswith(("https://", "http://")):
        raise OSError(f"{url} is no address of a server")
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 (looked at above)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return bytes(answer.read())


def architecture_for(recipe: Recipe, shape: Shape) -> Architecture | None:
    """What `fit` is to know of the model on a shape.

    On the CPU an unknown model trains all the same, so nobody is asked over the network, and None is an answer.

    Raises:
        UserError: as in `find_architecture`, for a shape with GPUs.
    """
    try:
        return find_architecture(recipe, online=shape.count > 0)
    except UserError as error:
        if shape.count:
            raise
        log.info("memory is not predicted: %s", error.message)
        return None


def find_architecture(
    recipe: Recipe,
    *,
    online: bool = True,
    fetch: Fetch = https_get,
    environ: Mapping[str, str] = os.environ,
) -> Architecture:
    """Of the model that the recipe starts from; an adapter counts as its base, into which it is merged.

    Raises:
        ModelError: there is no such model, it is of a kind that we cannot count, or nobody is to be asked.
        HubAway: the Hub does not answer.
        BucketError, Unavailable: the model is in a bucket that cannot be read.
    """
    if recipe.init == "tiny":
        return Architecture.from_config("tiny", {"model_type": "mistral", **recipe.tiny.model_dump()})
    look = _Lookup(str(recipe.model_args.get("model_revision") or "main"), fetch if online else None, environ)
    return look.up(str(recipe.model_name_or_path))


class _Lookup:
    """One lookup, which may lead from an adapter to its base."""

    def __init__(self, revision: str, fetch: Fetch | None, environ: Mapping[str, str]) -> None:
        self._revision = revision
        self._fetch = fetch
        self._environ = hub_login.with_login(environ)

    def up(self, name: str, depth: int = 0) -> Architecture:
        if depth > DEEPEST:
            raise ModelError(f"{name} is an adapter of an adapter, {DEEPEST} times over")
        if known := known_architecture(name):
            return known
        if name.endswith(".gguf"):
            return Architecture.from_config(name, gguf_header.config(Path(name).expanduser()))
        if "://" in name and self._fetch is None:
            raise _unreachable(name, "no bucket is asked here")
        read = _in_bucket(name) if "://" in name else self._reader(name)
        config = read("config.json")
        if config is not None and "model_type" in config:
            return Architecture.from_config(name, config)
        adapter = read("adapter_config.json")
        if adapter is None:
            raise ModelError(f"{name} has neither config.json nor adapter_config.json")
        return self.up(str(adapter.get("base_model_name_or_path")), depth + 1)

    def _reader(self, name: str) -> Callable[[str], dict[str, Any] | None]:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return lambda file: _json_file(folder / file)
        if folder.is_absolute() or name.count("/") > 1:
            raise ModelError(f"there is no model folder {name}")
        cached = _cached(name, self._environ)
        if cached is not None:
            return lambda file: _json_file(cached / file)
        return lambda file: self._hub(name, file)

    def _hub(self, name: str, file: str) -> dict[str, Any] | None:
        """A file of a Hub's model; None if it has none of that name."""
        endpoint = (self._environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        if self._fetch is None or self._environ.get("HF_HUB_OFFLINE", "0").upper() in (
            "1",
            "TRUE",
            "YES",
            "ON",
        ):
            raise _unreachable(name, "the Hub is not asked here")
        token = self._environ.get("HF_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            found: dict[str, Any] = json.loads(
                self._fetch(f"{endpoint}/{name}/resolve/{self._revision}/{file}", headers)
            )
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            if error.code in (401, 403):
                hint = "accept its terms on the Hub, and pass your token as $HF_TOKEN; or check its name"
                raise ModelError(
                    f"{endpoint} does not let us see {name} ({error.code})", hint=hint
                ) from error
            passing = error.code >= 500 or error.code in BUSY
            raise _unreachable(name, f"{endpoint} answers {error.code}", passing=passing) from error
        except (OSError, ValueError) as error:
            raise _unreachable(
                name, f"{endpoint}: {error}", passing=not isinstance(error, ValueError)
            ) from error
        return found


def _unreachable(name: str, why: str, *, passing: bool = False) -> ModelError | HubAway:
    return (HubAway if passing else ModelError)(
        f"the config.json of {name} cannot be had, so its memory cannot be predicted: {why}",
        hint="check the name and the network, name a local folder, or take a model of the table: "
        "`trainer.architecture.table` lists them",
    )


def _json_file(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return found


def _cached(name: str, environ: Mapping[str, str]) -> Path | None:
    """The newest snapshot of a model in the cache of the Hub's client: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    home, named = hub_login.home(environ), environ.get("HF_HUB_CACHE")
    if not named and home is None:
        return None
    hub = Path(named).expanduser() if named else Path(str(home)) / "hub"
    snapshots = [
        file.parent
        for kind in ("config.json", "adapter_config.json")
        for file in hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/{kind}")
    ]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _in_bucket(uri: str) -> Callable[[str], dict[str, Any] | None]:
    """Files of a run's final model."""
    from trainer.bucket.restore import find_exported

    bucket, manifest = find_exported(uri)

    def read(file: str) -> dict[str, Any] | None:
        data = bucket.get_or_none(manifest.prefix + file)
        return None if data is None else dict(json.loads(data))

    return read
