"""The site's facts: where checkpoints go, where machines come from. A TOML file, then the environment."""

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
"""Environment variables that override the file, and the keys they stand for."""


class SettingsError(UserError):
    """A settings file that is missing or unreadable, an unknown key, or a wrong value."""


class Settings(BaseModel):
    """What holds for every submission from this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoints: str = Field(default="runs", min_length=1)
    """Bucket (`gs://`, `s3://`) or folder that holds the runs; a relative folder is the caller's."""
    trainer_python: Path | None = None
    """Python of the trainer's environment; None lets the supervisor look for one."""
    node_python: Path | None = None
    """The same on machines of one's own, such as a Slurm cluster's; None has each node install it."""
    infra: tuple[str, ...] = Field(default=("gcp", "lambda"), min_length=1)
    """Where `submit` looks for machines; in the environment with commas between."""
    image: str | None = None
    """Docker image with the trainer, for rented machines; None has each node install the pinned packages.

    `auto` is that of this checkout, built and pushed to the registry when a machine is rented for it.
    """
    registry: str | None = None
    """Where images go, as in `ghcr.io/NAME`."""
    budget_usd: float | None = Field(default=None, gt=0)
    """The most that a run may cost; `--budget` goes before it."""
    usd_per_h: float | None = Field(default=None, ge=0)
    """What an hour of a machine of one's own costs, all nodes together; rented ones have a catalog's price."""

    @field_validator("infra", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (
            [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
        )


def load(environ: Mapping[str, str]) -> Settings:
    """Defaults, overridden by the settings file, overridden by the environment; raises SettingsError."""
    path = settings_file(environ)
    given = {key: environ[name] for name, key in VARIABLES.items() if environ.get(name)}
    try:
        return Settings.model_validate({**_read(path, must_exist="AEOLUS_CONFIG" in environ), **given})
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(dict(item))}" for item in error.errors())
        raise SettingsError(f"settings are wrong ({path} and the environment):\n{lines}") from None


def settings_file(environ: Mapping[str, str]) -> Path:
    """`$AEOLUS_CONFIG`, else the user's `aeolus/config.toml`."""
    named = environ.get("AEOLUS_CONFIG")
    return Path(named).expanduser() if named else user_config_path("aeolus") / "config.toml"


def _read(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if must_exist:
            hint = "make the file, or unset AEOLUS_CONFIG"
            raise SettingsError(f"no settings file at {path}", hint=hint) from None
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


def remember(environ: Mapping[str, str], key: str, value: str) -> Path:
    """Set `key` in the settings file, which is made if there is none; returns the file.

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
    """TOML with the key set: in its own line if it has one, else before the first table."""
    line = f"{key} = {json.dumps(value)}"  # a JSON string is a TOML string
    top, table, rest = re.match(r"(.*?)(^\[|\Z)(.*)", text, re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    changed, count = re.subn(rf"^\s*{key}\s*=.*$", lambda _: line, top, count=1, flags=re.MULTILINE)
    if not count:
        changed = f"{top.rstrip()}\n{line}\n".lstrip()
    return f"{changed}{table}{rest}"
