"""A stand-in for SkyPilot, for tests and for trying the commands without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.cloud.protocol import JobStatus, Kind, Say
from trainer.errors import UserError


class FakeCloud:
    """Takes everything, and runs it at once; remembers what it was given, secrets apart."""

    def __init__(self, *, fault: UserError | None = None, ends: str = "running") -> None:
        """What fails with `fault` fails every time; a task that is launched stands as `ends` says."""
        self.fault = fault
        self.ends = ends
        self.launched: list[tuple[Kind, str, dict[str, Any]]] = []
        self.secrets: dict[str, str] = {}
        self.standings: dict[tuple[Kind, str], JobStatus] = {}
        self.log = ["a line of the log"]
        self.asked: list[str] = []
        self.disabled: dict[str, str] = {}
        """Clouds that cannot be used, and why."""

    def launch(
        self,
        config: Mapping[str, Any],
        *,
        name: str,
        secrets: Mapping[str, str],
        retry_until_up: bool,
        say: Say,
    ) -> int | None:
        return self._take("cluster", config, name, secrets, say, f"retry until up: {retry_until_up}")

    def launch_managed(
        self, config: Mapping[str, Any], *, name: str, secrets: Mapping[str, str], say: Say
    ) -> int:
        return self._take("managed job", config, name, secrets, say, "launch")

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        self._ask(f"enabled {' '.join(infra)}")
        return {name: self.disabled.get(name) for name in infra}

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        return self._of("managed job", names)

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        return self._of("cluster", names)

    def tried(self, standing: JobStatus) -> Sequence[str]:
        self._ask(f"tried {standing.name}")
        return [f"trying GCP for {standing.name}"]

    def logs(self, standing: JobStatus, say: Say, *, follow: bool, tail: int = 0) -> None:
        self._ask(f"logs {standing.name}{' -f' if follow else ''}")
        for line in self.log[-tail:]:
            say(line)

    def cancel(self, standing: JobStatus, say: Say) -> None:
        self._ask(f"cancel {standing.name}")
        say(f"cancelling {standing.name}")
        self.standings[standing.kind, standing.name] = standing.model_copy(update={"phase": "cancelled"})

    def down(self, name: str, say: Say) -> None:
        self._ask(f"down {name}")
        say(f"terminating {name}")
        self.standings.pop(("cluster", name), None)

    def _take(
        self, kind: Kind, config: Mapping[str, Any], name: str, secrets: Mapping[str, str], say: Say, how: str
    ) -> int:
        self._ask(how)
        say(f"launching {name}")
        self.launched.append((kind, name, dict(config)))
        self.secrets = dict(secrets)
        job_id = len(self.launched)
        facts = {"kind": kind, "name": name, "job_id": job_id, "phase": self.ends, "said": self.ends.upper()}
        self.standings[kind, name] = JobStatus.model_validate({**facts, "where": "GCP (us-central1)"})
        return job_id

    def _of(self, kind: Kind, names: Sequence[str] | None) -> Mapping[str, JobStatus]:
        self._ask(f"{kind}s")
        return {
            name: each
            for (of_kind, name), each in self.standings.items()
            if of_kind == kind and (names is None or name in names)
        }

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.fault:
            raise self.fault
