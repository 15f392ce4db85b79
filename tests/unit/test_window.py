"""Whether an emergency save fits into a preemption notice, computed from sizes and times without a clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from trainer.bucket.manifest import File, Manifest
from trainer.bucket.restore import Restored
from trainer.events import Event, EventLog, of_kind, parse
from trainer.recipe import Recipe
from trainer.supervisor.reporter import Reporter
from trainer.supervisor.save_window import GCP_SPOT, Save, SaveHistory, Window, verdict

GB = 10**9
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def save(seconds: float) -> Save:
    """Return a save of this duration. The upload takes all but 3 s of it."""
    return Save(bytes=int((seconds - 3) * GB), bytes_per_s=GB, stall_s=1.0, step_s=2.0)


@pytest.mark.parametrize(
    ("seconds", "holds", "words"),
    [(24, "yes", "is long enough"), (25, "barely", "may be too short"), (31, "no", "save more often")],
)
def test_a_save_must_fit_into_the_window_with_a_margin(seconds: float, holds: str, words: str) -> None:
    """Up to 80 % of the window is safe. Above 100 % only committed steps are safe."""
    found = verdict(save(seconds), GCP_SPOT)
    assert found.holds == holds
    assert words in found.text
    assert f"about {seconds:.1f} s" in found.text
    assert "30 s" in found.text


@pytest.mark.parametrize(
    ("seconds", "words"), [(12, ", within GCP's 30 s"), (40, "not safely within GCP's 30 s")]
)
def test_an_unknown_window_is_reported_as_unknown(seconds: float, words: str) -> None:
    """The text gives the time that a save needs, so that users can set the grace time of their cluster."""
    found = verdict(save(seconds), None)
    assert found.holds == "unknown"
    assert words in found.text
    assert f"at least {seconds / 0.8:.0f} s" in found.text


def test_the_text_names_every_part_of_the_duration() -> None:
    """It has the size, the rate, the stall, the step, and an upload that may be in progress."""
    text = verdict(Save(12 * GB, 0.5 * GB, 1.5, 0.5), Window(60, "a test")).text
    assert text == (
        "emergency save: about 26.0 s (12.0 GB at 500.0 MB/s, 1.5 s to stage, up to 0.5 s for the current step;"
        " 24.0 s more during another upload); a test of 60 s is long enough"
    )


def event(kind: str, at_s: float = 0.0, **fields: Any) -> Event:
    return {"kind": kind, "time": (BEGAN + timedelta(seconds=at_s)).isoformat(), **fields}


def test_nothing_is_known_before_an_upload_was_measured() -> None:
    """A size alone does not give a duration."""
    history = SaveHistory()
    history.add(event("restored", bytes=100, seconds=1.0))
    history.add(event("saved", stall_s=1.0))
    assert history.save() is None


def test_the_slowest_of_the_last_three_counts() -> None:
    """Rates, stalls and steps vary, and a preemption may come at the slowest moment."""
    history = SaveHistory()
    for seconds in (9.0, 1.0, 2.0, 1.5):
        history.add(event("committed", bytes=100, seconds=seconds))
        history.add(event("saved", stall_s=seconds / 10))
    for step, at_s in ((1, 0.0), (2, 100.0), (3, 101.0), (4, 104.0), (6, 106.0)):
        history.add(event("step", at_s, step=step))
    assert history.save() == Save(bytes=100, bytes_per_s=50.0, stall_s=0.2, step_s=3.0)


def test_the_time_between_attempts_is_not_a_step() -> None:
    """The last step of one attempt and the first step of the next do not measure a step."""
    history = SaveHistory()
    history.add(event("committed", bytes=100, seconds=1.0))
    history.add(event("step", 0.0, step=5))
    history.add(event("started", 3600.0))
    history.add(event("step", 3601.0, step=6))
    found = history.save()
    assert found is not None
    assert found.step_s == 0.0


RECIPE = Recipe.model_validate(
    {
        "name": "fake",
        "method": "sft",
        "init": "tiny",
        "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
        "global_batch_size": 4,
    }
)


def manifest(step: int, size: int) -> Manifest:
    return Manifest(
        run_id="r", attempt=1, step=step, kind="checkpoint", created=BEGAN, recipe="digest", details={},
        files=(File(path="model.safetensors", size=size, xxh3="0"),),
    )  # fmt: skip


class Reported:
    """A reporter and the events that it has written."""

    def __init__(self, folder: Path, window: Window | None, clock: Callable[[], float]) -> None:
        self._data = b""
        self._log = EventLog(2, self._keep)
        self.reporter = Reporter(
            self._log, RECIPE, folder / "steps.jsonl", window=lambda: window, clock=clock
        )

    def _keep(self, data: bytes) -> None:
        self._data = data

    def events(self, kind: Any) -> list[Event]:
        self._log.flush(now=True)
        return of_kind(parse(self._data), kind)


def test_the_window_is_reported_at_the_start_from_an_earlier_measurement(tmp_path: Path) -> None:
    """It is reported again after this machine's own first upload, and then only if the verdict changes."""
    reported = Reported(tmp_path, GCP_SPOT, lambda: 0.0)
    reported.reporter.recall([event("committed", bytes=GB, seconds=1.0)])
    reported.reporter.restored(Restored(manifest(10, 5 * GB), tmp_path, 5 * GB, 1.0))
    reported.reporter.window()
    for step, seconds in ((20, 10.0), (30, 11.0), (40, 60.0), (50, 61.0)):
        reported.reporter.committed(manifest(step, 5 * GB), seconds)
    windows = reported.events("window")
    assert [(one["holds"], round(one["seconds"])) for one in windows] == [("yes", 5), ("yes", 10), ("no", 60)]
    assert {one["window_s"] for one in windows} == {30.0}
    assert windows[0]["bytes"] == 5 * GB


