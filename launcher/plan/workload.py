"""How much data a recipe has: known data sets, files on this machine, or what the user says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.bucket import open_file
from trainer.errors import DataError, UserError
from trainer.estimate import Workload, counted_workload, full_workload, known_workload
from trainer.recipe import DataSource, Recipe

READ_BYTES = 2**20
COUNTED_BYTES = 2**26
"""Of a file in a bucket: a plan that waits for gigabytes is of no use."""


def workload_of(recipe: Recipe, *, rows: int | None = None) -> Workload:
    """Rows and tokens of a recipe's training data.

    Args:
        recipe: what is trained.
        rows: of a data set that is not known here; its rows are taken to be as long as the recipe allows.

    Raises:
        UserError: the data set is not known, not here, and nobody said how large it is.
        BucketError, Unavailable: it is in a bucket that cannot be read.
    """
    mixture = recipe.dataset_mixture
    if rows is None and (known := known_workload(recipe)):
        return known
    if rows is None and (counted := _count(mixture.datasets)):
        tests = _count(mixture.test_datasets)
        return counted_workload(
            recipe, rows=counted[0], size_bytes=counted[1], test_rows=tests[0] if tests else 0
        )
    steps = recipe.trainer_args.get("max_steps") or 0
    if rows is None and steps > 0:
        return full_workload(recipe, steps * recipe.global_batch_size, f"{steps} steps, as the recipe says")
    if rows is None:
        names = ", ".join(source.id for source in mixture.datasets)
        raise UserError(
            f"how many rows {names} has is not known here", hint="say it with `--rows N`, or set `max_steps`"
        )
    return full_workload(recipe, rows, f"{rows} rows, as you said")


def _count(sources: Sequence[DataSource]) -> tuple[int, int] | None:
    """Rows and bytes of JSON-lines files on this machine and in buckets; None if any is something else."""
    names = [name for source in sources for name in _files(source.id)]
    if not names or any(not name.endswith(".jsonl") for name in names):
        return None
    counted = [_in_bucket(name) if "://" in name else _here(Path(name)) for name in names]
    return sum(rows for rows, _ in counted), sum(size for _, size in counted)


def _files(name: str) -> Iterable[str]:
    if "://" not in name and Path(name).is_dir():
        return sorted(str(each) for each in Path(name).iterdir() if each.is_file())
    return [name]


def _in_bucket(uri: str) -> tuple[int, int]:
    """Its rows have to be read to be counted; of a large file those of its beginning stand for all."""
    bucket, key = open_file(uri)
    if (size := bucket.size(key)) is None:
        raise DataError(f"there is no {uri}", hint="is it spelled like this in its bucket?")
    rows = read = 0
    for piece in bucket.read(key):
        rows, read = rows + bytes(piece).count(b"\n"), read + len(piece)
        if read >= COUNTED_BYTES:
            break
    return round(rows * size / max(read, 1)), size


def _here(path: Path) -> tuple[int, int]:
    if not path.is_file():
        return 0, 0
    with path.open("rb") as file:
        rows = sum(piece.count(b"\n") for piece in iter(lambda: file.read(READ_BYTES), b""))
    return rows, path.stat().st_size
