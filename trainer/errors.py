"""The errors a user can mend, and the exit codes that a managed job reads."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `python -m trainer run`; the launcher exits with `USAGE` for what a user can mend."""

    DONE = 0
    BUG = 1
    USAGE = 2
    RECOVER = 75
    """Preempted, or the infrastructure failed: start the run again (`EX_TEMPFAIL`)."""
    SUPERSEDED = 77
    """A newer attempt owns the run: neither recover nor retry this one (`EX_NOPERM`)."""
    CONFIG = 78
    """The recipe, the data or the bucket's address is wrong: a retry cannot help (`EX_CONFIG`)."""
    LIMIT = 79
    """The run's budget or deadline is used up, and its work is saved: nobody goes on without a higher one."""


class UserError(Exception):
    """What a user can mend: what happened with its values, and the way out.

    Becomes text in one place, the command line; anything else is a bug and keeps its traceback.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RecipeError(UserError):
    """A recipe with an unknown key, a wrong value, or a combination that cannot train."""


class DataError(UserError):
    """A data set that is missing, empty, or in a form that cannot be read."""


class ModelError(UserError):
    """A model that is missing or cannot be loaded."""


class BucketError(UserError):
    """A bucket that is not there, that refuses us, or that is written by nobody we know."""


class NoFit(UserError):
    """A recipe that cannot run on the shape at hand."""


class Unavailable(UserError):
    """The store, or the network to it, failed for longer than we retry: the run can be recovered."""

    exit_code = ExitCode.RECOVER


class NoRoom(UserError):
    """This machine's disk or memory cannot hold what the run has to put there; another machine's may."""

    exit_code = ExitCode.RECOVER


class Superseded(UserError):
    """A newer attempt has claimed the run; this one must neither commit nor delete."""

    exit_code = ExitCode.SUPERSEDED


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its cause or context, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
