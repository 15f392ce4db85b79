"""Look up the architecture of a recipe's model: in the table, a folder, a GGUF file, a bucket, or on the Hub.

Also where the Hub's client keeps its cache and the token of `hf auth login`:
https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.architecture import Architecture, gguf_header, known_architecture
from trainer.errors import ModelError, Unavailable, UserError
from trainer.hardware import Shape
from trainer.recipe.model import Recipe

log = logging.getLogger(__name__)
HUB = "https://huggingface.co"
TOKEN = "HF_TOKEN"  # noqa: S105 (a variable's name)
TIMEOUT_S = 5.0
DEEPEST = 4
"""Adapters of adapters that are followed. A longer chain is taken for a cycle."""
BUSY = {408, 429}
"""HTTP statuses below 500 after which a retry may succeed."""
TRUE = ("1", "TRUE", "YES", "ON")
"""Values that the Hub's client reads as true."""

Fetch = Callable[[str, Mapping[str, str]], bytes]
"""Returns the body at a URL, given request headers. Raises OSError."""


class HubAway(Unavailable):
    """The Hub or the network failed. The same request may succeed later."""


def https_get(url: str, headers: Mapping[str, str]) -> bytes:
    """Return the body at a URL.

    Raises:
        OSError: the request failed. `urllib.error.HTTPError`, a subclass, has the server's status in `code`.
    """
    if not url.startswith(("https://", "http://")):
        raise OSError(f"{url} is not an HTTP address")
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 (the scheme is checked above)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
        return bytes(response.read())


def hub_home(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the Hub's client. None if the environment names no home folder."""
    if named := environ.get("HF_HOME"):
        return Path(named).expanduser()
    if cache := environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "huggingface"
    return Path(environ["HOME"]) / ".cache" / "huggingface" if environ.get("HOME") else None


def with_login(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment, with the token of `hf auth login` if the environment has none.

    Rented machines do not have the login's file, so they need the token as a variable.
    """
    folder = hub_home(environ)
    if environ.get(TOKEN) or folder is None:
        return environ
    try:
        token = Path(environ.get("HF_TOKEN_PATH") or folder / "token").expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError):
        return environ
    return {**environ, TOKEN: token} if token else environ


def architecture_for(recipe: Recipe, shape: Shape) -> Architecture | None:
    """Return the architecture that `fit` needs for a shape.

    On a CPU the fit works without the architecture. So no server is asked, and an unknown model gives None.

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
    """Return the architecture of the model that the recipe starts from.

    For an adapter this is the architecture of its base model, because the adapter is merged into it.

    Args:
        recipe: the recipe whose model is looked up.
        online: whether to ask the Hub and buckets. The variable `HF_HUB_OFFLINE` turns the Hub off, too.
        fetch: reads a URL.
        environ: names the Hub's address, cache and token.

    Raises:
        ModelError: there is no such model, its type is not supported, or only a server knows it and `online` is false.
        HubAway: the Hub does not answer.
        BucketError, Unavailable: the model is in a bucket that cannot be read.
    """
    if recipe.init == "tiny":
        return Architecture.from_config("tiny", {"model_type": "mistral", **recipe.tiny.model_dump()})
    revision = str(recipe.model_args.get("model_revision") or "main")
    return _Lookup(revision, fetch if online else None, environ).find(str(recipe.model_name_or_path))


class _Lookup:
    """One lookup. It follows adapters to their base model."""

    def __init__(self, revision: str, fetch: Fetch | None, environ: Mapping[str, str]) -> None:
        self._revision = revision
        self._fetch = fetch
        self._environ = with_login(environ)

    def find(self, name: str, depth: int = 0) -> Architecture:
        """Return the architecture of a model, or of the base model of an adapter."""
        if depth > DEEPEST:
            raise ModelError(
                f"{name} is more than {DEEPEST} adapters away from a base model",
                hint="check `base_model_name_or_path` in adapter_config.json for a cycle",
            )
        if known := known_architecture(name):
            return known
        if name.endswith(".gguf"):
            return Architecture.from_config(name, gguf_header.config(Path(name).expanduser()))
        if "://" in name and self._fetch is None:
            raise _unreachable(name, "this lookup is offline and reads no bucket")
        read = _in_bucket(name) if "://" in name else self._reader(name)
        config = read("config.json")
        if config is not None and "model_type" in config:
            return Architecture.from_config(name, config)
        adapter = read("adapter_config.json")
        if adapter is None:
            raise ModelError(
                f"{name} has neither config.json nor adapter_config.json",
                hint="check the model's name or folder",
            )
        return self.find(str(adapter.get("base_model_name_or_path")), depth + 1)

    def _reader(self, name: str) -> Callable[[str], dict[str, Any] | None]:
        """Return a function that reads a JSON file of a model: from a folder, the Hub's cache, or the Hub."""
        folder = Path(name).expanduser()
        if folder.is_dir():
            return lambda file: _json_file(folder / file)
        if folder.is_absolute() or name.count("/") > 1:
            raise ModelError(f"there is no model folder {name}", hint="check the path, or give a Hub id")
        cached = _cached(name, self._environ)
        if cached is not None:
            return lambda file: _json_file(cached / file)
        return lambda file: self._hub(name, file)

    def _hub(self, name: str, file: str) -> dict[str, Any] | None:
        """Return a JSON file of a model on the Hub. None if the model has no such file."""
        endpoint = (self._environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        if self._fetch is None or self._environ.get("HF_HUB_OFFLINE", "0").upper() in TRUE:
            raise _unreachable(name, "this lookup is offline and does not ask the Hub")
        token = self._environ.get(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            found: dict[str, Any] = json.loads(
                self._fetch(f"{endpoint}/{name}/resolve/{self._revision}/{file}", headers)
            )
        except urllib.error.HTTPError as error:
            error.close()
            if (
                error.code == 404
            ):  # not an error: an adapter has no config.json, and a model no adapter_config.json
                return None
            if error.code in (401, 403):
                hint = (
                    "accept the model's terms on the Hub and pass your token as $HF_TOKEN, or check the name"
                )
                raise ModelError(
                    f"{endpoint} denies access to {name} (HTTP {error.code})", hint=hint
                ) from error
            # Only after a temporary failure is a retry, or a recovery on another machine, worth its time.
            temporary = error.code >= 500 or error.code in BUSY
            raise _unreachable(name, f"{endpoint} answers {error.code}", temporary=temporary) from error
        except (OSError, ValueError) as error:
            raise _unreachable(
                name, f"{endpoint}: {error}", temporary=not isinstance(error, ValueError)
            ) from error
        return found


def _unreachable(name: str, why: str, *, temporary: bool = False) -> ModelError | HubAway:
    return (HubAway if temporary else ModelError)(
        f"the config.json of {name} cannot be read, so its memory cannot be predicted: {why}",
        hint="check the name and the network, give a local folder, or use a model of the table in "
        "trainer/architecture/table.py",
    )


def _json_file(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file. None if it does not exist."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="check that it is a JSON file") from error
    return found


def _cached(name: str, environ: Mapping[str, str]) -> Path | None:
    """Return the newest snapshot of a model in the cache of the Hub's client, or None.

    The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home, named = hub_home(environ), environ.get("HF_HUB_CACHE")
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
    """Return a function that reads a JSON file of a run's final model."""
    from trainer.bucket.restore import find_exported

    bucket, manifest = find_exported(uri)

    def read(file: str) -> dict[str, Any] | None:
        data = bucket.get_or_none(manifest.prefix + file)
        return None if data is None else dict(json.loads(data))

    return read
