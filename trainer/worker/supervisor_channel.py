"""What a worker says to its supervisor, a line at a time, and the one thing it hears: a signal to stop."""

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
    """Lines to `steps.jsonl`, the outcome, and the stop signal.

    Rank 0 tells the steps, and the first rank of each node the outcome, but for what only another knows.

    Until `training_begins` a signal ends the process at once, as preempted: there is nothing to save.
    From then on it raises `stop_asked`, which the training loop reads where a step ends.
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
        """Write one line and flush it; floats are written so that they read back equal."""
        if self._lines:
            self._lines.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._lines.flush()

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 for this process; main thread only.

        SIGINT is ignored: a terminal sends Ctrl-C to the whole group, and the supervisor answers it.
        """
        self._ends_at_once = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def training_begins(self) -> None:
        self._ends_at_once = False

    def conclude(self, outcome: Outcome) -> None:
        """Write how it ended; nothing is said after this. Any rank may find that there is no room, or a user's fault;
        of several that do the first is heard, and a node's first rank before its others.
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
            # No cleanup: imports and loads in full flight would delay it or turn it into an error. Ranks that went
            # past this point already learn from the code that they wait in vain.
            os._exit(0 if self._job.fit.processes == 1 else 1)


class ChannelHandler(logging.Handler):
    """Hands our own log records to the supervisor, which shows them to the user."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.INFO)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.say("log", level=record.levelname.lower(), message=record.getMessage())
