"""Files that a recipe names: found, and made absolute; what lies elsewhere is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError

LOCAL_ENDINGS = (".jsonl", ".json", ".parquet", ".gguf")
LOCAL_STARTS = ("./", "../", "/", "~")


def resolve(name: str, *, folders: Sequence[Path], error: type[UserError]) -> str:
    """The absolute path of a file or folder that exists in one of `folders`, else the name itself.

    Raises:
        UserError: of class `error`, if the name can only be a path, and nothing is there.
    """
    if "://" in name or name.startswith("generated:"):
        return name
    path = Path(name).expanduser()
    candidates = list(dict.fromkeys((folder / path).resolve() for folder in folders))
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    if name.lower().endswith(LOCAL_ENDINGS) or name.startswith(LOCAL_STARTS) or name in (".", ".."):
        raise error(
            f"{name} does not exist",
            hint="looked for " + " and ".join(str(candidate) for candidate in candidates),
        )
    return name
