"""Write one key of the settings file and leave the rest of it as it is."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launcher.settings import SettingsError, settings_file


def remember(environ: Mapping[str, str], key: str, value: str) -> Path:
    """Set `key` in the settings file, which is made if there is none; returns the file.

    Raises:
        SettingsError: the file cannot be read or written.
    """
    path = settings_file(environ)
    try:
        before = path.read_text() if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, with_key(before, key, value))
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


def _replace(path: Path, text: str) -> None:
    """All of it or nothing: a full disk leaves the old file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".config", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)  # noqa: PTH105 (one call, atomic)
