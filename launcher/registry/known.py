"""The runs that were started or submitted from this machine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from launcher.registry import local, submitted
from launcher.registry.local import Home, LocalRecord
from launcher.registry.submitted import Sent
from trainer.errors import UserError


class Local(NamedTuple):
    """A run that was started on this machine."""

    home: Home
    record: LocalRecord

    @property
    def began(self) -> float:
        return self.record.created


class Submitted(NamedTuple):
    """A run that was submitted to SkyPilot from this machine."""

    record: Sent

    @property
    def began(self) -> float:
        return self.record.submitted


Known = Local | Submitted


def known(state: Path) -> list[Known]:
    """Everything that was started or submitted from here, the latest first."""
    found: list[Known] = [Local(home, record) for home, record in local.known(state)]
    found += [Submitted(sent) for sent in submitted.known(state)]
    return sorted(found, key=lambda each: each.began, reverse=True)


def find(state: Path, run: str, checkpoints: str | None) -> Known:
    """The run of that name: at work on this machine, else the one that was started last.

    Raises:
        UserError: there is none, or there are several in several places.
    """
    everything = known(state)
    found = [
        each
        for each in everything
        if each.record.run_id == run and checkpoints in (None, each.record.checkpoints)
    ]
    places = list(dict.fromkeys(each.record.checkpoints for each in found))
    if len(places) > 1:
        raise UserError(
            f"{len(places)} runs are called {run}: in {', '.join(places)}",
            hint="choose one with --checkpoints",
        )
    if found:
        here = (each for each in found if isinstance(each, Local) and each.record.process())
        return next(here, found[0])
    names = ", ".join(dict.fromkeys(each.record.run_id for each in everything)) or "none yet"
    raise UserError(f"no run {run} was started on this machine", hint=f"known runs: {names}")
