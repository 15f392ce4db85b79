"""Make the plan for a recipe: look up its architecture, its data and the prices, then rank the offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from launcher.plan.rank import Plan, PlanRequest, Rejected, plan
from launcher.prices.load import load_prices
from launcher.prices.offer import Prices
from trainer.architecture.lookup import find_architecture
from trainer.bucket import open_file
from trainer.errors import DataError, NoFit, UserError
from trainer.estimate import Workload, counted_workload, full_workload, known_workload
from trainer.recipe import DataSource, Recipe

MAX_REJECTIONS = 6
"""Rejections that the error message lists."""
READ_BYTES = 2**20
COUNTED_BYTES = 2**26
"""Bytes of a bucket's data file that are read to count its rows; a plan must not wait for gigabytes."""
LoadPrices = Callable[..., Prices]
"""The type of `launcher.prices.load.load_prices` and of its stand-ins."""


def make_plan(  # noqa: PLR0913 (what a plan depends on)
    recipe: Recipe,
    request: PlanRequest,
    *,
    infra: Sequence[str],
    now: datetime,
    rows: int | None = None,
    refresh: bool = False,
    prices: LoadPrices = load_prices,
) -> Plan:
    """Return the plan for a recipe, with the architecture, the data and the prices looked up."""
    found = prices(now=now, infra=infra, refresh=refresh)
    workload = find_workload(recipe, rows=rows)
    return plan(recipe, find_architecture(recipe), found, workload, request)


def no_fit_error(found: Plan) -> NoFit:
    """Return the error for a plan without a choice: its first rejections, and a hint taken from them."""
    lines = [f"\n  {rejection.what}: {rejection.why}" for rejection in found.rejected[:MAX_REJECTIONS]]
    more = len(found.rejected) - MAX_REJECTIONS
    rest = f"\n  and {more} more: `launcher plan --all`" if more > 0 else ""
    return NoFit(f"{found.recipe}: {found.why}{''.join(lines)}{rest}", hint=suggest(found.rejected))


def suggest(rejected: Sequence[Rejected]) -> str:
    """Return the most frequent hint of the rejections; options that only a limit rejects count first."""
    near = [rejection for rejection in rejected if rejection.fits] or rejected
    hints = [rejection.way_out for rejection in near if rejection.way_out]
    return max(hints, key=hints.count) if hints else "name other GPUs with `--gpus`"


def find_workload(recipe: Recipe, *, rows: int | None = None) -> Workload:
    """Return the rows and tokens of a recipe's training data.

    They are known for some data sets, counted in JSON-lines files, or follow from `max_steps`.

    Args:
        recipe: the recipe.
        rows: the number of rows as the user gave it; every row then counts as long as the recipe allows.

    Raises:
        UserError: the size of the data set is unknown, and the user gave no number.
        BucketError, Unavailable: the data is in a bucket that cannot be read.
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
        return full_workload(recipe, steps * recipe.global_batch_size, f"{steps} steps, from the recipe")
    if rows is None:
        names = ", ".join(source.id for source in mixture.datasets)
        raise UserError(
            f"the number of rows of {names} is unknown", hint="pass it with `--rows N`, or set `max_steps`"
        )
    return full_workload(recipe, rows, f"{rows} rows, from --rows")


def _count(sources: Sequence[DataSource]) -> tuple[int, int] | None:
    """Return rows and bytes of JSON-lines files on this machine and in buckets; None if any file is another kind."""
    names = [name for source in sources for name in _files(source.id)]
    if not names or any(not name.endswith(".jsonl") for name in names):
        return None
    counted = [_count_in_bucket(name) if "://" in name else _count_local(Path(name)) for name in names]
    return sum(rows for rows, _ in counted), sum(size for _, size in counted)


def _files(name: str) -> Iterable[str]:
    if "://" not in name and Path(name).is_dir():
        return sorted(str(path) for path in Path(name).iterdir() if path.is_file())
    return [name]


def _count_in_bucket(uri: str) -> tuple[int, int]:
    """Return rows and bytes of a file in a bucket; the rows of a large file are extrapolated from its beginning."""
    bucket, key = open_file(uri)
    if (size := bucket.size(key)) is None:
        raise DataError(f"{uri} does not exist", hint="check its spelling")
    rows = read = 0
    for piece in bucket.read(key):
        rows, read = rows + bytes(piece).count(b"\n"), read + len(piece)
        if read >= COUNTED_BYTES:
            break
    return round(rows * size / max(read, 1)), size


def _count_local(path: Path) -> tuple[int, int]:
    if not path.is_file():
        return 0, 0
    with path.open("rb") as file:
        rows = sum(piece.count(b"\n") for piece in iter(lambda: file.read(READ_BYTES), b""))
    return rows, path.stat().st_size
