"""What the launcher wants of a cloud: a protocol, and what comes back as values of our own; `skypilot.py` has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

Kind = Literal["managed job", "cluster"]
Phase = Literal["waiting", "running", "recovering", "stopping", "idle", "done", "failed", "cancelled"]
"""`waiting`: for a machine, or for its set-up; `idle`: a cluster without work, which is paid all the same."""
AT_WORK: tuple[Phase, ...] = ("waiting", "running", "recovering", "stopping")
Say = Callable[[str], None]
"""Takes a line as it comes."""


class JobStatus(BaseModel):
    """How SkyPilot sees a managed job, or a cluster and the job on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    name: str
    job_id: int | None
    """Of the managed job; of the job on a cluster, if it has had any."""
    phase: Phase
    said: str
    """SkyPilot's own words: `RECOVERING`."""
    where: str | None = None
    """`GCP (us-central1)`, as SkyPilot writes it."""
    cloud: str | None = None
    """`gcp`, `slurm`."""
    recoveries: int = 0
    reason: str | None = None
    """Of a failure."""
    since: float | None = None
    """When it was submitted, or the cluster launched (unix time, seconds)."""

    @property
    def at_work(self) -> bool:
        return self.phase in AT_WORK


class Cloud(Protocol):
    """Every verb raises UserError for what the user can mend, and Unavailable for what may pass."""

    def launch(
        self,
        config: Mapping[str, Any],
        *,
        name: str,
        secrets: Mapping[str, str],
        retry_until_up: bool,
        say: Say,
    ) -> int | None:
        """Have a cluster, and the task's job on it, which has then begun; returns the job's id."""

    def launch_managed(
        self, config: Mapping[str, Any], *, name: str, secrets: Mapping[str, str], say: Say
    ) -> int:
        """Hand a task to the controller of managed jobs; returns the job's id."""

    def enabled(self, infra: Sequence[str]) -> Mapping[str, str | None]:
        """Each cloud: None if its credentials let machines be had, else why not."""

    def jobs(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        """Managed jobs by name, of each name the newest; None: all."""

    def clusters(self, names: Sequence[str] | None = None) -> Mapping[str, JobStatus]:
        """Clusters by name; None: all."""

    def tried(self, standing: JobStatus) -> Sequence[str]:
        """What the controller of a managed job has said so far: the places that it tried."""

    def logs(self, standing: JobStatus, say: Say, *, follow: bool, tail: int = 0) -> None:
        """The job's log, or its last `tail` lines; with `follow`, until the job ends."""

    def cancel(self, standing: JobStatus, say: Say) -> None:
        """Have the job end, with SIGTERM first; a managed job's machine goes, and so does Slurm's; a cluster stays."""

    def down(self, name: str, say: Say) -> None:
        """Give a cluster back."""


def find(cloud: Cloud, name: str, kind: Kind | None = None) -> JobStatus | None:
    """What SkyPilot has of a name: what is at work first, else the managed job, else the cluster."""
    found = [cloud.jobs([name]).get(name)] if kind != "cluster" else []
    found += [cloud.clusters([name]).get(name)] if kind != "managed job" else []
    known = [each for each in found if each]
    return next((each for each in known if each.at_work), known[0] if known else None)


class CatalogRow(NamedTuple):
    """An instance type in a region, as a catalog has it; SkyPilot's names throughout."""

    infra: str
    region: str
    instance_type: str
    accelerator: str
    gpus: int
    cores: int
    host_memory_gib: float
    usd_per_h: float | None
    spot_usd_per_h: float | None
