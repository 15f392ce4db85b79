"""Log-probabilities of a reference as files: a folder with one array for each data set, and what they are of."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError  # type: ignore[import-not-found,unused-ignore]
from safetensors.numpy import load_file, save_file  # type: ignore[import-not-found,unused-ignore]

from trainer.staged import Staged, mark_staged

log = logging.getLogger(__name__)
ABOUT, VALUES = "reference.json", "logps.safetensors"
Pairs = np.ndarray[Any, np.dtype[np.float32]]
"""(rows, 2): of the chosen and of the rejected answer, summed over their tokens; not a number where not computed."""


class About(BaseModel):
    """What the values are a function of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    """Digest of the weights."""
    data: str
    """Fingerprint of the training tokens."""
    max_length: int | None
    truncation_mode: str
    precision: str
    """Of the matrix products."""
    ld_alpha: float | None

    @property
    def fingerprint(self) -> str:
        """xxh3_128, hex."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.model_dump(), sort_keys=True).encode())


class CachedLogps:
    """Values by the fingerprint of their data."""

    def __init__(self, about: About, values: dict[str, Pairs], *, source: str = "") -> None:
        self.about = about
        self.values = values
        self.source = source
        """The run that computed or took them over; empty if nobody did."""

    def pairs(self, data: str, rows: int) -> Pairs:
        """The array of a data set, to be filled where it is not a number."""
        if data not in self.values or self.values[data].shape != (rows, 2):
            self.values[data] = np.full((rows, 2), np.nan, dtype=np.float32)
        return self.values[data]

    @property
    def known(self) -> int:
        """Rows."""
        return sum(int((~np.isnan(each).any(axis=1)).sum()) for each in self.values.values())

    @property
    def digest(self) -> str:
        total = xxhash.xxh3_128()
        for data, values in sorted(self.values.items()):
            total.update(data.encode())
            total.update(np.ascontiguousarray(values).tobytes())
        return total.hexdigest()


def stage(staging: Path, kept: CachedLogps) -> None:
    """Write all that is known, and mark it staged; the uploader drops an earlier part that still waits."""
    folder = f"reference-{kept.known:09d}"
    into = staging / folder
    into.mkdir(exist_ok=True)
    save_file(kept.values, into / VALUES)
    (into / ABOUT).write_text(kept.about.model_dump_json(indent=2))
    details = {"fingerprint": kept.about.fingerprint, "pairs": kept.known}
    mark_staged(staging, Staged(folder=folder, step=0, kind="reference", details=details))


def read(folders: Path | None, about: About) -> CachedLogps:
    """The first of the folders, by name, that is of this reference; what is none of it is left out, and said."""
    for folder in sorted(folders.iterdir()) if folders and folders.is_dir() else []:
        try:
            theirs = About.model_validate_json((folder / ABOUT).read_text())
            values = load_file(folder / VALUES)
        except (OSError, ValidationError, SafetensorError) as error:
            log.warning("kept log-probabilities of the reference cannot be read: %s", error)
            continue
        if theirs != about:
            log.info("kept log-probabilities are of another reference: %s", _difference(theirs, about))
        elif all(
            each.dtype == np.float32 and each.ndim == 2 and each.shape[1] == 2 for each in values.values()
        ):
            source = folder.name.partition("-")[2]
            return CachedLogps(about, {data: np.array(each) for data, each in values.items()}, source=source)
        else:
            log.warning("kept log-probabilities of the reference are no pairs of float32")
    return CachedLogps(about, {})


def _difference(theirs: About, mine: About) -> str:
    there, here = theirs.model_dump(), mine.model_dump()
    return "; ".join(f"{key} {there[key]}, not {here[key]}" for key in there if there[key] != here[key])
