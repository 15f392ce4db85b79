"""Which run is meant: one that was started from here, one of the settings' bucket, or an address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launcher import settings
from launcher.registry import known
from launcher.runs.run import Reader, RunHistory
from trainer.bucket import open_run
from trainer.bucket.address import canonical
from trainer.errors import UserError


class RunPlace(NamedTuple):
    """Where a run is."""

    checkpoints: str
    """Canonical address of the folder of runs."""
    run_id: str

    def reader(self) -> Reader:
        """Raises BucketError and Unavailable."""
        return Reader(open_run(self.checkpoints, self.run_id), self.run_id)

    def read(self) -> RunHistory:
        """The run as it is now.

        Raises:
            UserError: there is nothing of it.
        """
        run = self.reader().read()
        if not run.attempts and not run.commits:
            raise UserError(
                f"nothing of a run {self.run_id} is in {self.checkpoints}",
                hint="`launcher runs` lists what is there; --checkpoints names another bucket",
            )
        return run


def started_here(found: RunPlace, state: Path) -> bool:
    """Whether a run was started from here, be there anything of it in its bucket yet or not."""
    places = ((each.record.checkpoints, each.record.run_id) for each in known.known(state))
    return found in places


def place(
    run: str, checkpoints: str | None, *, state: Path, environ: Mapping[str, str], cwd: Path
) -> RunPlace:
    """Where the run is that was named.

    Args:
        run: its id, or its address: `s3://bucket/prefix/RUN`, a folder with a slash in it.
        checkpoints: the folder of runs, if it was named.
        state: this machine's, which knows the runs that were started from here.
        environ: for the settings.
        cwd: where relative folders begin.

    Raises:
        UserError: runs of this name were started from here in several buckets.
    """
    if checkpoints:
        return RunPlace(canonical(checkpoints, cwd), run)
    if "/" in run:
        folder, _, run_id = canonical(run, cwd).rpartition("/")
        return RunPlace(folder, run_id)
    places = dict.fromkeys(
        each.record.checkpoints for each in known.known(state) if each.record.run_id == run
    )
    if len(places) > 1:
        raise UserError(
            f"{len(places)} runs are called {run}: in {', '.join(places)}",
            hint="choose one with --checkpoints",
        )
    return RunPlace(next(iter(places), canonical(settings.load(environ).checkpoints, cwd)), run)
