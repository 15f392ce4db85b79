"""Keys of older recipes are renamed, ignored or refused, each with a note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RecipeError
from trainer.recipe import DataSource, load
from trainer.recipe.fields import of
from trainer.recipe.model import Mixture
from trainer.recipe.old_keys import GONE, IGNORED, RENAMED
from trainer.recipe.translate import UNDERSTOOD, translate

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def translated(**keys: Any) -> dict[str, Any]:
    return translate(keys, source="a.yaml").keys


def test_a_dpo_recipe_of_2023_keeps_its_meaning() -> None:
    """Every key of an old file is kept, renamed, or ignored with a note."""
    recipe, notes = load(FIXTURES / "handbook_dpo_full.yaml")
    assert recipe.method == "dpo"
    assert recipe.global_batch_size == 8 * 2 * 8
    assert recipe.max_prompt_length == 512
    assert recipe.dataset_mixture == Mixture(
        datasets=(DataSource(id="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),),
        test_datasets=(DataSource(id="HuggingFaceH4/ultrafeedback_binarized", split="test_prefs"),),
    )
    assert recipe.model_args == {"dtype": "float32", "attn_implementation": "flash_attention_2"}
    assert recipe.trainer_args == {
        "beta": 0.01,
        "bf16": True,
        "eval_steps": 100,
        "eval_strategy": "steps",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 5e-7,
        "logging_steps": 10,
        "loss_type": ["sigmoid"],
        "lr_scheduler_type": "cosine",
        "max_length": 1024,
        "num_train_epochs": 1,
        "optim": "adamw_torch",
        "per_device_eval_batch_size": 8,
        "save_steps": 100,
        "save_total_limit": 2,
        "seed": 42,
        "warmup_steps": 0.1,
    }
    text = "\n".join(notes)
    dropped = (
        "do_eval",
        "hub_model_id",
        "log_level",
        "output_dir",
        "overwrite_output_dir",
        "push_to_hub",
        "rpo_alpha",
    )
    assert [key for key in dropped if f"`{key}" not in text] == []
    assert (
        "`global_batch_size: 128` = per_device_train_batch_size 8 x gradient_accumulation_steps 2 x 8 GPUs"
        in text
    )


def test_a_qlora_recipe_of_2024_keeps_its_meaning() -> None:
    """The mixer's weights apply to training data only, and YAML's `no` stays the text `no`."""
    recipe, notes = load(FIXTURES / "handbook_sft_qlora.yaml")
    assert recipe.method == "sft"
    assert recipe.global_batch_size == 4 * 8
    assert [(data.id, data.config, data.split, data.weight) for data in recipe.dataset_mixture.datasets] == [
        ("HuggingFaceH4/ultrachat_200k", "default", "train_sft", 0.5),
        ("HuggingFaceH4/no_robots", "default", "train_sft", 1.0),
    ]
    assert [data.weight for data in recipe.dataset_mixture.test_datasets] == [1.0, 1.0]
    assert recipe.trainer_args["max_length"] == 2048
    assert recipe.trainer_args["eval_strategy"] == "no"
    assert recipe.trainer_args["learning_rate"] == 2e-4
    assert "dataset_kwargs" not in recipe.trainer_args
    assert recipe.model_args["dtype"] == "bfloat16"
    assert recipe.model_args["load_in_4bit"] is True
    assert "`save_strategy: no` is ignored: a checkpoint is saved every `save_steps` steps" in notes
    assert "gradient_accumulation_steps 1 x 8 GPUs" in "\n".join(notes)


def test_a_mixture_of_2025_keeps_its_meaning() -> None:
    """The handbook's `columns` is a list. It selects columns and renames none."""
    recipe, notes = load(FIXTURES / "handbook_sft_mixture.yaml")
    assert recipe.dataset_mixture == Mixture(
        datasets=(
            DataSource(
                id="HuggingFaceTB/smoltalk2", config="Mid", columns={"messages": "messages"},
                split="Llama_Nemotron_Post_Training_Dataset_reasoning_r1",
            ),
            DataSource(
                id="HuggingFaceTB/smoltalk2", config="Mid", columns={"messages": "messages"},
                split="OpenThoughts3_1.2M", weight=0.5,
            ),
        ),
        test_split_size=0.01,
        seed=0,
    )  # fmt: skip
    assert recipe.trainer_args["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    assert recipe.trainer_args["trust_remote_code"] is True
    assert "`dataset_num_proc`, `ddp_timeout` are ignored: recipes do not describe hardware" in "\n".join(
        notes
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"dtype": "float32"}),
        ({"max_seq_length": 512}, {"max_length": 512}),
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": "1e-1"}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1, "warmup_steps": 30}, {"warmup_steps": 30}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"use_flash_attention_2": False}, {}),
        ({"use_flash_attention_2": False, "attn_implementation": "sdpa"}, {"attn_implementation": "sdpa"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"tokenizer_name_or_path": "m", "model_name_or_path": "m"}, {"model_name_or_path": "m"}),
        (
            {"gradient_checkpointing_use_reentrant": False},
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True, "x": 1}},
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
        ),
        ({"max_seq_length": 512, "max_length": 512}, {"max_length": 512}),
    ],
    ids=str,
)
def test_an_old_key_becomes_the_new_one(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A recipe with the old key trains the same model as before."""
    assert translated(**old) == new


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rpo_alpha": 1.0}, r"loss_weights: \[1.0, <rpo_alpha>\]"),
        ({"reference_free": True}, "always compares with the reference"),
        ({"load_best_model_at_end": True}, "older checkpoints are deleted"),
        ({"max_completion_length": 512}, "use `max_length`"),
        ({"label_pad_token_id": 0}, "-100"),
        (
            {"tokenizer_name_or_path": "other", "model_name_or_path": "m"},
            "the tokenizer is loaded from the model's folder",
        ),
        ({"warmup_ratio": 1.5}, "at least 0 and below 1"),
        ({"warmup_ratio": "some"}, "at least 0 and below 1"),
        ({"system_prompt": "Be kind."}, "no system prompt is added"),
        ({"eos_token": "<|im_end|>"}, "set it in the model's tokenizer"),
    ],
    ids=str,
)
def test_a_key_that_would_train_another_model_is_refused(keys: dict[str, Any], message: str) -> None:
    """A key with an effect that TRL no longer supports is an error, not a note."""
    with pytest.raises(RecipeError, match=message) as caught:
        translated(**keys)
    assert str(caught.value).startswith("a.yaml: `")


@pytest.mark.parametrize("key", sorted(GONE))
def test_a_removed_key_with_a_harmless_value_is_ignored_with_a_note(key: str) -> None:
    """Old files write out many defaults."""
    keys, notes = translate({key: GONE[key].harmless[0]}, source="a.yaml")
    assert keys == {}
    assert len(notes) == 1


def test_false_is_not_zero_to_a_gone_key() -> None:
    """`reference_free: false` is harmless. `reference_free: 0` has the wrong type and is refused."""
    with pytest.raises(RecipeError):
        translated(reference_free=0)


def test_the_same_thing_under_two_names_must_agree() -> None:
    """Two different values under the old and the new name are an error."""
    with pytest.raises(RecipeError, match="`torch_dtype: float16` and `dtype: bfloat16` set the same key"):
        translated(torch_dtype="float16", dtype="bfloat16")


def test_keys_ignored_for_one_reason_share_a_note() -> None:
    """Several ignored keys with one reason give one note."""
    notes = translate({"push_to_hub": True, "hub_model_id": "a/b", "output_dir": "x"}, source="a.yaml").notes
    assert [note.partition(":")[0] for note in notes] == [
        "`push_to_hub`, `hub_model_id` are ignored", "`output_dir` is ignored",
    ]  # fmt: skip


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_new_name_is_one_that_trl_knows(old: str) -> None:
    """The new name is a key of the pinned TRL, and the old name is not."""
    known = {*of("sft"), *of("dpo"), *of("model")}
    assert RENAMED[old] in known
    assert old not in known


def test_every_old_key_is_in_one_table() -> None:
    """A key is either renamed, ignored, or removed."""
    assert len(UNDERSTOOD) >= len(RENAMED) + len(IGNORED) + len(GONE)
    assert not set(RENAMED) & set(IGNORED)
    assert not {*RENAMED, *IGNORED} & set(GONE)
