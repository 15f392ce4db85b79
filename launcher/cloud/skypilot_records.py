"""Convert the answers of SkyPilot 0.14.1 to our own values, without importing SkyPilot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.cloud.protocol import JobStatus, Phase, Say
from launcher.cloud.skypilot_errors import plain

PHASES: Mapping[str, Phase] = {
    "INIT": "waiting",
    "PENDING": "waiting",
    "SUBMITTED": "waiting",
    "STARTING": "waiting",
    "SETTING_UP": "waiting",
    "RUNNING": "running",
    "WINDING_DOWN": "running",
    "RECOVERING": "recovering",
    "CANCELLING": "stopping",
    "SUCCEEDED": "done",
    "CANCELLED": "cancelled",
}
"""Phases of `ManagedJobStatus` (`sky/jobs/state.py`) and `JobStatus` (`sky/skylet/job_lib.py`); others are `failed`."""
STATED = re.compile(r": (en|dis)abled")
"""A cloud's own line in the report of `sky check`. The reasons below it belong to that cloud."""
REASON = re.compile(r"^Reason( \[[^]]*\])?: ")
ENDS_REASON = ("For more info", "Details", "Reason")


def enabled_of(
    found: Mapping[str, Mapping[str, Iterable[Any]]], infra: Iterable[str], report: Iterable[str]
) -> dict[str, str | None]:
    """Return None for each cloud that has compute in any workspace, else the reason why it cannot be used.

    Args:
        found: the answer of `sky check`: workspace, then cloud, then capabilities.
        infra: the places in question; `gcp/us-central1` stands for gcp.
        report: the lines that `sky check` prints: a cloud's name, and its reasons below.
    """
    able = {
        cloud.casefold()
        for clouds in found.values()
        for cloud, capabilities in clouds.items()
        if any("compute" in str(capability).casefold() for capability in capabilities)
    }
    lines = [plain(line).strip() for line in report]
    clouds = dict.fromkeys(name.partition("/")[0].lower() for name in infra)
    return {cloud: None if cloud in able else _reason(cloud, lines) for cloud in clouds}


def _reason(cloud: str, lines: list[str]) -> str:
    """Return the first reason below the cloud's own line, with the commands or addresses that follow it."""
    below, found = False, list[str]()
    for line in lines:
        if found and (not line or line.startswith(ENDS_REASON) or STATED.search(line)):
            break
        if STATED.search(line):
            below = line.casefold().startswith(cloud)
        elif found or (below and line.startswith("Reason")):
            found.append(line)
    return REASON.sub("", " ".join(found)) or "SkyPilot has no credentials for it"


def of_cluster(record: Any, job: tuple[int | None, str] | None) -> JobStatus:
    status = record.status.value
    starting: Phase = "waiting" if status in ("INIT", "PENDING") else "idle"
    resources = str(record.resources_str or "")
    return JobStatus(
        kind="cluster",
        name=record.name,
        job_id=job[0] if job else None,
        phase=PHASES.get(job[1], "failed") if job else starting,
        raw_status=f"{status}, job {job[1]}" if job else status,
        where=resources or None,
        cloud=_cloud(record),
        reason=record.init_status_reason,
        since=float(record.launched_at),
    )


def of_job(record: Any) -> JobStatus:
    status = record.status.value if record.status else "PENDING"
    place = [str(part) for part in (record.cloud, record.region) if part and str(part) != "-"]
    return JobStatus(
        kind="managed job",
        name=record.job_name or "",
        job_id=record.job_id,
        phase=PHASES.get(status, "failed"),
        raw_status=status,
        where="/".join(place).lower() or None,
        cloud=_cloud(record),
        recoveries=record.recovery_count or 0,
        reason=record.failure_reason,
        since=record.submitted_at,
    )


def _cloud(record: Any) -> str | None:
    return str(record.cloud).lower() if record.cloud and str(record.cloud) != "-" else None


class LineStream:
    """A stream that passes on complete lines without colours. A redrawn spinner counts as its last state."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._rest = ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        self.writelines(whole)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._say(plain(line.rstrip("\r").rpartition("\r")[2]))

    def flush(self) -> None:
        """Do nothing: SkyPilot flushes after every piece, and an incomplete line waits for its end."""

    def isatty(self) -> bool:
        return False
