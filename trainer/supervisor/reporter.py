"""Reports what happens to an attempt: as events for programs, and as log lines for people."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.accounting import Limit, Limits
from trainer.bucket.layout import final_uri
from trainer.bucket.manifest import Manifest
from trainer.bucket.restore import Restored
from trainer.errors import ExitCode, Superseded
from trainer.events import Event, EventLog, Kind
from trainer.fit import Fit
from trainer.hardware import Shape
from trainer.job import Tail
from trainer.metrics import log_text
from trainer.recipe import Recipe
from trainer.supervisor.price import Price
from trainer.supervisor.save_window import SAFE_SHARE, SaveHistory, Window, WindowVerdict, verdict

log = logging.getLogger(__name__)
DEFAULT_LOGGING_STEPS = 10
WARN_EVERY_S = 60.0


class Reporter:
    """Has one method for each event of an attempt. The methods are safe to call from any thread."""

    def __init__(
        self,
        events: EventLog,
        recipe: Recipe,
        steps: Path,
        *,
        window: Callable[[], Window | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Report to `events` and to the log.

        Args:
            events: the attempt's event log.
            recipe: the recipe of the run.
            steps: file of the workers' events (`Job.steps`).
            window: returns the preemption notice's window, once it is known.
            clock: monotonic clock, in seconds.
        """
        self._events = events
        self._window = window
        self._history = SaveHistory()
        self._commits = 0
        self._verdict: WindowVerdict | None = None
        self._outage = Outage(clock)
        self._recipe = recipe
        self._steps = Tail(steps)
        self._forwarding = threading.Lock()
        self._print_every = int(recipe.trainer_args.get("logging_steps") or DEFAULT_LOGGING_STEPS) or 1

    def claimed(  # noqa: PLR0913 (the fields of the event)
        self,
        shape: Shape,
        planned: Fit,
        uri: str,
        *,
        price: Price | None = None,
        plan: Event | None = None,
        limits: Limits | None = None,
        booted: str | None = None,
    ) -> Event:
        """Report the claim.

        `booted` is the time since which the machine is paid for (UTC, ISO 8601), if that is before the claim.
        """
        event = self._events.add(
            "claimed",
            run=uri,
            method=self._recipe.method,
            recipe=self._recipe.name,
            shape=shape.model_dump(),
            fit=planned.model_dump(),
            price=(price or Price()).model_dump(),
            plan=plan,
            limits=(limits or Limits()).model_dump(),
            **({"booted": booted} if booted else {}),
        )
        log.info("attempt %d of %s on %s: %s", event["attempt"], uri, shape, "; ".join(planned.reasons))
        return event

    def warned(self, message: str) -> None:
        """Report something that the user should know about this attempt."""
        self._events.add("log", level="warning", message=message)
        log.warning("%s", message)

    def rejected(self, step: int, reason: str) -> None:
        self._events.add("rejected", step=step, reason=reason)
        log.warning("checkpoint of step %d failed verification and is not used: %s", step, reason)

    def staging(self, where: str, reason: str) -> None:
        message = f"staging on {where}: {reason}"
        self._events.add("log", level="info", message=message)
        log.info("%s", message)

    def restored(self, restored: Restored | None) -> None:
        if restored is None:
            self._events.add("restored", step=0, files=0, bytes=0, seconds=0.0)
            log.info("no committed checkpoint: starting at step 0")
            return
        manifest = restored.manifest
        event = self._events.add(
            "restored",
            step=manifest.step,
            from_attempt=manifest.attempt,
            files=len(manifest.files),
            bytes=manifest.size,
            seconds=restored.seconds,
        )
        self._history.add(event)
        log.info(
            "restored step %d, committed by attempt %d: %s verified in %.1f s",
            manifest.step, manifest.attempt, _files(manifest), restored.seconds,
        )  # fmt: skip

    def recall(self, events: Iterable[Event]) -> None:
        """Learn from the events of an earlier attempt how long a save takes. Call it before `restored`."""
        for event in events:
            self._history.add(event)

    def window(self) -> None:
        """Report whether a preemption notice leaves time for a save.

        Nothing is reported while the duration of a save is unknown, or while the verdict is unchanged. The first commit
        is an exception: its own measurement is reported even if the verdict is unchanged.
        """
        window = self._window()
        if (save := self._history.save()) is None:
            return
        current = verdict(save, window)
        if self._verdict and self._verdict.holds == current.holds and self._commits != 1:
            return
        changed = self._verdict is None or self._verdict.holds != current.holds
        self._verdict = current
        self._events.add(
            "window",
            holds=current.holds,
            seconds=save.seconds,
            bytes=save.bytes,
            bytes_per_s=save.bytes_per_s,
            window_s=window.seconds if window else None,
        )
        if changed:
            level = logging.INFO if current.holds in ("yes", "unknown") else logging.WARNING
            log.log(level, "%s", current.text)

    def forward_worker_events(self) -> bool:
        """Report the events that the workers have written since the last call. Return whether there were any."""
        with self._forwarding:
            lines = self._steps.new_lines()
            for line in lines:
                fields: dict[str, Any] = json.loads(line)
                event = self._events.add(fields.pop("kind"), **fields)
                self._history.add(event)
                self._print_worker_event(event)
        return bool(lines)

    def stuck_s(self) -> float:
        """Return after how many seconds without an event workers that were asked to stop count as stuck."""
        return self._history.stuck_s()

    def committing(self) -> None:
        """Write all events so far to the bucket. Called before each commit, so that no committed step lacks its events."""
        self.forward_worker_events()
        self._events.flush(now=True)

    def _print_worker_event(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "started":
                log.info("training from step %d to %d", event["step"], event["total_steps"])
            case "step" if event["step"] % self._print_every == 0 or event["step"] == event["total_steps"]:
                log.info("step %d/%d  %s", event["step"], event["total_steps"], log_text(event))
            case "eval":
                log.info("step %d test  %s", event["step"], log_text(event))
            case "save_skipped":
                log.warning("step %d is not saved: %s", event["step"], event["reason"])
            case "log":
                log.log(
                    logging.getLevelNamesMapping().get(event["level"].upper(), logging.INFO),
                    "%s",
                    event["message"],
                )

    def committed(self, manifest: Manifest, seconds: float) -> None:
        kind: Kind = "committed" if manifest.kind == "checkpoint" else "exported"
        event = self._events.add(
            kind,
            step=manifest.step,
            files=len(manifest.files),
            bytes=manifest.size,
            seconds=seconds,
            weights_digest=manifest.weights_digest,
        )
        what = f"step {manifest.step}" if kind == "committed" else "the final model"
        log.info("committed %s: %s in %.1f s", what, _files(manifest), seconds)
        if tried := self._outage.end():
            log.info("uploads to the bucket succeed again, after failing %s", tried)
        if kind == "committed":
            self._commits += 1
            if self._commits == 1:
                self._history.forget_uploads()
            self._history.add(event)
            self.window()

    def dropped(self, step: int) -> None:
        reason = "a newer checkpoint was staged before the upload of this one began"
        self._events.add("save_skipped", step=step, reason=reason)
        log.warning("step %d is not uploaded: %s", step, reason)

    def upload_failed(self, step: int, reason: str) -> None:
        tries = self._outage.failed()
        self._events.add("upload_failed", step=step, reason=reason, tries=tries)
        if tried := self._outage.due_warning():
            log.warning("upload of step %d failed %s and will be retried: %s", step, tried, reason)

    def notice(self, source: str) -> None:
        self._events.add("notice", source=source)
        log.warning("%s: saving, uploading and committing, then this attempt ends", source)

    def save_s(self) -> float:
        """Return the seconds to reserve for a save, with a margin. 0 until an upload has been measured.

        An upload may be in progress already, so that the time of two uploads is included.
        """
        save = self._history.save()
        return (save.seconds + save.upload_s) / SAFE_SHARE if save else 0.0

    def limit(self, limit: Limit, share: float, *, usd: float, hours: float) -> None:
        self._events.add(
            "limit", what=limit.what, share=share, limit=limit.of, usd=round(usd, 4), hours=round(hours, 4)
        )
        rest = "; saving, uploading and committing, then this run stops" if share >= 1.0 else ""
        log.warning("%s: %s%s", "used up" if share >= 1.0 else "nearly used up", limit, rest)

    def stopped(self, limit: Limit, where: str, *, usd: float, hours: float) -> None:
        message = (
            f"{limit.what} used up ({limit}): stopped {where};"
            f" run again with a higher {limit.what} to resume from the newest commit"
        )
        self._events.add(
            "stopped",
            message=message,
            what=limit.what,
            limit=limit.of,
            usd=round(usd, 4),
            hours=round(hours, 4),
        )
        log.warning("%s", message)

    def preempted(self, message: str) -> None:
        self._events.add("preempted", message=message)
        log.warning(
            "this attempt was preempted %s; run the same command again to resume from the newest commit",
            message,
        )

    def superseded(self, error: Superseded) -> None:
        self._events.add("superseded", message=error.message)

    def failed(self, message: str, exit_code: ExitCode) -> None:
        self._events.add("failed", message=message, exit_code=int(exit_code))
        if exit_code in (ExitCode.BUG, ExitCode.RECOVER):
            log.error("%s", message)

    def done(self, model: Manifest, uri: str) -> None:
        self._events.add("done", step=model.step, weights_digest=model.weights_digest)
        log.info("done: the model is in %s/", final_uri(uri))


class Outage:
    """Counts the failed uploads since the last commit, and limits the warnings to one each minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tries = 0
        self._since = 0.0
        self._warned_at: float | None = None

    def failed(self) -> int:
        """Count a failed upload. Return the number of failures in a row."""
        if not self._tries:
            self._since = self._clock()
        self._tries += 1
        return self._tries

    def due_warning(self) -> str | None:
        """Return the number and duration of the failures. None if there was a warning within the last minute."""
        now = self._clock()
        if self._warned_at is not None and now - self._warned_at < WARN_EVERY_S:
            return None
        self._warned_at = now
        return self._summary()

    def end(self) -> str | None:
        """End the outage. Return the number and duration of its failures, or None if there was no failure."""
        if not self._tries:
            return None
        summary = self._summary()
        self._tries = 0
        return summary

    def _summary(self) -> str:
        times = "once" if self._tries == 1 else f"{self._tries} times"
        return f"{times} in {self._clock() - self._since:.0f} s"


def _files(manifest: Manifest) -> str:
    count = len(manifest.files)
    return f"{count} file{'s' * (count != 1)}, {manifest.size / 1e6:,.1f} MB"
