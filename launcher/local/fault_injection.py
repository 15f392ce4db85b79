"""Preemptions on request: at which steps a run on this machine loses its machine, and which were had."""

from __future__ import annotations

import random
from dataclasses import dataclass

from launcher.runs.run import AttemptHistory

LATEST = 0.9
"""Share of what is left to train, beyond which no machine is taken away."""


@dataclass(frozen=True)
class KillMoment:
    """A moment of training: `delay` of a step's duration after `step` has been seen."""

    step: int
    delay: float


def plan(*, after: int, total_steps: int, times: int, seed: int) -> tuple[KillMoment, ...]:
    """One spot in each of `times` equal parts of what is left to train, in order, no two at one step.

    The last tenth is spared: a run that is nearly over is over before it could be stopped.

    Fewer than `times` if there are not as many steps between the first and the last.
    """
    generator = random.Random(seed)
    spots: list[KillMoment] = []
    for part in range(times):
        fraction = LATEST * (part + generator.random()) / times
        earliest = (spots[-1].step if spots else after) + 1
        step = max(earliest, after + round(fraction * (total_steps - after)))
        spot = KillMoment(min(step, total_steps - 1), generator.random())
        if spot.step < earliest:
            break
        spots.append(spot)
    return tuple(spots)


class Preemptions:
    """The preemptions that were asked for; planned once the length of the training is known."""

    def __init__(self, *, times: int = 0, seed: int = 0) -> None:
        self._times = times
        self._seed = seed
        self._spots: tuple[KillMoment, ...] | None = None
        self.steps: list[int] = []
        """Where the machine was lost: the last step known of each attempt that was killed."""

    @property
    def missed(self) -> int:
        """How many of them have not been done."""
        return self._times - len(self.steps)

    def due(self, attempt: AttemptHistory, total_steps: int | None) -> KillMoment | None:
        """The spot that the running attempt has reached, beyond the place of the last preemption."""
        if not self.missed or total_steps is None or attempt.end or attempt.step >= total_steps:
            return None
        if self._spots is None:
            self._spots = plan(
                after=attempt.start, total_steps=total_steps, times=self._times, seed=self._seed
            )
        last = self.steps[-1] if self.steps else 0
        spot = self._spots[len(self.steps)] if len(self.steps) < len(self._spots) else None
        return spot if spot and attempt.step >= max(spot.step, last + 1) else None

    def happened(self, step: int) -> None:
        """The machine was lost when the attempt had come to `step`."""
        self.steps.append(step)
