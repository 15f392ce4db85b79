"""`key=value` words on a command line are parsed as YAML, override the file, and are checked like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.recipe import Recipe, load
from trainer.recipe.yaml_file import parse, set_dotted

FILE = """
method: sft
init: tiny
dataset_mixture:
  datasets:
  - id: org/one
  - id: org/two
    weight: 0.5
  test_datasets: [org/three]
global_batch_size: 8
learning_rate: 1e-3
"""
IMPORTED = """
method: sft
model_name_or_path: org/model
model_revision: v2
dataset_mixer: {org/one: 1.0}
dataset_splits: [train_sft, test_sft]
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    path = tmp_path / "imported.yaml"
    path.write_text(IMPORTED)
    return path


def of_file(path: Path, *overrides: str) -> Recipe:
    return load(path, overrides).recipe


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["learning_rate=2e-5"], "learning_rate", 2e-5),
        (["learning_rate=1", "learning_rate=2e-4"], "learning_rate", 2e-4),
        (["report_to=[wandb, tensorboard]"], "report_to", ["wandb", "tensorboard"]),
        (["max_length=null"], "max_length", None),
        (["max_length="], "max_length", None),
        (["run_name=a=b"], "run_name", "a=b"),
        (
            ["lr_scheduler_kwargs.min_lr=1e-6", "lr_scheduler_kwargs.x=2"],
            "lr_scheduler_kwargs",
            {"min_lr": 1e-6, "x": 2},
        ),
        (["warmup_ratio=0.1"], "warmup_steps", 0.1),
    ],
)
def test_an_override_wins_over_the_file(file: Path, words: list[str], key: str, value: Any) -> None:
    """The value is YAML, a later word overrides an earlier one, and old key names are translated."""
    assert of_file(file, *words).trainer_args[key] == value


def test_an_unknown_override_names_the_command_line(file: Path) -> None:
    """The message names the command line, not the file."""
    with pytest.raises(RecipeError) as caught:
        load(file, ["learning_rte=2e-5"])
    assert caught.value.message == "command line: unknown key `learning_rte` (value 2e-5)"
    assert caught.value.hint == "did you mean `learning_rate`?"


@pytest.mark.parametrize("word", ["learning_rate", "=3", "--learning_rate=3", "lr_scheduler_kwargs={a"])
def test_a_malformed_word_is_refused(file: Path, word: str) -> None:
    """A word without a key, a value or valid YAML is an error."""
    with pytest.raises(RecipeError, match="command line"):
        load(file, [word])


def test_a_wrong_type_names_the_command_line(file: Path) -> None:
    """A value on the command line is checked like one in a file."""
    with pytest.raises(RecipeError, match="command line: `max_steps: many` must be a whole number"):
        load(file, ["max_steps=many"])


def test_dotted_keys_reach_into_mappings_and_lists(file: Path) -> None:
    """A dotted key changes one number of the tiny model or of a data source."""
    recipe = of_file(
        file, "tiny.hidden_size=64", "dataset_mixture.seed=1", "dataset_mixture.datasets.1.weight=0.25"
    )
    assert recipe.tiny.hidden_size == 64
    assert recipe.dataset_mixture.seed == 1
    assert [data.weight for data in recipe.dataset_mixture.datasets] == [1.0, 0.25]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tiny.hidden_sise=64", "did you mean `hidden_size`"),
        ("dataset_mixture.datasets.2.weight=1", "indices 0 to 1"),
        ("dataset_mixture.datasets.one.weight=1", "indices 0 to 1"),
        ("learning_rate.x=1", "`learning_rate` has no keys below it"),
        ("learning_rte.x=1", "unknown key `learning_rte`"),
        ("dataset_mixture.sede=1", "its keys are `datasets`, `test_datasets`"),
    ],
)
def test_a_dotted_key_that_leads_nowhere_is_refused(file: Path, word: str, message: str) -> None:
    """A dotted key never creates an unknown key or list entry."""
    with pytest.raises(RecipeError) as caught:
        load(file, [word])
    assert message in str(caught.value)


def test_a_dotted_key_creates_a_missing_mapping() -> None:
    """`lr_scheduler_kwargs.min_lr=…` works without `lr_scheduler_kwargs:` in the file."""
    keys: dict[str, Any] = {"a": None}
    set_dotted(keys, ("a", "b"), 1)
    set_dotted(keys, ("c", "d"), 2)
    assert keys == {"a": {"b": 1}, "c": {"d": 2}}


def test_a_model_overrides_the_tiny_one(file: Path) -> None:
    """A model on the command line overrides `init: tiny` of the file, with a note."""
    recipe, notes = load(file, ["model_name_or_path=org/model"])
    assert (recipe.model_name_or_path, recipe.init) == ("org/model", None)
    assert "`model_name_or_path: org/model` on the command line overrides `init: tiny`" in notes


def test_the_tiny_model_overrides_a_given_one(imported: Path) -> None:
    """`init=tiny` removes the file's model and its revision, so every recipe can be tried out."""
    recipe = of_file(imported, "init=tiny")
    assert (recipe.model_name_or_path, recipe.init) == (None, "tiny")
    assert "model_revision" not in recipe.model_args


