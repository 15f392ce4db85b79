"""The event log is written to the bucket completely, in order, and not at every step."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from trainer.errors import Unavailable
from trainer.events import MOST, WHOLE_TAIL, Event, EventLines, EventLog, of_kind, parse


class Clock:
    """A clock that only tests advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_events_are_written_together_once_their_time_has_come() -> None:
    """A hundred steps within a second take one write."""
    writes: list[bytes] = []
    clock = Clock()
    log = EventLog(3, writes.append, every_s=2.0, clock=clock)
    for step in range(3):
        log.add("step", step=step, loss=0.1)
        log.flush()
    assert [len(parse(data)) for data in writes] == [1]
    clock.now += 2.0
    log.flush()
    assert [event["step"] for event in parse(writes[-1])] == [0, 1, 2]
    assert {event["attempt"] for event in parse(writes[-1])} == {3}


def test_a_flush_without_news_writes_nothing() -> None:
    """A flush without new events sends no request."""
    writes: list[bytes] = []
    log = EventLog(1, writes.append)
    log.add("notice", source="SIGTERM")
    log.flush(now=True)
    log.flush(now=True)
    assert len(writes) == 1


def test_a_store_that_is_away_loses_no_event() -> None:
    """The next flush writes the events that could not be written."""
    writes: list[bytes] = []

    def write(data: bytes) -> None:
        writes.append(data)
        if len(writes) == 1:
            raise Unavailable("the bucket is away")

    log = EventLog(1, write)
    log.add("claimed")
    with pytest.raises(Unavailable):
        log.flush(now=True)
    log.add("done", step=4)
    log.flush(now=True)
    assert [event["kind"] for event in parse(writes[-1])] == ["claimed", "done"]


def test_floats_come_back_with_the_same_bits() -> None:
    """A loss read from the events can be compared with `==`."""
    writes: list[bytes] = []
    log = EventLog(1, writes.append)
    losses = [0.1 + 0.2, 1 / 3, 6.02e-23]
    for loss in losses:
        log.add("step", loss=loss)
    log.flush(now=True)
    assert [event["loss"] for event in parse(writes[-1])] == losses


def long_run(steps: int) -> list[Event]:
    """Return the log of a run with a spike of the loss, and an evaluation and a save every ten steps."""
    writes: list[bytes] = []
    log = EventLog(1, writes.append)
    log.add("claimed", recipe="long")
    for step in range(1, steps + 1):
        loss = 100.0 if step == 40_123 else 1 / step
        log.add("step", step=step, loss=loss, train_s=step * 0.5)
        if step % 10 == 0:
            log.add("eval", step=step, eval_loss=1 / step, seconds=0.25)
            log.add("saved", step=step, stall_s=0.5, bytes=7)
            log.add("log", level="warning", message=f"step {step}")
    log.add("done", step=steps)
    log.flush(now=True)
    return parse(writes[-1])


def test_a_long_run_s_log_stays_small_and_keeps_its_shape() -> None:
    """Of 100,000 steps at most 1,024 are kept, including the spike, the first and the newest steps."""
    events = long_run(100_000)
    steps = [event["step"] for event in of_kind(events, "step")]
    assert steps == sorted(steps)
    assert len(steps) <= MOST["step"]
    assert {1, 40_123, *range(99_900, 100_001)} <= set(steps)
    assert max(after - before for before, after in pairwise(steps)) <= 100_000 / 100
    assert len(json.dumps(events)) < 400_000
    assert [events[0]["kind"], events[-1]["kind"]] == ["claimed", "done"]


def test_a_log_is_equally_fine_everywhere() -> None:
    """No quarter of a long log has more than twice the steps of another, except for the newest lines."""
    steps = [event["step"] for event in of_kind(long_run(100_000), "step")][: -MOST["step"] // WHOLE_TAIL]
    quarters = [sum(low < step <= low + 24_000 for step in steps) for low in range(0, 96_000, 24_000)]
    assert max(quarters) <= 2 * min(quarters)


def test_sums_outlive_the_lines_that_they_are_of() -> None:
    """The last event of a kind has the sums over all events of that kind."""
    events = long_run(100_000)
    assert of_kind(events, "saved")[-1]["so_far"] == {"count": 10_000, "stall_s": 5000.0, "bytes": 70_000}
    assert of_kind(events, "eval")[-1]["so_far"] == {"count": 10_000, "seconds": 2500.0}


def test_a_short_run_is_kept_whole() -> None:
    """A log of a thousand steps is complete."""
    assert [event["step"] for event in of_kind(long_run(1000), "step")] == list(range(1, 1001))


@pytest.mark.parametrize("values", [[math.nan] * 50, [None] * 50, [1.0, math.nan, None, math.inf] * 20])
def test_losses_that_are_no_numbers_are_thinned_too(values: list[float | None]) -> None:
    """The log of a diverged run is bounded too."""
    lines = EventLines(16)
    for order, value in enumerate(values):
        lines.add(order, value, b"")
        assert len(list(lines)) <= 16
    assert [line.order for line in lines][-4:] == list(range(len(values)))[-4:]
