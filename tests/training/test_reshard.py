"""A run that changes its engine halfway trains the same steps as an undisturbed run."""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import rank_files
from tests.training.jobs import Trained, train
from tests.training.ranks import ranks_job, run
from tests.training.test_engines import LOSS_TOLERANCE, assert_alike, needs_compiler, steps_of
from trainer.job import Job, Outcome

SFT = "zephyr-tiny/sft"
LENGTH = ("max_steps=20", "save_steps=5")
DECAY = ("weight_decay=0.3",)  # of matrices only: groups that are mixed up, or take each other's, show
LORA = ("use_peft=true", "lora_r=4", "lora_dropout=0.0", "lora_target_modules=[q_proj, v_proj]")
HALF = 10
TWO = {"processes": 2, "micro_batch": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "single": {"micro_batch": 8},
    "ddp": TWO,
    "zero2": {**TWO, "engine": "zero2"},
    "zero3": {**TWO, "engine": "zero3"},
    "zero3 x 4": {"processes": 4, "micro_batch": 1, "engine": "zero3"},
    "zero3 x 1": {"processes": 1, "micro_batch": 4, "engine": "zero3"},
    "zero3, optimizer": {**TWO, "engine": "zero3", "offload_optimizer": True},
    "zero3, all": {**TWO, "engine": "zero3", "offload_optimizer": True, "offload_parameters": True},
    "fsdp2": {**TWO, "engine": "fsdp2"},
    "fsdp2 x 4": {"processes": 4, "micro_batch": 1, "engine": "fsdp2"},
    "fsdp2 x 1": {"processes": 1, "micro_batch": 4, "engine": "fsdp2"},
    "zero2, optimizer": {"processes": 1, "micro_batch": 4, "engine": "zero2", "offload_optimizer": True},
}
Whole = Callable[..., Trained]


def trained(work: Path, shape: str, *overrides: str, resume_from: Path | None = None) -> Trained:
    """Train to the end, from the start or a checkpoint. One process without DeepSpeed runs in this process."""
    job = ranks_job(work, SFT, *LENGTH, *DECAY, *overrides, resume_from=resume_from, **SHAPES[shape])
    return train(job) if shape == "single" else run(job)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return an undisturbed run of 20 steps. Equal arguments share one run, also over pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared

    def run_once(shape: str, *overrides: str) -> Trained:
        work = shared / f"reshard-{zlib.crc32(' '.join([shape, *overrides]).encode()):08x}"
        with work.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not work.exists():
                done = trained(work, shape, *overrides)
                (work / "job.json").write_text(done.job.model_dump_json())
                (work / "outcome.json").write_text(done.outcome.model_dump_json())
        job = Job.model_validate_json((work / "job.json").read_text())
        return Trained(job, Outcome.model_validate_json(job.outcome.read_text()))

    return run_once


def rest_of(one: Trained, after: int) -> Trained:
    """Return the part of a run after a step."""
    rest = Trained(one.job, one.outcome)
    rest.lines = [line for line in one.lines if line["kind"] != "step" or line["step"] > after]
    return rest


def assert_goes_on(before: Trained, after: Trained, step: int = HALF) -> None:
    """Assert that the resumed run has the same samples, losses, learning rates and gradients as the undisturbed run."""
    assert after.of("started")[0]["step"] == step, after.outcome
    assert_alike(rest_of(before, step), after)
    assert steps_of(after, "learning_rate") == steps_of(rest_of(before, step), "learning_rate")
    assert any("converted the checkpoint's state from" in line["message"] for line in after.of("log"))


PAIRS = [
    ("single", "zero3"),
    ("single", "zero2, optimizer"),
    ("ddp", "zero3, optimizer"),
    ("zero2", "zero3 x 4"),
    ("zero2", "ddp"),
    ("zero3", "zero2"),
    ("zero3", "single"),
    ("zero3", "zero3, all"),
    ("zero3, all", "zero3"),
    ("zero3, all", "single"),
    ("fsdp2", "zero3"),
    ("zero3", "fsdp2"),
    ("fsdp2", "single"),
    ("ddp", "fsdp2"),
]

SAMPLE = {
    ("single", "zero3"),
    ("single", "zero2, optimizer"),
    ("zero2", "zero3 x 4"),
    ("zero3, all", "single"),
    ("fsdp2", "zero3"),
    ("ddp", "fsdp2"),
}
"""The pairs of `make test`. They read each engine's checkpoint once and fill each engine's optimizer once."""


def named(pair: tuple[str, str]) -> Any:
    marks = [needs_compiler] if any(shape.startswith("zero") for shape in pair) else []
    marks += [] if pair in SAMPLE else [pytest.mark.thorough]
    return pytest.param(*pair, marks=marks, id=" to ".join(pair))


