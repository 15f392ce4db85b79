"""The keys of a run's bucket are spelled in one module, and their spelling is fixed by the buckets that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.bucket import layout
from trainer.errors import BucketError, ExitCode

ROOT = Path(__file__).resolve().parents[2]
KEY = re.compile(
    r"^(run\.json|aeolus\.json|\.parts/?)$"
    r"|^(attempts|events|checkpoints|commits|final|reports|reference)/"
    r"|(?<!>)(?<!RUN)/(final|reference)/?$|/final/|commits/final\.json|step-0|/\.parts"
)
"""Messages may show the form of an address: `/<run id>/final`, `s3://BUCKET/runs/RUN/final`."""
HOMES = {"trainer/bucket/layout.py", "trainer/staged.py"}
"""`trainer.staged` names the file of a checkpoint that identifies it: the worker writes it, and imports no bucket."""
FILES = sorted(path for package in ("launcher", "trainer") for path in (ROOT / package).rglob("*.py"))


def literals(tree: ast.AST) -> Iterator[str]:
    """Every string in the code, without docstrings and the strings that document constants."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_no_other_module_spells_a_key() -> None:
    """A key that stands in two modules drifts: each reader and writer asks `trainer.bucket.layout`."""
    found = [
        (path.relative_to(ROOT).as_posix(), text)
        for path in FILES
        if path.relative_to(ROOT).as_posix() not in HOMES
        for text in literals(ast.parse(path.read_text()))
        if KEY.search(text)
    ]
    assert not found


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (layout.attempt_key(3), "attempts/0003.json"),
        (layout.events_key(3), "events/0003.jsonl"),
        (layout.step_prefix(100), "checkpoints/step-00000100/"),
        (layout.upload_prefix(100, 3), "checkpoints/step-00000100/0003/"),
        (layout.node_part_key(100, 3, 1), "checkpoints/step-00000100/0003/.parts/0001.json"),
        (layout.commit_key(100), "commits/step-00000100.json"),
        (layout.FINAL_COMMIT_KEY, "commits/final.json"),
        (layout.MODEL_CARD_KEY, "final/README.md"),
        (layout.final_uri("s3://bucket/runs/mine/"), "s3://bucket/runs/mine/final"),
        (layout.reference_uri("s3://bucket/runs/"), "s3://bucket/runs/reference"),
        (layout.reference_prefix("print", "mine"), "print/mine/"),
        (layout.reference_manifest_key("print", "mine"), "print/mine.json"),
    ],
)
def test_keys_are_those_of_the_buckets_that_exist(key: str, expected: str) -> None:
    """A release must find what an earlier release wrote."""
    assert key == expected


def test_keys_are_read_back() -> None:
    """Each pattern finds in a key the numbers that made it."""
    assert layout.claimed_attempt(layout.attempt_key(3)) == 3
    assert layout.events_attempt(layout.events_key(3)) == 3
    assert layout.upload_of(layout.upload_prefix(100, 3) + "model.safetensors") == (100, 3)
    assert layout.node_part_of(layout.node_part_key(100, 3, 1)) == (100, 3, 1)
    assert layout.committed_step(layout.commit_key(100)) == 100
    assert layout.run_of_final("s3://bucket/runs/mine/final/") == "s3://bucket/runs/mine"
    assert layout.reference_owner("print/mine.json") == ("print", "mine")
    assert layout.reference_owner("print/mine/0001-000000007/rows.npz") == ("print", "mine")


@pytest.mark.parametrize(
    "key", ["run.json", "attempts/x.json", "events/0003.json", "commits/final.json", "final/a"]
)
def test_other_keys_are_recognised_as_such(key: str) -> None:
    """A listing may hold anything, so each pattern must refuse what is not its own."""
    patterns = (
        layout.claimed_attempt,
        layout.events_attempt,
        layout.upload_of,
        layout.node_part_of,
        layout.committed_step,
    )
    assert [pattern(key) for pattern in patterns] == [None] * len(patterns)
    assert layout.run_of_final("s3://bucket/runs/mine") is None


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", ".x", "a b", "x" * 101, "x\n", "reference"])
def test_a_name_that_no_new_run_can_have_is_refused(name: str) -> None:
    """A run's name is part of paths, of addresses and of jobs' names."""
    with pytest.raises(BucketError, match="cannot name a run") as caught:
        layout.checked_run_id(name, new=True)
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("run_id", ["-x", ".x", "x" * 200, "a.1_x-2"])
def test_runs_that_exist_keep_their_ids(run_id: str) -> None:
    """The rules for new names must not hide a run that is in a bucket already."""
    assert layout.checked_run_id(run_id) == run_id


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "x" * 201, "reference"])
def test_an_id_that_no_run_can_have_is_refused(run_id: str) -> None:
    """An id that cannot be part of a key is refused before anything is written."""
    with pytest.raises(BucketError, match="cannot name a run"):
        layout.checked_run_id(run_id)