@pytest.mark.parametrize(
    "word",
    [
        "dataset_mixture=org/new",
        "dataset_mixer={org/new: 1.0}",
        "dataset_name=org/new",
        "datasets=[{path: org/new}]",
    ],
)
def test_data_on_the_command_line_override_the_files(file: Path, imported: Path, word: str) -> None:
    """New data replace all data keys of the file, also its splits and test data."""
    for path in (file, imported):
        mixture = of_file(path, word).dataset_mixture
        assert [data.id for data in mixture.datasets] == ["org/new"]
        assert {data.id for data in mixture.test_datasets} <= {"org/new"}
        assert mixture.datasets[0].split == "train"


def test_test_data_can_be_given_alone(file: Path) -> None:
    """`test_dataset=` replaces only the file's test data. The default split is `test`."""
    mixture = of_file(file, "test_dataset=org/exam").dataset_mixture
    assert len(mixture.datasets) == 2
    assert [(data.id, data.split) for data in mixture.test_datasets] == [("org/exam", "test")]


@pytest.mark.parametrize(
    ("word", "ids"),
    [
        ("dataset_mixture.test_datasets=[org/exam]", ["org/exam"]),
        ("dataset_mixture.test_datasets.0.id=org/exam", ["org/exam"]),
        ("dataset_mixture.test_datasets=org/exam", ["org/exam"]),
        ("dataset_mixture.test_datasets=null", []),
    ],
)
def test_a_dotted_key_takes_data_in_short(file: Path, word: str, ids: list[str]) -> None:
    """Below a dotted key, data may have the same short forms as in a file."""
    assert [data.id for data in of_file(file, word).dataset_mixture.test_datasets] == ids


def test_the_splits_of_one_data_set_can_be_named(file: Path) -> None:
    """The arguments of TRL's scripts are translated, with any names of splits."""
    mixture = of_file(
        file, "dataset_name=org/new", "dataset_train_split=a", "dataset_test_split=b"
    ).dataset_mixture
    assert [data.split for data in mixture.datasets] == ["a"]
    assert [data.split for data in mixture.test_datasets] == ["b"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset_mixture=5", "names no data"),
        ("dataset_mixture=[]", "names no data"),
        ("dataset_mixture={datasets: null}", "names no data"),
        ("dataset_mixture={datasets: [{config: x}]}", "has no `id`"),
        ("dataset_mixture={datasets: [[a]]}", "is not a mapping"),
        ("dataset_mixture={datasets: [{id: a/b, weigth: 1}]}", "did you mean `weight`"),
        ("dataset_mixture={datasets: [{id: a/b, fraction: 0.5}]}", "use `weight`"),
        ("dataset_mixture={datasets: [{id: a/b}], seeds: 1}", "unknown key `dataset_mixture.seeds`"),
        ("dataset_mixture={datasets: [{id: a/b}], streaming: true}", "needs the whole data set"),
        ("dataset_mixture={a/b: 2.0}", "less than or equal to 1"),
        ("dataset_name=3", "has no `id`"),
        ("test_dataset=[{split: x}]", "has no `id`"),
        ("dataset_splits=[test_a]", "no split to train on"),
        ("dataset_splits=3", "not a list of splits"),
        ("dataset_configs=[a]", "each of the 2 data sets"),
    ],
)
def test_data_in_no_known_form_is_refused(file: Path, word: str, message: str) -> None:
    """The message shows the value and where it was set."""
    with pytest.raises(RecipeError) as caught:
        load(file, [word])
    assert message in str(caught.value)
    assert caught.value.message.startswith(("command line: ", f"{file}: `dataset_", f"{file}: `test_"))


def test_a_local_test_file_has_no_splits(file: Path, tmp_path: Path) -> None:
    """A single file is used whole."""
    (tmp_path / "exam.jsonl").write_text("{}\n")
    [exam] = of_file(file, f"test_dataset={tmp_path}/exam.jsonl").dataset_mixture.test_datasets
    assert (exam.id, exam.split) == (str(tmp_path / "exam.jsonl"), "train")


def test_a_path_on_the_command_line_is_from_the_current_folder(
    file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typed path is relative to the current folder, even if the recipe's folder has a file of the same name."""
    here = tmp_path_factory.mktemp("here")
    for folder in (here, tmp_path):
        (folder / "chat.jsonl").write_text("{}\n")
    monkeypatch.chdir(here)
    assert of_file(file, "dataset_mixture=chat.jsonl").dataset_mixture.datasets[0].id == str(
        here / "chat.jsonl"
    )


def test_a_global_batch_overrides_an_imported_one(imported: Path) -> None:
    """The product of the imported keys is replaced, and a note names them."""
    assert of_file(imported).global_batch_size == 4 * 2 * 8
    recipe, notes = load(imported, ["global_batch_size=16"])
    assert recipe.global_batch_size == 16
    assert any(
        "`global_batch_size: 16` on the command line overrides `gradient_accumulation_steps: 2`" in note
        for note in notes
    )


def test_a_per_device_batch_over_a_global_one_is_refused(file: Path) -> None:
    """A recipe does not know the number of devices, so it cannot have both keys."""
    with pytest.raises(RecipeError, match="drop `per_device_train_batch_size`"):
        load(file, ["per_device_train_batch_size=4"])


def test_plain_and_dotted_words_are_parsed_apart() -> None:
    """Plain and dotted keys are applied at different times."""
    assert parse(["a=1", "b.c=x"]) == ({"a": 1}, {("b", "c"): "x"})
