"""The training processes of one attempt: their command and environment, and how they end together."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.fit import Fit
from trainer.job import Job
from trainer.recipe import Recipe
from trainer.supervisor.workers import Rendezvous, Workers, choose_rendezvous, command, environment

RECIPE = {
    "name": "fake",
    "method": "sft",
    "init": "tiny",
    "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
    "global_batch_size": 4,
}


def job(work: Path, **fit: Any) -> Job:
    layout: dict[str, Any] = {
        "processes": 1,
        "micro_batch": 1,
        "accumulation": 1,
        "engine": "single",
        "attention": "sdpa",
        "activation_checkpointing": False,
        "reference": "none",
        "threads": 3,
        "use_cpu": True,
        "reasons": (),
    }
    return Job(
        run_id="r",
        attempt=1,
        recipe=Recipe.model_validate(RECIPE),
        fit=Fit.model_validate({**layout, **fit}),
        work=work,
        model=None,
        resume_from=None,
    )


def test_the_command_of_a_rank_is_the_program_with_the_job(tmp_path: Path) -> None:
    """The number of the rank is in its environment."""
    assert command(tmp_path / "job.json", "python", "a.program") == [
        "python", "-m", "a.program", str(tmp_path / "job.json"),
    ]  # fmt: skip


def added(job: Job, **arguments: Any) -> dict[str, str]:
    return {
        name: value
        for name, value in environment(job, {"HOME": "/home"}, **arguments).items()
        if name not in ("HOME", "PYTHONPATH")
    }


def test_one_process_on_the_cpu_gets_its_number_of_threads(tmp_path: Path) -> None:
    """It gets no rank variables, because it is not one of several ranks."""
    assert added(job(tmp_path)) == {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "passive",
    }


def test_ranks_get_torchruns_variables(tmp_path: Path) -> None:
    """The ranks of the second node are numbered after those of the first."""
    ddp = job(tmp_path, processes=16, nodes=2, engine="ddp", use_cpu=False)
    assert added(ddp, local_rank=3, at=Rendezvous("10.0.0.1", 29500, node=1)) == {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "3",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_deepspeed_needs_rank_variables_for_one_process_too(tmp_path: Path) -> None:
    """One GPU with offload is ZeRO with a world size of 1. On the CPU the variables also name the device."""
    alone = added(job(tmp_path, engine="zero3"), at=Rendezvous(port=1))
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1")
    assert (alone["DS_ACCELERATOR"], alone["ACCELERATE_TORCH_DEVICE"]) == ("cpu", "cpu")
    assert "DS_ACCELERATOR" not in added(job(tmp_path, engine="zero3", use_cpu=False))


def test_fsdp_needs_rank_variables_for_one_process_too(tmp_path: Path) -> None:
    """FSDP shards over a process group, even of size 1. No variable of DeepSpeed is set."""
    alone = added(job(tmp_path, engine="fsdp2"), at=Rendezvous(port=1))
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1")
    assert not {"DS_ACCELERATOR", "ACCELERATE_USE_DEEPSPEED"} & alone.keys()


def test_existing_settings_of_the_environment_are_kept(tmp_path: Path) -> None:
    """A variable that is already set is not replaced."""
    assert environment(job(tmp_path), {"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"
    found = environment(job(tmp_path, use_cpu=False), {"PYTORCH_ALLOC_CONF": "backend:native"})
    assert found["PYTORCH_ALLOC_CONF"] == "backend:native"


PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
open(f"{sys.argv[1]}.{rank}", "w").write(str(os.getpid()))
fate = os.environ["FATE"].split(",")[rank]
while fate == "waits" or (fate == "stops" and not stops):
    time.sleep(0.01)
if fate == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(fate) if fate.isdigit() else 0)
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts one rank for each fate, of a program that needs no torch."""
    (tmp_path / "fated.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[Workers] = []

    def start(*fates: str, grace_s: float = 30.0) -> Workers:
        monkeypatch.setenv("FATE", ",".join(fates))
        made = job(tmp_path, processes=len(fates), engine="ddp")
        started.append(Workers(made, sys.executable, "fated", grace_s=grace_s))
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("job.json.*"))) < len(fates):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return started[-1]

    yield start
    for running in started:
        running.kill()


def end(workers: Workers) -> int:
    deadline = time.monotonic() + 30
    while (code := workers.poll()) is None:
        assert time.monotonic() < deadline
        workers.wait(0.05)
    return code


def test_the_exit_code_is_0_if_all_ranks_succeed(workers: Any) -> None:
    """It is known when the last rank has ended."""
    assert end(workers("0", "0")) == 0


def test_a_killed_rank_gives_the_signal_as_exit_code(workers: Any) -> None:
    """The kernel kills with SIGKILL for lack of memory. The other ranks do not wait forever."""
    assert end(workers("waits", "killed", grace_s=0.2)) == -signal.SIGKILL


def test_a_failed_rank_ends_the_others(workers: Any) -> None:
    """They have a grace period in which they can report what they know."""
    running = workers("waits", "3", "waits", grace_s=0.2)
    started = time.monotonic()
    assert end(running) == 3
    assert time.monotonic() - started < 20
    assert end(running) == 3


def test_the_first_failure_is_the_exit_code(workers: Any, tmp_path: Path) -> None:
    """Later failures, such as the kill of the waiting ranks, are only its consequences."""
    running = workers("waits", "killed", grace_s=60)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{(tmp_path / 'job.json.1').read_text()}/fd") and time.monotonic() < deadline:  # noqa: PTH110
        running.wait(0.01)
        assert running.poll() is None
        if running._exit_code:
            break
    os.kill(int((tmp_path / "job.json.0").read_text()), signal.SIGTERM)  # the rank receives it and continues
    running.kill()
    assert running.poll() == -signal.SIGKILL


def test_a_stop_reaches_every_rank(workers: Any) -> None:
    """Every rank receives the signal directly from the supervisor."""
    running = workers("stops", "stops")
    assert running.poll() is None
    running.stop()
    assert end(running) == 0


def test_a_kill_leaves_no_process(workers: Any, tmp_path: Path) -> None:
    """Ranks that ignore the request to stop are ended too."""
    running = workers("waits", "waits")
    running.kill()
    assert running.poll() == -signal.SIGKILL
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"job.json.{rank}").read_text()), 0)


def test_the_rendezvous_port_is_below_those_of_outgoing_connections() -> None:
    """An outgoing connection that takes the port before rank 0 listens would end the attempt as a bug."""
    ports = {choose_rendezvous().port for _ in range(50)}
    assert max(ports) < 32_768
    assert len(ports) > 1


def test_the_rendezvous_port_does_not_depend_on_the_seed() -> None:
    """Trainings seed `random`, and two trainings with equal seeds would choose the same port."""
    ports = set()
    for _ in range(5):
        random.seed(7)
        ports.add(choose_rendezvous().port)
    assert len(ports) > 1