@pytest.mark.parametrize(("one", "other"), map(named, PAIRS))
def test_a_run_goes_on_in_another_form(tmp_path: Path, whole: Whole, one: str, other: str) -> None:
    """10 steps under one engine and 10 under another equal 20 steps under the first."""
    before = whole(one)
    after = trained(tmp_path / "work", other, resume_from=before.checkpoint(HALF))
    assert_goes_on(before, after)


@needs_compiler
def test_a_converted_run_is_converted_again(tmp_path: Path, whole: Whole) -> None:
    """ZeRO-3 on 2, then 4, then 1 ranks: a checkpoint saved after a conversion can be converted again."""
    before = whole("zero3")
    on_four = trained(tmp_path / "four", "zero3 x 4", resume_from=before.checkpoint(HALF))
    assert_goes_on(before, on_four)
    on_one = trained(tmp_path / "one", "zero3 x 1", resume_from=on_four.checkpoint(15))
    assert_goes_on(before, on_one, 15)
    again = trained(tmp_path / "again", "zero3 x 1", resume_from=on_one.checkpoint(20))
    assert again.of("step") == []  # it lacked only its export
    assert again.outcome.status == "done"


@pytest.mark.thorough
def test_fsdp_goes_on_on_any_number_of_processes(tmp_path: Path, whole: Whole) -> None:
    """On 2, then 4, then 1, then 2 ranks, each run converts the checkpoint of the run before."""
    before = whole("fsdp2")
    folder = before.checkpoint(5)
    for step, shape in ((5, "fsdp2 x 4"), (10, "fsdp2 x 1"), (15, "fsdp2")):
        after = trained(tmp_path / shape, shape, resume_from=folder)
        assert_goes_on(before, after, step)
        folder = after.checkpoint(step + 5)


@needs_compiler
def test_a_converted_checkpoint_of_the_last_step_is_exported(tmp_path: Path, whole: Whole) -> None:
    """A run that is killed during its export under ZeRO-3 ends on one process with the same model."""
    from safetensors.torch import load_file

    before = whole("zero3")
    after = trained(tmp_path / "work", "single", resume_from=before.checkpoint(20))
    assert after.of("step") == []
    ours, theirs = (load_file(each.final / "model.safetensors") for each in (after, before))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("shape", [pytest.param("zero3", marks=needs_compiler), "fsdp2"])
def test_an_adapter_goes_on_in_parts_and_back(tmp_path: Path, whole: Whole, shape: str) -> None:
    """Under LoRA the optimizer has only the adapter's matrices, and the base is loaded from its source."""
    before = whole("single", *LORA)
    sharded = trained(tmp_path / "sharded", shape, *LORA, resume_from=before.checkpoint(HALF))
    assert_goes_on(before, sharded)
    back = trained(tmp_path / "back", "single", *LORA, resume_from=sharded.checkpoint(15))
    assert_goes_on(before, back, 15)


@needs_compiler
def test_rmsprop_goes_on_offloaded(tmp_path: Path, whole: Whole) -> None:
    """An optimizer with one moment, which torch steps on the host, is converted."""
    before = whole("single", "optim=rmsprop")
    after = trained(
        tmp_path / "work", "zero3, optimizer", "optim=rmsprop", resume_from=before.checkpoint(HALF)
    )
    assert_goes_on(before, after)


def lose_steps(scalars: dict[str, Any]) -> None:
    for state in scalars["states"].values():
        state["step"]["value"] = 0


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@needs_compiler
def test_a_moment_that_is_lost_would_show(tmp_path: Path, whole: Whole, key: str) -> None:
    """The tests above can fail: if a moment or the step is set to zero, the losses differ."""
    before = whole("zero3")
    if key == "step":
        folder = rank_files.copy_with_scalars(before.checkpoint(HALF), tmp_path, lose_steps)
    else:
        folder = rank_files.copy_with_zeros(before.checkpoint(HALF), tmp_path, key)
    after = trained(tmp_path / "work", "single", resume_from=folder)
    rest = rest_of(before, HALF)
    assert steps_of(after, "samples") == steps_of(rest, "samples")
    differences = [
        one - other for one, other in zip(steps_of(after, "loss"), steps_of(rest, "loss"), strict=True)
    ]
    assert max(map(abs, differences)) > 100 * LOSS_TOLERANCE


def test_an_optimizer_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    """Adafactor's state is per row and column, so it cannot be converted. The message names the alternatives."""
    before = trained(tmp_path / "before", "single", "optim=adafactor", "max_steps=6")
    job = ranks_job(
        tmp_path / "work",
        SFT,
        *LENGTH,
        *DECAY,
        "optim=adafactor",
        resume_from=before.checkpoint(5),
        **SHAPES["zero3"],
    )
    refused = run(job)
    assert refused.outcome.status == "user_error"
    assert "the optimizer's state `exp_avg_sq_col` is not one value per weight" in refused.outcome.message
    assert "the same number of GPUs" in (refused.outcome.hint or "")
