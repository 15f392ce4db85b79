"""The log-probabilities of DPO's reference: computed once, equal to those of a second model, and cached."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_weights

from tests.training.jobs import LORA, SMALL, Trained, make_job, train
from trainer.job import Job
from trainer.worker import reference_logps
from trainer.worker.data import TokenizedDataset
from trainer.worker.reference_logps import VALUES
from trainer.worker.supervisor_channel import Channel

DPO = "zephyr-tiny/dpo"
PLAIN = ("loss_type=sigmoid", "loss_weights=null", "eval_strategy=steps", "eval_steps=2")
TOLERANCE = 5e-6
"""Tolerance of float32 sums over about 30 tokens with different padding."""
Small = Callable[..., Trained]


def losses(trained: Trained) -> list[float]:
    assert trained.outcome.status == "done", trained.outcome
    return [line["loss"] for line in trained.of("step")] + [line["eval_loss"] for line in trained.of("eval")]


def computed(trained: Trained) -> list[int]:
    """Pairs of the training data and of the tests, that were not there already."""
    return [line["computed"] for line in trained.of("reference")]


def shelf_of(trained: Trained, into: Path, name: str = "0000-test") -> Path:
    """What the supervisor brings to the next attempt: the fullest that this one staged."""
    staged = max(trained.job.staging.glob("reference-*/"))
    shutil.copytree(staged, into / name)
    return into


def again(tmp_path: Path, shelf: Path, *overrides: str) -> Trained:
    job = make_job(tmp_path / "again", DPO, *SMALL, *PLAIN, *overrides)
    return train(job.model_copy(update={"reference": shelf}))


def same_weights(one: Trained, other: Trained) -> bool:
    first, second = (load_weights(each.final / "model.safetensors") for each in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_losses_are_those_of_a_second_model(small: Small) -> None:
    """Training and evaluations, whether the reference is computed beforehand or held in memory."""
    kept, in_memory = small(DPO, *PLAIN), small(DPO, *PLAIN, "precompute_ref_log_probs=false")
    assert losses(kept) == pytest.approx(losses(in_memory), abs=TOLERANCE)
    assert in_memory.of("reference") == []


def test_the_first_loss_is_that_of_two_equal_models(small: Small) -> None:
    """Policy and reference are one: ln 2, until the first step has moved one of them."""
    assert losses(small(DPO, *PLAIN))[0] == pytest.approx(math.log(2), abs=TOLERANCE)


def test_what_is_kept_is_not_computed_again(small: Small, tmp_path: Path) -> None:
    """Another attempt takes it, computes nothing, and ends with the same bits."""
    first = small(DPO, *PLAIN)
    assert computed(first) == [16, 4]  # 4 steps of 4 pairs see 16 of the 24
    second = again(tmp_path, shelf_of(first, tmp_path / "kept"))
    assert computed(second) == [0, 0]
    assert losses(second) == losses(first)
    assert same_weights(first, second)
    assert not list(second.job.staging.glob("reference-*")), "its own run keeps it already"


def test_a_resumed_run_computes_nothing(small: Small, tmp_path: Path) -> None:
    """From a checkpoint on, the policy is no reference any more, and need not be."""
    first = small(DPO, *PLAIN)
    job = make_job(tmp_path / "resumed", DPO, *SMALL, *PLAIN, resume_from=first.checkpoint(2))
    resumed = train(job.model_copy(update={"reference": shelf_of(first, tmp_path / "kept")}))
    assert computed(resumed) == [0, 0]
    assert resumed.trajectory == first.trajectory[2:]


def test_a_resumed_run_without_what_was_kept_computes_the_same(small: Small, tmp_path: Path) -> None:
    """The policy is the reference until its checkpoint is loaded."""
    first = small(DPO, *PLAIN)
    resumed = train(make_job(tmp_path / "resumed", DPO, *SMALL, *PLAIN, resume_from=first.checkpoint(2)))
    assert computed(resumed) == [16, 4]
    assert resumed.trajectory == first.trajectory[2:]


def test_another_runs_values_are_used_and_taken_over(small: Small, tmp_path: Path) -> None:
    """Another beta has the same reference; this run keeps a copy that no one else changes."""
    shelf = shelf_of(small(DPO, *PLAIN), tmp_path / "kept", "0000-other")
    other = again(tmp_path, shelf, "beta=0.5")
    assert computed(other) == [0, 0]
    assert losses(other)[0] == pytest.approx(math.log(2), abs=TOLERANCE)
    mine, theirs = (load_file(next(each.glob(f"*/{VALUES}"))) for each in (other.job.staging, shelf))
    assert all(np.array_equal(mine[data], theirs[data], equal_nan=True) for data in theirs)


def test_a_part_is_completed(small: Small, tmp_path: Path) -> None:
    """A longer run of the same data computes only the pairs that the shorter one never saw."""
    shelf = shelf_of(small(DPO, *PLAIN), tmp_path / "kept", "0000-other")
    longer = again(tmp_path, shelf, "max_steps=6", "lr_scheduler_type=constant")
    assert computed(longer) == [8, 0]


@pytest.mark.parametrize(
    "change", [{"model": "0" * 32}, {"precision": "bfloat16"}, {"max_length": 5}, {"ld_alpha": 0.5}], ids=str
)
def test_a_foreign_reference_is_refused(small: Small, tmp_path: Path, change: dict[str, Any]) -> None:
    """Values of other weights, another precision or another cut are computed anew, and it is said."""
    shelf = shelf_of(small(DPO, *PLAIN), tmp_path / "kept")
    about = shelf / "0000-test" / "reference.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
    second = again(tmp_path, shelf)
    assert computed(second) == [16, 4]
    assert any("to another reference" in line["message"] for line in second.of("log"))
    assert losses(second) == losses(small(DPO, *PLAIN))


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{nonsen"])
def test_damaged_values_are_refused(small: Small, tmp_path: Path, damage: bytes) -> None:
    """A file cut short, or none of ours, is computed anew."""
    shelf = shelf_of(small(DPO, *PLAIN), tmp_path / "kept")
    (shelf / "0000-test" / VALUES).write_bytes(damage)
    second = again(tmp_path, shelf)
    assert computed(second) == [16, 4]
    assert losses(second) == losses(small(DPO, *PLAIN))


def test_values_that_are_there_are_what_is_used(small: Small, tmp_path: Path) -> None:
    """The tests above would pass if the cache were ignored. Other cached values give other losses."""
    shelf = shelf_of(small(DPO, *PLAIN), tmp_path / "kept")
    path = shelf / "0000-test" / VALUES
    save_file({data: values + np.float32([1.0, 0.0]) for data, values in load_file(path).items()}, path)
    assert losses(again(tmp_path, shelf))[0] == pytest.approx(math.log(1 + math.exp(0.1)), abs=TOLERANCE)


def test_the_batch_changes_nothing(small: Small, tmp_path: Path) -> None:
    """One pair at a time or all at once: the same to the rounding of float32."""
    one = train(make_job(tmp_path / "one", DPO, *SMALL, *PLAIN, "precompute_ref_batch_size=1"))
    values = [load_file(max(each.job.staging.glob(f"*/{VALUES}"))) for each in (one, small(DPO, *PLAIN))]
    for data, pairs in values[1].items():
        np.testing.assert_allclose(values[0][data], pairs, rtol=0, atol=1e-4)
        assert np.array_equal(np.isnan(values[0][data]), np.isnan(pairs))


def test_lora_switches_its_adapter_off(small: Small) -> None:
    """The policy without its adapter is the reference, at no cost in memory; nothing is computed beforehand."""
    trained = small(DPO, *PLAIN, *LORA)
    assert trained.of("reference") == []
    assert trained.job.fit.reference == "adapters_off"


def test_lora_computes_beforehand_on_request(small: Small) -> None:
    """Over several epochs the pass is the cheaper way; the losses are the same."""
    asked = small(DPO, *PLAIN, *LORA, "precompute_ref_log_probs=true")
    assert computed(asked) == [16, 4]
    assert losses(asked) == pytest.approx(losses(small(DPO, *PLAIN, *LORA)), abs=TOLERANCE)


class LosesItsMachine(Exception):
    """In the middle of the pass."""


class Trainer:
    """As much of TRL's trainer as the pass asks for; a pair's values are sums of its token ids."""

    is_deepspeed_enabled = is_fsdp_enabled = False

    def __init__(self, job: Job, *, batches: int) -> None:
        self.args = SimpleNamespace(
            max_length=None, max_steps=-1, world_size=1, process_index=0, device=torch.device("cpu"),
            per_device_train_batch_size=1, precompute_ref_batch_size=2,
        )  # fmt: skip
        self.model = torch.nn.Linear(1, 1)
        self.left = batches
        self.asked: list[int] = []

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor([sum(row[f"{name}_ids"]) for row in rows]) for name in ("chosen", "rejected")
        }

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        if not self.left:
            raise LosesItsMachine
        self.left -= 1
        self.asked += inputs["chosen"].tolist()
        return inputs["chosen"], inputs["rejected"]


def test_a_lost_machine_loses_a_minute_of_the_pass(tmp_path: Path) -> None:
    """What was staged on the way is not computed again, and the rest is computed in the same batches."""
    pairs = 50
    columns = {
        "prompt_ids": [[1]] * pairs, "chosen_ids": [[row] for row in range(pairs)], "rejected_ids": [[-row] for row in range(pairs)],
    }  # fmt: skip
    tokens = TokenizedDataset(datasets.Dataset.from_dict(columns), 3 * pairs, "data")

    def attempt(name: str, batches: int, kept: Path | None) -> tuple[Trainer, Job, Any]:
        job = make_job(tmp_path / name, DPO, *SMALL).model_copy(update={"reference": kept})
        about = reference_logps.about(job, tokens, "model")
        minutes = iter(range(0, 10**6, 61))
        pass_ = reference_logps.Reference(
            job, Channel(job), about, tokens, None, clock=lambda: float(next(minutes))
        )
        trainer = Trainer(job, batches=batches)
        try:
            return trainer, job, pass_.add_to(trainer, tokens.dataset, "train")
        except LosesItsMachine:
            return trainer, job, None

    whole, *_ = attempt("whole", 1000, None)
    lost, job, nothing = attempt("lost", 20, None)
    assert nothing is None
    shutil.copytree(max(job.staging.glob("reference-*/")), tmp_path / "kept" / "0000-test")
    second, _, columns_after = attempt("again", 1000, tmp_path / "kept")
    assert lost.asked == whole.asked[:40]
    assert second.asked == whole.asked[32:], "two exchanges of eight batches of two pairs were staged"
    assert columns_after["ref_chosen_logps"] == list(range(pairs))
    assert columns_after["ref_rejected_logps"] == [-row for row in range(pairs)]
