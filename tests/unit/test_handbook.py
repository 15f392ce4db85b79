"""Whole recipe files in the forms of the alignment-handbook from 2023 to 2025, compared with every resulting value."""

from __future__ import annotations

from pathlib import Path

from trainer.recipe import DataSource, Mixture, Recipe, load

HANDBOOK = Path(__file__).resolve().parents[1] / "fixtures" / "handbook"


def test_an_sft_file_of_2023_is_packed_without_a_key() -> None:
    """The handbook's script always packed. Its weights apply to training data, never to test data."""
    recipe, notes = load(HANDBOOK / "nimbus-7b" / "sft" / "config_full.yaml")
    assert recipe == Recipe(
        name="nimbus-7b/sft_full",
        method="sft",
        model_name_or_path="nimbus/nimbus-7b-v0.1",
        dataset_mixture=Mixture(
            datasets=(
                DataSource(id="nimbus/chats", split="train_sft"),
                DataSource(id="nimbus/stories", split="train_sft", weight=0.25),
            ),
            test_datasets=(
                DataSource(id="nimbus/chats", split="test_sft"),
                DataSource(id="nimbus/stories", split="test_sft"),
            ),
        ),
        global_batch_size=32 * 2 * 8,
        max_train_samples=90000,
        max_test_samples=500,
        trainer_args={
            "bf16": True,
            "eval_strategy": "epoch",
            "gradient_checkpointing": True,
            "learning_rate": 2e-5,
            "logging_steps": 5,
            "loss_type": "nll",
            "lr_scheduler_type": "cosine",
            "max_length": 2048,
            "max_steps": -1,
            "num_train_epochs": 2,
            "optim": "adamw_torch_fused",
            "packing": True,
            "packing_strategy": "wrapped",
            "per_device_eval_batch_size": 16,
            "remove_unused_columns": True,
            "report_to": ["tensorboard"],
            "save_steps": 50,
            "save_total_limit": 2,
            "seed": 42,
            "tf32": True,
        },
        model_args={
            "attn_implementation": "flash_attention_2",
            "dtype": "bfloat16",
            "model_revision": "main",
        },
    )
    assert (
        "`max_seq_length` is now called `max_length`; `packing: true` is set, as the handbook's scripts of that "
        "time always did" in notes
    )


def test_a_lora_file_of_2023_keeps_its_meaning() -> None:
    """Its tokenizer is the model's own, and its weight of one half applies to the training data."""
    recipe, notes = load(HANDBOOK / "nimbus-7b" / "dpo" / "config_lora.yaml")
    assert recipe == Recipe(
        name="nimbus-7b/dpo_lora",
        method="dpo",
        model_name_or_path="nimbus/nimbus-7b-sft-lora",
        dataset_mixture=Mixture(
            datasets=(DataSource(id="nimbus/preferences", split="train_prefs", weight=0.5),),
            test_datasets=(DataSource(id="nimbus/preferences", split="test_prefs"),),
        ),
        global_batch_size=2 * 16 * 8,
        max_prompt_length=512,
        truncation_side="left",
        trainer_args={
            "beta": 0.1,
            "bf16": True,
            "eval_strategy": "epoch",
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "learning_rate": 5e-7,
            "logging_steps": 10,
            "loss_type": ["sigmoid"],
            "lr_scheduler_type": "linear",
            "max_length": 1024,
            "num_train_epochs": 3,
            "optim": "rmsprop",
            "per_device_eval_batch_size": 4,
            "report_to": ["wandb", "tensorboard"],
            "save_steps": 50,
            "save_total_limit": 2,
            "seed": 42,
            "warmup_steps": 0.1,
        },
        model_args={
            "dtype": "auto",
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "lora_r": 32,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "use_peft": True,
        },
    )
    assert "`save_strategy: epoch` is ignored: a checkpoint is saved every `save_steps` steps" in notes


def test_a_dpo_file_of_2025_trains_on_its_test_split() -> None:
    """An imported file may mix training and test split, which the shipped recipes keep apart."""
    recipe = load(HANDBOOK / "zonda-3b" / "dpo" / "config_full.yaml").recipe
    columns = {"chosen": "chosen", "rejected": "rejected"}
    assert recipe == Recipe(
        name="zonda-3b/dpo_full",
        method="dpo",
        model_name_or_path="zonda/zonda-3b-sft",
        dataset_mixture=Mixture(
            datasets=(
                DataSource(id="zonda/preferences", config="default", split="train_prefs", columns=columns),
                DataSource(id="zonda/preferences", config="default", split="test_prefs", columns=columns),
            ),
            test_split_size=2000,
            seed=0,
        ),
        global_batch_size=4 * 2 * 8,
        max_prompt_length=768,
        auto_insert_empty_system_msg=False,
        trainer_args={
            "beta": 0.01,
            "bf16": True,
            "eval_steps": 100,
            "eval_strategy": "steps",
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "learning_rate": 5e-7,
            "logging_steps": 10,
            "loss_type": ["ipo"],
            "lr_scheduler_type": "cosine",
            "max_length": 1536,
            "num_train_epochs": 1,
            "optim": "adamw_torch",
            "per_device_eval_batch_size": 8,
            "save_steps": 100,
            "save_total_limit": 2,
            "seed": 42,
            "warmup_steps": 0.1,
        },
        model_args={"dtype": "float32"},
    )


def test_an_explicit_packing_key_wins(tmp_path: Path) -> None:
    """`packing: false` beside the old keys stays false."""
    text = (HANDBOOK / "nimbus-7b" / "sft" / "config_full.yaml").read_text()
    (tmp_path / "sft.yaml").write_text(f"{text}packing: false\n")
    settings = load(tmp_path / "sft.yaml").recipe.trainer_args
    assert (settings["packing"], settings["max_length"]) == (False, 2048)
    assert "packing_strategy" not in settings
