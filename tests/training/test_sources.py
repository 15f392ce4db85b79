"""Rows from files, mixtures and splits; faults are told with the file and the line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import DataError
from trainer.recipe import Recipe
from trainer.worker import sources
from trainer.worker.sources import read


def recipe(*datasets: dict[str, Any], **mixture: Any) -> Recipe:
    limits = {key: mixture.pop(key) for key in ("max_train_samples", "max_test_samples") if key in mixture}
    return Recipe(
        name="test",
        method="sft",
        init="tiny",
        global_batch_size=1,
        dataset_mixture={"datasets": datasets, **mixture},
        **limits,
    )


def write(path: Path, names: str) -> str:
    path.write_text("".join(json.dumps({"name": name}) + "\n" for name in names))
    return str(path)


def names(rows: Any) -> str:
    return "".join(row["name"] for row in rows)


def test_lines_keep_their_order(tmp_path: Path) -> None:
    """One source alone is read as it stands, blank lines and odd separators inside texts included."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a\u2028b"}\n\n{"name": "c"}\n')
    assert [row["name"] for row in read(recipe({"id": str(path)})).train] == ["a\u2028b", "c"]


def test_an_array_and_parquet_are_read_like_lines(tmp_path: Path) -> None:
    """The three kinds of files give the same rows."""
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "rows.json").write_text('[{"name": "a"}, {"name": "b"}]')
    parquet.write_table(pa.table({"name": ["a", "b"]}), tmp_path / "rows.parquet")
    for file in ("rows.json", "rows.parquet"):
        assert names(read(recipe({"id": str(tmp_path / file)})).train) == "ab"


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Every rank reads them: beside its rows, the file's text and a copy of it in lines would be the host's memory."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 10_000}) + "\n" for _ in range(500)))
    tracemalloc.start()
    try:
        rows = sources._read_file(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 500
    assert most - kept < path.stat().st_size / 4


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    """Files named after the split are taken, and a split that no file is named after is refused."""
    write(tmp_path / "train.jsonl", "ab")
    write(tmp_path / "test.jsonl", "c")
    assert names(read(recipe({"id": str(tmp_path)})).train) == "ab"
    assert names(read(recipe({"id": str(tmp_path), "split": "test"})).train) == "c"
    with pytest.raises(DataError, match="for split validation"):
        read(recipe({"id": str(tmp_path), "split": "validation"}))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    """The message leads to the character."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a"}\n\n{"name": }\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not JSON"):
        read(recipe({"id": str(path)}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "\n", "has no rows"),
        ("rows.jsonl", "3\n", "row 1: a int"),
        ("rows.parquet", "x", "as Parquet"),
    ],
)
def test_what_holds_no_rows_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    """An empty or broken file never becomes an empty training."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(recipe({"id": str(tmp_path / name)}))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    """A path that looks like a file is one."""
    with pytest.raises(DataError, match="there is no file"):
        read(recipe({"id": str(tmp_path / "rows.jsonl")}))


def test_columns_are_renamed_and_the_rest_left_out(tmp_path: Path) -> None:
    """`columns` maps the data's names to ours; a name that the data do not have is refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"chosen": [1], "messages": [2], "score": 3}\n')
    rows = read(recipe({"id": str(path), "columns": {"chosen": "messages"}})).train
    assert list(rows) == [{"messages": [1]}]
    with pytest.raises(DataError, match="no column text"):
        read(recipe({"id": str(path), "columns": {"text": "messages"}}))


def test_a_mixture_takes_its_portions_by_its_seed(tmp_path: Path) -> None:
    """Weights take that share of a source, sources are shuffled together, and the seed decides how."""
    one, two = write(tmp_path / "1.jsonl", "abcdefghij"), write(tmp_path / "2.jsonl", "0123456789")
    sources = ({"id": one, "weight": 0.3}, {"id": two})
    mixed = names(read(recipe(*sources)).train)
    assert mixed == names(read(recipe(*sources)).train)
    assert mixed != names(read(recipe(*sources, seed=1)).train)
    assert sum(name.isalpha() for name in mixed) == 3
    assert sorted(name for name in mixed if name.isdigit()) == list("0123456789")
    assert [name for name in mixed if name.isdigit()] != list("0123456789")


def test_a_test_split_is_held_back(tmp_path: Path) -> None:
    """No row is in both parts, and none is lost."""
    path = write(tmp_path / "rows.jsonl", "abcdefghij")
    for size, count in ((2, 2), (0.3, 3)):
        rows = read(recipe({"id": path}, test_split_size=size))
        assert len(rows.test) == count
        assert sorted(names(rows.train) + names(rows.test)) == list("abcdefghij")
    with pytest.raises(DataError, match="leaves no training rows or no test rows"):
        read(recipe({"id": path}, test_split_size=10))


def test_samples_are_limited(tmp_path: Path) -> None:
    """`max_train_samples` and `max_test_samples` take the first rows."""
    train, test = write(tmp_path / "train.jsonl", "abcd"), write(tmp_path / "test.jsonl", "efgh")
    rows = read(recipe({"id": train}, test_datasets=[{"id": test}], max_train_samples=3, max_test_samples=2))
    assert (names(rows.train), names(rows.test)) == ("abc", "ef")
