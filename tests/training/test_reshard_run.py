"""End to end: a machine with two processes is lost, and one process resumes from the bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import RunView, TrainerRun, wait_until
from tests.training.test_engines import LOSS_TOLERANCE, needs_compiler
from trainer.errors import ExitCode

RECIPE = """
method: sft
init: tiny
tiny: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}
dataset_mixture: {datasets: [{id: "generated:chats", split: train}]}
max_train_samples: 38
global_batch_size: 8
micro_batch_size: 2
max_length: 96
learning_rate: 2.0e-3
max_steps: 30
save_steps: 5
eval_strategy: "no"
bf16: false
"""
SHAPED = {"SHAPED": json.dumps({"processes": 2, "engine": "zero3"})}


@needs_compiler
def test_a_run_that_loses_two_processes_ends_on_one(tmp_path: Path) -> None:
    """SIGKILL under ZeRO 3 on two, whose config is in the bucket: the next attempt, whose fit is one process, converts what
    was committed.
    """
    recipe, checkpoints = tmp_path / "recipe.yaml", str(tmp_path / "runs")
    recipe.write_text(RECIPE)
    view, whole = RunView(checkpoints, "lost"), RunView(checkpoints, "whole")
    with TrainerRun(
        recipe, checkpoints, "lost", tmp_path / "two", environ=SHAPED, module="tests.fakes.shaped"
    ) as two:
        wait_until(
            lambda: (view.committed_steps() and two.step() >= 8) or not two.alive, "a commit and step 8"
        )
        assert two.alive, two.log
        two.lose_machine()
    committed = view.committed_steps()[0]
    assert any(each.key.endswith("/deepspeed.json") for each in view.bucket.list("checkpoints/"))
    with TrainerRun(recipe, checkpoints, "lost", tmp_path / "one") as one:
        assert one.wait() == ExitCode.DONE, one.log
    with TrainerRun(recipe, checkpoints, "whole", tmp_path / "undisturbed") as undisturbed:
        assert undisturbed.wait() == ExitCode.DONE, undisturbed.log
    assert [event["step"] for event in view.events("started")] == [0, committed]
    ours, theirs = view.steps(), whole.steps()
    assert sorted(ours) == list(range(1, 31))
    for step, told in theirs.items():
        for each in ours[step]:
            assert each["samples"] == told[0]["samples"]
            assert each["loss"] == pytest.approx(told[0]["loss"], abs=LOSS_TOLERANCE)
    words = [event["message"] for event in view.events("log")]
    assert any(
        "converted the checkpoint's state from zero3 on 2 processes to single on 1 process:" in each
        for each in words
    )
