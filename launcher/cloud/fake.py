"""A stand-in for SkyPilot, for tests and for trying the commands without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.cloud.protocol import JobStatus, Kind, LaunchRequest, Say
from trainer.errors import UserError


class FakeCloud:
    """Accepts every task and runs it at once. It records all calls, and the values of secrets apart from the tasks."""

    polls = False

    def __init__(self, *, fault: UserError | None = None, ends: str = "running") -> None:
        """Create the cloud.

        Args:
            fault: raised by every call.
            ends: phase of a task once it is launched.
        """
        self.fault = fault
        self.ends = ends
        self.launched: list[tuple[Kind, str, dict[str, Any]]] = []
        self.secrets: dict[str, str] = {}
        self.statuses: dict[tuple[Kind, str], JobStatus] = {}
        self.log = ["a line of the log"]
        self.asked: list[str] = []
        self.disabled: dict[str, str] = {}
        """Clouds that cannot be used, and why."""

    def launch(self, request: LaunchRequest, say: Say) -> int:
        retry = f"retry until up: {request.retry_until_up}"
        self._ask(retry if request.kind == "cluster" else "launch")
        say(f"launching {request.name}")
        self.launched.append((request.kind, request.name, dict(request.task)))
        self.secrets = dict(request.secrets)
        job_id = len(self.launched)
        facts = {"kind": request.kind, "name": request.name, "job_id": job_id, "phase": self.ends}
        self.statuses[request.kind, request.name] = JobStatus.model_validate(
            {**facts, "raw_status": self.ends.upper(), "where": "GCP (us-central1)"}
        )
        return job_id

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        self._ask(f"enabled {' '.join(infra)}")
        return {name: self.disabled.get(name) for name in infra}

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        return self._of("managed job", names)

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        return self._of("cluster", names)

    def tried(self, status: JobStatus) -> Sequence[str]:
        self._ask(f"tried {status.name}")
        return [f"trying GCP for {status.name}"]

    def logs(
        self,
        status: JobStatus,
        say: Say,
        *,
        follow: bool,
        tail: int = 0,
        poll: Callable[[], bool] | None = None,  # noqa: ARG002 (the log ends at once)
    ) -> None:
        self._ask(f"logs {status.name}{' -f' if follow else ''}")
        for line in self.log[-tail:]:
            say(line)

    def cancel(self, status: JobStatus, say: Say) -> None:
        self._ask(f"cancel {status.name}")
        say(f"cancelling {status.name}")
        self.statuses[status.kind, status.name] = status.model_copy(update={"phase": "cancelled"})

    def down(self, name: str, say: Say) -> None:
        self._ask(f"down {name}")
        say(f"terminating {name}")
        self.statuses.pop(("cluster", name), None)

    def _of(self, kind: Kind, names: Sequence[str] | None) -> Mapping[str, JobStatus]:
        self._ask(f"{kind}s")
        return {
            name: status
            for (of_kind, name), status in self.statuses.items()
            if of_kind == kind and (names is None or name in names)
        }

    def _ask(self, call: str) -> None:
        self.asked.append(call)
        if self.fault:
            raise self.fault
