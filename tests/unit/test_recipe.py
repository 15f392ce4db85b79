"""A recipe: what a file means, what is refused and with which words, and what makes two the same."""

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
    """Write a recipe of the least keys and those given; a key that is given as None is left out."""

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
    """A shipped recipe is known by its name and needs no translation."""
    loaded = load(name)
    assert loaded.recipe.name == name
    assert not [note for note in loaded.notes if "ignored" in note or "now" in note]


def test_what_a_run_relies_on_is_stated(write: Any) -> None:
    """Defaults that changed over the releases are in the recipe, so that a new release cannot change a run."""
    loaded = load(write()).recipe
    assert {key: loaded.trainer_args[key] for key in ("seed", "learning_rate", "num_train_epochs", "optim")} == {
        "seed": 42, "learning_rate": 2e-5, "num_train_epochs": 3.0, "optim": "adamw_torch_fused",
    }  # fmt: skip
    assert loaded.model_args == {"dtype": "float32"}
    assert (loaded.trainer_args["save_steps"], loaded.keep_checkpoints) == (50, 2)


def test_an_unknown_key_is_named_with_its_value_and_the_nearest(write: Any) -> None:
    """A misspelt key must not be dropped silently, as TRL's own scripts do."""
    path = write(learning_rte=2e-5)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.message == f"{path}: unknown key `learning_rte` (value 2e-05)"
    assert caught.value.hint == "did you mean `learning_rate`?"


def test_all_unknown_keys_are_told_at_once(write: Any) -> None:
    """Three mistakes cost one look, not three."""
    with pytest.raises(RecipeError) as caught:
        load(write(learning_rte=1, sede=3, qqqqqqqq=True), ["wormup_steps=5"])
    assert [word in str(caught.value) for word in ("learning_rte", "sede", "qqqqqqqq", "command line")] == [
        True
    ] * 4
    assert "`wormup_steps`: did you mean `warmup_steps`?" in str(caught.value)


def test_a_renamed_key_misspelt_leads_to_its_name(write: Any) -> None:
    """People misspell old names, too."""
    with pytest.raises(RecipeError, match="did you mean `evaluation_strategy`"):
        load(write(evaluation_stratgy="steps"))


def test_a_key_of_the_other_method_says_so(write: Any) -> None:
    """`beta` is spelt right, and still means nothing in SFT."""
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
def test_a_wrong_type_is_told_with_the_right_one(write: Any, key: str, value: Any, expected: str) -> None:
    """The message has the file, the key, the value, and what would do."""
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
def test_what_yaml_misreads_is_set_right(write: Any, text: str, key: str, value: Any) -> None:
    """PyYAML takes `2e-5` for text, `no` for false and a date for a date."""
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
def test_a_file_that_is_no_recipe_says_where(tmp_path: Path, text: str, message: str) -> None:
    """A syntax error comes with line and column."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_name_that_does_not_exist_leads_to_the_nearest() -> None:
    """`zephyr-tiny/dpoo` is `zephyr-tiny/dpo` to anyone who reads it."""
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
    """What cannot train fails on the laptop, not on the GPUs."""
    with pytest.raises(RecipeError) as caught:
        load(write(**keys))
    assert message in str(caught.value)


def test_without_test_data_nothing_is_evaluated_and_it_is_said(write: Any) -> None:
    """An override of the data must not make the file's `eval_strategy` an error."""
    loaded = load(write(eval_strategy="epoch"))
    assert loaded.recipe.trainer_args["eval_strategy"] == "no"
    assert "`eval_strategy: epoch` is ignored: the recipe has no test data" in loaded.notes


def test_local_data_is_found_beside_the_recipe(write: Any, tmp_path: Path) -> None:
    """A recipe and its data can be moved together."""
    (tmp_path / "chat.jsonl").write_text("{}\n")
    loaded = load(write(dataset_mixture="chat.jsonl")).recipe
    assert loaded.dataset_mixture.datasets[0].id == str(tmp_path / "chat.jsonl")


