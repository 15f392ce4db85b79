"""Every engine takes the same steps: DDP, ZeRO 2 and 3, with offload, FSDP 2, and QLoRA, on processes of this machine.

What compares computations trains with forks (`tests.training.forks`); what is killed, told to stop or made to fail is started.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_values
from safetensors.torch import load_file

from tests.training import forks
from tests.training.jobs import Trained, train
from tests.training.ranks import finish, ranks_job, run, run_started, start, wait_for_step
from trainer.job import Job, Outcome
from trainer.staged import pending
from trainer.supervisor.workers import Workers
from trainer.worker.checkpoint.format import RANK_FILES
from trainer.worker.reference_logps import VALUES

SFT, DPO = "zephyr-tiny/sft", "zephyr-tiny/dpo"
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"processes": 2, "micro_batch": 2},
    "zero2": {"processes": 2, "micro_batch": 2, "engine": "zero2"},
    "zero3": {"processes": 2, "micro_batch": 2, "engine": "zero3"},
    "offload": {
        "processes": 2,
        "micro_batch": 2,
        "engine": "zero3",
        "offload_optimizer": True,
        "offload_parameters": True,
    },
    "fsdp2": {"processes": 2, "micro_batch": 2, "engine": "fsdp2"},
}
LOSS_TOLERANCE = 2e-5
"""Float32 sums in another order, after six steps at a rate of 5e-3; losses are between 0.1 and 6."""
DRIFT_TOLERANCE = 1e-5
"""Bound of the mean difference: rounding errors cancel out, and a wrong weight of a sample does not."""
NO_COMPILER = "DeepSpeed compiles its communication and its Adam for the CPU: no g++ or ninja here"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and (shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists())),
    reason=NO_COMPILER,
)
Engine = Callable[..., Trained]


def kinds(*names: str, thorough: tuple[str, ...] = ()) -> list[Any]:
    """Return parameters for engines: DeepSpeed's need a compiler, and `make test` leaves the thorough ones out."""
    return [
        pytest.param(
            name,
            marks=[needs_compiler] * (name not in ("ddp", "fsdp2"))
            + [pytest.mark.thorough] * (name in thorough),
        )
        for name in names
    ]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Trains under an engine; the same words give the same training once only, also over processes of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared

    def trained(kind: str, name: str) -> Trained:
        work = shared / f"{kind}-{name.replace('/', '-')}"
        with work.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not work.exists():
                return run(ranks_job(work, name, **ENGINES[kind]))
        job = Job.model_validate_json((work / "job.json").read_text())
        return Trained(job, Outcome.model_validate_json(job.outcome.read_text()))

    return trained


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Trains in this process, with a micro batch of the caller's."""
    done: dict[tuple[str, int], Trained] = {}

    def trained(name: str, micro_batch: int = 8) -> Trained:
        if (name, micro_batch) not in done:
            work = tmp_path_factory.mktemp("alone") / "work"
            done[name, micro_batch] = train(ranks_job(work, name, micro_batch=micro_batch))
        return done[name, micro_batch]

    return trained


def steps_of(trained: Trained, name: str) -> list[Any]:
    assert trained.outcome.status == "done", trained.outcome
    return [line[name] for line in trained.of("step")]


def tokens_of(trained: Trained) -> list[int]:
    """The value of each step, over all ranks."""
    pace = zip(steps_of(trained, "tokens_per_s"), steps_of(trained, "step_s"), strict=True)
    return [round(per_s * seconds) for per_s, seconds in pace]


def assert_alike(one: Trained, other: Trained) -> None:
    """The same samples at each step, and losses that rounding could have made."""
    assert steps_of(one, "samples") == steps_of(other, "samples")
    assert tokens_of(one) == tokens_of(other)
    losses = torch.tensor([steps_of(one, "loss"), steps_of(other, "loss")], dtype=torch.float64)
    difference = losses[0] - losses[1]
    assert difference.abs().max() <= LOSS_TOLERANCE
    assert difference.mean().abs() <= DRIFT_TOLERANCE


def final(trained: Trained) -> dict[str, torch.Tensor]:
    return load_file(trained.final / "model.safetensors")


