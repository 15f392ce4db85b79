"""Run the doctor's checks in parallel, each with its own timeout, and remove secrets from their findings."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.errors import UserError
from trainer.recipe.gather import is_secret

Status = Literal["ok", "missing", "failed", "skipped"]
"""`missing`: not set up; `failed`: set up but not working; `skipped`: not needed, or impossible to check."""
HIDDEN = "***"
MIN_SECRET_LENGTH = 6
"""Shorter values are not hidden, because they are likely to be ordinary words."""


class Finding(BaseModel):
    """The result of one check: one line of the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    status: Status
    detail: str = Field(serialization_alias="said")  # the JSON output's key since the first release
    """What the check found."""
    hint: str | None = None
    """How to fix it."""
    needed: bool = True
    """Whether the run requires it."""

    @property
    def blocks_run(self) -> bool:
        return self.needed and self.status in ("missing", "failed")


@dataclass(frozen=True)
class Check:
    """A function that checks one thing, and its timeout."""

    name: str
    run: Callable[[], Finding | list[Finding]]
    timeout_s: float = 20.0
    needed: bool = True


def ignore_check(_name: str) -> None:
    """A no-op callback for the names of ended checks."""


def run_all(
    checks: Iterable[Check],
    *,
    environ: Mapping[str, str] = os.environ,
    on_done: Callable[[str], None] = ignore_check,
) -> list[Finding]:
    """Return the findings of all checks, in the order of the checks.

    Every check runs in its own daemon thread. A check that exceeds its timeout is abandoned, because the code that it
    calls does not always have a timeout of its own.

    Args:
        checks: the checks.
        environ: environment variables; the values of secrets among them are hidden in the findings.
        on_done: called with the name of every check that has ended.
    """
    threads = [(check, _CheckThread(check)) for check in checks]
    started = time.monotonic()
    for _, thread in threads:
        thread.start()
    hide = _secret_filter(environ)
    findings: list[Finding] = []
    for check, thread in threads:
        thread.join(max(0.0, started + check.timeout_s - time.monotonic()))
        findings += [hide(finding) for finding in thread.result()]
        on_done(check.name)
    return findings


class _CheckThread(threading.Thread):
    def __init__(self, check: Check) -> None:
        super().__init__(name=f"doctor: {check.name}", daemon=True)
        self._check = check
        self._found: list[Finding] | None = None

    def run(self) -> None:
        try:
            found = self._check.run()
            self._found = found if isinstance(found, list) else [found]
        except UserError as error:
            self._found = [self._failed(error.message, error.hint)]
        except Exception as error:  # noqa: BLE001 (a bug in one check must not hide the findings of the others)
            self._found = [self._failed(f"{type(error).__name__}: {error}", None)]

    def result(self) -> list[Finding]:
        if self._found is not None:
            return self._found
        return [self._failed(f"no answer within {self._check.timeout_s:g} s", "check the network connection")]

    def _failed(self, detail: str, hint: str | None) -> Finding:
        return Finding(
            name=self._check.name, status="failed", detail=detail, hint=hint, needed=self._check.needed
        )


def _secret_filter(environ: Mapping[str, str]) -> Callable[[Finding], Finding]:
    """Return a function that removes the values of secrets from a finding; an error may quote its input."""
    secrets = sorted(_secrets(environ), key=len, reverse=True)

    def clean(text: str | None) -> str | None:
        for value in secrets:
            text = text.replace(value, HIDDEN) if text else text
        return text

    def hide(finding: Finding) -> Finding:
        update = {"detail": clean(finding.detail) or "", "hint": clean(finding.hint)}
        return finding.model_copy(update=update)

    return hide


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        is_key = is_secret(name, value) or name.startswith("AWS_ACCESS_KEY")
        if len(value) >= MIN_SECRET_LENGTH and is_key:
            yield value
