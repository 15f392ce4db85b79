"""A preemption notice during a restore cancels the transfer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.faults.test_supervisor import attempt, fate, request_, view
from tests.harness import RunView
from tests.servers.stores import MemoryBucket
from trainer.bucket.manifest import File
from trainer.bucket.reference_cache import ReferenceManifest
from trainer.bucket.restore import fetch
from trainer.errors import ExitCode
from trainer.supervisor.attempt import RunRequest
from trainer.supervisor.preemption import Notice
from trainer.supervisor.run import run
from trainer.supervisor.transfers import TransferCancelled, TransferProgress

__all__ = ["fate", "request_", "view"]


class WhileRestoring(Notice):
    """A notice that is given as soon as the restore of a checkpoint has begun."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self._work = work

    @property
    def given(self) -> bool:
        if not super().given and any(self._work.rglob(".checkpoint-*.partial")):
            self.give("SIGTERM")
        return super().given


def test_a_notice_cancels_a_restore(request_: RunRequest, view: RunView, fate: pytest.MonkeyPatch) -> None:
    """The attempt asks for a recovery immediately, and the next attempt restores the checkpoint."""
    assert attempt(request_, fate, "killed@5") == ExitCode.RECOVER
    assert run(request_, WhileRestoring(request_.work)) == ExitCode.RECOVER
    assert view.events("preempted")[0]["message"] == "before its checkpoint was restored"
    assert [event["step"] for event in view.events("restored")] == [0]
    assert not list(request_.work.glob("*"))
    assert attempt(request_, fate) == ExitCode.DONE
    assert [event["step"] for event in view.events("restored")] == [0, 4]


def test_a_cancelled_transfer_leaves_no_folder(tmp_path: Path) -> None:
    """A folder appears only when it is complete."""
    bucket, notice = MemoryBucket(), Notice()
    bucket.put("f/r/0001-000000001/a", b"1234")
    part = ReferenceManifest(
        run_id="r", attempt=1, fingerprint="f", pairs=1, created="2026-01-01T00:00:00Z",
        files=(File(path="a", size=4, xxh3="0"),),
    )  # fmt: skip
    notice.give("SIGTERM")
    with pytest.raises(TransferCancelled):
        fetch(bucket, part, tmp_path / "folder", TransferProgress(notice))
    assert not list(tmp_path.iterdir())


def test_a_long_restore_logs_its_progress(caplog: pytest.LogCaptureFixture) -> None:
    """The number of bytes and the rate are logged every 20 s."""
    times = iter([0.0, 10.0, 20.0, 25.0, 40.0])
    progress = TransferProgress(Notice(), every_s=20.0, clock=lambda: next(times))
    with caplog.at_level(logging.INFO, logger="trainer"):
        for _ in range(4):
            progress(2 * 10**9)
    assert caplog.messages == ["fetched 4.0 GB so far, 200 MB/s", "fetched 8.0 GB so far, 200 MB/s"]
