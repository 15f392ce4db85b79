"""Ends a run that SkyPilot has, and waits until it has saved what it could."""

from __future__ import annotations

import time
from collections.abc import Callable

from launcher.cloud.protocol import Cloud, Say, Standing, find
from launcher.runs.read import Reader, Run

GRACE_S = 45.0
"""On a cluster: SkyPilot sends SIGTERM, and SIGKILL 30 s later (`sky/skylet/subprocess_daemon.py`, 0.14.1)."""
GONE_S = 600.0
"""For a managed job to be CANCELLED: until then its machine is being given back."""
POLL_S = 2.0


def cancel(
    standing: Standing,
    cloud: Cloud,
    reader: Reader,
    say: Say,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Cancel the job; returns the run as it was left.

    Raises:
        UserError: SkyPilot refuses, or the bucket cannot be read.
    """
    cloud.cancel(standing, say)
    until = clock() + (GRACE_S if standing.kind == "cluster" else GONE_S)
    while not _over(standing, cloud, reader.read()) and clock() < until:
        sleep(POLL_S)
    return reader.read()


def _over(standing: Standing, cloud: Cloud, run: Run) -> bool:
    """Whether the attempt has told its end; a managed job must be gone, too."""
    if standing.kind == "cluster":
        return not run.attempts or run.attempts[-1].end is not None
    now = find(cloud, standing.name, standing.kind)
    return now is None or not now.at_work
