"""The recipes of Zephyr and Notus: the values that they reproduce, and what their headers promise."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from trainer.recipe import DataSource, Recipe, load, names
from trainer.recipe.yaml_file import RECIPES

LARGE = [name for name in names() if name.partition("/")[0].endswith("-7b")]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ULTRACHAT, ULTRAFEEDBACK = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"
ARGILLA = "argilla/ultrafeedback-binarized-preferences"
HARDWARE = ("attn_implementation", "gradient_checkpointing", "per_device_eval_batch_size", "tf32")
"""What the fit decides for each shape: a recipe that said it would fit fewer."""


@pytest.fixture(params=LARGE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def header(name: str) -> list[str]:
    """Return the lines of the comment at the top of a recipe, without the `#`."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].rstrip() for line in lines[:end]]


def commands(name: str) -> list[list[str]]:
    """Return the words of each command in the header. A backslash continues a line."""
    text = "\n".join(header(name)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith("python -m launcher")]


def values(recipe: Recipe, *keys: str) -> tuple[Any, ...]:
    """Return a recipe's values by their names in the YAML."""
    return tuple((recipe.trainer_args | recipe.model_args).get(key) for key in keys)


def splits(sources: tuple[DataSource, ...]) -> list[tuple[str, str]]:
    return [(source.id, source.split) for source in sources]


def test_all_recipes_are_shipped() -> None:
    """The shipped recipes reproduce Zephyr and Notus."""
    assert LARGE == [
        "notus-7b/dpo_full",
        "notus-7b/dpo_lora",
        "zephyr-7b/dpo_full",
        "zephyr-7b/dpo_full_paper",
        "zephyr-7b/dpo_qlora",
        "zephyr-7b/sft_full",
        "zephyr-7b/sft_qlora",
    ]


def test_every_recipe_needs_no_translation(name: str) -> None:
    """A recipe's name is its path, and no key is renamed or ignored."""
    loaded = load(name)
    assert loaded.recipe.name == name
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("name", "model", "batch", "training"),
    [
        ("zephyr-7b/sft_full", "mistralai/Mistral-7B-v0.1", 16 * 8, (2e-5, "cosine", 0.1, "adamw_torch", 1)),
        ("zephyr-7b/sft_qlora", "mistralai/Mistral-7B-v0.1", 4 * 2, (2e-4, "cosine", 0.1, "adamw_torch", 1)),
        (
            "zephyr-7b/dpo_full",
            "alignment-handbook/zephyr-7b-sft-full",
            8 * 2 * 8,
            (5e-7, "cosine", 0.1, "adamw_torch", 1),
        ),
        (
            "zephyr-7b/dpo_full_paper",
            "HuggingFaceH4/mistral-7b-sft-beta",
            32,
            (5e-7, "linear", 0.1, "adamw_torch", 3),
        ),
        (
            "zephyr-7b/dpo_qlora",
            "alignment-handbook/zephyr-7b-sft-qlora",
            4 * 4,
            (5e-6, "cosine", 0.1, "paged_adamw_32bit", 1),
        ),
        (
            "notus-7b/dpo_full",
            "alignment-handbook/zephyr-7b-sft-full",
            8 * 8,
            (5e-7, "linear", 0.1, "rmsprop", 3),
        ),
        (
            "notus-7b/dpo_lora",
            "alignment-handbook/zephyr-7b-sft-full",
            2 * 32 * 8,
            (5e-7, "linear", 0.1, "rmsprop", 3),
        ),
    ],
)
def test_a_recipe_has_the_settings_that_it_reproduces(
    name: str, model: str, batch: int, training: tuple[Any, ...]
) -> None:
    """Model, batch, learning rate, schedule, optimizer and epochs equal those of the source in the header."""
    recipe = load(name).recipe
    assert (recipe.model_name_or_path, recipe.global_batch_size) == (model, batch)
    keys = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "num_train_epochs")
    assert values(recipe, *keys) == training
    assert values(recipe, "seed", "bf16", "max_steps") == (42, True, None)


def test_weights_are_loaded_in_bfloat16(name: str) -> None:
    """Weights and computation are in bfloat16. Trained weights have float32 masters, which the fit plans for."""
    assert values(load(name).recipe, "dtype", "bf16") == ("bfloat16", True)


@pytest.mark.parametrize(
    ("name", "beta"),
    [
        ("zephyr-7b/dpo_full", 0.01),
        ("zephyr-7b/dpo_full_paper", 0.1),
        ("zephyr-7b/dpo_qlora", 0.01),
        ("notus-7b/dpo_full", 0.1),
        ("notus-7b/dpo_lora", 0.1),
    ],
)
def test_pairs_are_cut_to_the_same_lengths(name: str, beta: float) -> None:
    """A prompt keeps its last 512 tokens, a sequence has at most 1,024, and the loss is plain DPO."""
    recipe = load(name).recipe
    assert (recipe.max_prompt_length, recipe.truncation_side) == (512, "left")
    assert values(recipe, "max_length", "beta", "loss_type") == (1024, beta, ["sigmoid"])


