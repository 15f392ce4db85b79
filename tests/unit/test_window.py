"""Whether a notice leaves time for a save: from sizes and times, without a clock."""

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
    """One that takes so long, of which 3 s are not the upload."""
    return Save(bytes=int((seconds - 3) * GB), bytes_per_s=GB, stall_s=1.0, step_s=2.0)


@pytest.mark.parametrize(
    ("seconds", "holds", "words"),
    [(24, "yes", "holds it"), (25, "barely", "may be too short"), (31, "no", "save more often")],
)
def test_a_window_holds_a_save_with_a_margin(seconds: float, holds: str, words: str) -> None:
    """Up to 80 % is sure, up to all of it is luck, above it the commit before is what there is."""
    found = verdict(save(seconds), GCP_SPOT)
    assert found.holds == holds
    assert words in found.text
    assert f"takes {seconds:.1f} s" in found.text
    assert "30 s" in found.text


@pytest.mark.parametrize(("seconds", "words"), [(12, "would hold it"), (40, "would not surely hold it")])
def test_a_window_that_nobody_knows_is_said_to_be_unknown(seconds: float, words: str) -> None:
    """What the save needs is told, so that a person can set the grace time of their cluster."""
    found = verdict(save(seconds), None)
    assert found.holds == "unknown"
    assert words in found.text
    assert f"leave {seconds / 0.8:.0f} s" in found.text


def test_the_text_names_all_that_it_was_made_of() -> None:
    """Size, rate, stall, step, and the upload that may be under way."""
    text = verdict(Save(12 * GB, 0.5 * GB, 1.5, 0.5), Window(60, "a test")).text
    assert text == (
        "saving on notice takes 26.0 s (12.0 GB at 500.0 MB/s, 1.5 s to stage, up to 0.5 s for the step;"
        " 24.0 s more if an upload is under way): a test, 60 s, holds it"
    )


def event(kind: str, at_s: float = 0.0, **fields: Any) -> Event:
    return {"kind": kind, "time": (BEGAN + timedelta(seconds=at_s)).isoformat(), **fields}


def test_nothing_is_known_before_an_upload_was_measured() -> None:
    """A size alone says nothing of time."""
    pace = SaveHistory()
    pace.add(event("restored", bytes=100, seconds=1.0))
    pace.add(event("saved", stall_s=1.0))
    assert pace.save() is None


def test_the_slowest_of_the_last_three_counts() -> None:
    """Rates, stalls and steps vary, and a machine that goes does not choose its moment."""
    pace = SaveHistory()
    for seconds in (9.0, 1.0, 2.0, 1.5):
        pace.add(event("committed", bytes=100, seconds=seconds))
        pace.add(event("saved", stall_s=seconds / 10))
    for step, at_s in ((1, 0.0), (2, 100.0), (3, 101.0), (4, 104.0), (6, 106.0)):
        pace.add(event("step", at_s, step=step))
    assert pace.save() == Save(bytes=100, bytes_per_s=50.0, stall_s=0.2, step_s=3.0)


def test_time_between_attempts_is_no_step() -> None:
    """What lies between two lives of a run is not the length of a step."""
    pace = SaveHistory()
    pace.add(event("committed", bytes=100, seconds=1.0))
    pace.add(event("step", 0.0, step=5))
    pace.add(event("started", 3600.0))
    pace.add(event("step", 3601.0, step=6))
    found = pace.save()
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


class Told:
    """A narrator, and the events that it has told."""

    def __init__(self, folder: Path, window: Window | None, clock: Callable[[], float]) -> None:
        self._data = b""
        self._log = EventLog(2, self._keep)
        self.narrator = Reporter(
            self._log, RECIPE, folder / "steps.jsonl", window=lambda: window, clock=clock
        )

    def _keep(self, data: bytes) -> None:
        self._data = data

    def events(self, kind: Any) -> list[Event]:
        self._log.flush(now=True)
        return of_kind(parse(self._data), kind)


def test_the_window_is_told_at_the_start_from_what_an_earlier_attempt_measured(tmp_path: Path) -> None:
    """Then once more from this machine's own first upload, and again only when the verdict changes."""
    told = Told(tmp_path, GCP_SPOT, lambda: 0.0)
    told.narrator.recall([event("committed", bytes=GB, seconds=1.0)])
    told.narrator.restored(Restored(manifest(10, 5 * GB), tmp_path, 5 * GB, 1.0))
    told.narrator.window()
    for step, seconds in ((20, 10.0), (30, 11.0), (40, 60.0), (50, 61.0)):
        told.narrator.committed(manifest(step, 5 * GB), seconds)
    said = told.events("window")
    assert [(one["holds"], round(one["seconds"])) for one in said] == [("yes", 5), ("yes", 10), ("no", 60)]
    assert {one["window_s"] for one in said} == {30.0}
    assert said[0]["bytes"] == 5 * GB


def test_a_first_attempt_says_nothing_before_its_first_commit(tmp_path: Path) -> None:
    """There is neither a size nor a rate."""
    told = Told(tmp_path, None, lambda: 0.0)
    told.narrator.restored(None)
    told.narrator.window()
    assert told.events("window") == []
    told.narrator.committed(manifest(10, 100), 1.0)
    assert [one["holds"] for one in told.events("window")] == ["unknown"]


def test_an_outage_is_said_once_a_minute_and_counted_each_try(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A night without a bucket fills no screen; the events keep every try, and its end is said."""
    now = [0.0]
    told = Told(tmp_path, None, lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in range(13):
            told.narrator.upload_failed(10, "503")
            now[0] += 10.0
        told.narrator.committed(manifest(10, 100), 1.0)
        told.narrator.upload_failed(20, "503")
        now[0] += 60.0
        told.narrator.upload_failed(20, "503")
    said = [message for message in caplog.messages if message.startswith("upload")]
    assert said == [
        "upload of step 10 failed, once in 0 s, and will be tried again: 503",
        "upload of step 10 failed, 7 times in 60 s, and will be tried again: 503",
        "upload of step 10 failed, 13 times in 120 s, and will be tried again: 503",
        "upload of step 20 failed, 2 times in 60 s, and will be tried again: 503",
    ]
    assert "the bucket takes uploads again; it failed 13 times in 130 s" in caplog.messages
    assert [one["tries"] for one in told.events("upload_failed")] == [*range(1, 14), 1, 2]


def test_workers_are_taken_for_stuck_by_what_they_have_taken_before() -> None:
    """Two hours while nothing is known, a quarter of an hour at least, else five times step, save and evaluation."""

    def step(number: int, at_s: float) -> Event:
        return {"kind": "step", "step": number, "time": (BEGAN + timedelta(seconds=at_s)).isoformat()}

    pace = SaveHistory()
    assert pace.stuck_s() == 7200.0
    pace.add(step(1, 0.0))
    pace.add(step(2, 100.0))
    assert pace.stuck_s() == 900.0
    pace.add({"kind": "saved", "stall_s": 20.0})
    pace.add({"kind": "eval", "seconds": 1000.0})
    assert pace.stuck_s() == 5 * (100.0 + 20.0 + 1000.0)
