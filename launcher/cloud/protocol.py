"""The protocol of a backend that runs jobs, and the values that backends return.

`skypilot.py` implements it for rented machines and clusters, `local.py` for this machine, `fake.py` for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

Kind = Literal["managed job", "cluster", "local"]
"""`managed job`: SkyPilot replaces a lost machine. `cluster`: it does not. `local`: a process on this machine."""
Phase = Literal["waiting", "running", "recovering", "stopping", "idle", "done", "failed", "cancelled", "lost"]
"""`waiting`: for a machine or its set-up. `idle`: a cluster without a job, which still costs money.

`lost`: the process ended before the run did, and the backend does not restart it by itself.
"""
AT_WORK: tuple[Phase, ...] = ("waiting", "running", "recovering", "stopping")
Say = Callable[[str], None]
"""Receives one line of text as soon as it is available."""


class JobStatus(BaseModel):
    """The state of a job, as its backend reports it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    name: str
    job_id: int | None
    """Number of the managed job, or of the newest job on the cluster; the process id of a local job."""
    phase: Phase
    raw_status: str
    """The backend's own word for the phase, such as `RECOVERING`."""
    where: str | None = None
    """The place in the backend's words, such as `GCP (us-central1)`."""
    cloud: str | None = None
    """`gcp`, `slurm`."""
    recoveries: int = 0
    reason: str | None = None
    """Why the job failed."""
    since: float | None = None
    """When the job was submitted, the cluster launched or the process started (unix time, seconds)."""
    exit_code: int | None = None
    """Exit code of an ended local job, negative for a signal; None if the backend does not know it."""
    log_path: str | None = None
    """Log file of a local job."""

    @property
    def at_work(self) -> bool:
        """Whether the job is running or will run without further action."""
        return self.phase in AT_WORK

    @property
    def label(self) -> str:
        """The job in a few words: `managed job 3 a-run`, `cluster a-run`, `pid 4711`."""
        if self.kind == "local":
            return f"pid {self.job_id}"
        number = f" {self.job_id}" if self.kind == "managed job" and self.job_id is not None else ""
        return f"{self.kind}{number} {self.name}"

    def describe(self) -> str:
        """Return the job with its place, such as `managed job 3 a-run on GCP (us-central1) (RUNNING)`."""
        if self.kind == "local":
            return f"{self.label}, log {self.log_path}"
        where = f" on {self.where}" if self.where else ""
        return f"{self.label}{where} ({self.raw_status})"


@dataclass(frozen=True)
class LaunchRequest:
    """A job to start. Commands, environments and secrets may contain tokens, so they are not in the repr."""

    kind: Kind
    name: str
    """The backend's name for the job."""
    run_id: str
    recipe: str
    checkpoints: str
    """Canonical address of the folder of runs."""
    task: Mapping[str, Any] = field(repr=False)
    """SkyPilot's task, or for a local job its command (`run`) and its environment (`envs`)."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Values of the secrets that the task names."""
    retry_until_up: bool = False
    """Whether to ask again until a machine is available."""


class Cloud(Protocol):
    """A backend. Its methods raise UserError for what the user can fix and Unavailable for what may pass."""

    polls: bool
    """Whether `logs` calls `poll`. If not, only an interrupt ends a log that is followed."""

    def launch(self, request: LaunchRequest, say: Say) -> int | None:
        """Start the job and return its id. A cluster's job and a local job have then begun; a managed job may wait."""

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        """Return None for each cloud that can be used, else the reason why it cannot."""

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        """Return managed or local jobs by name, the newest of each name; None: all."""

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        """Return clusters by name; None: all."""

    def tried(self, status: JobStatus) -> Sequence[str]:
        """Return the places where a managed job's controller has looked for a machine so far."""

    def logs(
        self,
        status: JobStatus,
        say: Say,
        *,
        follow: bool,
        tail: int = 0,
        poll: Callable[[], bool] | None = None,
    ) -> None:
        """Pass the job's log to `say`.

        Args:
            status: the job.
            say: receives each line.
            follow: continue until the job ends.
            tail: pass only this many of the last lines; 0: all.
            poll: called again and again while the log is followed, if the backend `polls`; it pauses, and returns
                whether to stop following.
        """

    def cancel(self, status: JobStatus, say: Say) -> None:
        """Stop the job, with SIGTERM first. The machine of a managed job or of Slurm is given back; a cluster stays."""

    def down(self, name: str, say: Say) -> None:
        """Give a cluster back."""


def find(cloud: Cloud, name: str, kind: Kind | None = None) -> JobStatus | None:
    """Return the job of that name: a running one first, else the managed or local job, else the cluster."""
    found = [cloud.jobs([name]).get(name)] if kind != "cluster" else []
    found += [cloud.clusters([name]).get(name)] if kind in (None, "cluster") else []
    known = [status for status in found if status]
    return next((status for status in known if status.at_work), known[0] if known else None)


class CatalogRow(NamedTuple):
    """An instance type in a region, as a catalog lists it; the names are SkyPilot's."""

    infra: str
    region: str
    instance_type: str
    accelerator: str
    gpus: int
    cores: int
    host_memory_gib: float
    usd_per_h: float | None
    spot_usd_per_h: float | None
