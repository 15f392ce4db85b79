"""This machine as a backend: a job is a supervisor process, and its name is the name of the run's local folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.cloud.protocol import JobStatus, LaunchRequest, Phase, Say
from launcher.local import process
from launcher.local.process import Home, LogTail, Supervisor
from trainer.errors import ExitCode

POLL_S = 0.3
"""Pause between two looks at a log that is followed."""
WHERE = "this machine"


class LocalMachine:
    """Implements `Cloud` for this machine.

    A supervisor that ends early is reported as `lost`; the follower of the run then launches it again.
    """

    polls = True

    def __init__(self, state: Path) -> None:
        """Keep the jobs' folders under `state`."""
        self._state = state
        self._started: dict[str, Supervisor] = {}
        self._logs: dict[str, LogTail] = {}

    def launch(self, request: LaunchRequest, say: Say) -> int:  # noqa: ARG002 (the protocol's signature)
        """Start the supervisor and return its pid, or the pid of the one that another launcher has just started."""
        home = self._home(request.name)
        with home.locked():
            if found := process.attach(home):
                return found.pid
            if request.name not in self._logs:  # the first launch, not a recovery
                home.set_cancelled(False)
                # The log is opened before the process starts, so that its first lines are shown.
                self._logs[request.name] = LogTail(home.log)
            supervisor = process.start(
                home,
                request.task["run"],
                request.task["envs"],
                run_id=request.run_id,
                recipe=request.recipe,
                checkpoints=request.checkpoints,
            )
        supervisor.leave()
        self._started[request.name] = supervisor
        return supervisor.pid

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        return dict.fromkeys(infra)

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        """Return the jobs of these names, ended ones too; None: all that are running."""
        if names is None:
            found = [self._status(home) for home in process.homes(self._state)]
            return {status.name: status for status in found if status and status.at_work}
        found = [self._status(self._home(name)) for name in names]
        return {status.name: status for status in found if status}

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:  # noqa: ARG002
        return {}

    def tried(self, status: JobStatus) -> Sequence[str]:  # noqa: ARG002 (a local job never waits for a machine)
        return ()

    def logs(
        self,
        status: JobStatus,
        say: Say,
        *,
        follow: bool,
        tail: int = 0,
        poll: Callable[[], bool] | None = None,
    ) -> None:
        home = self._home(status.name)
        log = self._logs.get(status.name) or LogTail(home.log, last_lines=tail or sys.maxsize)
        self._logs[status.name] = log
        while True:
            # The process is checked first, so that nothing written before its end is missed.
            running = self._running(home)
            for line in log.new_lines():
                say(line)
            if not (follow and running) or (poll or _pause)():
                return

    def cancel(self, status: JobStatus, say: Say) -> None:  # noqa: ARG002 (the protocol's signature)
        """Record the cancellation, so that no follower restarts the job, and send SIGTERM if it is still running.

        The job may have been lost while the user was asked; it must not be restarted then either.
        """
        home = self._home(status.name)
        self._logs.setdefault(status.name, LogTail(home.log))
        home.set_cancelled(True)
        if supervisor := self._supervisor(home):
            supervisor.terminate()

    def down(self, name: str, say: Say) -> None:
        """Do nothing: this machine is not rented."""

    def kill(self, status: JobStatus) -> bool:
        """Kill the job without notice, like a preemption; return whether it was still running."""
        supervisor = self._supervisor(self._home(status.name))
        return supervisor is not None and supervisor.lose()

    def _home(self, name: str) -> Home:
        return Home(self._state / name)

    def _supervisor(self, home: Home) -> Supervisor | None:
        """Return our own child first: only for a child is the exit code known."""
        own = self._started.get(home.path.name)
        return own if own and own.alive() else process.attach(home)

    def _running(self, home: Home) -> bool:
        return self._supervisor(home) is not None

    def _status(self, home: Home) -> JobStatus | None:
        record = home.record()
        if record is None:
            return None
        running, own = self._running(home), self._started.get(home.path.name)
        code = own.exit_code() if own and own.pid == record.pid else None
        phase: Phase = "stopping" if home.cancelled else "running"
        return JobStatus(
            kind="local",
            name=home.path.name,
            job_id=record.pid,
            phase=phase if running else ended_phase(code, cancelled=home.cancelled),
            raw_status=f"pid {record.pid}" + ("" if running else " has ended"),
            where=WHERE,
            since=record.created,
            exit_code=None if running else code,
            log_path=str(home.log),
        )


def ended_phase(code: int | None, *, cancelled: bool) -> Phase:
    """Return the phase of an ended supervisor.

    Args:
        code: its exit code, negative for a signal; None: unknown.
        cancelled: whether the user has cancelled the run.
    """
    if code == ExitCode.DONE:
        return "done"
    if code is None or code == ExitCode.RECOVER or code < 0:
        return "cancelled" if cancelled else "lost"
    return "failed"


def _pause() -> bool:
    time.sleep(POLL_S)
    return False
