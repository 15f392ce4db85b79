"""Where an attempt's time went, second by second: parts that add up to what was paid."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import astuple, dataclass
from datetime import datetime

from launcher.runs.run import AttemptHistory, RunHistory
from trainer.events import Event, Kind, of_kind

WORKERS: tuple[Kind, ...] = ("started", "step", "eval", "saved", "save_skipped")
"""Kinds that the workers tell: after the last of them, an attempt only uploads and exports."""


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds of an attempt, or of several; together all that was paid."""

    useful_s: float = 0.0
    """Steps that the run was built on."""
    redone_s: float = 0.0
    """Steps that were lost with the machine, so that a later attempt had to take them again."""
    boot_s: float = 0.0
    """From the machine's boot to the claim: boot, image, installation; 0 where that is not known to be paid."""
    restore_s: float = 0.0
    """Bringing the checkpoint from the bucket."""
    setup_s: float = 0.0
    """From the claim to the first step, but for the restore: start of the workers, loading of data and model."""
    evaluation_s: float = 0.0
    stall_s: float = 0.0
    """Training stood still while a checkpoint was staged."""
    upload_s: float = 0.0
    """After the last step: what was still to be uploaded, and the export of the model."""
    other_s: float = 0.0
    """All else: between a machine's last word and its loss, waiting for ranks."""

    @property
    def paid_s(self) -> float:
        return float(sum(astuple(self)))

    @property
    def goodput(self) -> float | None:
        """Useful of paid time, 0 to 1."""
        return self.useful_s / self.paid_s if self.paid_s else None

    def __add__(self, other: TimeBreakdown) -> TimeBreakdown:
        return TimeBreakdown(
            *(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))
        )


NAMES = {
    "useful_s": "useful steps",
    "redone_s": "steps lost and redone",
    "setup_s": "set-up",
    "boot_s": "boot until the claim",
    "restore_s": "restore",
    "evaluation_s": "evaluation",
    "stall_s": "checkpoint stall",
    "upload_s": "last upload and export",
    "other_s": "other",
}
"""In the order in which they are shown."""


def useful_until(run: RunHistory, attempt: AttemptHistory) -> int:
    """The last step of an attempt that no later one took again."""
    later = [
        each.start for each in run.attempts if each.number > attempt.number and of_kind(each.events, "step")
    ]
    return max(attempt.start, min([attempt.step, *later]))


def hours(run: RunHistory, attempt: AttemptHistory, *, until: float | None = None) -> TimeBreakdown:
    """Where an attempt's time went.

    Args:
        run: whose attempt it is; later ones decide what of it was useful.
        attempt: as its events tell it.
        until: unix time, seconds: now, if it is at work.
    """
    held_s = attempt.cost(until).seconds - attempt.boot_s
    training = Training(attempt)
    useful_s = training.seconds_until(useful_until(run, attempt))
    restore_s = sum(float(event.get("seconds", 0)) for event in of_kind(attempt.events, "restored"))
    parts = TimeBreakdown(
        useful_s=useful_s,
        redone_s=training.seconds_until(attempt.step) - useful_s,
        restore_s=restore_s,
        setup_s=max(0.0, _setup_s(attempt, held_s) - restore_s),
        evaluation_s=total(attempt, "eval", "seconds"),
        stall_s=total(attempt, "saved", "stall_s"),
        upload_s=_after_training_s(attempt),
    )
    if parts.paid_s > held_s > 0:  # clocks that disagree by a little: the parts are shares of what was paid
        parts = TimeBreakdown(*(part * held_s / parts.paid_s for part in astuple(parts)))
    return parts + TimeBreakdown(boot_s=attempt.boot_s, other_s=max(0.0, held_s - parts.paid_s))


def total(attempt: AttemptHistory, kind: Kind, key: str) -> float:
    """Of all events of a kind, as the last of them tells it: the log does not keep each."""
    events = of_kind(attempt.events, kind)
    if events and key in events[-1].get("so_far", {}):
        return float(events[-1]["so_far"][key])
    return sum(float(event.get(key) or 0) for event in events)


def count(attempt: AttemptHistory, kind: Kind) -> int:
    """How many events of a kind there were, the log keeping them or not."""
    events = of_kind(attempt.events, kind)
    return int(events[-1]["so_far"]["count"]) if events and "so_far" in events[-1] else len(events)


class Training:
    """How far an attempt's steps had come after how much training."""

    def __init__(self, attempt: AttemptHistory) -> None:
        self._steps = [attempt.start]
        self._seconds = [0.0]
        began = next(iter(of_kind(attempt.events, "started")), None)
        for event in of_kind(attempt.events, "step"):
            if int(event["step"]) > self._steps[-1]:
                self._steps.append(int(event["step"]))
                self._seconds.append(float(event.get("train_s") or _since(began, event)))

    def seconds_until(self, step: int) -> float:
        """Seconds that all steps up to this one took; between two that are known, in proportion."""
        after = bisect_right(self._steps, step)
        if after >= len(self._steps):
            return self._seconds[-1]
        low, high = self._steps[after - 1], self._steps[after]
        share = (step - low) / (high - low) if high > low else 0.0
        return self._seconds[after - 1] + share * (self._seconds[after] - self._seconds[after - 1])


def _setup_s(attempt: AttemptHistory, held_s: float) -> float:
    began = next(iter(of_kind(attempt.events, "started")), None)
    return _since(attempt.events[0], began) if began else held_s


def _after_training_s(attempt: AttemptHistory) -> float:
    """An attempt that vanished was not waiting for anything that we know of."""
    told = of_kind(attempt.events, *WORKERS)
    if not told or not (attempt.end or of_kind(attempt.events, "exported")):
        return 0.0
    return _since(told[-1], attempt.events[-1])


def _since(first: Event | None, then: Event) -> float:
    if first is None:
        return 0.0
    moment = datetime.fromisoformat
    return max(0.0, (moment(then["time"]) - moment(first["time"])).total_seconds())
