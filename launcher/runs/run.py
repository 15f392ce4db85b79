"""The history of a run, read from its bucket: attempts, steps, commits, and steps that were taken twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from trainer import accounting
from trainer.accounting import AttemptCost, RunCost
from trainer.bucket.layout import (
    COMMITS_PREFIX,
    EVENTS_PREFIX,
    FINAL_COMMIT_KEY,
    committed_step,
    events_attempt,
    final_uri,
)
from trainer.events import Event, of_kind, parse

if TYPE_CHECKING:
    from trainer.bucket import Bucket

State = Literal["new", "running", "preempted", "stopped", "failed", "superseded", "done"]
End = Literal["preempted", "stopped", "failed", "superseded", "done"]


@dataclass(frozen=True)
class Redone:
    """Steps `after + 1` to `until`, which an attempt took again after an earlier attempt."""

    after: int
    until: int


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt, from its events; a machine that vanished leaves no end event."""

    number: int
    events: tuple[Event, ...]

    @cached_property
    def began(self) -> float:
        """Time of its claim (unix time, seconds)."""
        return accounting.claimed_at(self.events).timestamp()

    @cached_property
    def ended(self) -> float:
        """The latest time of any of its events (unix time, seconds)."""
        return accounting.latest_event_at(self.events).timestamp()

    @cached_property
    def claim(self) -> Event:
        """The `claimed` event with machine, fit and price; empty if it is missing."""
        return next(iter(of_kind(self.events, "claimed")), {})

    @cached_property
    def boot_s(self) -> float:
        """Seconds from the machine's boot to the claim, which are paid too."""
        return accounting.boot_s(self.events)

    def cost(self, until: float | None = None) -> AttemptCost:
        """Return its paid time and price, up to `until` (unix time, seconds) or its latest event."""
        return accounting.attempt_cost(self.events, until=until)

    @cached_property
    def start(self) -> int:
        """The step that it resumed from; 0 if it started from the beginning."""
        return max((int(event.get("step", 0)) for event in of_kind(self.events, "restored")), default=0)

    @cached_property
    def step(self) -> int:
        """The last step in its events."""
        return max((int(event["step"]) for event in of_kind(self.events, "step")), default=self.start)

    @cached_property
    def end(self) -> Event | None:
        """The event that ended it, or None."""
        return next(
            iter(reversed(of_kind(self.events, "preempted", "stopped", "failed", "superseded", "done"))), None
        )

    @cached_property
    def step_s(self) -> float:
        """Mean seconds between its steps, evaluations and saves included; 0 before the second step."""
        steps = of_kind(self.events, "step")
        if len(steps) < 2 or steps[-1]["step"] <= steps[0]["step"]:
            return 0.0
        return _seconds(steps[0], steps[-1]) / float(steps[-1]["step"] - steps[0]["step"])