@pytest.mark.parametrize("name", [SFT, DPO])
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_accumulation_changes_no_trajectory(alone: Engine, name: str, micro_batch: int) -> None:
    """1 x 4 x 2 and 1 x 1 x 8 take the steps of 1 x 8 x 1."""
    assert_alike(alone(name), alone(name, micro_batch))


@pytest.mark.parametrize("name", [SFT, DPO])
def test_two_processes_change_no_trajectory(alone: Engine, engine: Engine, name: str) -> None:
    """2 x 2 x 2 takes the steps of 1 x 8 x 1: tokens and pairs weigh the same on every rank."""
    assert_alike(alone(name), engine("ddp", name))


@pytest.mark.thorough
def test_four_processes_change_no_trajectory(tmp_path: Path, alone: Engine) -> None:
    """4 x 2 x 1 takes the steps of 1 x 8 x 1."""
    assert_alike(alone(SFT), run(ranks_job(tmp_path / "work", SFT, processes=4, micro_batch=2)))


def test_another_order_would_show(alone: Engine, tmp_path: Path) -> None:
    """The tests above can fail: another seed of the data gives other losses."""
    other = train(ranks_job(tmp_path / "work", SFT, "data_seed=1", micro_batch=8))
    with pytest.raises(AssertionError):
        assert_alike(alone(SFT), other)


@pytest.mark.parametrize("kind", kinds("zero2", "zero3", "offload", "fsdp2"))
def test_a_cut_model_takes_ddps_steps(engine: Engine, kind: str) -> None:
    """Whatever is cut or offloaded, samples, losses and the final weights are those of whole replicas."""
    assert_alike(engine("ddp", DPO), engine(kind, DPO))
    whole, cut = final(engine("ddp", DPO)), final(engine(kind, DPO))
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=0, atol=2e-4)


@needs_compiler
@pytest.mark.parametrize("kind", ["zero2", "zero3", "offload"])
def test_the_config_is_in_the_run(engine: Engine, kind: str) -> None:
    """DeepSpeed's config lies with the attempt, in its events, and in each checkpoint and its manifest."""
    trained = engine(kind, DPO)
    told = trained.of("started")[0]["deepspeed"]
    assert told["zero_optimization"]["stage"] == (2 if kind == "zero2" else 3)
    assert (trained.checkpoint(3) / "deepspeed.json").exists()
    assert (trained.job.work / "deepspeed.json").exists()
    details = next(each for each in pending(trained.job.staging) if each.kind == "checkpoint").details
    assert details["deepspeed"] == told
    assert (details["engine"], details["world_size"]) == ("zero2" if kind == "zero2" else "zero3", 2)


def test_fsdps_config_is_in_the_run(engine: Engine) -> None:
    """As DeepSpeed's is; and gradients are cut at every micro batch, not kept whole until the last."""
    trained = engine("fsdp2", DPO)
    told = trained.of("started")[0]["fsdp"]
    assert (told["fsdp_config"]["version"], told["fsdp_config"]["reshard_after_forward"]) == (2, True)
    assert told["accelerator_config"]["gradient_accumulation_kwargs"] == {"sync_each_batch": True}
    for folder in (trained.checkpoint(3), trained.job.work):
        assert json.loads((folder / "fsdp.json").read_text()) == told
    details = next(each for each in pending(trained.job.staging) if each.kind == "checkpoint").details
    assert (details["fsdp"], details["engine"], details["world_size"]) == (told, "fsdp2", 2)