def test_local_data_is_found_in_the_current_folder(
    write: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not beside the recipe is looked for where the command was typed."""
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
def test_a_path_to_nothing_says_where_it_was_looked_for(
    write: Any, tmp_path: Path, key: str, error: type[Exception], name: str
) -> None:
    """Only a path looks like this, so it is not taken for a Hub id."""
    with pytest.raises(error) as caught:
        load(write(**{"init": None, "model_name_or_path": "org/model", key: name}))
    assert f"{name} does not exist" in str(caught.value)
    assert str(tmp_path) in str(caught.value) or name.startswith(("~", "/"))


@pytest.mark.parametrize(
    "name", ["org/model", "gpt2", "s3://bucket/run/final", "gs://b/r/final", "file:///b/r/final"]
)
def test_what_lies_elsewhere_is_left_alone(write: Any, name: str) -> None:
    """Hub ids and URIs are the node's to fetch."""
    assert load(write(init=None, model_name_or_path=name)).recipe.model_name_or_path == name


def test_a_local_model_becomes_absolute(write: Any, tmp_path: Path) -> None:
    """The trainer may start in another folder."""
    (tmp_path / "model").mkdir()
    loaded = load(write(init=None, model_name_or_path="model")).recipe
    assert loaded.model_name_or_path == str(tmp_path / "model")


def test_the_digest_does_not_see_bookkeeping() -> None:
    """Saving more often, another name, or a smaller micro batch is still the same run."""
    plain, told = (
        recipe(),
        recipe(name="b", micro_batch_size=4, max_test_samples=3, trainer_args={"save_steps": 1}),
    )
    assert plain.digest() == told.digest()
    assert plain.differences(told) == []


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
def test_the_digest_sees_what_is_trained(keys: dict[str, Any]) -> None:
    """Whatever changes the model changes the digest, and the difference is named."""
    assert recipe().digest() != recipe(**keys).digest()
    assert len(recipe().differences(recipe(**keys))) == 1


def test_the_digest_is_the_same_wherever_the_data_lies() -> None:
    """A recovery on another cloud has the same file under another home."""
    here, there = (
        recipe(dataset_mixture=Mixture(datasets=(DataSource(id=f"{home}/a.jsonl"),))) for home in ("/a", "/b")
    )
    assert here.digest() == there.digest()


def test_differences_are_told_with_both_values() -> None:
    """The one that was recorded is there, the one at hand is here."""
    there, here = (
        recipe(trainer_args={"learning_rate": 1e-5}),
        recipe(trainer_args={"learning_rate": 2e-5, "seed": 1}),
    )
    assert there.differences(here) == ["learning_rate: 1e-05 there, 2e-05 here", "seed: unset there, 1 here"]


def test_a_whole_number_is_the_same_with_and_without_its_point() -> None:
    """`num_train_epochs: 1` and `1.0` train alike."""
    assert (
        recipe(trainer_args={"num_train_epochs": 1}).digest()
        == recipe(trainer_args={"num_train_epochs": 1.0}).digest()
    )


def test_a_run_id_can_be_a_folder_and_tells_recipes_apart() -> None:
    """Without `--run-id` the same recipe goes on with the same run."""
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
    """It goes to the node as JSON and must be the same recipe there."""
    original = recipe(trainer_args=arguments)
    copied = Recipe.model_validate_json(original.model_dump_json())
    assert copied == original
    assert copied.digest() == original.digest()


FOUR_BITS = {"use_peft": True, "load_in_4bit": True}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"engine": "fsdp2", "offload": "optimizer"},
            "`engine: fsdp2` does not support `offload: optimizer`",
        ),
        ({"engine": "zero2", "offload": "all"}, "`engine: zero2` does not support `offload: all`"),
        ({"engine": "fsdp2", "model_args": FOUR_BITS}, "cannot be sharded"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(keys: dict[str, Any], told: str) -> None:
    """By any machine, so by the recipe."""
    with pytest.raises(RecipeError, match=told) as refused:
        recipe(**keys)
    assert "remove" in str(refused.value.hint)


def test_an_engine_is_no_part_of_what_is_trained(write: Any) -> None:
    """A run that goes on under another one is the same run; a name that nobody knows has a nearest one."""
    assert recipe(engine="fsdp2").digest() == recipe(engine="zero3").digest() == recipe().digest()
    with pytest.raises(RecipeError, match=r"`engine: fsdp` must be one of .*did you mean `fsdp2`"):
        load(write(engine="fsdp"))


def test_a_list_on_the_command_line_needs_no_brackets(write: Any) -> None:
    """`q_proj,v_proj` is two modules, and none has that name."""
    found = load(write(use_peft=True), ["lora_target_modules=q_proj,v_proj"]).recipe
    assert found.model_args["lora_target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "begins"), [("my project (2)/dpo", "my-project-2-dpo-"), ("-x", "x-"), ("ü", "sft-")]
)
def test_a_run_s_name_is_one_that_clouds_take(write: Any, name: str, begins: str) -> None:
    """A recipe's folder may be called anything."""
    assert default_run_id(load(write(name=name)).recipe).startswith(begins)


def test_data_in_a_recipe_s_place_is_told_where_it_goes() -> None:
    """Whether it is there or not: YAML's own words for JSON lines help nobody."""
    with pytest.raises(RecipeError, match=r"pairs\.jsonl is a data file, not a recipe") as caught:
        load("mine/pairs.jsonl")
    assert "dataset_mixture=mine/pairs.jsonl" in str(caught.value.hint)