@dataclass(frozen=True)
class RunHistory:
    """The history of a run over all its attempts."""

    run_id: str
    uri: str
    """The run's address: the folder or bucket of the runs, then the run id."""
    attempts: tuple[AttemptHistory, ...]
    commits: tuple[int, ...]
    """Steps of the checkpoints ever committed, ascending; retention may have removed some since."""
    finished: str | None = None
    """When the final model was committed (UTC, ISO 8601). This makes a run done, with or without a `done` event."""

    @property
    def state(self) -> State:
        """The state as recorded in the bucket. If the newest attempt has no end event, the run counts as running."""
        if self.finished:
            return "done"
        if not self.attempts:
            return "new"
        end = self.attempts[-1].end
        state: State = end["kind"] if end else "running"
        return state

    @cached_property
    def events(self) -> tuple[Event, ...]:
        return tuple(event for attempt in self.attempts for event in attempt.events)

    @cached_property
    def steps(self) -> tuple[Event, ...]:
        """The step events in step order; a step that was taken again has the event of the later attempt."""
        return _merge(of_kind(self.events, "step"))

    @cached_property
    def evals(self) -> tuple[Event, ...]:
        """The evaluations in step order; a repeated evaluation has the event of the later attempt."""
        return _merge(of_kind(self.events, "eval"))

    @property
    def method(self) -> str:
        """`dpo` or `sft`, from the newest claim; empty before the first claim."""
        claims = of_kind(self.events, "claimed")
        return str(claims[-1]["method"]) if claims else ""

    @property
    def step(self) -> int:
        """The newest attempt's last step."""
        return self.attempts[-1].step if self.attempts else 0

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None before training starts."""
        totals = [
            event["total_steps"]
            for event in of_kind(self.events, "started", "step")
            if event.get("total_steps")
        ]
        return int(totals[-1]) if totals else None

    @property
    def preemptions(self) -> int:
        """Number of attempts that were preempted or lost. The newest counts only if it has a `preempted` event."""
        ends = [attempt.end["kind"] if attempt.end else None for attempt in self.attempts[:-1]]
        gone = sum(end in (None, "preempted") for end in ends)
        return gone + (self.state == "preempted")

    @property
    def restores(self) -> tuple[AttemptHistory, ...]:
        """The attempts that resumed from a checkpoint."""
        return tuple(attempt for attempt in self.attempts if attempt.start > 0)

    @cached_property
    def redone(self) -> tuple[Redone, ...]:
        """The repeated steps, one span for each attempt that repeated any."""
        spans: list[Redone] = []
        reached = 0
        for attempt in self.attempts:
            until = min(reached, attempt.step)
            if until > attempt.start:
                spans.append(Redone(attempt.start, until))
            reached = max(reached, attempt.step)
        return tuple(spans)

    @property
    def lost_steps(self) -> int:
        """Number of steps that were repeated. Steps in the last seconds of a lost machine may not be in its events."""
        return sum(span.until - span.after for span in self.redone)

    @property
    def wall_s(self) -> float:
        """Seconds from the first event to the last, including the time between attempts."""
        return _seconds(self.events[0], self.events[-1]) if self.events else 0.0

    def cost(self, *, now: float | None = None, usd_per_h: float | None = None) -> RunCost:
        """Return what all attempts have cost so far; see `trainer.accounting.run_cost`."""
        return accounting.run_cost(
            [attempt.events for attempt in self.attempts], now=now, usd_per_h=usd_per_h
        )

    @property
    def final_uri(self) -> str:
        """Address of the exported model."""
        return final_uri(self.uri)


class Reader:
    """Reads one run repeatedly; files whose size has not changed are not read again."""

    def __init__(self, bucket: Bucket, run_id: str) -> None:
        self._bucket = bucket
        self._run_id = run_id
        self._attempts: dict[int, tuple[int, AttemptHistory]] = {}
        self._commits: set[int] = set()
        self._finished: str | None = None

    def read(self) -> RunHistory:
        """Return the run as it is now; raises BucketError and Unavailable."""
        for entry in self._bucket.list(EVENTS_PREFIX):
            if (number := events_attempt(entry.key)) is not None:
                self._refresh(number, entry.key, entry.size)
        attempts = tuple(self._attempts[number][1] for number in sorted(self._attempts))
        keys = [entry.key for entry in self._bucket.list(COMMITS_PREFIX)]
        committed = [event for attempt in attempts for event in of_kind(attempt.events, "committed")]
        self._commits |= {step for step in map(committed_step, keys) if step is not None}
        self._commits |= {int(event["step"]) for event in committed}
        if self._finished is None and FINAL_COMMIT_KEY in keys:
            self._finished = json.loads(self._bucket.get(FINAL_COMMIT_KEY))["created"]
        return RunHistory(
            self._run_id, self._bucket.uri, attempts, tuple(sorted(self._commits)), self._finished
        )

    def _refresh(self, number: int, key: str, size: int) -> None:
        known = self._attempts.get(number)
        if known is None or known[0] != size:
            self._attempts[number] = (size, AttemptHistory(number, tuple(parse(self._bucket.get(key)))))


def values(events: Sequence[Event], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the events that have a number for the key."""
    having = [event for event in events if isinstance(event.get(key), int | float)]
    return [int(event["step"]) for event in having], [float(event[key]) for event in having]


def _merge(events: Iterable[Event]) -> tuple[Event, ...]:
    merged: dict[int, Event] = {}
    for event in events:
        before = merged.get(int(event["step"]), {})
        same = before.get("attempt") == event.get("attempt")  # an attempt may log two events for one step
        merged[int(event["step"])] = {**before, **event} if same else event
    return tuple(merged[step] for step in sorted(merged))


def _seconds(first: Event, last: Event) -> float:
    return (datetime.fromisoformat(last["time"]) - datetime.fromisoformat(first["time"])).total_seconds()
