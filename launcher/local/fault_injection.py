"""Preemptions on request (`--preempt`): the steps at which a local run is killed, and which have happened."""

from __future__ import annotations

import random
from dataclasses import dataclass

from launcher.runs.run import AttemptHistory

LATEST = 0.9
"""Share of the remaining training in which preemptions are planned."""


@dataclass(frozen=True)
class KillMoment:
    """A moment of training: `delay` is the share of a step's duration to wait after `step`."""

    step: int
    delay: float


def plan(*, after: int, total_steps: int, times: int, seed: int) -> tuple[KillMoment, ...]:
    """Return one random moment in each of `times` equal parts of the remaining training, no two at one step.

    The last tenth has none, because a run that is nearly done may end before it can be killed. There are fewer
    moments than `times` if there are fewer steps.
    """
    generator = random.Random(seed)
    moments: list[KillMoment] = []
    for part in range(times):
        fraction = LATEST * (part + generator.random()) / times
        earliest = (moments[-1].step if moments else after) + 1
        step = max(earliest, after + round(fraction * (total_steps - after)))
        moment = KillMoment(min(step, total_steps - 1), generator.random())
        if moment.step < earliest:
            break
        moments.append(moment)
    return tuple(moments)


class Preemptions:
    """The requested preemptions. They are planned once the length of the training is known."""

    def __init__(self, *, times: int = 0, seed: int = 0) -> None:
        self._times = times
        self._seed = seed
        self._moments: tuple[KillMoment, ...] | None = None
        self.steps: list[int] = []
        """The last known step of each attempt that was killed."""

    @property
    def missed(self) -> int:
        """The number of preemptions that have not happened."""
        return self._times - len(self.steps)

    def due(self, attempt: AttemptHistory, total_steps: int | None) -> KillMoment | None:
        """Return the moment that the running attempt has reached, if it is beyond the last preemption."""
        if not self.missed or total_steps is None or attempt.end or attempt.step >= total_steps:
            return None
        if self._moments is None:
            self._moments = plan(
                after=attempt.start, total_steps=total_steps, times=self._times, seed=self._seed
            )
        last = self.steps[-1] if self.steps else 0
        moment = self._moments[len(self.steps)] if len(self.steps) < len(self._moments) else None
        return moment if moment and attempt.step >= max(moment.step, last + 1) else None

    def happened(self, step: int) -> None:
        """Record a preemption at `step`."""
        self.steps.append(step)
