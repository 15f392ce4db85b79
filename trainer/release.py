"""The version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "aeolus"


def own_version() -> str:
    """Return the installed version, such as `0.1.0`; `source` if the package is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "source"
