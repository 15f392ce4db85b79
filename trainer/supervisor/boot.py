"""From when on this machine is paid: its boot, where SkyPilot rented it and no earlier attempt has paid for that.

SkyPilot 0.14.1 does not tell a node when it was launched, and a recovery has the task id of the attempt before. Of other
runs on the same machine nobody here knows: what began within the hour then counts in each of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import psutil

from trainer.events import Event, of_kind
from trainer.supervisor.price import rented

LONGEST_S = 3600.0
"""Between boot and claim; a machine that has been up for longer did something else before."""
SAME_S = 5.0
"""Two readings of one boot differ by less: the kernel takes it from a clock that is set meanwhile."""


def booted_here(
    node: str,
    earlier: Callable[[], Sequence[Sequence[Event]]],
    *,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
) -> str | None:
    """When this machine booted (UTC, ISO 8601), if this attempt is the first of its run to pay for that.

    Args:
        node: this machine's name.
        earlier: the events of each earlier attempt; asked for only where they matter.
        environ: of this process.
        now: unix time, seconds.
    """
    if not rented(environ):
        return None
    at = psutil.boot_time()
    if not 0 < now() - at <= LONGEST_S or any(_paid(claimed, node, at) for claimed in _claims(earlier())):
        return None
    return datetime.fromtimestamp(at, UTC).isoformat()


def _claims(attempts: Sequence[Sequence[Event]]) -> list[Event]:
    return [claimed for events in attempts for claimed in of_kind(events, "claimed")]


def _paid(claimed: Event, node: str, at: float) -> bool:
    """Whether an earlier attempt was claimed on the same machine since the same boot, and pays for it."""
    if not claimed.get("booted") or claimed["shape"]["node"] != node:
        return False
    return abs(datetime.fromisoformat(claimed["booted"]).timestamp() - at) <= SAME_S