@pytest.mark.parametrize("name", ["zephyr-7b/sft_full", "zephyr-7b/sft_qlora"])
def test_chats_are_packed_end_to_end(name: str) -> None:
    """Chats in Zephyr's template are packed into sequences of 2,048 tokens, and nothing is cut."""
    recipe = load(name).recipe
    assert values(recipe, "max_length", "packing", "packing_strategy") == (2048, True, "wrapped")
    assert recipe.chat_template == load("zephyr-7b/sft_full").recipe.chat_template
    assert "<|assistant|>" in str(recipe.chat_template)


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "dropout", "modules"),
    [
        ("zephyr-7b/sft_qlora", 16, 16, 0.05, LAYERS),
        ("zephyr-7b/dpo_qlora", 128, 128, 0.05, LAYERS),
        ("notus-7b/dpo_lora", 64, 16, 0.1, LAYERS[:4]),
    ],
)
def test_adapters_have_the_settings_that_they_reproduce(
    name: str, rank: int, alpha: int, dropout: float, modules: list[str]
) -> None:
    """Rank, alpha, dropout and adapted modules equal those of the source."""
    found = values(load(name).recipe, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    assert found == (rank, alpha, dropout, modules)


@pytest.mark.parametrize("name", ["zephyr-7b/sft_qlora", "zephyr-7b/dpo_qlora"])
def test_qlora_quantises_its_constants(name: str) -> None:
    """The recipe states it because TRL's default changed, and the memory prediction depends on it."""
    keys = ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "use_peft")
    assert values(load(name).recipe, *keys) == (True, "nf4", True, True)


def test_no_test_row_is_trained_on(name: str) -> None:
    """The handbook's newest files train on the test split. These recipes do not."""
    mixture = load(name).recipe.dataset_mixture
    train, test = splits(mixture.datasets), splits(mixture.test_datasets)
    if name.startswith("notus"):
        assert (train, test, mixture.test_split_size) == ([(ARGILLA, "train")], [], 2000)
    else:
        data, kind = (ULTRACHAT, "sft") if "/sft" in name else (ULTRAFEEDBACK, "prefs")
        assert (train, test) == ([(data, f"train_{kind}")], [(data, f"test_{kind}")])
    assert load(name).recipe.trainer_args["eval_strategy"] != "no"


def test_a_recipe_does_not_describe_hardware(name: str) -> None:
    """The fit decides these settings for each shape."""
    recipe = load(name).recipe
    assert recipe.micro_batch_size is None
    assert [key for key in HARDWARE if key in recipe.trainer_args | recipe.model_args] == []


@pytest.mark.parametrize("part", ["Reproduces", "Source", "Data", "Chats", "GPUs", "Attention"])
def test_a_header_has_all_parts(name: str, part: str) -> None:
    """A header names what it reproduces, its source, data and GPUs, and the differences."""
    assert [line for line in header(name) if line.startswith(f" {part}: ")]


def test_a_header_has_its_prediction(name: str) -> None:
    """One line has the cheapest offers of `launcher plan`, with hours and dollars."""
    lines = [line for line in header(name) if line.lower().startswith(" predicted:")]
    assert len(lines) == 1
    assert re.match(r" Predicted: .*\d(\.\d+)? h\b.*\$\d", lines[0])


def test_a_header_has_its_commands(name: str) -> None:
    """A header shows the commands to plan and to submit."""
    assert ["python", "-m", "launcher", "plan", name] in commands(name)
    assert ["python", "-m", "launcher", "submit", name, "--infra", "local"] in commands(name)


def test_the_commands_of_a_header_work(name: str) -> None:
    """Every command names this recipe, and its overrides load."""
    for words in commands(name):
        assert words[4] == name
        load(name, [word for word in words[5:] if "=" in word])


@pytest.mark.parametrize("name", ["notus-7b/dpo_full", "notus-7b/dpo_lora"])
def test_notus_can_be_trained_on_our_own_pairs(name: str) -> None:
    """The header's command uses the raw answers and holds out equally many rows by the same seed."""
    ours = next(
        words for words in commands(name) if "dataset_mixture.datasets.0.binarise=mean_rating" in words
    )
    mixture = load(name, ours[7:]).recipe.dataset_mixture
    assert mixture.datasets == (DataSource(id="openbmb/UltraFeedback", binarise="mean_rating"),)
    assert (mixture.test_split_size, mixture.seed) == (2000, 42)


def test_an_unknown_way_to_binarise_is_refused() -> None:
    """A misspelt value must not turn binarising off."""
    with pytest.raises(Exception, match="binarise"):
        load("notus-7b/dpo_full", ["dataset_mixture.datasets.0.binarise=mean"])


def test_the_digest_covers_how_pairs_are_made() -> None:
    """One data set binarised in two ways gives two digests. Without `binarise` the digest is that of older releases."""
    plain = Recipe(
        name="a", method="dpo", init="tiny", global_batch_size=1,
        dataset_mixture={"datasets": [{"id": "org/data"}]},
    )  # fmt: skip
    pairs = plain.model_copy(
        update={
            "dataset_mixture": plain.dataset_mixture.model_copy(
                update={"datasets": (DataSource(id="org/data", binarise="mean_rating"),)}
            )
        }
    )
    assert plain.differences(pairs) == ["dataset_mixture.datasets.0.binarise: unset there, mean_rating here"]
