"""Transfers between a bucket and this machine, apart from checkpoints.

Models (`s3://bucket/prefix/run/final`) and data files (`s3://bucket/pairs.jsonl`) are fetched before training. The
files of the trackers (TensorBoard and offline W&B) are copied to the bucket while training runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.bucket import Bucket, open_file
from trainer.bucket.byte_streams import ignore_progress
from trainer.bucket.layout import REPORTS_PREFIX
from trainer.bucket.restore import Progress, fetch, find_exported
from trainer.errors import DataError, UserError
from trainer.job import Job
from trainer.recipe import Recipe
from trainer.supervisor.preemption import Notice

log = logging.getLogger(__name__)
PROGRESS_EVERY_S = 20.0
TRACKER_EVERY_S = 15.0
TRACKER_PATTERNS = ("tensorboard/*", "wandb/offline-run-*/**/*")
"""The folder of an online W&B run is left out, because W&B uploads it itself."""


def fetch_model(source: str | None, into: Path, progress: Progress = ignore_progress) -> str | None:
    """Fetch a model that is in a bucket, and return what the worker loads.

    Args:
        source: the recipe's model.
        into: folder for the files.
        progress: called with the number of bytes of each part, as in `fetch`.

    Returns:
        The folder with the fetched files, or `source` itself if it is not in a bucket.

    Raises:
        ModelError: the URI does not point to a run's exported model, or the run has none yet.
        CorruptCheckpoint: the size or checksum of a file differs from the manifest.
    """
    if source is None or "://" not in source:
        return source
    bucket, manifest = find_exported(source)
    fetch(bucket, manifest, into, progress)
    return str(into)


def fetch_data(recipe: Recipe, into: Path, progress: Progress = ignore_progress) -> Recipe:
    """Fetch the data files that are in buckets, and return the recipe that names the local copies.

    Every file keeps its own name. `progress` is called as in `fetch`.

    Raises:
        DataError: a file does not exist.
        BucketError, Unavailable: its bucket cannot be read.
    """
    sources = (*recipe.dataset_mixture.datasets, *recipe.dataset_mixture.test_datasets)
    uris = dict.fromkeys(source.id for source in sources if "://" in source.id)
    # Each file has a folder of its own, since two buckets may have files of the same name.
    local = {uri: into / str(number) / uri.rpartition("/")[2] for number, uri in enumerate(uris)}
    for uri, path in local.items():
        bucket, key = open_file(uri)
        try:
            bucket.download(key, path, progress)
        except FileNotFoundError:
            raise DataError(
                f"there is no {uri}", hint="check its spelling against the files of the bucket"
            ) from None
    return recipe.with_data(lambda name: str(local.get(name, name)))


class TransferCancelled(Exception):
    """A preemption notice arrived during a transfer, so its result would not be used."""


class TransferProgress:
    """Counts transferred bytes (thread-safe) and logs the progress every 20 s."""

    def __init__(
        self,
        notice: Notice,
        *,
        every_s: float = PROGRESS_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notice = notice
        self._every_s = every_s
        self._clock = clock
        self._adding = threading.Lock()
        self._started_at = self._logged_at = clock()
        self._bytes = 0

    def __call__(self, count: int) -> None:
        """Count `count` more bytes.

        Raises:
            TransferCancelled: a preemption notice has arrived. The exception ends the transfer.
        """
        if self._notice.given:
            raise TransferCancelled
        with self._adding:
            self._bytes += count
            now = self._clock()
            if now - self._logged_at < self._every_s:
                return
            self._logged_at = now
        rate = self._bytes / max(now - self._started_at, 1e-9)
        log.info("fetched %.1f GB so far, %.0f MB/s", self._bytes / 1e9, rate / 1e6)


class TrackerSync(threading.Thread):
    """Copies the files of the trackers to `reports/` of the run as they grow.

    Whole files are copied, because object stores cannot append. Every attempt writes its own files, so no attempt
    overwrites those of another.
    """

    def __init__(self, bucket: Bucket, folder: Path, *, every_s: float = TRACKER_EVERY_S) -> None:
        super().__init__(name="tracker-sync", daemon=True)
        self._bucket = bucket
        self._folder = folder
        self._every_s = every_s
        self._ended = threading.Event()
        self._copied: dict[Path, tuple[int, int]] = {}  # size and modification time of each copied file

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.copy()

    def stop(self) -> None:
        """Stop the thread, then copy what has changed since its last copy."""
        self._ended.set()
        self.join(self._every_s)
        self.copy()

    def copy(self) -> None:
        """Copy the files that have changed since the last time. A failure is logged and does not stop training."""
        try:
            for path in sorted(path for pattern in TRACKER_PATTERNS for path in self._folder.glob(pattern)):
                if path.is_symlink() or not path.is_file():
                    continue
                state = path.stat()
                if self._copied.get(path) != (state.st_size, state.st_mtime_ns):
                    key = REPORTS_PREFIX + path.relative_to(self._folder).as_posix()
                    self._bucket.put(key, path.read_bytes())
                    self._copied[path] = (state.st_size, state.st_mtime_ns)
        except (UserError, OSError) as error:
            log.warning("cannot copy the trackers' files to the bucket for now: %s", error)


@contextmanager
def sync_trackers(bucket: Bucket, job: Job) -> Iterator[None]:
    """Copy the trackers' files while the workers run. Do nothing if the recipe uses no tracker."""
    if not job.recipe.reports:
        yield
        return
    sync = TrackerSync(bucket, job.reports)
    sync.start()
    try:
        yield
    finally:
        sync.stop()
