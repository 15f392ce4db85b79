"""Runs that consist of events only, for tests of programs that read events."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trainer.events import Event

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def attempt_events(
    number: int,
    *,
    start: int,
    last: int,
    total_steps: int,
    method: str = "dpo",
    end: Event | None = None,
    began: datetime = BEGIN,
) -> list[Event]:
    """Return the events of an attempt that resumed from step `start` and trained up to step `last`, one step per second."""
    events: list[Event] = [
        {"kind": "claimed", "method": method, "recipe": "fake"},
        {"kind": "restored", "step": start},
        {"kind": "started", "step": start, "total_steps": total_steps},
    ]
    accuracy = "rewards/accuracies" if method == "dpo" else "mean_token_accuracy"
    for step in range(start + 1, last + 1):
        metrics = {"loss": 1 / step + number, "learning_rate": 1e-4, accuracy: 0.5}
        events.append({"kind": "step", "step": step, "total_steps": total_steps, **metrics})
        if step % 10 == 0:
            events.append(
                {"kind": "eval", "step": step, "eval_loss": 1 / step, f"eval_{accuracy}": step / 100}
            )
            events.append({"kind": "committed", "step": step, "files": 1, "bytes": 10, "seconds": 0.1})
    events += [end] if end else []
    timed = enumerate(events)
    return [
        {**event, "attempt": number, "time": (began + timedelta(seconds=at)).isoformat()}
        for at, event in timed
    ]


def write_events(run: Path, *attempts: list[Event]) -> None:
    """Write events into the folder of a run, as the supervisor does."""
    (run / "events").mkdir(parents=True, exist_ok=True)
    for events in attempts:
        data = "".join(json.dumps(event) + "\n" for event in events)
        (run / "events" / f"{events[0]['attempt']:04d}.jsonl").write_text(data)


def write_commit(run: Path, name: str, *, created: str = BEGIN.isoformat()) -> None:
    """Write a manifest with the fields that the launcher reads."""
    (run / "commits").mkdir(parents=True, exist_ok=True)
    (run / "commits" / f"{name}.json").write_text(json.dumps({"created": created}))
