"""The worker's side of the connection to the supervisor: lines in a file, the outcome file, and the stop signal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from types import FrameType
from typing import Any

from trainer.events import Kind
from trainer.files import write_atomically
from trainer.job import Job, Outcome


class Channel:
    """Writes lines to `steps.jsonl`, writes the outcome, and receives the stop signal.

    Rank 0 writes the lines. The first rank of each node writes the outcome, unless another rank has failed.

    Before `training_begins`, a signal ends the process at once with the outcome `preempted`, because there is nothing to
    save. After it, a signal sets `stop_asked`, which the training loop reads at the end of each step.
    """

    def __init__(self, job: Job, *, rank: int = 0, local_rank: int | None = None) -> None:
        self.stop_asked = False
        self._job = job
        self._rank = rank
        self._concludes = (rank if local_rank is None else local_rank) == 0
        self._ends_at_once = False
        self._lines = job.steps.open("a") if rank == 0 else None
        self._concluded = False

    def say(self, kind: Kind, **fields: Any) -> None:
        """Write one event as a line and flush it. Floats keep all digits, so that they read back equal."""
        if self._lines:
            self._lines.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._lines.flush()

    def listen(self) -> None:
        """Install handlers for SIGTERM and SIGUSR1; call this in the main thread.

        SIGINT is ignored: a terminal sends Ctrl-C to the whole process group, and the supervisor handles it.
        """
        self._ends_at_once = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def training_begins(self) -> None:
        """From now on a signal requests a stop instead of ending the process."""
        self._ends_at_once = False

    def conclude(self, outcome: Outcome) -> None:
        """Write the outcome; later calls of `say` are ignored.

        Any rank may fail with a full disk or an error of the user. If several do, the first one's outcome is used, and
        the outcome of a node's first rank replaces those of its other ranks.
        """
        lines, self._lines = self._lines, None
        if lines:
            lines.close()
        if self._concludes:
            if not self._concluded:
                write_atomically(self._job.outcome, outcome.model_dump_json())
            self._concluded = True
        elif outcome.explains:
            mine = self._job.outcome.with_name(f"outcome-{self._rank}.json")
            mine.write_text(outcome.model_dump_json())
            with contextlib.suppress(FileExistsError):
                self._job.outcome.hardlink_to(mine)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.stop_asked = True
        if self._ends_at_once:
            self.conclude(Outcome(status="preempted", message="before the first step"))
            # Exit without cleanup, which running imports and loads could delay or turn into an error. The exit code
            # tells ranks that are further ahead that this one will not come.
            os._exit(0 if self._job.fit.processes == 1 else 1)


class ChannelHandler(logging.Handler):
    """Sends our own log records to the supervisor, which shows them to the user."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.INFO)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.say("log", level=record.levelname.lower(), message=record.getMessage())
