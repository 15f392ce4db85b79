"""A bucket that is a folder on the disk where the files lie already: they get a second name there.

A hard link shares the file itself, so this is safe only because nothing writes to a file once it is
staged, and nothing ever writes to a file of a bucket in place: both replace files, or remove names.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import LocalStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PLAIN = re.compile(r"[A-Za-z0-9._/-]+")
"""Keys that are paths as they stand; others the store spells in its own way."""


def folder_of(store: ObjectStore) -> Path | None:
    """Where a store's keys are paths; None for what is no folder."""
    return Path(store.prefix) if isinstance(store, LocalStore) and store.prefix else None


def below(folder: Path, prefix: str) -> tuple[str, ...]:
    """Prefixes of the folders two levels below one, in order, whatever they hold."""
    found = (folder / prefix).glob("*/*") if (folder / prefix).is_dir() else ()
    return tuple(sorted(f"{path.relative_to(folder).as_posix()}/" for path in found if path.is_dir()))


def clear(folder: Path, prefix: str) -> None:
    """Remove a folder with what no listing shows: files that a killed process has begun to write, empty folders."""
    shutil.rmtree(folder / prefix, ignore_errors=True)
    with suppress(OSError):  # others are in it
        (folder / prefix).parent.rmdir()


def link(path: Path, folder: Path, key: str) -> bool:
    """Give the file `path` the name `key` below `folder`, in one step, if nothing has that name.

    Returns:
        False if it is to be copied: another file system, one without links, a key that is no plain
        path or is taken, a symbolic link, which would have a second name itself and lead to nothing soon.
    """
    if not PLAIN.fullmatch(key) or path.is_symlink():
        return False
    target = folder / key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    except OSError:  # the copy that follows says what is wrong, if anything is
        return False
    return True
