"""What happened in an attempt: one JSON object a line, in `events/<attempt>.jsonl` of the run.

Object stores cannot append, so the log is kept in memory and written whole: at once when
something matters (a claim, a commit, an end), else at most every few seconds. It is of bounded size
(`trainer.event_thinning`), and what is summed over many events is told by each of them, as `so_far`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from trainer.event_thinning import MOST, VALUES, EventLines

Kind = Literal[
    "claimed",  # recipe, fit, shape, node, price (usd_per_h, market, cloud, region), plan: what was promised, limits,
    # booted: from when on the machine is paid; only where that is before the claim
    "restored",  # step, from_attempt, files, bytes, seconds; or step 0 with the reason
    "rejected",  # step, reason: a checkpoint that did not verify
    "started",  # total_steps, samples; the workers are about to take the first step
    "reference",  # pairs, computed, seconds: log-probabilities of DPO's reference; computed are not from the bucket
    "step",  # step, total_steps, loss, learning_rate, grad_norm, samples, rewards/..., step_s, train_s (of all steps
    # of the attempt), tokens_per_s, gpu_peak_gib, host_peak_gib
    "eval",  # step, eval_loss, eval_rewards/accuracies, ..., seconds
    "saved",  # step, bytes, stall_s
    "save_skipped",  # step, reason
    "committed",  # step, files, bytes, seconds
    "upload_failed",  # step, reason, tries: so many since the last commit
    "window",  # holds, seconds, bytes, bytes_per_s, window_s: whether a notice leaves time for a save
    "notice",  # source: SIGTERM ...
    "limit",  # what: "budget" or "deadline", share: 0.8 or 1.0 of it, limit, usd, hours: so far, all attempts
    "preempted",  # step
    "stopped",  # message, what, limit, usd, hours: a limit is used up, and what there was is saved
    "superseded",  # by: attempt
    "failed",  # message, exit_code
    "exported",  # files, bytes, seconds, weights_digest
    "done",  # step
    "log",  # level, message: what the user should see
]
"""The kinds of events, with their fields; every event also has `time` (UTC, ISO 8601) and `attempt`."""

MEASURED = frozenset(
    {"step_s", "train_s", "tokens_per_s", "gpu_peak_gib", "host_peak_gib", "seconds", "so_far"}
)
"""Of `step` and `eval`: what is of the machine and the moment; all else is the run's, and the same in each attempt."""
Event = dict[str, Any]
AT_FULL_PACE_BYTES = 256 * 1024
"""A log longer than this is written less often in proportion: it is always written whole."""
SUMMED: dict[str, tuple[str, ...]] = {
    "eval": ("seconds",),
    "saved": ("bytes", "stall_s"),
    "committed": ("bytes", "seconds"),
    "save_skipped": (),
    "upload_failed": (),
}
"""Kinds that count themselves, and the fields that they add up, since the log does not keep all of them."""


class EventLog:
    """The attempt's events; `add` never waits for the store."""

    def __init__(
        self,
        attempt: int,
        write: Callable[[bytes], None],
        *,
        every_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attempt = attempt
        self._write = write
        self._every_s = every_s
        self._clock = clock
        self._lines = {kind: EventLines(MOST.get(kind)) for kind in get_args(Kind)}
        self._so_far: dict[str, dict[str, float]] = {}
        self._added = 0
        self._written = 0
        self._written_at = -every_s
        self._adding = threading.Lock()
        self._writing = threading.Lock()

    def add(self, kind: Kind, **fields: Any) -> Event:
        """Record one event; it reaches the bucket with the next `flush`."""
        event = {"kind": kind, "time": datetime.now(UTC).isoformat(), "attempt": self._attempt, **fields}
        with self._adding:
            event |= self._sums(event)
            data = json.dumps(event).encode() + b"\n"
            self._lines[kind].add(self._added, event.get(VALUES.get(kind, "")), data)
            self._added += 1
        return event

    def _sums(self, event: Event) -> Event:
        """Over all events of its kind, with this one."""
        if (keys := SUMMED.get(event["kind"])) is None:
            return {}
        sums = self._so_far.setdefault(event["kind"], dict.fromkeys(("count", *keys), 0))
        sums["count"] += 1
        for key in keys:
            sums[key] += event.get(key) or 0
        return {"so_far": dict(sums)}

    def flush(self, *, now: bool = False) -> None:
        """Write the log if it grew and its time has come, or at once with `now`.

        Raises:
            UserError: the store refused or is away; nothing is lost, the next flush writes it all.
        """
        with self._writing:  # a newer log must never be overwritten by an older one
            if not now and self._clock() - self._written_at < self._every_s:
                return
            with self._adding:
                added = self._added
                lines = sorted(line for kind in self._lines.values() for line in kind)
            data = b"".join(line.data for line in lines)
            waits_s = self._every_s * max(1.0, len(data) / AT_FULL_PACE_BYTES)
            due = now or self._clock() - self._written_at >= waits_s
            if due and added > self._written:
                self._write(data)
                self._written = added
                self._written_at = self._clock()


def parse(data: bytes) -> list[Event]:
    """The events of one file."""
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def of_kind(events: Iterable[Event], *kinds: Kind) -> list[Event]:
    return [event for event in events if event["kind"] in kinds]
