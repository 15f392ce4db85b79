"""Checks that run side by side, each with its own time limit; what they find, as values without secrets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trainer.errors import UserError
from trainer.recipe.secrets import is_secret

Status = Literal["ok", "missing", "failed", "skipped"]
"""`missing`: nobody has set it up; `failed`: it is there and does not work; `skipped`: not needed, or not to be seen."""
HIDDEN = "***"
LEAST_SECRET = 6
"""Characters of a value below which it is too common a word to be hidden."""


class Finding(BaseModel):
    """One line of what was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    status: Status
    said: str
    """What was seen."""
    hint: str | None = None
    """How to get it."""
    needed: bool = True
    """Whether the run cannot do without."""

    @property
    def in_the_way(self) -> bool:
        return self.needed and self.status in ("missing", "failed")


@dataclass(frozen=True)
class Check:
    """A question, and how long it may take."""

    name: str
    ask: Callable[[], Finding | list[Finding]]
    limit_s: float = 20.0
    needed: bool = True


def run_all(
    checks: Iterable[Check], *, environ: Mapping[str, str] = os.environ, done: Callable[[str], object] = str
) -> list[Finding]:
    """What all of them find, in their order; `done` hears each name as it ends.

    They run on threads that are left behind if they hang: none of what they ask has time limits of its own to rely on.
    """
    asked = [(check, _Asked(check)) for check in checks]
    began = time.monotonic()
    for _, each in asked:
        each.start()
    hide = _hider(environ)
    findings: list[Finding] = []
    for check, each in asked:
        each.join(max(0.0, began + check.limit_s - time.monotonic()))
        findings += [hide(finding) for finding in each.answer()]
        done(check.name)
    return findings


class _Asked(threading.Thread):
    def __init__(self, check: Check) -> None:
        super().__init__(name=f"doctor: {check.name}", daemon=True)
        self._check = check
        self._found: list[Finding] | None = None

    def run(self) -> None:
        try:
            found = self._check.ask()
            self._found = found if isinstance(found, list) else [found]
        except UserError as error:
            self._found = [self._failed(error.message, error.hint)]
        except Exception as error:  # noqa: BLE001 (one check's bug must not hide what the others find)
            self._found = [self._failed(f"{type(error).__name__}: {error}", None)]

    def answer(self) -> list[Finding]:
        late = self._failed(f"no answer within {self._check.limit_s:g} s", "is the network up?")
        return [late] if self._found is None else self._found

    def _failed(self, said: str, hint: str | None) -> Finding:
        return Finding(
            name=self._check.name, status="failed", said=said, hint=hint, needed=self._check.needed
        )


def _hider(environ: Mapping[str, str]) -> Callable[[Finding], Finding]:
    """Takes the values of secrets out of what others have said: an error may repeat what it was given."""
    secrets = sorted(_secrets(environ), key=len, reverse=True)

    def clean(text: str | None) -> str | None:
        for value in secrets:
            text = text.replace(value, HIDDEN) if text else text
        return text

    def hide(finding: Finding) -> Finding:
        return finding.model_copy(update={"said": clean(finding.said) or "", "hint": clean(finding.hint)})

    return hide


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if len(value) >= LEAST_SECRET and (is_secret(name, value) or name.startswith("AWS_ACCESS_KEY")):
            yield value
