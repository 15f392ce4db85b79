"""What lies in a bucket, brought here: a model, `s3://bucket/prefix/run/final`; data, `s3://bucket/pairs.jsonl`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer.bucket import open_file
from trainer.bucket.restore import Tell, fetch, find_exported
from trainer.bucket.store import ignore_progress
from trainer.errors import DataError
from trainer.recipe import Recipe
from trainer.supervisor.preemption import Notice


def fetch_model(source: str | None, into: Path, tell: Tell = ignore_progress) -> str | None:
    """What the worker is to load: `source` itself, or the folder that a bucket's model was fetched to; `tell` as in `fetch`.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        CorruptCheckpoint: a file does not have the size or checksum of the manifest.
    """
    if source is None or "://" not in source:
        return source
    bucket, manifest = find_exported(source)
    fetch(bucket, manifest, into, tell)
    return str(into)


def fetch_data(recipe: Recipe, into: Path, tell: Tell = ignore_progress) -> Recipe:
    """What the worker is to read: the recipe with its buckets' data files as they were fetched, each under its own name;
    `tell` as in `fetch`.

    Raises:
        DataError: there is no such file.
        BucketError, Unavailable: its bucket cannot be read.
    """
    sources = (*recipe.dataset_mixture.datasets, *recipe.dataset_mixture.test_datasets)
    there = dict.fromkeys(each.id for each in sources if "://" in each.id)
    here = {uri: into / str(number) / uri.rpartition("/")[2] for number, uri in enumerate(there)}
    for uri, path in here.items():
        bucket, key = open_file(uri)
        try:
            bucket.download(key, path, tell)
        except FileNotFoundError:
            raise DataError(f"there is no {uri}", hint="is it spelled like this in its bucket?") from None
    return recipe.with_data(lambda name: str(here.get(name, name)))


log = logging.getLogger(__name__)
TELL_EVERY_S = 20.0


class TransferCancelled(Exception):
    """Notice was given: what is being brought here is of no use here."""


class TransferProgress:
    """Told the bytes of each piece, on whichever thread has moved it; says how many they are, now and then."""

    def __init__(
        self, notice: Notice, *, every_s: float = TELL_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notice = notice
        self._every_s = every_s
        self._clock = clock
        self._adding = threading.Lock()
        self._began = self._told = clock()
        self._bytes = 0

    def __call__(self, count: int) -> None:
        """Raises `TransferCancelled` once notice was given, which ends the transfer."""
        if self._notice.given:
            raise TransferCancelled
        with self._adding:
            self._bytes += count
            now = self._clock()
            if now - self._told < self._every_s:
                return
            self._told = now
        rate = self._bytes / max(now - self._began, 1e-9)
        log.info("brought %.1f GB so far, %.0f MB/s", self._bytes / 1e9, rate / 1e6)
