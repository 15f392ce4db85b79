"""A run that is killed during a step, a save or an upload ends with the same bits as an undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness import RunView, TrainerRun, wait_until
from tests.servers.s3 import FaultyS3

pytest.importorskip("torch", reason="the trainer's environment is not here: make setup")

RECIPE = """
method: {method}
init: tiny
tiny: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 600}}
dataset_mixture:
  datasets: [{{id: "generated:{data}", split: train}}]
  test_datasets: [{{id: "generated:{data}", split: test}}]
max_train_samples: 60
max_test_samples: 8
global_batch_size: 16
micro_batch_size: 1
max_length: 96
learning_rate: 2.0e-3
lr_scheduler_type: cosine
warmup_steps: 0.1
max_steps: 12
save_steps: 4
eval_strategy: steps
eval_steps: 6
logging_steps: 1
bf16: false
seed: 7
"""
LORA = """
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
"""
KEEP_DROPOUT = "disable_dropout: false\n"
LAST_STEP = 12


@pytest.fixture(
    params=[
        pytest.param("sft-full", marks=pytest.mark.thorough),
        "sft-lora",
        "dpo-full",
        pytest.param("dpo-lora", marks=pytest.mark.thorough),
    ]
)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """SFT and DPO, with full weights and with LoRA under dropout."""
    method, weights = request.param.split("-")
    text = RECIPE.format(method=method, data="chats" if method == "sft" else "preferences")
    if weights == "lora":
        text += LORA + (KEEP_DROPOUT if method == "dpo" else "")
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(text)
    return path


def whole_run(recipe: Path, tmp_path: Path) -> RunView:
    """The undisturbed run, in a folder."""
    checkpoints = str(tmp_path / "runs")
    with TrainerRun(recipe, checkpoints, "whole", tmp_path / "work" / "whole") as run:
        assert run.wait() == 0, run.log
    return RunView(checkpoints, "whole")


def jam(run: TrainerRun) -> Path:
    """Make the optimizer's file of step 8 a pipe without a reader, so that its save hangs; return the checkpoint's folder."""
    staging = wait_until(run.staging, "the staging folder")
    checkpoint: Path = staging / "checkpoint-8"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "optimizer.pt")
    return checkpoint


def kill_in_mid_step(run: TrainerRun, view: RunView) -> None:
    """Step 4 is the newest commit, whatever is told beyond it; the worker is at a step when it dies."""
    jam(run)  # however late this process looks, the run is not yet over
    wait_until(lambda: 4 in view.committed_steps() or not run.alive, "step 4 to be committed")
    wait_until(lambda: run.step() >= 5 or not run.alive, "step 5 to be told")
    assert run.alive, run.log
    assert run.step() < LAST_STEP
    assert run.lose_machine() == -signal.SIGKILL
    assert view.committed_steps() == [4]


def kill_in_mid_save(run: TrainerRun, view: RunView) -> None:
    checkpoint = jam(run)
    wait_until(
        lambda: list(checkpoint.glob("*.safetensors")) or not run.alive, "the weights of step 8 to be saved"
    )
    assert run.alive, run.log
    assert run.lose_machine() == -signal.SIGKILL
    assert not (checkpoint / "trainer_state.json").exists()
    assert not checkpoint.with_name("checkpoint-8.staged").exists()
    assert 8 not in view.committed_steps()


def kill_in_mid_upload(run: TrainerRun, view: RunView, store: FaultyS3) -> None:
    """Part of step 8 has arrived, its optimizer has not."""
    store.hold("PUT|POST", r"checkpoints/step-0*8/.*optimizer\.pt")
    assert store.wait_for_held(240), run.log
    assert run.alive, run.log
    assert run.lose_machine() == -signal.SIGKILL
    store.clear()
    assert any("step-00000008" in item.key for item in view.bucket.list("checkpoints/"))
    assert 8 not in view.committed_steps()


def test_three_kills_change_no_bit(recipe: Path, tmp_path: Path, s3: str, faulty_s3: FaultyS3) -> None:
    """Every loss, learning rate, sample and the final weights are those of the undisturbed run."""
    whole = whole_run(recipe, tmp_path)
    view = RunView(s3, "killed")

    def attempt(number: int) -> TrainerRun:
        return TrainerRun(recipe, s3, "killed", tmp_path / "work" / f"killed-{number}")

    with attempt(1) as first:
        kill_in_mid_step(first, view)
    with attempt(2) as second:
        kill_in_mid_save(second, view)
    with attempt(3) as third:
        kill_in_mid_upload(third, view, faulty_s3)
    with attempt(4) as fourth:
        assert fourth.wait() == 0, fourth.log

    assert [event["step"] for event in view.events("restored")] == [0, 4, 4, 4]
    assert [event["attempt"] for event in view.events("done")] == [4]
    references = [killed.told("reference") for killed in (first, second, third)]
    references.append([event for event in view.events("reference") if event["attempt"] == 4])
    computed = [{event["computed"] > 0 for event in events} for events in references]
    expected = [{True}, {False}, {False}, {False}] if "dpo-full" in recipe.name else [set()] * 4
    assert computed == expected, "the reference's log-probabilities are the first attempt's"
    told = whole.steps()
    assert sorted(told) == list(range(1, LAST_STEP + 1))
    assert {"loss", "learning_rate", "grad_norm", "samples"} <= told[1][0].keys()
    for step, tellings in view.steps().items():
        kinds = {event["kind"]: event for event in told[step]}
        assert all(event == kinds[event["kind"]] for event in tellings), f"step {step} diverged"
    assert sorted(view.steps()) == sorted(told)
    assert view.final().weights_digest == whole.final().weights_digest
