"""The event log reaches the bucket whole, in order, and not at every step."""

from __future__ import annotations

import pytest

from trainer.errors import Unavailable
from trainer.events import EventLog, parse


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_events_are_written_together_once_their_time_has_come() -> None:
    """A hundred steps in a second are one write."""
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
    """An idle run does not pay for requests."""
    writes: list[bytes] = []
    log = EventLog(1, writes.append)
    log.add("notice", source="SIGTERM")
    log.flush(now=True)
    log.flush(now=True)
    assert len(writes) == 1


def test_a_store_that_is_away_loses_no_event() -> None:
    """What could not be written is written with the next flush."""
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
