"""The model card describes how a model was made, in a form that the Hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.events import Event
from trainer.recipe import Recipe, load
from trainer.supervisor.model_card import POINTS, card, front_matter


def events() -> list[Event]:
    """Return the events of two attempts: the first is lost after step 6, the second resumes from step 4."""

    def at(attempt: int, minute: int, kind: str, **fields: Any) -> Event:
        return {"kind": kind, "attempt": attempt, "time": f"2026-11-21T10:{minute:02d}:00+00:00", **fields}

    a100 = {"accelerator": "A100", "count": 8, "nodes": 1, "cores": 96}
    found = [at(1, 0, "claimed", shape=a100, fit={"engine": "zero3"}), at(1, 1, "restored", step=0)]
    found += [at(1, 1 + step, "step", step=step, loss=1 / step) for step in range(1, 7)]
    cpu = {"accelerator": None, "count": 0, "nodes": 1, "cores": 2}
    found += [at(2, 20, "claimed", shape=cpu, fit={"engine": "single"}), at(2, 21, "restored", step=4)]
    found += [at(2, 20 + step, "step", step=step, loss=1 / step) for step in range(5, 31)]
    found += [at(2, 50, "eval", step=30, eval_loss=0.25), at(2, 50, "done", step=30)]
    return found


def recipe(name: str, *overrides: str) -> Recipe:
    return load(name, overrides).recipe


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize(
    ("name", "merged", "library", "relation"),
    [
        ("zephyr-7b/dpo_full", False, "transformers", "finetune"),
        ("zephyr-7b/dpo_qlora", False, "peft", "adapter"),
        ("zephyr-7b/dpo_qlora", True, "transformers", "finetune"),
    ],
)
def test_the_header_names_base_data_and_licence(name: str, merged: bool, library: str, relation: str) -> None:
    """The Hub needs a name and a link for a license that it does not know."""
    header, _ = parts(card(recipe(name), events(), name="org/model", step=30, merged=merged))
    base = recipe(name).model_name_or_path
    assert header["base_model"] == base
    assert header["base_model_relation"] == relation
    assert header["library_name"] == library
    assert header["datasets"] == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert (header["license"], header["license_link"]) == ("other", f"https://huggingface.co/{base}")
    assert {"trl", "dpo"} <= set(header["tags"])


@pytest.mark.parametrize("model", ["s3://bucket/runs/sft/final", "FOLDER/mine", "FOLDER/model.gguf"])
def test_a_model_outside_the_hub_is_not_named_as_a_base_model(tmp_path: Path, model: str) -> None:
    """The Hub rejects a card whose `base_model` is not a repository of the Hub."""
    model = model.replace("FOLDER", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "model.gguf").touch()
    header = front_matter(recipe("zephyr-tiny/dpo", "init=null", f"model_name_or_path={model}"), merged=False)
    assert "base_model" not in header
    assert "license" not in header
    assert "datasets" not in header


def test_the_card_lists_every_attempt() -> None:
    """A row has the machine, steps, hours and end. The total counts paid hours, not the time between attempts."""
    _, body = parts(card(recipe("zephyr-tiny/dpo"), events(), name="model", step=30, merged=False))
    assert "| 1 | 8 x A100, zero3 | 0 to 6 | 0.12 | lost |" in body
    assert "| 2 | CPU, 2 cores | 4 to 30 | 0.50 | done |" in body
    assert "0.62 hours in 2 attempts, 1 recovery" in body


def test_curves_have_every_step_once() -> None:
    """A repeated step appears once. Of many steps some are shown, with the first and the last."""
    _, body = parts(card(recipe("zephyr-tiny/dpo"), events(), name="model", step=30, merged=False))
    table = body.split("## Curves")[1].split("## Recipe")[0]
    steps = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert steps == sorted(set(steps), key=int)
    assert (steps[0], steps[-1]) == ("1", "30")
    assert len(steps) <= POINTS
    assert "| 30 | 0.0333 | 0.2500 |" in table


def test_the_card_of_a_checkpoint_has_no_later_steps() -> None:
    """The card for the weights of step 5 does not show step 6."""
    _, body = parts(card(recipe("zephyr-tiny/dpo"), events(), name="model", step=5, merged=False))
    assert "| 5 | 0.2000 |" in body
    assert "| 6 |" not in body.split("## Curves")[1]


def test_the_card_holds_the_recipe() -> None:
    """The recipe is the resolved one, so the run can be repeated from it."""
    _, body = parts(card(recipe("zephyr-tiny/dpo"), events(), name="model", step=30, merged=False))
    found = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert (found["method"], found["beta"], found["global_batch_size"]) == ("dpo", 0.1, 32)
