"""Staged checkpoints are committed after every kind of failure, and the exit code shows how to continue."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import RunView, wait_until
from trainer.bucket import attempts
from trainer.bucket.manifest import committed
from trainer.errors import ExitCode, ModelError, RecipeError, Superseded, UserError
from trainer.recipe import Recipe
from trainer.supervisor import save_window
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import run

RECIPE = Recipe.model_validate(
    {
        "name": "fake",
        "method": "sft",
        "init": "tiny",
        "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
        "global_batch_size": 4,
    }
)


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    return RunRequest(
        recipe=RECIPE,
        checkpoints=str(tmp_path / "runs"),
        run_id="r",
        program="tests.fakes.worker",
        work=tmp_path / "work",
    )


@pytest.fixture
def view(request_: RunRequest) -> RunView:
    return RunView(request_.checkpoints, request_.run_id)


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sets how the next attempt's worker fails. The worker's Python needs no torch."""
    monkeypatch.setenv("AEOLUS_TRAINER_PYTHON", sys.executable)
    return monkeypatch


def attempt(request: RunRequest, fate: pytest.MonkeyPatch, what: str = "") -> ExitCode:
    fate.setenv("FAKE_WORKER", what)
    return run(request, Notice())


def test_an_undisturbed_run_ends_done_with_its_model_committed(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The final model is committed like a checkpoint, and the two newest checkpoints are kept."""
    assert attempt(request_, fate) == ExitCode.DONE
    assert view.final().step == 6
    assert view.committed_steps() == [6, 4]
    assert [event["step"] for event in view.events("committed")][-1] == 6
    assert view.events()[-1]["kind"] == "done"
    assert not list((request_.work).glob("*"))


def test_a_completed_run_is_not_run_again(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The second run of the same command exits immediately and changes nothing."""
    attempt(request_, fate)
    before = {item.key: view.bucket.get(item.key) for item in view.bucket.list("")}
    assert attempt(request_, fate) == ExitCode.DONE
    assert {item.key: view.bucket.get(item.key) for item in view.bucket.list("")} == before


def test_a_checkpoint_staged_before_a_crash_is_committed(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """A bug is not retried, but the checkpoint before it is safe, and a fixed program resumes from it."""
    assert attempt(request_, fate, "crash@5") == ExitCode.BUG
    assert view.committed_steps()[0] == 4
    assert attempt(request_, fate) == ExitCode.DONE
    assert [event["step"] for event in view.events("restored")] == [0, 4]
    assert [event["step"] for event in view.events("step")] == [1, 2, 3, 4, 5, 5, 6]


def test_a_killed_worker_asks_for_a_recovery(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The kernel or the cloud killed it, so another machine may succeed."""
    assert attempt(request_, fate, "killed@3") == ExitCode.RECOVER
    assert view.committed_steps() == [2]
    assert "SIGKILL" in view.events("failed")[0]["message"]


def test_a_worker_that_is_killed_repeatedly_without_a_commit_is_not_recovered_forever(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """Otherwise a host that runs out of memory at the first step would be paid for all night."""
    codes = [attempt(request_, fate, "killed@1") for _ in range(3)]
    assert codes == [ExitCode.RECOVER, ExitCode.RECOVER, ExitCode.BUG]
    assert "the 2 attempts before it" in view.events("failed")[-1]["message"]


@contextmanager
def noticed_at(step: int, view: RunView, source: str) -> Iterator[Notice]:
    """Yield a notice that is given once the step is reported."""
    notice = Notice()

    def give() -> None:
        wait_until(
            lambda: view.bucket.get_or_none("events/0001.jsonl") and step in view.steps(), f"step {step}"
        )
        notice.give(source)

    giver = threading.Thread(target=give)
    giver.start()
    yield notice
    giver.join()


def test_a_notice_saves_the_current_step_and_asks_for_a_recovery(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """No step is lost: the next attempt resumes at the next step."""
    fate.setenv("FAKE_WORKER", "waits@3")
    with noticed_at(3, view, "SIGTERM") as notice:
        assert run(request_, notice) == ExitCode.RECOVER
    assert view.committed_steps() == [3, 2]
    assert view.events("preempted")[0]["message"] == "at step 3"
    assert attempt(request_, fate) == ExitCode.DONE
    assert [event["step"] for event in view.events("step")] == [1, 2, 3, 4, 5, 6]


def test_stuck_workers_are_killed_after_a_notice(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """They ignore the request to stop, and what they had staged is still committed."""
    fate.setenv("FAKE_WORKER", "deaf@5")
    fate.setattr(save_window, "STUCK_UNMEASURED_S", 0.5)
    fate.setattr(save_window, "STUCK_S", 0.5)
    with noticed_at(5, view, "budget") as notice:
        assert run(request_, notice) == ExitCode.RECOVER
    assert view.committed_steps() == [4, 2]
    assert any("killed as stuck" in event["message"] for event in view.events("log"))
    assert attempt(request_, fate) == ExitCode.DONE


def test_a_notice_before_the_start_starts_nothing(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """A machine that is already being preempted claims no attempt."""
    fate.setenv("FAKE_WORKER", "")
    notice = Notice()
    notice.give("SIGTERM")
    assert run(request_, notice) == ExitCode.RECOVER
    assert view.events() == []


def test_a_recipe_that_the_worker_rejects_is_not_retried(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The worker's message reaches the user, with the exit code that ends recovery."""
    with pytest.raises(RecipeError, match="the data is not to be had") as caught:
        attempt(request_, fate, "wrong")
    assert caught.value.exit_code == ExitCode.CONFIG
    assert view.events("failed")[0]["exit_code"] == 78


def test_an_unreachable_hub_is_retried_but_not_forever(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """A run that has trained for days must survive it, but a model that does not exist must not be retried all night."""
    assert attempt(request_, fate, "killed@3") == ExitCode.RECOVER
    codes = []
    for _ in range(3):
        with pytest.raises(UserError, match="cannot be loaded for now") as caught:
            attempt(request_, fate, "away")
        codes.append(caught.value.exit_code)
    assert codes == [ExitCode.RECOVER, ExitCode.RECOVER, ExitCode.CONFIG]
    assert "the 2 attempts before it" in caught.value.message
    assert view.events("failed")[-1]["exit_code"] == ExitCode.CONFIG


def test_another_recipe_under_the_same_run_id_is_refused(
    request_: RunRequest, fate: pytest.MonkeyPatch
) -> None:
    """A run that mixed two recipes would be a model that no recipe describes."""
    attempt(request_, fate, "killed@3")
    other = request_.model_copy(update={"recipe": RECIPE.model_copy(update={"global_batch_size": 8})})
    with pytest.raises(RecipeError, match="global_batch_size"):
        attempt(other, fate)


def test_a_checkpoint_with_a_flipped_bit_is_rejected(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The one before is restored, and the reason is an event."""
    attempt(request_, fate, "crash@5")
    newest = committed(view.bucket)[0]
    assert newest.step == 4
    key = f"{newest.prefix}model.safetensors"
    data = bytearray(view.bucket.get(key))
    data[1000] ^= 1
    view.bucket.put(key, bytes(data))
    assert attempt(request_, fate) == ExitCode.DONE
    assert [event["step"] for event in view.events("restored")] == [0, 2]
    assert "model.safetensors" in view.events("rejected")[0]["reason"]


def test_retention_does_not_count_a_rejected_checkpoint(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The damaged checkpoint is the newest and has the right sizes. It must not displace the one that was restored."""
    attempt(request_, fate, "crash@5")
    key = f"{committed(view.bucket)[0].prefix}model.safetensors"
    view.bucket.put(key, bytes(len(view.bucket.get(key))))
    fate.setenv("FAKE_WORKER", "waits@3")
    notice = Notice()

    def give() -> None:
        wait_until(
            lambda: 3 in {event["step"] for event in view.events("step") if event["attempt"] == 2}, "step 3"
        )
        notice.give("SIGTERM")

    giver = threading.Thread(target=give)
    giver.start()
    assert run(request_, notice) == ExitCode.RECOVER
    giver.join()
    assert view.committed_steps() == [4, 3, 2]
    assert attempt(request_, fate) == ExitCode.DONE
    assert [event["step"] for event in view.events("restored")] == [0, 2, 3]
    assert view.committed_steps() == [6, 4]


def test_a_superseded_attempt_stops_and_commits_nothing(
    request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """If two attempts run at once, the older one ends with its own exit code and leaves the bucket unchanged."""
    fate.setenv("FAKE_WORKER", "waits@3")
    notice = Notice()

    def take_over() -> None:
        wait_until(lambda: view.committed_steps() == [2], "step 2")
        attempts.claim(view.bucket, {"node": "another"})
        notice.give("SIGTERM")

    taker = threading.Thread(target=take_over)
    taker.start()
    with pytest.raises(Superseded) as caught:
        run(request_, notice)
    taker.join()
    assert caught.value.exit_code == ExitCode.SUPERSEDED
    assert view.committed_steps() == [2]
    assert view.events("superseded")


def test_a_missing_model_in_a_bucket_is_an_error_that_names_its_run(
    request_: RunRequest, tmp_path: Path, fate: pytest.MonkeyPatch
) -> None:
    """This happens if DPO is started before the SFT run it builds on is done."""
    recipe = RECIPE.model_copy(
        update={"init": None, "model_name_or_path": f"file://{tmp_path}/runs/sft/final"}
    )
    with pytest.raises(ModelError, match=r"run sft .* has no final model yet"):
        attempt(request_.model_copy(update={"recipe": recipe}), fate)
