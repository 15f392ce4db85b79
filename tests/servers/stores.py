"""Fake buckets in memory, some of which fail at a chosen operation."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from obstore.store import MemoryStore

from trainer.bucket import Bucket, Checked, Object
from trainer.bucket.byte_streams import ignore_progress
from trainer.errors import Unavailable


class MemoryBucket(Bucket):
    """A bucket in memory. Several instances over one store see the same objects."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        super().__init__(self.store, "memory://runs/tried")


class Died(BaseException):
    """The machine has died. No handler of ordinary errors catches this exception."""


class FailsAt(MemoryBucket):
    """A bucket that raises at the operation of that number, counted from 0, and at all later ones.

    `lost_answer` says whether that operation still took effect. Each key of a deletion counts.
    """

    def __init__(
        self,
        store: MemoryStore,
        operation: int,
        *,
        lost_answer: bool = False,
        fault: type[BaseException] = Died,
        lasts: int | None = None,
    ) -> None:
        super().__init__(store)
        self._from = operation
        self._until = None if lasts is None else operation + lasts
        self._lost_answer = lost_answer
        self._fault = fault
        self._counter = itertools.count()
        self._lock = threading.Lock()
        self.operations = 0
        self.fired = False

    def _next(self) -> int:
        with self._lock:
            self.operations += 1
            return next(self._counter)

    def _before(self, operation: int) -> None:
        if self._is_down(operation) and not (self._lost_answer and operation == self._from):
            self._fire()

    def _after(self, operation: int) -> None:
        if self._lost_answer and operation == self._from:
            self._fire()

    def _is_down(self, operation: int) -> bool:
        return self._from <= operation and (self._until is None or operation < self._until)

    def _fire(self) -> None:
        self.fired = True
        raise self._fault("on request")

    def get(self, key: str) -> bytes:
        operation = self._next()
        self._before(operation)
        data = super().get(key)
        self._after(operation)
        return data

    def put(self, key: str, data: bytes) -> None:
        operation = self._next()
        self._before(operation)
        super().put(key, data)
        self._after(operation)

    def create(self, key: str, data: bytes) -> bool:
        operation = self._next()
        self._before(operation)
        created = super().create(key, data)
        self._after(operation)
        return created

    def keeps_first(self, key: str, data: bytes) -> bool:
        operation = self._next()
        self._before(operation)
        kept = super().keeps_first(key, data)
        self._after(operation)
        return kept

    def list(self, prefix: str = "") -> list[Object]:
        operation = self._next()
        self._before(operation)
        found = super().list(prefix)
        self._after(operation)
        return found

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            operation = self._next()
            self._before(operation)
            super().delete([key])
            self._after(operation)

    def download(self, key: str, path: Path, tell: Callable[[int], object] = ignore_progress) -> Checked:
        operation = self._next()
        self._before(operation)
        got = super().download(key, path, tell)
        self._after(operation)
        return got


class Down(FailsAt):
    """A bucket that is unreachable for some operations."""

    def __init__(self, store: MemoryStore, operation: int = 0, *, lasts: int | None = None) -> None:
        super().__init__(store, operation, fault=Unavailable, lasts=lasts)


class Unconditional(MemoryBucket):
    """A bucket whose store ignores conditional writes, like `rclone serve s3`."""

    def _create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True
