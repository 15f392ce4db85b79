"""Whether an emergency save fits between a preemption notice and the end of the machine. Pure functions and values."""

from __future__ import annotations

import math
from datetime import datetime
from itertools import pairwise
from typing import Literal, NamedTuple

from trainer.events import Event

SAFE_SHARE = 0.8
"""A save is expected to fit if it takes at most this share of the window. Upload rates vary from one to the next."""
STUCK_S, STUCK_TIMES, STUCK_UNMEASURED_S = 900.0, 5.0, 7200.0
"""Own assumptions. Workers that were asked to stop still finish their step. They count as stuck after reporting nothing
for STUCK_S, and for STUCK_TIMES as long as a step, a save and an evaluation have taken. While no step has been timed,
the limit is STUCK_UNMEASURED_S."""
RECENT = 3
"""The number of recent saves that are taken into account. The slowest of them counts."""
GB, MB = 1e9, 1e6

Holds = Literal["yes", "barely", "no", "unknown"]


class Window(NamedTuple):
    """The time from a preemption notice to the end of the machine."""

    seconds: float
    source: str


GCP_SPOT = Window(30.0, "GCP's spot preemption notice")
"""cloud.google.com/compute/docs/instances/spot: ACPI G2 soft off, 30 s later G3 mechanical off."""


class Save(NamedTuple):
    """The expected duration of an emergency save, from the notice to the commit."""

    bytes: int
    bytes_per_s: float
    stall_s: float
    step_s: float
    """Duration of a step. The current step is finished before the save."""

    @property
    def upload_s(self) -> float:
        return self.bytes / self.bytes_per_s

    @property
    def seconds(self) -> float:
        return self.step_s + self.stall_s + self.upload_s


class WindowVerdict(NamedTuple):
    """Whether a save fits into a window, and the sentence that explains it."""

    holds: Holds
    text: str


def verdict(save: Save, window: Window | None) -> WindowVerdict:
    """Return whether the save fits into the window. If the window is unknown, return how long it must be."""
    rate = f"{_size(save.bytes)} at {save.bytes_per_s / MB:,.1f} MB/s"
    if window is None:
        fits = "within" if _holds(save, GCP_SPOT) == "yes" else "not safely within"
        return WindowVerdict(
            "unknown",
            f"emergency save: about {save.seconds:.1f} s ({rate}), {fits} GCP's"
            f" {GCP_SPOT.seconds:.0f} s preemption notice; a grace time that you set yourself (Slurm's GraceTime)"
            f" should be at least {math.ceil(save.seconds / SAFE_SHARE)} s",
        )
    holds = _holds(save, window)
    meaning = {
        "yes": "is long enough",
        "barely": "may be too short: rely on the last commit only",
        "no": "is too short: committed steps are safe, later steps are lost; save more often",
    }[holds]
    return WindowVerdict(
        holds,
        f"emergency save: about {save.seconds:.1f} s ({rate}, {save.stall_s:.1f} s to stage, up to"
        f" {save.step_s:.1f} s for the current step; {save.upload_s:.1f} s more during another upload);"
        f" {window.source} of {window.seconds:.0f} s {meaning}",
    )


def _holds(save: Save, window: Window) -> Literal["yes", "barely", "no"]:
    if save.seconds <= SAFE_SHARE * window.seconds:
        return "yes"
    return "barely" if save.seconds <= window.seconds else "no"


def _size(count: int) -> str:
    return f"{count / GB:,.1f} GB" if count >= GB else f"{count / MB:,.1f} MB"


class SaveHistory:
    """The durations of recent saves, steps and evaluations, learned from the run's events.

    The slowest of the recent ones counts. The tuples are replaced and never changed, so that one thread may read them
    while another thread adds events.
    """

    def __init__(self) -> None:
        self._size = 0
        self._uploads: tuple[tuple[int, float], ...] = ()  # bytes and seconds
        self._stalls: tuple[float, ...] = ()
        self._evaluation_s = 0.0
        self._steps: tuple[tuple[int, datetime], ...] = ()

    def add(self, event: Event) -> None:
        """Learn from an event."""
        match event["kind"]:
            case "restored" if event["bytes"]:
                self._size = event["bytes"]
            case "committed" if event["bytes"] and event["seconds"] > 0:
                self._size = event["bytes"]
                self._uploads = (*self._uploads, (event["bytes"], event["seconds"]))[-RECENT:]
            case "saved":
                self._stalls = (*self._stalls, float(event["stall_s"]))[-RECENT:]
            case "eval":
                self._evaluation_s = max(self._evaluation_s, float(event.get("seconds", 0.0)))
            case "started":
                self._steps = ()
            case "step":
                step = (event["step"], datetime.fromisoformat(event["time"]))
                self._steps = (*self._steps, step)[-RECENT - 1 :]

    def forget_uploads(self) -> None:
        """Forget the uploads of earlier attempts, because this machine's network may be faster or slower."""
        self._uploads = ()

    def stuck_s(self) -> float:
        """Return after how many seconds without a report workers that were asked to stop count as stuck."""
        step_s = self._step_s()
        measured = STUCK_TIMES * (step_s + max(self._stalls, default=0.0) + self._evaluation_s)
        return max(STUCK_S, measured) if step_s else STUCK_UNMEASURED_S

    def save(self) -> Save | None:
        """Return the expected save. None until an upload has been measured."""
        uploads = self._uploads
        if not uploads or not self._size:
            return None
        rate = min(count / seconds for count, seconds in uploads)
        return Save(self._size, rate, max(self._stalls, default=0.0), self._step_s())

    def _step_s(self) -> float:
        gaps = [
            (later_time - time).total_seconds() / (later - step)
            for (step, time), (later, later_time) in pairwise(self._steps)
            if later > step
        ]
        return max(gaps, default=0.0)
