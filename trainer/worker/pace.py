"""How long steps and evaluations take, and what they take of memory: measured, to be held against the prediction."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

GIB = 2**30
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""Of `ru_maxrss`: getrusage(2)."""


class Pace:
    """A stopwatch that is held while training does something else than steps."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.train_s = 0.0
        """Of all steps, their data and their loss included."""

    def step(self) -> float:
        """Seconds since the last step, evaluation or save was over; a step ends here."""
        took = self.other()
        self.train_s += took
        return took

    def other(self) -> float:
        """The same of what is no step."""
        now = self._clock()
        took, self._since = now - self._since, now
        return took


class Peaks(NamedTuple):
    """Of this process since it began."""

    gpu_gib: float | None
    """What lies on its GPU, the CUDA context and NCCL's buffers included; None on the CPU."""
    host_bytes: int
    """The most that was resident."""


def peaks() -> Peaks:
    """CUDA's allocator knows its own peak; what lies outside of it stays, once it is there."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    if not torch.cuda.is_available():
        return Peaks(None, host)
    free, total = torch.cuda.mem_get_info()
    outside = max(0, total - free - torch.cuda.memory_reserved())
    return Peaks((torch.cuda.max_memory_reserved() + outside) / GIB, host)
