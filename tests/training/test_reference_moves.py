"""DPO on machines of several kinds: its reference is computed once, comes along through the bucket, and is not touched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.harness import RunView, TrainerRun, wait_until
from tests.training.jobs import make_job, train
from tests.training.ranks import ranks_job, run
from tests.training.test_engines import (
    DPO,
    DRIFT_TOLERANCE,
    ENGINES,
    LOSS_TOLERANCE,
    assert_alike,
    needs_compiler,
    steps_of,
)
from tests.training.test_reference import TOLERANCE
from tests.training.test_reshard import LORA, rest_of
from trainer.errors import ExitCode

STEPS, PAIRS = 40, 38
RECIPE = f"""
method: dpo
init: tiny
tiny: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}}
dataset_mixture: {{datasets: [{{id: "generated:preferences", split: train}}]}}
max_train_samples: {PAIRS}
global_batch_size: 8
micro_batch_size: 2
max_length: 96
learning_rate: 5.0e-4
max_steps: {STEPS}
save_steps: 5
eval_strategy: "no"
bf16: false
"""
SHAPES = {
    "zero3": {"processes": 2, "engine": "zero3"},
    "ddp": {"processes": 2, "engine": "ddp"},
    "single": {"processes": 1, "engine": "single"},
}


def attempt(recipe: Path, checkpoints: str, shape: str) -> TrainerRun:
    environ = {"SHAPED": json.dumps(SHAPES[shape])}
    work = recipe.parent / shape
    return TrainerRun(recipe, checkpoints, "moves", work, environ=environ, module="tests.fakes.shaped")


def lose(machine: TrainerRun, view: RunView, *, after: int) -> None:
    """After a commit beyond a step, and some steps more."""
    wait_until(lambda: any(step > after for step in view.committed_steps()) or not machine.alive, "a commit")
    newest = view.committed_steps()[0]
    wait_until(lambda: machine.step() >= newest + 2 or not machine.alive, "steps after it")
    assert machine.alive, machine.log
    machine.lose_machine()


def shelf(checkpoints: str) -> dict[Path, tuple[int, bytes]]:
    """What is kept of references: when each file was written, and its bytes."""
    files = [path for path in Path(checkpoints, "reference").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@needs_compiler
def test_a_reference_of_zero_3_is_that_of_ddp_and_of_one_process(tmp_path: Path) -> None:
    """Lost under ZeRO 3 on two, then under DDP on two, then ended by one: computed once, and the undisturbed run's losses."""
    recipe, checkpoints = tmp_path / "recipe.yaml", str(tmp_path / "runs")
    recipe.write_text(RECIPE)
    view = RunView(checkpoints, "moves")
    with attempt(recipe, checkpoints, "zero3") as first:
        lose(first, view, after=0)
    kept, committed = shelf(checkpoints), view.committed_steps()[0]
    assert kept
    with attempt(recipe, checkpoints, "ddp") as second:
        lose(second, view, after=committed)
    again = view.committed_steps()[0]
    with attempt(recipe, checkpoints, "single") as third:
        assert third.wait() == ExitCode.DONE, third.log

    assert [event["step"] for event in view.events("started")] == [0, committed, again]
    told = [(event["pairs"], event["computed"]) for event in view.events("reference")]
    assert told == [(PAIRS, PAIRS), (PAIRS, 0), (PAIRS, 0)]
    assert shelf(checkpoints) == kept, "the cache was written again"
    words = [event["message"] for event in view.events("log")]
    assert any(
        "converted the checkpoint's state from zero3 on 2 processes to ddp on 2 processes:" in each
        for each in words
    )
    assert_undisturbed(view, recipe)


def assert_undisturbed(view: RunView, recipe: Path) -> None:
    """Every telling of a step, and a reference that was computed for itself."""
    whole = train(make_job(recipe.parent / "whole", str(recipe)))
    assert [line["computed"] for line in whole.of("reference")] == [PAIRS]
    steps = view.steps()
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert steps[1][0]["loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    pairs = [(each, line) for line in whole.of("step") for each in steps[line["step"]]]
    assert all(ours["samples"] == theirs["samples"] for ours, theirs in pairs)
    difference = torch.tensor([ours["loss"] - theirs["loss"] for ours, theirs in pairs], dtype=torch.float64)
    assert difference.abs().max() <= LOSS_TOLERANCE
    assert difference.mean().abs() <= DRIFT_TOLERANCE
    margins = [ours["rewards/margins"] - theirs["rewards/margins"] for ours, theirs in pairs]
    assert max(map(abs, margins)) <= LOSS_TOLERANCE


def test_an_adapter_s_reference_comes_along_from_two_processes_to_one(tmp_path: Path) -> None:
    """LoRA: the policy without its adapter; the first loss is ln 2, and the second half that of the undisturbed run."""
    words = (*LORA, "loss_type=sigmoid", "loss_weights=null", "max_steps=20", "save_steps=10")
    before = run(ranks_job(tmp_path / "two", DPO, *words, **ENGINES["ddp"]))
    saved = before.checkpoint(10)
    after = train(ranks_job(tmp_path / "one", DPO, *words, resume_from=saved, micro_batch=8))
    assert steps_of(before, "loss")[0] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert before.of("reference") == after.of("reference") == []
    assert after.of("started")[0]["step"] == 10
    assert_alike(rest_of(before, 10), after)
    margins = steps_of(rest_of(before, 10), "rewards/margins")
    assert steps_of(after, "rewards/margins") == pytest.approx(margins, abs=LOSS_TOLERANCE)
    assert min(map(abs, margins)) > 100 * LOSS_TOLERANCE
