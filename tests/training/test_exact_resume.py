"""A run that is killed during a step, a save or an upload ends with the same bits as an undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load

from tests.harness import RunView, TrainerRun, wait_until
from tests.servers.s3 import FaultyS3
from tests.training.held_rank import HELD_FILE

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
RANK_FILE, JSON_FILES = "rank-00000.safetensors", {"index.json", "scalars.json", "trainer_state.json"}


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


def kill_in_mid_copy(run: TrainerRun, view: RunView) -> None:
    """The memory of the save of step 4, which is committed, has half of the tensors of step 8."""
    staging = wait_for_held(run)
    assert run.lose_machine() == -signal.SIGKILL
    assert list((staging / "checkpoint-8").iterdir()) == []
    [half] = (staging / "buffers").glob(f"*{RANK_FILE}")
    [key] = (item.key for item in view.bucket.list("checkpoints/") if item.key.endswith(RANK_FILE))
    now, before = load(half.read_bytes()), load(view.bucket.get(key))
    changed = {name.partition("/")[0] for name, tensor in before.items() if (tensor != now[name]).any()}
    same = {name.partition("/")[0] for name, tensor in before.items() if (tensor == now[name]).all()}
    assert "exp_avg" in changed & same
    assert view.committed_steps() == [4]


def kill_in_mid_step(run: TrainerRun, view: RunView) -> None:
    """Step 4 is the newest commit, whatever is told beyond it; the worker is at a step when it dies."""
    jam(run)  # however late this process looks, the run is not yet over
    wait_until(lambda: run.step() >= 5 or not run.alive, "step 5 to be told")
    assert run.alive, run.log
    assert run.step() < LAST_STEP
    assert run.lose_machine() == -signal.SIGKILL
    assert view.committed_steps() == [4]


def jam(run: TrainerRun) -> None:
    """Make the last file of the save of step 8 a pipe without a reader, so that the save never ends."""
    staging = wait_until(run.staging, "the staging folder")
    (staging / "checkpoint-8").mkdir()
    os.mkfifo(staging / "checkpoint-8" / "trainer_state.json")


def kill_in_mid_serialization(run: TrainerRun, view: RunView) -> None:
    """The tensors of step 8 are copied. Half of the first JSON file is written, and neither index nor scalars exist."""
    staging = wait_for_held(run)
    assert run.lose_machine() == -signal.SIGKILL
    written = {path.name for path in (staging / "checkpoint-8").iterdir()}
    assert {RANK_FILE, ".scalars.json.partial"} <= written
    assert not written & JSON_FILES
    assert not (staging / "checkpoint-8.staged").exists()
    assert view.committed_steps() == [4]


def wait_for_held(run: TrainerRun) -> Path:
    """Wait until the worker is in the middle of its save, and return the staging folder."""
    staging: Path = wait_until(run.staging, "the staging folder")
    wait_until(lambda: (staging.parent / HELD_FILE).exists() or not run.alive, "the middle of step 8's save")
    assert run.alive, run.log
    return staging


def kill_in_mid_upload(run: TrainerRun, view: RunView, store: FaultyS3) -> None:
    """A part of step 8 has arrived, and the file with the tensors has not."""
    store.hold("PUT|POST", rf"checkpoints/step-0*8/.*{RANK_FILE}")
    assert store.wait_for_held(240), run.log
    wait_until(lambda: arrived(view, "index.json"), "the index of step 8")
    assert run.alive, run.log
    assert run.lose_machine() == -signal.SIGKILL
    store.clear()
    assert not arrived(view, RANK_FILE)
    assert 8 not in view.committed_steps()


def arrived(view: RunView, file: str) -> bool:
    """Return whether the bucket has this file of step 8."""
    return any(item.key.endswith(file) for item in view.bucket.list("checkpoints/step-00000008/"))


def test_four_kills_change_no_bit(recipe: Path, tmp_path: Path, s3: str, faulty_s3: FaultyS3) -> None:
    """Every loss, learning rate, sample and the final weights are those of the undisturbed run."""
    whole = whole_run(recipe, tmp_path)
    view = RunView(s3, "killed")

    def attempt(number: int, held_in: str = "") -> TrainerRun:
        work = tmp_path / "work" / f"killed-{number}"
        if not held_in:
            return TrainerRun(recipe, s3, "killed", work)
        environ = {"PROGRAM": "tests.training.held_rank", "HELD_IN": held_in}
        return TrainerRun(recipe, s3, "killed", work, environ=environ, module="tests.fakes.programmed")

    with attempt(1, held_in="copy") as first:
        kill_in_mid_copy(first, view)
    with attempt(2) as second:
        kill_in_mid_step(second, view)
    with attempt(3, held_in="text") as third:
        kill_in_mid_serialization(third, view)
    with attempt(4) as fourth:
        kill_in_mid_upload(fourth, view, faulty_s3)
    with attempt(5) as fifth:
        assert fifth.wait() == 0, fifth.log

    assert [event["step"] for event in view.events("restored")] == [0, 4, 4, 4, 4]
    assert [event["attempt"] for event in view.events("done")] == [5]
    references = [killed.told("reference") for killed in (first, second, third, fourth)]
    references.append([event for event in view.events("reference") if event["attempt"] == 5])
    computed = [{event["computed"] > 0 for event in events} for events in references]
    expected = [{True}, {False}, {False}, {False}, {False}] if "dpo-full" in recipe.name else [set()] * 5
    assert computed == expected, "the reference's log-probabilities are the first attempt's"
    told = whole.steps()
    assert sorted(told) == list(range(1, LAST_STEP + 1))
    assert {"loss", "learning_rate", "grad_norm", "samples"} <= told[1][0].keys()
    for step, tellings in view.steps().items():
        kinds = {event["kind"]: event for event in told[step]}
        assert all(event == kinds[event["kind"]] for event in tellings), f"step {step} diverged"
    assert sorted(view.steps()) == sorted(told)
    assert view.final().weights_digest == whole.final().weights_digest
