"""The recipes for 7B models, each with its own settings on the smallest model and data of the same form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.jobs import LORA, SMALL, Trained, make_job, train
from trainer.recipe import load, names
from trainer.worker import ultrafeedback
from trainer.worker.chat_template import ZEPHYR_TEMPLATE
from trainer.worker.synthetic import preferences

LARGE = [name for name in names() if name.partition("/")[0].endswith("-7b")]
STEPS = ("max_steps=2", "max_train_samples=8", "save_steps=2")


def data(name: str, folder: Path) -> str:
    """The override that gives a recipe data of its form."""
    if name.startswith("notus"):
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in responses()))
        return f"dataset_mixture={{datasets: [{{id: {path}}}], test_split_size: 2}}"
    return f"dataset_mixture=generated:{'chats' if '/sft' in name else 'preferences'}"


def responses() -> list[dict[str, Any]]:
    """Pairs in Argilla's columns."""
    return [
        {
            "instruction": row["chosen"][-2]["content"],
            "chosen_response": row["chosen"][-1]["content"],
            "rejected_response": row["rejected"][-1]["content"],
        }
        for row in list(preferences("train"))[:12]
    ]


def raw() -> list[dict[str, Any]]:
    """The same in UltraFeedback's form."""
    return [
        {
            "instruction": row["instruction"],
            "completions": [
                {
                    "model": rating,
                    "response": row[name],
                    "annotations": {aspect: {"Rating": rating} for aspect in ultrafeedback.ASPECTS},
                }
                for name, rating in (("rejected_response", "2"), ("chosen_response", "4"))
            ],
        }
        for row in responses()
    ]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    """TRL takes its optimizer, schedule, packing and adapters together, and every step has a loss."""
    job = make_job(tmp_path / "work", name, *SMALL, *STEPS, "init=tiny", data(name, tmp_path))
    trained = train(job)
    assert trained.outcome.status == "done", trained.outcome
    assert [line["step"] for line in trained.of("step")] == [1, 2]
    assert all(line["loss"] > 0 for line in trained.of("step"))
    adapters = job.recipe.model_args.get("use_peft")
    started = trained.of("started")[0]
    assert (started["trainable_parameters"] < started["parameters"]) == bool(adapters)


def test_notus_trains_on_our_own_pairs(tmp_path: Path) -> None:
    """By the header's two words; how the pairs were made is told."""
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in raw()))
    ours = (
        f"dataset_mixture.datasets.0.id={path}",
        "dataset_mixture.datasets.0.binarise=mean_rating",
        "dataset_mixture.test_split_size=2",
    )
    trained = train(make_job(tmp_path / "work", "notus-7b/dpo_full", *SMALL, *STEPS, "init=tiny", *ours))
    assert trained.outcome.status == "done"
    told = [line["message"] for line in trained.of("log")]
    assert any("raw.jsonl (train): built 12 pairs from 12 rows" in line for line in told)


def test_dpo_qlora_begins_with_the_sft_adapter_merged(tmp_path: Path, small: Callable[..., Trained]) -> None:
    """The adapter of a 4-bit SFT becomes part of the base, and the sum is quantised again before it is trained on."""
    base = small("zephyr-tiny/sft").final
    four_bit = ("load_in_4bit=true", "use_bnb_nested_quant=true")
    adapter = small("zephyr-tiny/sft", "init=null", f"model_name_or_path={base}", *LORA, *four_bit).final
    assert (adapter / "adapter_config.json").is_file()
    overrides = (*SMALL, *STEPS, f"model_name_or_path={adapter}", "dataset_mixture=generated:preferences")
    job = make_job(tmp_path / "work", "zephyr-7b/dpo_qlora", *overrides)
    trained = train(job)
    assert trained.outcome.status == "done", trained.outcome
    assert (job.work / "merged" / "config.json").is_file()
    assert trained.of("step")[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert (
        trained.final / "model.safetensors"
    ).is_file()  # merged again, because the base exists only in the run


@pytest.mark.parametrize("name", ["zephyr-7b/sft_full", "zephyr-7b/sft_qlora"])
def test_chats_are_written_by_zephyrs_template(name: str) -> None:
    """The recipe states the text that a tokenizer without one would get."""
    assert load(name).recipe.chat_template == ZEPHYR_TEMPLATE
