"""What the paid time of an attempt was spent on. The parts add up to the paid time of `trainer.accounting`."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import astuple, dataclass
from datetime import datetime

from launcher.runs.run import AttemptHistory, RunHistory
from trainer.events import Event, Kind, of_kind

WORKERS: tuple[Kind, ...] = ("started", "step", "eval", "saved", "save_skipped")
"""Kinds of events that come from the workers. After the last of them, an attempt only uploads and exports."""


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds of one or several attempts, by what they were spent on; the sum is the paid time."""

    useful_s: float = 0.0
    """Steps whose result is in the final weights."""
    redone_s: float = 0.0
    """Steps after the last checkpoint before a loss of the machine; a later attempt took them again."""
    boot_s: float = 0.0
    """From the machine's boot to the claim: boot, image, installation. 0 if the claim does not record the boot."""
    restore_s: float = 0.0
    """Download of the checkpoint."""
    setup_s: float = 0.0
    """From the claim to the first step without the restore: start of the workers, loading of data and model."""
    evaluation_s: float = 0.0
    stall_s: float = 0.0
    """Training waited while a checkpoint was staged."""
    upload_s: float = 0.0
    """After the last step: the remaining uploads, and the export of the model."""
    other_s: float = 0.0
    """The rest, such as waiting for ranks."""

    @property
    def paid_s(self) -> float:
        return float(sum(astuple(self)))

    @property
    def goodput(self) -> float | None:
        """The useful share of the paid time, 0 to 1; None if nothing was paid."""
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
"""Titles of the parts, in the order of display."""


def useful_until(run: RunHistory, attempt: AttemptHistory) -> int:
    """Return the last step of an attempt that no later attempt took again."""
    later = [
        other.start
        for other in run.attempts
        if other.number > attempt.number and of_kind(other.events, "step")
    ]
    return max(attempt.start, min([attempt.step, *later]))


def hours(run: RunHistory, attempt: AttemptHistory, *, until: float | None = None) -> TimeBreakdown:
    """Return what an attempt's paid time was spent on.

    Args:
        run: the run; its later attempts decide which steps were useful.
        attempt: the attempt.
        until: unix time, seconds: now, if the attempt is running.
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
    if parts.paid_s > held_s > 0:  # two clocks that differ slightly: scale the parts to the paid time
        parts = TimeBreakdown(*(part * held_s / parts.paid_s for part in astuple(parts)))
    return parts + TimeBreakdown(boot_s=attempt.boot_s, other_s=max(0.0, held_s - parts.paid_s))


def total(attempt: AttemptHistory, kind: Kind, key: str) -> float:
    """Return the sum of a field over all events of a kind.

    The log drops some events, so the newest one carries the sum in `so_far`; logs of older versions do not.
    """
    events = of_kind(attempt.events, kind)
    if events and key in events[-1].get("so_far", {}):
        return float(events[-1]["so_far"][key])
    return sum(float(event.get(key) or 0) for event in events)


def count(attempt: AttemptHistory, kind: Kind) -> int:
    """Return the number of events of a kind, including those that the log dropped."""
    events = of_kind(attempt.events, kind)
    return int(events[-1]["so_far"]["count"]) if events and "so_far" in events[-1] else len(events)


class Training:
    """Maps steps of an attempt to the seconds of training that they took."""

    def __init__(self, attempt: AttemptHistory) -> None:
        self._steps = [attempt.start]
        self._seconds = [0.0]
        began = next(iter(of_kind(attempt.events, "started")), None)
        for event in of_kind(attempt.events, "step"):
            if int(event["step"]) > self._steps[-1]:
                self._steps.append(int(event["step"]))
                self._seconds.append(float(event.get("train_s") or _since(began, event)))

    def seconds_until(self, step: int) -> float:
        """Return the seconds of all steps up to this one, interpolated between the steps of the log."""
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
    """Return the seconds after the workers' last event; 0 for a lost attempt, where they are unknown."""
    from_workers = of_kind(attempt.events, *WORKERS)
    if not from_workers or not (attempt.end or of_kind(attempt.events, "exported")):
        return 0.0
    return _since(from_workers[-1], attempt.events[-1])


def _since(first: Event | None, last: Event) -> float:
    if first is None:
        return 0.0
    parse = datetime.fromisoformat
    return max(0.0, (parse(last["time"]) - parse(first["time"])).total_seconds())
