"""Errors that users can fix, and the exit codes that a managed job reads."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `python -m trainer run`. The launcher exits with `USAGE` for errors that users can fix."""

    DONE = 0
    BUG = 1
    USAGE = 2
    RECOVER = 75
    """Preempted, or the infrastructure failed: start the run again (`EX_TEMPFAIL`)."""
    SUPERSEDED = 77
    """A newer attempt owns the run: neither recover nor retry this attempt (`EX_NOPERM`)."""
    CONFIG = 78
    """The recipe, the data or the bucket's address is wrong: a retry cannot help (`EX_CONFIG`)."""
    LIMIT = 79
    """The run's budget or deadline is used up, and its progress is saved. Resume it with a higher limit."""


class UserError(Exception):
    """An error that users can fix: what happened with its values, and a hint what to do.

    Only the command line turns it into text. Any other exception is a bug and keeps its traceback.
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
    """A data set that is missing, empty, or in an unknown format."""


class ModelError(UserError):
    """A model that is missing or cannot be loaded."""


class BucketError(UserError):
    """A bucket that does not exist, refuses access, or has unknown content."""


class NoFit(UserError):
    """A recipe that does not fit on the given machines."""


class Unavailable(UserError):
    """The store, or the network to it, failed for longer than the retries last. The run can be recovered."""

    exit_code = ExitCode.RECOVER


class NoRoom(UserError):
    """This machine's disk or memory is too small for the run's files. Another machine's may be large enough."""

    exit_code = ExitCode.RECOVER


class Superseded(UserError):
    """A newer attempt has claimed the run. This attempt must neither commit nor delete."""

    exit_code = ExitCode.SUPERSEDED


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its cause or context, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
