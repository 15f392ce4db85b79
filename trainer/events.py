"""Events of an attempt: one JSON object per line, in the run's object `events/<attempt>.jsonl`.

Object stores cannot append, so the log is kept in memory and written as a whole. It is written at once after important
events (a claim, a commit, an end), else at most every few seconds.

The log stays below a mebibyte. Of frequent events, `EventLines` keeps the newest ones and, of older ones, the extremes
of equal spans, so that curves keep their shape. Events of kinds that are summed carry the sums so far in `so_far`, so
that sums stay exact.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal[
    "claimed",  # recipe, fit, shape, node, price (usd_per_h, market, cloud, region), plan: the prediction, limits,
    # booted: since when the machine is paid; only if that is before the claim
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
    "upload_failed",  # step, reason, tries: failures since the last commit
    "window",  # holds, seconds, bytes, bytes_per_s, window_s: whether a preemption notice leaves time for a save
    "notice",  # source: SIGTERM ...
    "limit",  # what: "budget" or "deadline", share: 0.8 or 1.0 of it, limit, usd, hours: so far, all attempts
    "preempted",  # step
    "stopped",  # message, what, limit, usd, hours: a limit is used up, and the progress is saved
    "superseded",  # by: attempt
    "failed",  # message, exit_code
    "exported",  # files, bytes, seconds, weights_digest
    "done",  # step
    "log",  # level, message: what the user should see
]
"""The kinds of events, with their fields. Every event also has `time` (UTC, ISO 8601) and `attempt`."""
Event = dict[str, Any]

MEASURED = frozenset(
    {"step_s", "train_s", "tokens_per_s", "gpu_peak_gib", "host_peak_gib", "seconds", "so_far"}
)
"""Fields of `step` and `eval` that depend on the machine. All other fields are equal in every attempt at the run."""
AT_FULL_PACE_BYTES = 256 * 1024
"""A longer log is written less often, in proportion to its length, because it is always written as a whole."""
SUMMED: dict[str, tuple[str, ...]] = {
    "eval": ("seconds",),
    "saved": ("bytes", "stall_s"),
    "committed": ("bytes", "seconds"),
    "save_skipped": (),
    "upload_failed": (),
}
"""Kinds whose events are counted, and the fields that are summed, because the log does not keep all of these events."""
MOST: Mapping[str, int] = {
    "step": 1024,
    "eval": 256,
    "saved": 256,
    "committed": 256,
    "save_skipped": 64,
    "upload_failed": 64,
    "rejected": 64,
    "window": 64,
    "notice": 64,
    "log": 256,
}
"""The most lines of each kind, so that a log stays below a mebibyte. Other kinds come once in an attempt."""
WHOLE_TAIL = 4
"""One line in so many is reserved for the newest lines, which are never thinned out."""
CURVES: Mapping[str, str] = {"step": "loss", "eval": "eval_loss"}
"""The field of a kind whose extremes are kept when lines are thinned out."""


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
        """Record one event; the next `flush` writes it to the bucket."""
        event = {"kind": kind, "time": datetime.now(UTC).isoformat(), "attempt": self._attempt, **fields}
        with self._adding:
            event |= self._sums(event)
            data = json.dumps(event).encode() + b"\n"
            self._lines[kind].add(self._added, event.get(CURVES.get(kind, "")), data)
            self._added += 1
        return event

    def flush(self, *, now: bool = False) -> None:
        """Write the log if it grew and its interval has passed, or at once with `now`.

        Raises:
            UserError: the store refused or is unreachable. No event is lost: the next flush writes them all.
        """
        with self._writing:  # an older log must never overwrite a newer one
            if not now and self._clock() - self._written_at < self._every_s:
                return
            with self._adding:
                added = self._added
                lines = sorted(line for kind in self._lines.values() for line in kind)
            data = b"".join(line.data for line in lines)
            interval_s = self._every_s * max(1.0, len(data) / AT_FULL_PACE_BYTES)
            due = now or self._clock() - self._written_at >= interval_s
            if due and added > self._written:
                self._write(data)
                self._written = added
                self._written_at = self._clock()

    def _sums(self, event: Event) -> Event:
        """Return the sums over all events of this kind, including this one."""
        if (keys := SUMMED.get(event["kind"])) is None:
            return {}
        sums = self._so_far.setdefault(event["kind"], dict.fromkeys(("count", *keys), 0))
        sums["count"] += 1
        for key in keys:
            sums[key] += event.get(key) or 0
        return {"so_far": dict(sums)}


class EventLine(NamedTuple):
    """One event as it is written."""

    order: int
    """Its number among all events of the log."""
    nth: int
    """Its number among the events of its kind."""
    value: float | None
    data: bytes


class EventLines:
    """The lines of one kind, thinned out to a fixed number.

    A span is a number of consecutive events. Of each span, only the lines with the extreme values are kept. When there
    are too many lines, the span doubles. So all parts of the log have the same resolution, except the first line and the
    newest lines, which are all kept.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._span = 1
        self._added = 0
        self._lines: list[EventLine] = []

    def add(self, order: int, value: object, data: bytes) -> None:
        number = float(value) if isinstance(value, int | float) else None
        self._lines.append(EventLine(order, self._added, number, data))
        self._added += 1
        if self._most and len(self._lines) > self._most:
            self._thin(self._most)

    def __iter__(self) -> Iterator[EventLine]:
        return iter(self._lines)

    def _thin(self, most: int) -> None:
        tail = most // WHOLE_TAIL
        first, older, newest = self._lines[:1], self._lines[1:-tail], self._lines[-tail:]
        while len(first) + len(older) + len(newest) > most - tail:
            older = _extremes(older, self._span)
            if len(first) + len(older) + len(newest) > most - tail:
                self._span *= 2
        self._lines = [*first, *older, *newest]


def parse(data: bytes) -> list[Event]:
    """Return the events of one log."""
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def of_kind(events: Iterable[Event], *kinds: Kind) -> list[Event]:
    return [event for event in events if event["kind"] in kinds]


def _extremes(lines: list[EventLine], span: int) -> list[EventLine]:
    """Return the lines with the least and greatest value of each span, or its last line if it has no values."""
    spans: dict[int, list[EventLine]] = {}
    for line in lines:
        spans.setdefault(line.nth // span, []).append(line)
    extremes: list[EventLine] = []
    for members in spans.values():
        numbered = [line for line in members if line.value is not None and not math.isnan(line.value)]
        if numbered:
            extremes += sorted({min(numbered, key=_value), max(numbered, key=_value)})
        else:
            extremes.append(members[-1])
    return extremes


def _value(line: EventLine) -> float:
    return line.value or 0.0
