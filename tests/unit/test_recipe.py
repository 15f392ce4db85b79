"""Recipes: how a file is read, which errors it gives, and which recipes have the same digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError, ModelError, RecipeError
from trainer.recipe import Recipe, default_run_id, load, names
from trainer.recipe.model import DataSource, Mixture, TinyModel

LEAST = {"method": "sft", "init": "tiny", "dataset_mixture": "generated:chats", "global_batch_size": 8}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes a minimal recipe with more keys. A key that is None is left out."""

    def write_recipe(**keys: Any) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in (LEAST | keys).items() if value is not None})
        )
        return path

    return write_recipe


def recipe(**keys: Any) -> Recipe:
    data = Mixture(datasets=(DataSource(id="org/data"),))
    least: dict[str, Any] = {"name": "a", "method": "sft", "init": "tiny", "dataset_mixture": data}
    return Recipe(**least | {"global_batch_size": 8} | keys)


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads(name: str) -> None:
    """A shipped recipe is found by its name and needs no translation."""
    loaded = load(name)
    assert loaded.recipe.name == name
    assert not [note for note in loaded.notes if "ignored" in note or "now" in note]


def test_changing_defaults_are_written_out(write: Any) -> None:
    """The recipe states defaults that changed between releases, so that a new release cannot change a run."""
    loaded = load(write()).recipe
    assert {key: loaded.trainer_args[key] for key in ("seed", "learning_rate", "num_train_epochs", "optim")} == {
        "seed": 42, "learning_rate": 2e-5, "num_train_epochs": 3.0, "optim": "adamw_torch_fused",
    }  # fmt: skip
    assert loaded.model_args == {"dtype": "float32"}
    assert (loaded.trainer_args["save_steps"], loaded.keep_checkpoints) == (50, 2)


def test_an_unknown_key_is_named_with_its_value_and_the_nearest(write: Any) -> None:
    """A misspelt key is an error. TRL's own scripts drop it silently."""
    path = write(learning_rte=2e-5)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.message == f"{path}: unknown key `learning_rte` (value 2e-05)"
    assert caught.value.hint == "did you mean `learning_rate`?"


def test_all_unknown_keys_are_in_one_message(write: Any) -> None:
    """One error names every unknown key."""
    with pytest.raises(RecipeError) as caught:
        load(write(learning_rte=1, sede=3, qqqqqqqq=True), ["wormup_steps=5"])
    assert [word in str(caught.value) for word in ("learning_rte", "sede", "qqqqqqqq", "command line")] == [
        True
    ] * 4
    assert "`wormup_steps`: did you mean `warmup_steps`?" in str(caught.value)


def test_a_renamed_key_misspelt_leads_to_its_name(write: Any) -> None:
    """The suggestion may be an old name."""
    with pytest.raises(RecipeError, match="did you mean `evaluation_strategy`"):
        load(write(evaluation_stratgy="steps"))