def test_a_first_attempt_reports_no_window_before_its_first_commit(tmp_path: Path) -> None:
    """Until then neither the size nor the rate is known."""
    reported = Reported(tmp_path, None, lambda: 0.0)
    reported.reporter.restored(None)
    reported.reporter.window()
    assert reported.events("window") == []
    reported.reporter.committed(manifest(10, 100), 1.0)
    assert [one["holds"] for one in reported.events("window")] == ["unknown"]


def test_an_outage_is_logged_once_a_minute_and_every_try_is_an_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A long outage does not flood the log, the events have every try, and the end of the outage is logged."""
    now = [0.0]
    reported = Reported(tmp_path, None, lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in range(13):
            reported.reporter.upload_failed(10, "503")
            now[0] += 10.0
        reported.reporter.committed(manifest(10, 100), 1.0)
        reported.reporter.upload_failed(20, "503")
        now[0] += 60.0
        reported.reporter.upload_failed(20, "503")
    warnings = [message for message in caplog.messages if message.startswith("upload of")]
    assert warnings == [
        "upload of step 10 failed once in 0 s and will be retried: 503",
        "upload of step 10 failed 7 times in 60 s and will be retried: 503",
        "upload of step 10 failed 13 times in 120 s and will be retried: 503",
        "upload of step 20 failed 2 times in 60 s and will be retried: 503",
    ]
    assert "uploads to the bucket succeed again, after failing 13 times in 130 s" in caplog.messages
    assert [one["tries"] for one in reported.events("upload_failed")] == [*range(1, 14), 1, 2]


def test_the_timeout_for_stuck_workers_follows_their_earlier_durations() -> None:
    """It is 2 h while nothing is known, then 5 times step, save and evaluation, and at least 15 minutes."""

    def step(number: int, at_s: float) -> Event:
        return {"kind": "step", "step": number, "time": (BEGAN + timedelta(seconds=at_s)).isoformat()}

    history = SaveHistory()
    assert history.stuck_s() == 7200.0
    history.add(step(1, 0.0))
    history.add(step(2, 100.0))
    assert history.stuck_s() == 900.0
    history.add({"kind": "saved", "stall_s": 20.0})
    history.add({"kind": "eval", "seconds": 1000.0})
    assert history.stuck_s() == 5 * (100.0 + 20.0 + 1000.0)
