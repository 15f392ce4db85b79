"""The real trainer on two machines: one trajectory, one checkpoint, one stop."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RunView, TrainerRun, wait_until
from tests.training.jobs import Trained
from tests.training.ranks import finish, ranks_job
from tests.training.test_engines import needs_compiler
from trainer.errors import ExitCode
from trainer.job import Job, Outcome
from trainer.supervisor.workers import Rendezvous, Workers, choose_rendezvous
from trainer.worker.checkpoint.format import INDEX_FILE, RANK_FILES, rank_file

RECIPE = """
method: dpo
init: tiny
tiny: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 400}
dataset_mixture: {datasets: [{id: "generated:preferences", split: train}]}
max_train_samples: 38
global_batch_size: 8
micro_batch_size: 2
max_length: 96
learning_rate: 2.0e-3
max_steps: 30
save_steps: 10
eval_strategy: "no"
bf16: false
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@contextmanager
def nodes(recipe: Path, checkpoints: str, run: str) -> Iterator[list[TrainerRun]]:
    with ExitStack() as both:
        port = str(choose_rendezvous().port)
        yield [
            both.enter_context(
                TrainerRun(
                    recipe,
                    checkpoints,
                    run,
                    recipe.parent / f"work-{run}-{rank}",
                    environ={
                        "GROUP_WORLD_SIZE": "2",
                        "GROUP_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                    },
                )
            )
            for rank in range(2)
        ]


def run_to_the_end(recipe: Path, checkpoints: str, run: str) -> RunView:
    with nodes(recipe, checkpoints, run) as both:
        for node in both:
            assert node.wait() == ExitCode.DONE, node.log
    return RunView(checkpoints, run)


def test_a_notice_on_one_node_costs_no_step_on_either(recipe: Path, tmp_path: Path) -> None:
    """All ranks stop at one step, both nodes upload, node 0 commits; the next attempt goes on with the same bits."""
    checkpoints = str(tmp_path / "runs")
    view = RunView(checkpoints, "noticed")
    with nodes(recipe, checkpoints, "noticed") as both:
        wait_until(lambda: both[0].step() >= 3, "step 3")
        both[1].terminate()
        assert [node.wait() for node in both] == [ExitCode.RECOVER] * 2, both[0].log
    assert view.events("notice")[0]["source"] == "SIGTERM on node 1"
    stopped = view.events("step")[-1]["step"]
    assert view.committed_steps()[0] == stopped < 30
    run_to_the_end(recipe, checkpoints, "noticed")
    whole = run_to_the_end(recipe, checkpoints, "whole")
    assert [event["step"] for event in view.events("step")] == list(range(1, 31))
    assert view.steps() == whole.steps()
    model, other = view.final(), whole.final()
    assert model is not None
    assert other is not None
    assert model.weights_digest == other.weights_digest


def on_two_nodes(work: Path, engine: str, *, resume_from: Path | None = None) -> list[Job]:
    """A cut model over two machines, each with a folder of its own, as the supervisors of two nodes start it."""
    layout: dict[str, Any] = {"processes": 2, "nodes": 2, "micro_batch": 2, "engine": engine}
    jobs = [
        ranks_job(work / str(node), "zephyr-tiny/dpo", resume_from=resume_from, **layout) for node in range(2)
    ]
    at = Rendezvous("127.0.0.1", choose_rendezvous().port)
    with ExitStack() as ending:
        both = []
        for node, job in enumerate(jobs):
            both.append(Workers(job, sys.executable, at=at._replace(node=node)))
            ending.callback(both[-1].kill)
        for workers in both:
            assert finish(workers) == 0
    return jobs


@pytest.mark.parametrize(
    "engine",
    [pytest.param("zero3", marks=needs_compiler), pytest.param("fsdp2", marks=pytest.mark.thorough)],
)
def test_a_cut_model_saves_each_nodes_parts_on_its_own_disk(tmp_path: Path, engine: str) -> None:
    """Together they are the checkpoint, from which both go on exactly."""
    whole = on_two_nodes(tmp_path / "whole", engine)
    together = tmp_path / "restored" / "checkpoint-3"
    for node, job in enumerate(whole):
        parts = job.staging / "checkpoint-3"
        assert [path.name for path in parts.glob(RANK_FILES)] == [rank_file(node)]
        assert (parts / INDEX_FILE).exists() == (node == 0)
        assert (job.staging / "checkpoint-3.staged").exists()
        shutil.copytree(parts, together, dirs_exist_ok=True)
    again = on_two_nodes(tmp_path / "again", engine, resume_from=together)
    steps = [Trained(each[0], Outcome(status="done")).trajectory for each in (whole, again)]
    assert len(steps[1]) == 3
    assert steps[0][3:] == steps[1]
    weights = [(job.staging / "final" / "model.safetensors").read_bytes() for job in (whole[0], again[0])]
    assert weights[0] == weights[1]
    assert not whole[1].steps.exists()
    assert whole[1].outcome.exists()
    assert not (whole[1].staging / "final").exists()
