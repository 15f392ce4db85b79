"""The table of training methods: every row is complete, and no other file branches on a method's name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from trainer.method import METHODS, RowForm, TrainingMethod
from trainer.recipe import DataSource, Mixture, Recipe, fields

ROOT = Path(__file__).resolve().parents[2]
BRANCH = re.compile(r"""[!=]= ?["'](sft|dpo)["']""")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_row_is_complete(method: TrainingMethod) -> None:
    """The config class is described in `fields.json`, and the worker module has a function `train`."""
    assert "learning_rate" in fields.of(method.name)
    source = ROOT / (method.worker.replace(".", "/") + ".py")
    functions = {
        node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert "train" in functions
    assert set(method.recipe_keys) <= set(Recipe.model_fields)
    assert method.row_forms


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_default_length_is_that_of_the_config_class(method: TrainingMethod) -> None:
    """Predictions and training use the same default as the pinned TRL."""
    assert method.max_length == fields.of(method.name)["max_length"].default


def test_needed_columns_are_readable_text() -> None:
    """Messages list the forms of rows that a method can train on."""
    assert METHODS["sft"].needed_columns == "`messages`, or `prompt` and `completion`"
    assert str(RowForm(("a", "b", "c"), note="text")) == "`a`, `b` and `c` (text)"


def test_an_unknown_method_is_refused() -> None:
    """A `run.json` of a newer release may name a method that this release does not have."""
    with pytest.raises(ValueError, match="must be one of sft, dpo"):
        Recipe(
            name="a",
            method="grpo",
            init="tiny",
            dataset_mixture=Mixture(datasets=(DataSource(id="org/data"),)),
            global_batch_size=1,
        )


def test_no_file_branches_on_a_method_s_name() -> None:
    """A new method needs a row in the table, so no other file may decide by name."""
    files = [path for part in ("trainer", "launcher") for path in (ROOT / part).rglob("*.py")]
    found = [f"{path.name}: {match[0]}" for path in files for match in BRANCH.finditer(path.read_text())]
    assert found == ['dpo.py: == "sft"']  # TRL's DPO has a loss type of that name