def test_ddp_in_fsdps_place_is_found_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Accelerate runs DDP where it knows no FSDP, as on a CPU, without a word: here the ranks end."""
    job = ranks_job(tmp_path / "work", SFT, **ENGINES["fsdp2"])
    assert finish(Workers(job, sys.executable, "tests.training.untold_rank", grace_s=2.0)) == 1
    assert not job.outcome.exists()
    assert "FSDP 2 was requested, but 21 weights are whole on every rank" in capfd.readouterr().err


@pytest.mark.parametrize("kind", kinds("zero3", "fsdp2"))
def test_an_export_of_a_cut_model_is_whole(engine: Engine, kind: str) -> None:
    """`final/` is safetensors of every weight, and Transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = engine(kind, DPO)
    model = AutoModelForCausalLM.from_pretrained(trained.final)
    assert sum(weight.numel() for weight in model.parameters()) == trained.of("started")[0]["parameters"]
    ids = AutoTokenizer.from_pretrained(trained.final)("A hammer is a tool.", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert not list(trained.final.glob("*.pt"))


@pytest.mark.parametrize("kind", kinds("ddp", "zero2", "offload", thorough=("zero2", "offload")))
def test_a_fork_takes_the_steps_of_a_started_rank(tmp_path: Path, engine: Engine, kind: str) -> None:
    """What most tests here train with has the bits of what a user trains with; the killed runs below show it of the others."""
    started = run_started(ranks_job(tmp_path / "work", DPO, **ENGINES[kind]))
    assert started.trajectory == engine(kind, DPO).trajectory
    assert all(torch.equal(weight, final(engine(kind, DPO))[name]) for name, weight in final(started).items())


@pytest.mark.parametrize("kind", kinds(*ENGINES, thorough=("ddp", "zero2", "offload")))
def test_a_resume_holds_no_second_state(tmp_path: Path, engine: Engine, kind: str) -> None:
    """A rank's part of a checkpoint is mapped, not read into memory, and is no file's any more when training begins."""
    saved = engine(kind, DPO).checkpoint(3)
    job = ranks_job(tmp_path / "again", DPO, resume_from=saved, **ENGINES[kind])
    assert finish(forks.workers(job, "tests.training.mapped_rank")) == 0


@pytest.mark.parametrize("kind", kinds("ddp", "zero2", "offload"))
def test_a_resume_on_the_same_shape_is_exact(tmp_path: Path, engine: Engine, kind: str) -> None:
    """From the middle of an epoch on, every step and the final weights have the same bits."""
    whole = engine(kind, DPO)
    again = run(ranks_job(tmp_path / "work", DPO, resume_from=whole.checkpoint(3), **ENGINES[kind]))
    assert again.of("started")[0]["step"] == 3
    assert again.trajectory == whole.trajectory[3:]
    assert all(torch.equal(weight, final(whole)[name]) for name, weight in final(again).items())


def kept_by(trained: Trained) -> Path:
    return max(trained.job.staging.glob("reference-*/"))


@pytest.mark.parametrize("kind", kinds(*ENGINES))
def test_ranks_share_the_references_pass(alone: Engine, engine: Engine, kind: str) -> None:
    """Whatever cuts the policy, its log-probabilities before the first step are those of one process."""
    whole, shared = (load_values(kept_by(each) / VALUES) for each in (alone(DPO), engine(kind, DPO)))
    assert whole.keys() == shared.keys()
    for data, pairs in whole.items():
        np.testing.assert_allclose(shared[data], pairs, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", kinds("zero2", "zero3", "fsdp2", thorough=("zero2",)))
def test_a_pass_before_training_leaves_no_trace(tmp_path: Path, engine: Engine, kind: str) -> None:
    """An attempt that finds the log-probabilities makes no engine for them, and takes the same steps to the bit."""
    whole = engine(kind, DPO)
    shutil.copytree(kept_by(whole), tmp_path / "kept" / "0000-test")
    job = ranks_job(tmp_path / "work", DPO, **ENGINES[kind])
    again = run(job.model_copy(update={"reference": tmp_path / "kept"}))
    assert [line["computed"] for line in again.of("reference")] == [0, 0]
    assert again.trajectory == whole.trajectory


@pytest.mark.parametrize("kind", kinds("zero3", "fsdp2", thorough=("fsdp2",)))
def test_a_killed_run_of_a_cut_model_ends_as_if_undisturbed(
    tmp_path: Path, engine: Engine, kind: str
) -> None:
    """SIGKILL of all ranks after the commit of step 3: the next attempt repeats what was lost, with the same bits.

    Both attempts are started, and the undisturbed run is of forks.
    """
    job = ranks_job(tmp_path / "killed", DPO, **ENGINES[kind])
    workers = start(job)
    try:
        wait_for_step(job, workers, 4)
    finally:
        workers.kill()
    assert workers.poll() == -signal.SIGKILL
    assert not job.outcome.exists()
    whole = engine(kind, DPO)
    again = run_started(
        ranks_job(tmp_path / "again", DPO, resume_from=job.staging / "checkpoint-3", **ENGINES[kind])
    )
    assert again.trajectory == whole.trajectory[3:]
    assert all(torch.equal(weight, final(whole)[name]) for name, weight in final(again).items())


@pytest.mark.parametrize("kind", kinds("zero3", "fsdp2", thorough=("zero3",)))
def test_a_cut_run_that_lacks_only_its_export_is_exported(tmp_path: Path, engine: Engine, kind: str) -> None:
    """Killed during the export, the next attempt takes no step, gathers the last checkpoint, and writes the same."""
    whole = engine(kind, DPO)
    again = run(ranks_job(tmp_path / "work", DPO, resume_from=whole.checkpoint(6), **ENGINES[kind]))
    assert again.of("step") == again.of("saved") == []
    assert all(torch.equal(weight, final(whole)[name]) for name, weight in final(again).items())


def test_ranks_stop_together(tmp_path: Path, engine: Engine) -> None:
    """SIGTERM reaches the ranks at different moments; all stop at one step, which is saved and goes on exactly."""
    job = ranks_job(tmp_path / "stopped", SFT, "max_steps=60", "save_steps=60", **ENGINES["ddp"])
    workers = start(job)
    wait_for_step(job, workers, 2)
    os.kill(workers.pids[1], signal.SIGTERM)
    time.sleep(0.3)
    os.kill(workers.pids[0], signal.SIGTERM)
    assert finish(workers) == 0
    stopped = Trained(job, Outcome.model_validate_json(job.outcome.read_text()))
    assert stopped.outcome.status == "preempted"
    last = stopped.of("step")[-1]["step"]
    assert [each.step for each in pending(job.staging) if each.kind == "checkpoint"] == [last]
    assert last < 60
    assert len(list(stopped.checkpoint(last).glob(RANK_FILES))) == 2


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    """Rank 0 waits for a gradient that does not come: it is ended, and what happened is not told as a preemption."""
    job = ranks_job(tmp_path / "work", SFT, **ENGINES["ddp"])
    workers = Workers(job, sys.executable, "tests.training.failing_rank", grace_s=2.0)
    assert finish(workers) == 1
    assert not job.outcome.exists()
    assert [line["step"] for line in Trained(job, Outcome(status="done")).of("step")] in ([1], [1, 2])


@needs_compiler
def test_rmsprop_is_offloaded_as_itself(tmp_path: Path, alone: Engine) -> None:
    """Notus' setting: DeepSpeed has no RMSprop for the host, so torch's own steps there, and no Adam in its place."""
    job = ranks_job(tmp_path / "work", DPO, "optim=rmsprop", **ENGINES["offload"])
    single = train(ranks_job(tmp_path / "single", DPO, "optim=rmsprop", micro_batch=8))
    assert_alike(single, run(job))
    with pytest.raises(AssertionError):
        assert_alike(single, alone(DPO))


QLORA = (
    "use_peft=true",
    "load_in_4bit=true",
    "use_bnb_nested_quant=true",
    "lora_r=4",
    "lora_target_modules=[q_proj, v_proj]",
    "optim=paged_adamw_32bit",
    "max_steps=3",
)


def test_qlora_trains_on_one_process_and_under_ddp(tmp_path: Path) -> None:
    """NF4 with double quantisation, adapters in bfloat16, paged AdamW: two processes take one's steps, nearly."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
    single = train(ranks_job(tmp_path / "single", SFT, *QLORA, micro_batch=8))
    ddp = run(ranks_job(tmp_path / "ddp", SFT, *QLORA, **ENGINES["ddp"]))
    assert steps_of(ddp, "samples") == steps_of(single, "samples")
    assert steps_of(ddp, "loss") == pytest.approx(steps_of(single, "loss"), abs=5e-3)
    started = single.of("started")[0]
    assert 0 < started["trainable_parameters"] < started["parameters"]


def test_an_evaluation_changes_nothing_of_qlora(tmp_path: Path) -> None:
    """What bitsandbytes does for inference on some CPUs would leave the next steps without gradients."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux only")
    settings = (*QLORA, "tiny.hidden_size=64", "lora_dropout=0.0")
    evaluated = ("eval_strategy=steps", "eval_steps=1")
    plain = train(ranks_job(tmp_path / "plain", SFT, *settings, micro_batch=8))
    tested = train(ranks_job(tmp_path / "tested", SFT, *settings, *evaluated, micro_batch=8))
    assert len(tested.of("eval")) == 3
    assert tested.trajectory == plain.trajectory
