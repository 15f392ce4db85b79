"""Whether a save fits between the notice that a machine gives and its end; pure."""

from __future__ import annotations

import math
from datetime import datetime
from itertools import pairwise
from typing import Literal, NamedTuple

from trainer.events import Event

SURE = 0.8
"""Share of a window that may be spoken for: rates differ from one upload to the next."""
STUCK_S, STUCK_TIMES, STUCK_UNMEASURED_S = 900.0, 5.0, 7200.0
"""Own assumptions: workers that were asked to stop and have told nothing for a quarter of an hour, and for five times as long as
a step, a save and an evaluation took (the last step's is finished), do not come back; before a step was timed, for two hours."""
REMEMBERED = 3
"""Saves that are looked back on; the slowest of them counts."""
GB, MB = 1e9, 1e6

Holds = Literal["yes", "barely", "no", "unknown"]


class Window(NamedTuple):
    """The time from a notice to the end of the machine."""

    seconds: float
    source: str


GCP_SPOT = Window(30.0, "GCP's notice to a spot machine")
"""cloud.google.com/compute/docs/instances/spot: ACPI G2 soft off, 30 s later G3 mechanical off."""


class Save(NamedTuple):
    """What a save takes, from the notice to the commit."""

    bytes: int
    bytes_per_s: float
    stall_s: float
    step_s: float
    """The step that training is in is finished first."""

    @property
    def upload_s(self) -> float:
        return self.bytes / self.bytes_per_s

    @property
    def seconds(self) -> float:
        return self.step_s + self.stall_s + self.upload_s


class WindowVerdict(NamedTuple):
    holds: Holds
    text: str


def verdict(save: Save, window: Window | None) -> WindowVerdict:
    """Whether the window holds the save; with no window known, how long it would have to be."""
    takes = (
        f"saving on notice takes {save.seconds:.1f} s ({_size(save.bytes)} at {save.bytes_per_s / MB:,.1f} MB/s,"
        f" {save.stall_s:.1f} s to stage, up to {save.step_s:.1f} s for the step; {save.upload_s:.1f} s more if"
        " an upload is under way)"
    )
    if window is None:
        would = "would hold" if _holds(save, GCP_SPOT) == "yes" else "would not surely hold"
        return WindowVerdict(
            "unknown",
            f"saving on notice takes {save.seconds:.1f} s ({_size(save.bytes)} at {save.bytes_per_s / MB:,.1f} MB/s);"
            f" the {GCP_SPOT.seconds:.0f} s that GCP gives spot machines {would} it; a grace time set by hand"
            f" (Slurm's GraceTime) should leave {math.ceil(save.seconds / SURE)} s",
        )
    holds = _holds(save, window)
    says = {
        "yes": "holds it",
        "barely": "may be too short: count on the last commit only",
        "no": "is too short: what is committed is safe, the steps since are not; save more often",
    }[holds]
    return WindowVerdict(holds, f"{takes}: {window.source}, {window.seconds:.0f} s, {says}")


def _holds(save: Save, window: Window) -> Literal["yes", "barely", "no"]:
    if save.seconds <= SURE * window.seconds:
        return "yes"
    return "barely" if save.seconds <= window.seconds else "no"


def _size(count: int) -> str:
    return f"{count / GB:,.1f} GB" if count >= GB else f"{count / MB:,.1f} MB"


class SaveHistory:
    """What saves have taken, learnt from events as they come; of the last few the slowest counts.

    Tuples are replaced, never changed, so that it may be read while another thread adds.
    """

    def __init__(self) -> None:
        self._size = 0
        self._uploads: tuple[tuple[int, float], ...] = ()
        self._stalls: tuple[float, ...] = ()
        self._evaluation_s = 0.0
        self._steps: tuple[tuple[int, datetime], ...] = ()

    def add(self, event: Event) -> None:
        match event["kind"]:
            case "restored" if event["bytes"]:
                self._size = event["bytes"]
            case "committed" if event["bytes"] and event["seconds"] > 0:
                self._size = event["bytes"]
                self._uploads = (*self._uploads, (event["bytes"], event["seconds"]))[-REMEMBERED:]
            case "saved":
                self._stalls = (*self._stalls, float(event["stall_s"]))[-REMEMBERED:]
            case "eval":
                self._evaluation_s = max(self._evaluation_s, float(event.get("seconds", 0.0)))
            case "started":
                self._steps = ()
            case "step":
                seen = (event["step"], datetime.fromisoformat(event["time"]))
                self._steps = (*self._steps, seen)[-REMEMBERED - 1 :]

    def forget_uploads(self) -> None:
        """This machine's line may be another one: its own first upload counts alone."""
        self._uploads = ()

    def stuck_s(self) -> float:
        """Seconds without a word after which workers that were asked to stop are taken for stuck."""
        step_s = self._step_s()
        known = STUCK_TIMES * (step_s + max(self._stalls, default=0.0) + self._evaluation_s)
        return max(STUCK_S, known) if step_s else STUCK_UNMEASURED_S

    def save(self) -> Save | None:
        """None while no upload has been measured."""
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
