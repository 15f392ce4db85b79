"""A run, read from its bucket: what its attempts did, what is committed, what was done twice."""

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
    """Steps `after + 1` to `until`, which an attempt took although an earlier one had taken them."""

    after: int
    until: int


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt as its events tell it; a machine that vanished leaves no end."""

    number: int
    events: tuple[Event, ...]

    @cached_property
    def began(self) -> float:
        """When it claimed the run (unix time, seconds)."""
        return accounting.claimed_at(self.events).timestamp()

    @cached_property
    def ended(self) -> float:
        """The latest time of any of its events (unix time, seconds)."""
        return accounting.latest_event_at(self.events).timestamp()

    @cached_property
    def claim(self) -> Event:
        """Its machine, its fit and its price; empty if nothing of it was written."""
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
        """The step that it was restored to; 0 if it began anew."""
        return max((int(event.get("step", 0)) for event in of_kind(self.events, "restored")), default=0)

    @cached_property
    def step(self) -> int:
        """The last step that it is known to have taken."""
        return max((int(event["step"]) for event in of_kind(self.events, "step")), default=self.start)

    @cached_property
    def end(self) -> Event | None:
        """The event that ended it."""
        return next(
            iter(reversed(of_kind(self.events, "preempted", "stopped", "failed", "superseded", "done"))), None
        )

    @cached_property
    def step_s(self) -> float:
        """Seconds that a step takes, by the times of its steps; 0 as long as there are not two."""
        steps = of_kind(self.events, "step")
        if len(steps) < 2 or steps[-1]["step"] <= steps[0]["step"]:
            return 0.0
        return _seconds(steps[0], steps[-1]) / float(steps[-1]["step"] - steps[0]["step"])


@dataclass(frozen=True)
class RunHistory:
    """A run over all its attempts."""

    run_id: str
    uri: str
    """The run's own address: the bucket's or folder's, then the run id."""
    attempts: tuple[AttemptHistory, ...]
    commits: tuple[int, ...]
    """Steps of the checkpoints ever committed, ascending; retention may have removed some since."""
    finished: str | None = None
    """When the final model was committed (UTC, ISO 8601); that makes a run done, whoever saw it end."""

    @property
    def state(self) -> State:
        """As far as the bucket knows: a newest attempt without an end reads as running."""
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
        """The step events in step order; for a step taken again, the later attempt's."""
        return _merge(of_kind(self.events, "step"))

    @cached_property
    def evals(self) -> tuple[Event, ...]:
        """The evaluations in step order; for one made again, the later attempt's."""
        return _merge(of_kind(self.events, "eval"))

    @property
    def method(self) -> str:
        """`dpo` or `sft`, as the newest attempt claimed it; empty if none has yet."""
        claims = of_kind(self.events, "claimed")
        return str(claims[-1]["method"]) if claims else ""

    @property
    def step(self) -> int:
        """Where training stands: the newest attempt's last step."""
        return self.attempts[-1].step if self.attempts else 0

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None until an attempt has begun to train."""
        told = [
            event["total_steps"]
            for event in of_kind(self.events, "started", "step")
            if event.get("total_steps")
        ]
        return int(told[-1]) if told else None

    @property
    def preemptions(self) -> int:
        """Attempts that did not end by themselves; the newest counts only once it has said so."""
        ends = [attempt.end["kind"] if attempt.end else None for attempt in self.attempts[:-1]]
        gone = sum(end in (None, "preempted") for end in ends)
        return gone + (self.state == "preempted")

    @property
    def restores(self) -> tuple[AttemptHistory, ...]:
        """The attempts that went on from a checkpoint."""
        return tuple(attempt for attempt in self.attempts if attempt.start > 0)

    @cached_property
    def redone(self) -> tuple[Redone, ...]:
        """The spans of lost work, one for each attempt that repeated steps."""
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
        """Steps done more than once, as far as the events tell: the last seconds of a lost machine are unknown."""
        return sum(span.until - span.after for span in self.redone)

    @property
    def wall_s(self) -> float:
        """Seconds from the first event to the last, the time between attempts included."""
        return _seconds(self.events[0], self.events[-1]) if self.events else 0.0

    def cost(self, *, now: float | None = None, usd_per_h: float | None = None) -> RunCost:
        """Return what all attempts have cost so far; see `trainer.accounting.run_cost`."""
        return accounting.run_cost(
            [attempt.events for attempt in self.attempts], now=now, usd_per_h=usd_per_h
        )

    @property
    def final_uri(self) -> str:
        """Where the exported model lies once the run is done."""
        return final_uri(self.uri)


class Reader:
    """Reads one run again and again, and only the files that have grown."""

    def __init__(self, bucket: Bucket, run_id: str) -> None:
        self._bucket = bucket
        self._run_id = run_id
        self._attempts: dict[int, tuple[int, AttemptHistory]] = {}
        self._commits: set[int] = set()
        self._finished: str | None = None

    def read(self) -> RunHistory:
        """The run as it is now; raises BucketError and Unavailable."""
        for entry in self._bucket.list(EVENTS_PREFIX):
            if (number := events_attempt(entry.key)) is not None:
                self._refresh(number, entry.key, entry.size)
        attempts = tuple(self._attempts[number][1] for number in sorted(self._attempts))
        keys = [entry.key for entry in self._bucket.list(COMMITS_PREFIX)]
        told = [event for attempt in attempts for event in of_kind(attempt.events, "committed")]
        self._commits |= {step for step in map(committed_step, keys) if step is not None}
        self._commits |= {int(event["step"]) for event in told}
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
    """Steps and values of those events that have the key."""
    having = [event for event in events if isinstance(event.get(key), int | float)]
    return [int(event["step"]) for event in having], [float(event[key]) for event in having]


def _merge(events: Iterable[Event]) -> tuple[Event, ...]:
    merged: dict[int, Event] = {}
    for event in events:
        before = merged.get(int(event["step"]), {})
        same = before.get("attempt") == event.get("attempt")  # one attempt may tell of a step twice
        merged[int(event["step"])] = {**before, **event} if same else event
    return tuple(merged[step] for step in sorted(merged))


def _seconds(first: Event, last: Event) -> float:
    return (datetime.fromisoformat(last["time"]) - datetime.fromisoformat(first["time"])).total_seconds()
