"""Two nodes train one run. If one of them is lost, the recovered run ends with the same model as an undisturbed run."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness import RunView, TrainerRun, wait_until
from trainer.bucket.manifest import committed
from trainer.errors import ExitCode

STEPS = 60
RECIPE = f"""
method: sft
init: tiny
dataset_mixture: {{datasets: [{{id: "generated:chats"}}]}}
global_batch_size: 4
max_steps: {STEPS}
save_steps: 20
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


@contextmanager
def nodes(
    recipe: Path, checkpoints: str, run: str, *, step_s: float = 0.02, extra: Mapping[str, str] | None = None
) -> Iterator[list[TrainerRun]]:
    """Start both nodes of an attempt, each with its own disk. `extra` is added to the environment of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as both:
        yield [
            both.enter_context(
                TrainerRun(
                    recipe,
                    checkpoints,
                    run,
                    recipe.parent / f"work-{run}" / f"node-{rank}",
                    module="tests.soak.attempt",
                    environ={
                        "GROUP_WORLD_SIZE": "2",
                        "GROUP_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "COUNTING_STEP_S": str(step_s),
                        **(extra or {}),
                    },
                )
            )
            for rank in range(2)
        ]


def finish(recipe: Path, checkpoints: str, run: str) -> RunView:
    with nodes(recipe, checkpoints, run) as both:
        for node in both:
            assert node.wait(60) == ExitCode.DONE, node.log
    return RunView(checkpoints, run)


def assert_alike(disturbed: RunView, whole: RunView) -> None:
    """Check that every event of a step, and the final model, equal those of the undisturbed run."""
    steps = whole.steps()
    assert set(steps) == set(range(1, STEPS + 1))
    for step, repeats in disturbed.steps().items():
        assert all(event == steps[step][0] for event in repeats)
    model, other = whole.final(), disturbed.final()
    assert model is not None
    assert other is not None
    assert model.weights_digest == other.weights_digest


def test_two_nodes_make_one_checkpoint(recipe: Path, checkpoints: str) -> None:
    """Each node uploads the files of its own ranks. Node 0 commits all of them once and writes the events."""
    view = finish(recipe, checkpoints, "whole")
    newest = committed(view.bucket)[0]
    assert newest.step == STEPS
    assert {"of-rank-0.bin", "of-rank-1.bin", "model.safetensors"} <= {file.path for file in newest.files}
    assert [event["shape"]["nodes"] for event in view.events("claimed")] == [2]
    assert len(view.events("done")) == 1
    assert view.final() is not None


@pytest.mark.parametrize("lost", [0, 1], ids=["node 0", "node 1"])
def test_a_lost_node_ends_the_attempt_on_both_nodes(recipe: Path, checkpoints: str, lost: int) -> None:
    """The other node asks for a recovery immediately, and the next attempt resumes from the last complete commit."""
    whole = finish(recipe, checkpoints, "whole")
    view = RunView(checkpoints, "lost")
    with nodes(recipe, checkpoints, "lost", step_s=0.05) as both:
        wait_until(view.committed_steps, "a commit")
        assert both[lost].lose_machine() == -signal.SIGKILL
        left = both[1 - lost]
        assert left.wait(60) == ExitCode.RECOVER, left.log
        assert f"node {lost}" in left.log
    assert view.final() is None
    assert_alike(finish(recipe, checkpoints, "lost"), whole)
    assert [event["step"] for event in view.events("restored")] == [0, view.events("restored")[1]["step"]]
    assert view.events("restored")[1]["step"] >= 20


def test_half_a_checkpoint_is_not_committed(recipe: Path, checkpoints: str) -> None:
    """Node 1 is lost while node 0 waits for its part. No manifest may name what node 0 has uploaded."""
    view = RunView(checkpoints, "half")
    with nodes(recipe, checkpoints, "half", step_s=0.1) as both:
        wait_until(lambda: both[0].step() >= 5, "node 0 to be training")
        os.kill(
            both[1].process.pid, signal.SIGSTOP
        )  # its supervisor uploads nothing; its training program continues
        wait_until(lambda: list(view.bucket.list("checkpoints/step-00000020/")), "node 0's part")
        both[1].lose_machine()
        assert both[0].wait(60) == ExitCode.RECOVER, both[0].log
    assert "step 20 is incomplete: node 1 is lost" in both[0].log
    assert view.committed_steps() == []
    assert_alike(finish(recipe, checkpoints, "half"), finish(recipe, checkpoints, "whole"))
