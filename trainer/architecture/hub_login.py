"""Where the Hub's client keeps things in the home, and the token that `hf auth login` left there.

https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TOKEN = "HF_TOKEN"  # noqa: S105 (a variable's name)


def home(environ: Mapping[str, str]) -> Path | None:
    """The client's folder; None where nobody has a home."""
    if named := environ.get("HF_HOME"):
        return Path(named).expanduser()
    if cache := environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "huggingface"
    return Path(environ["HOME"]) / ".cache" / "huggingface" if environ.get("HOME") else None


def with_login(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment, with the token of the login where the shell has none: rented machines have no such file."""
    folder = home(environ)
    if environ.get(TOKEN) or folder is None:
        return environ
    try:
        token = Path(environ.get("HF_TOKEN_PATH") or folder / "token").expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError):
        return environ
    return {**environ, TOKEN: token} if token else environ
