"""When a machine is lost: at any moment, or aimed at what lasts too short to be hit by chance."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.harness import RunView, TrainerRun
from trainer.bucket.manifest import committed

AIMS = {"anytime": 5, "save": 2, "upload": 3, "commit": 3, "export": 1}
"""What a kill is aimed at, and how often. It is told of where it hit, not of what it was aimed at."""
POLL_S = 0.001
DELAY_S = {"save": 0.004, "upload": 0.03, "commit": 0.002, "export": 0.05}
"""Between what a kill is aimed at and the kill, on average."""


class Moment(NamedTuple):
    """Once the aim is there at or after `step`, wait `delay_s`, then kill."""

    aim: str
    step: int
    delay_s: float


def choose(chance: random.Random, *, after: int, last: int, span_s: float) -> Moment:
    """A moment for an attempt that goes on after step `after` of a run of `span_s` seconds in all."""
    (aim,) = chance.choices(list(AIMS), weights=list(AIMS.values()))
    if aim == "anytime":
        return Moment(aim, 0, chance.uniform(0.0, span_s))
    return Moment(aim, chance.randint(after, last), chance.expovariate(1 / DELAY_S[aim]))


def reach(run: TrainerRun, view: RunView, moment: Moment) -> bool:
    """Wait for the moment; False if the attempt has ended by itself before it."""
    there = _aim(run, view, moment.aim)
    while run.alive and not (_step(run) >= moment.step and there()):
        time.sleep(POLL_S)
    until = time.monotonic() + moment.delay_s
    while run.alive and time.monotonic() < until:
        time.sleep(min(POLL_S, moment.delay_s))
    return run.alive


class _Grows:
    """Whether a commit has come since the first look: its events and the pruning follow at once."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._known: set[str] | None = None

    def look(self) -> bool:
        there = {item.key for item in self._view.bucket.list("commits/")}
        if self._known is None:
            self._known = there
        return bool(there - self._known)


def _step(run: TrainerRun) -> int:
    try:
        return run.step()
    except FileNotFoundError:  # the attempt has just ended by itself
        return 0


def _names(run: TrainerRun) -> set[str]:
    staging = run.staging()
    try:
        return {path.name for path in staging.iterdir()} if staging else set()
    except OSError:  # the attempt has just ended by itself
        return set()


def _being_saved(run: TrainerRun) -> bool:
    names = _names(run)
    return any(
        name.startswith("checkpoint-") and f"{name}.staged" not in names for name in names - _markers(names)
    )


def _markers(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".staged")}


def _staged(run: TrainerRun) -> list[int]:
    """Steps of the checkpoints that wait for their upload or are uploaded."""
    steps = (name.removesuffix(".staged").rpartition("-")[2] for name in _markers(_names(run)))
    return [int(step) for step in steps if step.isdecimal()]


def _exporting(run: TrainerRun) -> bool:
    return "final" in _names(run)


def _leftovers(view: RunView) -> bool:
    """Whether files lie below the newest commit that no manifest names."""
    found = committed(view.bucket)
    named = {manifest.prefix + file.path for manifest in found for file in manifest.files}
    newest = found[0].prefix if found else ""
    return any(item.key not in named and item.key < newest for item in view.bucket.list("checkpoints/"))


def _aim(run: TrainerRun, view: RunView, aim: str) -> Callable[[], bool]:
    return {
        "anytime": lambda: True,
        "save": lambda: bool(_being_saved(run)),
        "upload": lambda: bool(_staged(run)),
        "commit": _Grows(view).look,
        "export": lambda: _exporting(run),
    }[aim]


def where(run: TrainerRun, view: RunView, keep: int) -> str:
    """What the machine was at when it was lost, by what it left on its disk and in the bucket."""
    staged, steps = _staged(run), [manifest.step for manifest in committed(view.bucket)]
    if _step(run) == 0:
        return "start"
    if _exporting(run):
        return "export"
    if _being_saved(run):
        return "save"
    if any(step not in steps for step in staged):
        return "upload"
    if staged or len(steps) > keep or _leftovers(view):
        return "commit or prune"
    return "step"
