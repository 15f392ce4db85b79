"""A stopwatch that is held while training does something else than steps."""

from __future__ import annotations

from trainer.worker.callback import StepTimer, peaks


def test_only_steps_are_counted() -> None:
    """An evaluation of seven seconds and a save of one lie between steps of two and of three."""
    now = [100.0]
    pace = StepTimer(lambda: now[0])
    took = []
    for seconds, stop in ((2.0, pace.step), (7.0, pace.other), (1.0, pace.other), (3.0, pace.step)):
        now[0] += seconds
        took.append(stop())
    assert took == [2.0, 7.0, 1.0, 3.0]
    assert pace.train_s == 5.0


def test_a_process_knows_its_peak() -> None:
    """What it held once counts when it is gone."""
    before = peaks().host_bytes
    held = bytearray(before + 2**28)
    size = len(held)
    del held
    assert peaks().host_bytes >= min(size, before + 2**27)
