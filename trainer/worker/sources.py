"""Reads rows from files, folders, the Hub or the generator; mixes, splits and cuts them as the recipe requests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from trainer.errors import DataError, Unavailable
from trainer.recipe import DataSource, Mixture, Recipe
from trainer.worker import synthetic, ultrafeedback
from trainer.worker.failures import out_of_reach

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")


class Mixed(Sequence[Row]):
    """Rows of several sources in one order. Each row is read on access, so a Hub data set stays on disk."""

    def __init__(self, parts: Sequence[Sequence[Row]], order: Sequence[tuple[int, int]]) -> None:
        self._parts = parts
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Mixed: ...
    def __getitem__(self, index: int | slice) -> Row | Mixed:
        if isinstance(index, slice):
            return Mixed(self._parts, self._order[index])
        part, row = self._order[index]
        return self._parts[part][row]

    def __iter__(self) -> Iterator[Row]:
        return (self._parts[part][row] for part, row in self._order)


class Renamed(Sequence[Row]):
    """Rows with a selection of their columns, renamed as `columns` of the recipe requests."""

    def __init__(self, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
        self._rows = rows
        self._columns = columns

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Renamed: ...
    def __getitem__(self, index: int | slice) -> Row | Renamed:
        if isinstance(index, slice):
            return Renamed(self._rows[index], self._columns)
        row = self._rows[index]
        return {new: row[old] for old, new in self._columns.items()}


class DatasetRows(NamedTuple):
    """The rows of both splits."""

    train: Mixed
    test: Mixed


def read(recipe: Recipe) -> DatasetRows:
    """Return the recipe's rows, in the order that its seeds define.

    Raises:
        DataError: a source is missing, unreadable or empty.
        Unavailable: the Hub does not answer.
    """
    mixture = recipe.dataset_mixture
    train = _mix(mixture.datasets, mixture.seed)
    test = _mix(mixture.test_datasets, mixture.seed)
    if mixture.test_split_size:
        train, test = _split(train, mixture)
    return DatasetRows(train[: recipe.max_train_samples], test[: recipe.max_test_samples])


def _mix(sources: Sequence[DataSource], seed: int) -> Mixed:
    parts = [_read(source, seed) for source in sources]
    order = [
        (number, row)
        for number, (source, part) in enumerate(zip(sources, parts, strict=True))
        for row in _portion(len(part), source, seed)
    ]
    if len(parts) > 1:
        random.Random(seed).shuffle(order)
    return Mixed(parts, order)


def _portion(count: int, source: DataSource, seed: int) -> Sequence[int]:
    """Return the rows of a source that are used: all, or a share of `weight` chosen by the seed.

    The choice depends on the file's name, not on its path, because another machine may have it in another folder.
    """
    if source.weight >= 1:
        return range(count)
    chosen = random.Random(f"{seed}/{Path(source.id).name}/{source.split}").sample(
        range(count), int(count * source.weight)
    )
    return sorted(chosen)


def _split(rows: Mixed, mixture: Mixture) -> tuple[Mixed, Mixed]:
    """Reserve `test_split_size` rows, or that share of the rows, for the test set."""
    size = mixture.test_split_size or 0
    held = size if isinstance(size, int) else int(len(rows) * size)
    if not 0 < held < len(rows):
        raise DataError(
            f"test_split_size={size} leaves no training rows or no test rows: the data have {len(rows)} rows"
        )
    order = random.Random(mixture.seed).sample(range(len(rows)), len(rows))
    return Mixed([rows], [(0, row) for row in order[held:]]), Mixed(
        [rows], [(0, row) for row in order[:held]]
    )


def _read(source: DataSource, seed: int) -> Sequence[Row]:
    rows = _raw(source)
    if not rows:
        raise DataError(f"{source.id} ({source.split}) has no rows")
    if source.binarise:
        rows = ultrafeedback.binarise(rows, name=f"{source.id} ({source.split})", seed=seed)
    if missing := [name for name in source.columns if name not in rows[0]]:
        raise DataError(
            f"{source.id} has no column {missing[0]}, which `columns` names; it has {', '.join(sorted(rows[0]))}"
        )
    return Renamed(rows, source.columns) if source.columns else rows


def _raw(source: DataSource) -> Sequence[Row]:
    if generate := synthetic.DATA.get(source.id):
        return generate(source.split)
    path = Path(source.id).expanduser()
    if path.is_dir():
        return [row for file in _files(path, source.split) for row in _read_file(file)]
    if path.is_file():
        return _read_file(path)
    if path.suffix in SUFFIXES or path.is_absolute():
        raise DataError(
            f"there is no file {path}", hint="paths are relative to the folder the run is started in"
        )
    return _read_hub(source)


def _files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder; only those with the split in their names, if there are any."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    named = [path for path in files if split in path.stem]
    if named or (files and split == "train"):
        return named or files
    raise DataError(
        f"{folder} has no {'/'.join(SUFFIXES)} file for split {split}", hint="name the file itself"
    )


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is not a data file", hint=f"known are {', '.join(SUFFIXES)}")
    if _is_array(path):
        return _parse_array(path, path.read_text())
    with path.open() as lines:  # line by line, because each rank holds all rows in memory already
        return _parse_lines(path, lines)


def _is_array(path: Path) -> bool:
    """Return whether the first character that is not a space opens a JSON array."""
    with path.open() as file:
        return next((line.lstrip() for line in file if line.strip()), "").startswith("[")


def _parse_lines(path: Path, lines: Iterable[str]) -> list[Row]:
    # Lines end at newlines only. str.splitlines() would also split at characters that JSON strings may hold, like U+2028.
    return [
        _row(path, number, _parse(path, line, first_line=number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parse_array(path: Path, text: str) -> list[Row]:
    return [
        _row(path, number, value) for number, value in enumerate(_parse(path, text, first_line=1), start=1)
    ]


def _parse(path: Path, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from error


def _row(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {number}: a {type(value).__name__}, not an object with columns")
    return value


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return rows


def _read_hub(source: DataSource) -> Sequence[Row]:
    import datasets
    import httpx

    try:
        rows: Sequence[Row] = datasets.load_dataset(
            source.id, source.config, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        kind = Unavailable if out_of_reach(error) else DataError
        raise kind(
            f"data set {source.id} (config {source.config}, split {source.split}) cannot be loaded: {error}",
            hint="it is neither a local file nor a data set of the Hub that this machine can reach; a gated one needs $HF_TOKEN",
        ) from error
    return rows