def test_a_key_of_another_method_is_named_as_such(write: Any) -> None:
    """`beta` is a key of DPO, so SFT refuses it with a hint."""
    with pytest.raises(RecipeError, match="it is a key of dpo, and this recipe is sft"):
        load(write(beta=0.1))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "fast", "must be a number"),
        ("max_steps", 1.5, "must be a whole number"),
        ("bf16", "yes please", "must be `true` or `false`"),
        ("bf16", 1, "must be `true` or `false`"),
        ("max_steps", True, "must be a whole number"),
        ("lr_scheduler_type", "cosin", "did you mean `cosine`"),
        ("run_name", 7, "must be text; write it in quotes"),
        ("lr_scheduler_kwargs", [1], "must be a mapping"),
        ("lora_target_modules", {"a": 1}, "must be a list, each text"),
        ("max_grad_norm", float("inf"), "must be a number"),
        ("global_batch_size", "many", "must be a whole number"),
        ("global_batch_size", 0, "greater than 0"),
        ("method", "grpo", "must be one of `sft`, `dpo`"),
    ],
)
def test_a_wrong_type_is_an_error_with_the_right_one(write: Any, key: str, value: Any, expected: str) -> None:
    """The message has the file, the key, the value, and what is allowed."""
    path = write(**{key: value})
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert f"`{key}" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("run_name: 2026-11-21", "run_name", "2026-11-21"),
        ("report_to: wandb", "report_to", "wandb"),
        ("label_names: labels", "label_names", ["labels"]),
        ("max_steps: 10.0", "max_steps", 10),
    ],
)
def test_misread_yaml_is_corrected(write: Any, text: str, key: str, value: Any) -> None:
    """PyYAML reads `2e-5` as text, `no` as false, and a date as a date object."""
    path = write()
    path.write_text(path.read_text() + text + "\n")
    read = load(path).recipe.trainer_args[key]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "contains a list"),
        ("a: [1\nb: 2\n", "line 2, column 2"),
        ("seed: 1\nmethod: sft\nseed: 2\n", "line 3, column 1: `seed` is given twice, first in line 1"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_an_error_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    """The message of a syntax error has line and column."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_name_that_does_not_exist_leads_to_the_nearest() -> None:
    """A misspelt recipe name gives a suggestion, with or without the family."""
    with pytest.raises(RecipeError, match="did you mean `zephyr-tiny/dpo`"):
        load("zephyr-tiny/dpoo")
    with pytest.raises(RecipeError, match="did you mean `dpo_full`"):
        load("dpo_ful")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": None}, "neither `model_name_or_path` nor `init`"),
        ({"model_name_or_path": "org/model"}, "both `model_name_or_path` and `init`"),
        ({"load_in_4bit": True}, "add `use_peft: true`"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "has both `load_in_4bit` and"),
        ({"micro_batch_size": 3}, "3 does not divide global_batch_size 8"),
        ({"global_batch_size": None}, "has no `global_batch_size`"),
        ({"per_device_train_batch_size": 4}, "drop `per_device_train_batch_size`"),
        ({"dataset_mixture": None}, "no key names the training data"),
        ({"dataset_name": "org/data"}, "both name the training data"),
        ({"train_sampling_strategy": "group_by_length"}, "depend on the number of GPUs"),
        ({"learning_rate": -1}, "`learning_rate: -1` is below zero"),
        ({"max_length": 0}, "`max_length: 0` leaves no tokens"),
        ({"save_steps": 0}, "`save_steps: 0` would save no checkpoint before the end"),
        ({"num_train_epochs": 0}, "`num_train_epochs: 0` trains nothing"),
        ({"tiny": {"hidden_size": 100, "num_attention_heads": 3}}, "is not a multiple of"),
        ({"tiny": {"hidden_sise": 100}}, "did you mean `hidden_size`"),
        ({"method": "dpo", "max_length": 512, "max_prompt_length": 512}, "leaves no tokens for an answer"),
    ],
)
def test_keys_that_cannot_go_together_are_refused(write: Any, keys: dict[str, Any], message: str) -> None:
    """A recipe that cannot train fails on the laptop, not on the GPUs."""
    with pytest.raises(RecipeError) as caught:
        load(write(**keys))
    assert message in str(caught.value)


def test_without_test_data_evaluation_is_turned_off_with_a_note(write: Any) -> None:
    """If an override removes the test data, the file's `eval_strategy` is ignored."""
    loaded = load(write(eval_strategy="epoch"))
    assert loaded.recipe.trainer_args["eval_strategy"] == "no"
    assert "`eval_strategy: epoch` is ignored: the recipe has no test data" in loaded.notes


def test_local_data_is_found_beside_the_recipe(write: Any, tmp_path: Path) -> None:
    """A path in the file is relative to the file's folder."""
    (tmp_path / "chat.jsonl").write_text("{}\n")
    loaded = load(write(dataset_mixture="chat.jsonl")).recipe
    assert loaded.dataset_mixture.datasets[0].id == str(tmp_path / "chat.jsonl")


def test_local_data_is_found_in_the_current_folder(
    write: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that does not exist beside the recipe is looked up in the current folder."""
    here = tmp_path_factory.mktemp("here")
    (here / "chat.jsonl").write_text("{}\n")
    monkeypatch.chdir(here)
    assert load(write(dataset_mixture="chat.jsonl")).recipe.dataset_mixture.datasets[0].id == str(
        here / "chat.jsonl"
    )


@pytest.mark.parametrize(
    ("key", "error"), [("dataset_mixture", DataError), ("model_name_or_path", ModelError)]
)
@pytest.mark.parametrize("name", ["./none", "~/none-of-it", "/none/of/it", "none.jsonl", "none.GGUF"])
def test_a_missing_path_is_an_error_with_the_folders(
    write: Any, tmp_path: Path, key: str, error: type[Exception], name: str
) -> None:
    """A name that can only be a path is never taken for a Hub id."""
    with pytest.raises(error) as caught:
        load(write(**{"init": None, "model_name_or_path": "org/model", key: name}))
    assert f"{name} does not exist" in str(caught.value)
    assert str(tmp_path) in str(caught.value) or name.startswith(("~", "/"))


@pytest.mark.parametrize(
    "name", ["org/model", "gpt2", "s3://bucket/run/final", "gs://b/r/final", "file:///b/r/final"]
)
def test_hub_ids_and_uris_stay_unchanged(write: Any, name: str) -> None:
    """The node fetches Hub ids and URIs."""
    assert load(write(init=None, model_name_or_path=name)).recipe.model_name_or_path == name


def test_a_local_model_becomes_absolute(write: Any, tmp_path: Path) -> None:
    """The trainer may start in another folder, so local paths become absolute."""
    (tmp_path / "model").mkdir()
    loaded = load(write(init=None, model_name_or_path="model")).recipe
    assert loaded.model_name_or_path == str(tmp_path / "model")


def test_the_digest_ignores_bookkeeping() -> None:
    """More checkpoints, another name or a smaller micro batch do not make another run."""
    plain, other = (
        recipe(),
        recipe(name="b", micro_batch_size=4, max_test_samples=3, trainer_args={"save_steps": 1}),
    )
    assert plain.digest() == other.digest()
    assert plain.differences(other) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "dpo"},
        {"global_batch_size": 16},
        {"tiny": TinyModel(hidden_size=64)},
        {"chat_template": "{{ messages }}"},
        {"max_train_samples": 10},
        {"trainer_args": {"seed": 1}},
        {"model_args": {"use_peft": True}},
        {"dataset_mixture": Mixture(datasets=(DataSource(id="org/data"),), seed=1)},
    ],
    ids=str,
)
def test_the_digest_covers_what_is_trained(keys: dict[str, Any]) -> None:
    """A key that changes the model changes the digest, and `differences` names it."""
    assert recipe().digest() != recipe(**keys).digest()
    assert len(recipe().differences(recipe(**keys))) == 1


def test_the_digest_ignores_the_folder_of_the_data() -> None:
    """A recovery on another cloud has the same file in another home folder."""
    here, there = (
        recipe(dataset_mixture=Mixture(datasets=(DataSource(id=f"{home}/a.jsonl"),))) for home in ("/a", "/b")
    )
    assert here.digest() == there.digest()


def test_differences_have_both_values() -> None:
    """`there` is the recorded value and `here` the current one."""
    there, here = (
        recipe(trainer_args={"learning_rate": 1e-5}),
        recipe(trainer_args={"learning_rate": 2e-5, "seed": 1}),
    )
    assert there.differences(here) == ["learning_rate: 1e-05 there, 2e-05 here", "seed: unset there, 1 here"]


def test_a_whole_number_is_the_same_with_and_without_its_point() -> None:
    """`num_train_epochs: 1` and `1.0` give the same digest."""
    assert (
        recipe(trainer_args={"num_train_epochs": 1}).digest()
        == recipe(trainer_args={"num_train_epochs": 1.0}).digest()
    )


def test_a_default_run_id_differs_between_recipes() -> None:
    """Without `--run-id`, the same recipe resumes the same run, and another recipe starts another one."""
    one, other = recipe(name="zephyr-tiny/dpo"), recipe(name="zephyr-tiny/dpo", global_batch_size=4)
    assert default_run_id(one).startswith("zephyr-tiny-dpo-")
    assert default_run_id(one) != default_run_id(other)


_TEXT = st.text('ab"\\\né ', max_size=4)
_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT
)
_VALUES = _PLAIN | st.lists(_PLAIN, max_size=3) | st.dictionaries(_TEXT, _PLAIN, max_size=3)


@given(
    arguments=st.dictionaries(
        st.sampled_from(["learning_rate", "optim", "lr_scheduler_kwargs", "report_to"]), _VALUES, max_size=6
    )
)
def test_a_recipe_survives_json(arguments: dict[str, Any]) -> None:
    """A recipe is sent to the node as JSON and must stay equal."""
    original = recipe(trainer_args=arguments)
    copied = Recipe.model_validate_json(original.model_dump_json())
    assert copied == original
    assert copied.digest() == original.digest()


FOUR_BITS = {"use_peft": True, "load_in_4bit": True}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"engine": "fsdp2", "offload": "optimizer"},
            "`engine: fsdp2` does not support `offload: optimizer`",
        ),
        ({"engine": "zero2", "offload": "all"}, "`engine: zero2` does not support `offload: all`"),
        ({"engine": "fsdp2", "model_args": FOUR_BITS}, "cannot be sharded"),
    ],
)
def test_an_impossible_engine_is_refused(keys: dict[str, Any], message: str) -> None:
    """No machine could run this combination, so the recipe is refused."""
    with pytest.raises(RecipeError, match=message) as refused:
        recipe(**keys)
    assert "remove" in str(refused.value.hint)


def test_the_engine_is_not_part_of_the_digest(write: Any) -> None:
    """A run may resume with another engine. An unknown engine gives a suggestion."""
    assert recipe(engine="fsdp2").digest() == recipe(engine="zero3").digest() == recipe().digest()
    with pytest.raises(RecipeError, match=r"`engine: fsdp` must be one of .*did you mean `fsdp2`"):
        load(write(engine="fsdp"))


def test_a_list_on_the_command_line_needs_no_brackets(write: Any) -> None:
    """`q_proj,v_proj` is a list of two modules."""
    found = load(write(use_peft=True), ["lora_target_modules=q_proj,v_proj"]).recipe
    assert found.model_args["lora_target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "begins"), [("my project (2)/dpo", "my-project-2-dpo-"), ("-x", "x-"), ("ü", "sft-")]
)
def test_a_default_run_id_is_valid_for_clouds(write: Any, name: str, begins: str) -> None:
    """A recipe's name may have any characters; the run id replaces those that clouds refuse."""
    assert default_run_id(load(write(name=name)).recipe).startswith(begins)


def test_a_data_file_given_as_a_recipe_is_an_error_with_a_hint() -> None:
    """The hint shows the right command, whether or not the file exists. YAML's own error would not help."""
    with pytest.raises(RecipeError, match=r"pairs\.jsonl is a data file, not a recipe") as caught:
        load("mine/pairs.jsonl")
    assert "dataset_mixture=mine/pairs.jsonl" in str(caught.value.hint)
