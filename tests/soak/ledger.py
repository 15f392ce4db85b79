"""What a run has promised so far, and whether its bucket still keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.harness import RunView
from trainer.bucket.manifest import Manifest, committed
from trainer.bucket.restore import mismatch
from trainer.events import MEASURED, Event

UNLIKE = {"time", "attempt"} | MEASURED


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed. Saves that it left out are known from the first run that made them."""

    told: dict[int, Event]
    """Each step's event, without what names attempt and time."""
    commits: dict[int, str]
    """Digest of the weights by step."""
    final: str
    seconds: float


def reference(view: RunView, seconds: float) -> Reference:
    final = view.final()
    assert final, "the undisturbed run has no final model"
    told = {event["step"]: _bare(event) for event in view.events("step")}
    commits = {manifest.step: manifest.weights_digest for manifest in committed(view.bucket)}
    return Reference(told, commits, final.weights_digest, seconds)


class Ledger:
    """One run's; asked after every kill. What it finds is in `lost` and `diverged`, a line each."""

    def __init__(self, view: RunView, expected: Reference, keep: int) -> None:
        self._view = view
        self._expected = expected
        self._keep = keep
        self._attempt = 0
        self.newest = 0
        """Step of the newest commit at the last look: where the next attempt has to go on."""
        self.seen: set[int] = set()
        """Steps of the commits that were ever there."""
        self.lost: list[str] = []
        self.diverged: list[str] = []

    def look(self) -> None:
        """After an attempt has ended, however it did, and before the next."""
        events = self._view.events()
        self._check_resumes(events)
        self._check_steps(events)
        found = committed(self._view.bucket)
        self.seen |= {event["step"] for event in events if event["kind"] == "committed"}
        self._check_commits(found)
        self.seen |= {manifest.step for manifest in found}
        self.newest = max((manifest.step for manifest in found), default=0)

    def conclude(self) -> None:
        """Once the run is done: the same model, by the same steps, every one of them told."""
        final = self._view.final()
        if final is None or final.weights_digest != self._expected.final:
            self.diverged.append("the final model is not that of the undisturbed run")
        missing = self._expected.told.keys() - {event["step"] for event in self._view.events("step")}
        if missing:
            self.diverged.append(f"nobody told of steps {sorted(missing)}")

    def _check_resumes(self, events: list[Event]) -> None:
        for event in events:
            if event["attempt"] <= self._attempt:
                continue
            if event["kind"] == "restored" and event["step"] != self.newest:
                self.lost.append(
                    f"attempt {event['attempt']} was restored to {event['step']}, not {self.newest}"
                )
            if event["kind"] == "rejected":
                self.lost.append(
                    f"attempt {event['attempt']} rejected step {event['step']}: {event['reason']}"
                )

    def _check_steps(self, events: list[Event]) -> None:
        wrong = {
            event["attempt"]
            for event in events
            if event["attempt"] > self._attempt
            and event["kind"] == "step"
            and _bare(event) != self._expected.told.get(event["step"])
        }
        self.diverged += [f"attempt {attempt} told other steps" for attempt in sorted(wrong)]
        self._attempt = max([self._attempt, *(event["attempt"] for event in events)])

    def _check_commits(self, found: list[Manifest]) -> None:
        there = {item.key: item.size for item in self._view.bucket.list("checkpoints/")}
        for manifest in found:
            if fault := manifest.fault(there):
                self.lost.append(f"step {manifest.step}: {fault}")
            known = self._expected.commits.setdefault(manifest.step, manifest.weights_digest)
            if manifest.weights_digest != known:
                self.diverged.append(
                    f"attempt {manifest.attempt} committed step {manifest.step} with other weights"
                )
        if found:
            self.lost += self._damage(found[0])
        steps = {manifest.step for manifest in found}
        for step in sorted(self.seen - steps):
            if len([newer for newer in steps if newer > step]) < self._keep:
                self.lost.append(f"step {step} is gone; what is there: {sorted(steps)}")
                self.seen.discard(step)

    def _damage(self, newest: Manifest) -> list[str]:
        """Every byte of the newest commit is read."""
        reasons = []
        for file in newest.files:
            key = newest.prefix + file.path
            try:
                reasons.append(mismatch(key, file, self._view.bucket.checksum(key)))
            except FileNotFoundError:
                reasons.append(mismatch(key, file, None))
        return [reason for reason in reasons if reason]


def _bare(event: Event) -> Event:
    return {key: event[key] for key in event.keys() - UNLIKE}
