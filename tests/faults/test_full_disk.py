"""If the staging folder is full, the current save is lost, but no commit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_supervisor import RECIPE
from tests.harness import RunView
from tests.mounts import tmpfs
from trainer.errors import ExitCode, NoRoom, UserError
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import run
from trainer.supervisor.staging import StagingChoice


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 8 MiB."""
    with tmpfs(tmp_path / "small", mib=8) as folder:
        yield folder


@pytest.fixture
def view(tmp_path: Path) -> RunView:
    return RunView(str(tmp_path / "runs"), "r")


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AEOLUS_TRAINER_PYTHON", sys.executable)
    monkeypatch.setenv("FAKE_WORKER", "")
    return monkeypatch


def request_(tmp_path: Path, *, work: Path, tmpfs: Path, staging: StagingChoice) -> RunRequest:
    return RunRequest(
        recipe=RECIPE,
        checkpoints=str(tmp_path / "runs"),
        run_id="r",
        program="tests.fakes.worker",
        work=work,
        staging=staging,
        tmpfs=tmpfs,
    )


@pytest.mark.parametrize("staging", ["disk", "tmpfs"])
def test_a_save_that_does_not_fit_is_said_and_recovered_from(
    tmp_path: Path, small: Path, view: RunView, fate: pytest.MonkeyPatch, staging: StagingChoice
) -> None:
    """The run resumes from the previous commit, on this machine or on a larger one."""
    work = small / "work" if staging == "disk" else tmp_path / "work"
    request = request_(tmp_path, work=work, tmpfs=small, staging=staging)
    fate.setenv("FAKE_WORKER", "crash@3")
    assert run(request, Notice()) == ExitCode.BUG
    assert view.committed_steps() == [2]

    fate.setenv("FAKE_WORKER", "")
    fate.setenv("FAKE_WORKER_MB", "30")
    with pytest.raises(NoRoom, match=r"no room left in .* MB of the save were written") as caught:
        run(request, Notice())
    assert caught.value.exit_code == ExitCode.RECOVER
    assert view.committed_steps() == [2]
    failed = view.events("failed")[-1]
    assert failed["exit_code"] == 75
    assert str(work if staging == "disk" else "work") in failed["message"]
    assert not [path for path in small.rglob("*") if path.is_file()]

    fate.setenv("FAKE_WORKER_MB", "0.1")
    assert run(request, Notice()) == ExitCode.DONE
    assert view.events("restored")[-1]["step"] == 2


def test_what_is_staged_before_the_disk_is_full_is_committed(
    tmp_path: Path, small: Path, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The uploader commits complete checkpoints and ignores incomplete ones."""
    request = request_(tmp_path, work=small / "work", tmpfs=tmp_path, staging="disk")
    fate.setenv("FAKE_WORKER", "fills@3")
    fate.setenv("FAKE_WORKER_MB", "3")
    with pytest.raises(NoRoom):
        run(request, Notice())
    assert view.committed_steps() == [2]


def test_a_machine_too_small_for_what_is_committed_is_refused_before_training(
    tmp_path: Path, small: Path, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded or started. After three such attempts in a row the run is not recovered any more."""
    fate.setenv("FAKE_WORKER", "crash@3")
    fate.setenv("FAKE_WORKER_MB", "20")
    elsewhere = request_(tmp_path, work=tmp_path / "work", tmpfs=tmp_path, staging="disk")
    assert run(elsewhere, Notice()) == ExitCode.BUG
    here = request_(tmp_path, work=small / "work", tmpfs=small, staging="auto")
    codes = []
    for _ in range(3):
        with pytest.raises(
            UserError, match=r"3 checkpoints of 0\.02 GB .* and one that is restored"
        ) as caught:
            run(here, Notice())
        codes.append(caught.value.exit_code)
    assert codes == [ExitCode.RECOVER, ExitCode.RECOVER, ExitCode.CONFIG]
    assert len(view.events("started")) == 1
    assert not [path for path in small.rglob("*") if path.is_file()]


def test_a_known_size_that_fits_is_staged_in_memory(
    tmp_path: Path, small: Path, view: RunView, fate: pytest.MonkeyPatch
) -> None:
    """The first attempt does not know the size and stages on disk. The next one stages on tmpfs and removes its files."""
    request = request_(tmp_path, work=tmp_path / "work", tmpfs=small, staging="auto")
    fate.setenv("FAKE_WORKER", "crash@3")
    assert run(request, Notice()) == ExitCode.BUG
    fate.setenv("FAKE_WORKER", "")
    assert run(request, Notice()) == ExitCode.DONE
    said = [event["message"] for event in view.events("log") if "staging on" in event["message"]]
    assert [message.split(":")[0] for message in said] == ["staging on disk", "staging on tmpfs"]
    assert not list(small.glob("*/*"))
