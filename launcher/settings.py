"""The settings of this machine's user: read from a TOML file, overridden by environment variables."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_config_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.errors import UserError
from trainer.files import write_atomically

VARIABLES = {
    "AEOLUS_CHECKPOINTS": "checkpoints",
    "AEOLUS_TRAINER_PYTHON": "trainer_python",
    "AEOLUS_NODE_PYTHON": "node_python",
    "AEOLUS_INFRA": "infra",
    "AEOLUS_IMAGE": "image",
    "AEOLUS_REGISTRY": "registry",
    "AEOLUS_BUDGET": "budget_usd",
    "AEOLUS_USD_PER_H": "usd_per_h",
}
"""Environment variables that override the settings file, with their keys in it."""


class SettingsError(UserError):
    """The settings file is missing or unreadable, or it has an unknown key or an invalid value."""


class Settings(BaseModel):
    """Defaults for every submission from this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoints: str = Field(default="runs", min_length=1)
    """Bucket (`gs://`, `s3://`) or folder of runs; a relative folder is relative to the working directory."""
    trainer_python: Path | None = None
    """Python of the trainer's environment on this machine; None means that the supervisor searches for it."""
    node_python: Path | None = None
    """Python of the trainer's environment on the user's own nodes, such as a Slurm cluster's; None means that each
    node installs the packages."""
    infra: tuple[str, ...] = Field(default=("gcp", "lambda"), min_length=1)
    """Where `submit` looks for machines; comma-separated in the environment variable."""
    image: str | None = None
    """Docker image with the trainer, for rented machines; None means that each node installs the pinned packages.

    `auto` is the image of this checkout: it is built and pushed to the registry when a machine is rented for it.
    """
    registry: str | None = None
    """Registry for images, such as `ghcr.io/NAME`."""
    budget_usd: float | None = Field(default=None, gt=0)
    """Maximum cost of a run; `--budget` overrides it."""
    usd_per_h: float | None = Field(default=None, ge=0)
    """Price per hour of the user's own machines, all nodes together; for rented machines the catalog has the price."""

    @field_validator("infra", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return (
            [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
        )


def load(environ: Mapping[str, str]) -> Settings:
    """Return the settings: defaults, overridden by the file, overridden by the environment.

    Raises:
        SettingsError: the file cannot be read, or it has an unknown key or an invalid value.
    """
    path = settings_file(environ)
    from_environ = {key: environ[name] for name, key in VARIABLES.items() if environ.get(name)}
    try:
        return Settings.model_validate({**_read(path, must_exist="AEOLUS_CONFIG" in environ), **from_environ})
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(dict(item))}" for item in error.errors())
        raise SettingsError(f"invalid settings ({path} and the environment):\n{lines}") from None


def settings_file(environ: Mapping[str, str]) -> Path:
    """Return the settings file: `$AEOLUS_CONFIG`, else `aeolus/config.toml` in the user's configuration folder."""
    named = environ.get("AEOLUS_CONFIG")
    return Path(named).expanduser() if named else user_config_path("aeolus") / "config.toml"


def _read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if must_exist:
            hint = "create the file, or unset AEOLUS_CONFIG"
            raise SettingsError(f"the settings file {path} does not exist", hint=hint) from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings in {path}: {error}") from None


def _explain(item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']}"
    near = difflib.get_close_matches(key, Settings.model_fields, n=1)
    known = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(Settings.model_fields)}"
    return f"{key}: unknown key; {known}"


def write_setting(environ: Mapping[str, str], key: str, value: str) -> Path:
    """Set a key in the settings file, which is created if it does not exist; return the file.

    Raises:
        SettingsError: the file cannot be read or written.
    """
    path = settings_file(environ)
    try:
        before = path.read_text() if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, with_key(before, key, value))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot write {key} to the settings in {path}: {error}") from None
    return path


def with_key(text: str, key: str, value: str) -> str:
    """Return TOML text with the key set: in the key's line if it has one, else before the first table."""
    line = f"{key} = {json.dumps(value)}"  # a JSON string is a TOML string
    top, table, rest = re.match(r"(.*?)(^\[|\Z)(.*)", text, re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    changed, count = re.subn(rf"^\s*{key}\s*=.*$", lambda _: line, top, count=1, flags=re.MULTILINE)
    if not count:
        changed = f"{top.rstrip()}\n{line}\n".lstrip()
    return f"{changed}{table}{rest}"
