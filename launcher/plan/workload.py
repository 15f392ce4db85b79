"""How much data a recipe has: known data sets, files on this machine, or what the user says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.estimate import Workload, counted_workload, known_workload
from trainer.recipe import DataSource, Recipe

READ_BYTES = 2**20


def workload_of(recipe: Recipe, *, rows: int | None = None) -> Workload:
    """Rows and tokens of a recipe's training data.

    Args:
        recipe: what is trained.
        rows: of a data set that is not known here; its rows are taken to be as long as the recipe allows.

    Raises:
        UserError: the data set is not known, not here, and nobody said how large it is.
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
        return _full(recipe, steps * recipe.global_batch_size, f"{steps} steps, as the recipe says")
    if rows is None:
        names = ", ".join(source.id for source in mixture.datasets)
        raise UserError(
            f"how many rows {names} has is not known here", hint="say it with `--rows N`, or set `max_steps`"
        )
    return _full(recipe, rows, f"{rows} rows, as you said")


def _full(recipe: Recipe, rows: int, said: str) -> Workload:
    longest = int(recipe.trainer_args.get("max_length") or 1024)
    sequences = 2 if recipe.method == "dpo" else 1
    return Workload(
        rows=rows,
        tokens=sequences * longest,
        spread=0.0,
        source=f"{said}, each of them taken to fill `max_length` {longest}",
    )


def _count(sources: Sequence[DataSource]) -> tuple[int, int] | None:
    """Rows and bytes of JSON-lines files on this machine; None if any is something else."""
    paths = [path for source in sources for path in _files(Path(source.id))]
    if not paths or any(path.suffix != ".jsonl" for path in paths):
        return None
    return sum(map(_lines, paths)), sum(path.stat().st_size for path in paths)


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return sorted(each for each in path.iterdir() if each.is_file())
    return [path]


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(READ_BYTES), b""))
