"""Find a run by its name or address, and the backend that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launcher import settings
from launcher.cloud.local import WHERE, LocalMachine
from launcher.cloud.protocol import Cloud, JobStatus, Kind
from launcher.cloud.protocol import find as find_job
from launcher.cloud.skypilot import SkyPilot
from launcher.local import process
from launcher.local.process import Home, LocalRecord
from launcher.registry.submitted import StartedRun, submissions
from launcher.runs.run import Reader, RunHistory
from trainer.bucket import open_run
from trainer.bucket.address import canonical
from trainer.errors import UserError


class RunPlace(NamedTuple):
    """The location of a run."""

    checkpoints: str
    """Canonical address of the folder of runs."""
    run_id: str

    def reader(self) -> Reader:
        """Return a reader of the run; raises BucketError and Unavailable."""
        return Reader(open_run(self.checkpoints, self.run_id), self.run_id)

    def read(self) -> RunHistory:
        """Return the run as it is now.

        Raises:
            UserError: the bucket has neither an attempt nor a commit of it.
        """
        run = self.reader().read()
        if not run.attempts and not run.commits:
            raise UserError(
                f"{self.checkpoints} has no run {self.run_id}",
                hint="`launcher runs` lists the runs in a bucket; --checkpoints names another bucket",
            )
        return run


def place_of(record: StartedRun) -> RunPlace:
    """Return where the run of a record is."""
    return RunPlace(record.checkpoints, record.run_id)


def backend_of(kind: Kind, state: Path, cloud: Cloud | None = None) -> Cloud:
    """Return the backend for this kind of job: this machine, else `cloud` if it is given, else SkyPilot."""
    return LocalMachine(state) if kind == "local" else cloud or SkyPilot()


def status_of(record: StartedRun, state: Path, cloud: Cloud | None = None) -> JobStatus | None:
    """Ask the run's backend for its job; None if the backend has no such job."""
    return find_job(backend_of(record.kind, state, cloud), record.name, record.kind)


def started_runs(state: Path) -> list[StartedRun]:
    """Return everything that was started or submitted from this machine, the latest first."""
    local = [_of_local(home, record) for home in process.homes(state) if (record := home.record())]
    return sorted([*local, *submissions(state)], key=lambda record: record.submitted, reverse=True)


def started_here(found: RunPlace, state: Path) -> bool:
    """Return whether the run was started from this machine, even if its bucket has nothing of it yet."""
    return found in map(place_of, started_runs(state))


def find_or_none(state: Path, run: str, checkpoints: str | None) -> StartedRun | None:
    """Return the run of that name: one that is running on this machine first, else the one that was started last.

    Args:
        state: state folder of this machine.
        run: the run's id.
        checkpoints: canonical address of its folder of runs; None: any.

    Raises:
        UserError: runs of this name were started in several buckets.
    """
    found = [
        record
        for record in started_runs(state)
        if record.run_id == run and checkpoints in (None, record.checkpoints)
    ]
    places = list(dict.fromkeys(record.checkpoints for record in found))
    if len(places) > 1:
        raise UserError(
            f"{len(places)} runs are called {run}: in {', '.join(places)}",
            hint="choose one with --checkpoints",
        )
    running = (r for r in found if r.kind == "local" and process.attach(Home(state / r.name)))
    return next(running, found[0] if found else None)


def find(state: Path, run: str, checkpoints: str | None) -> StartedRun:
    """Return the run that `find_or_none` finds; raises UserError, with the known names, if there is none."""
    if found := find_or_none(state, run, checkpoints):
        return found
    names = ", ".join(dict.fromkeys(record.run_id for record in started_runs(state))) or "none yet"
    raise UserError(f"no run {run} was started on this machine", hint=f"known runs: {names}")


def place(
    run: str, checkpoints: str | None, *, state: Path, environ: Mapping[str, str], cwd: Path
) -> RunPlace:
    """Return where a run is. It need not have been started from this machine.

    Args:
        run: its id, or its address: `s3://bucket/prefix/RUN`, or a folder with a slash in it.
        checkpoints: the folder of runs, if the user has named it.
        state: state folder of this machine, with the records of runs.
        environ: for the settings.
        cwd: relative folders start here.

    Raises:
        UserError: runs of this name were started from here in several buckets.
    """
    if checkpoints:
        return RunPlace(canonical(checkpoints, cwd), run)
    if "/" in run:
        folder, _, run_id = canonical(run, cwd).rpartition("/")
        return RunPlace(folder, run_id)
    if found := find_or_none(state, run, None):
        return place_of(found)
    return RunPlace(canonical(settings.load(environ).checkpoints, cwd), run)


def _of_local(home: Home, record: LocalRecord) -> StartedRun:
    return StartedRun(
        run_id=record.run_id,
        recipe=record.recipe,
        checkpoints=record.checkpoints,
        kind="local",
        name=home.path.name,
        job_id=None,
        where=WHERE,
        usd_per_h=None,
        submitted=record.created,
    )
