"""What W&B (offline) and TensorBoard write on this machine, copied to `reports/` of the run as it grows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.bucket import Bucket
from trainer.bucket.layout import REPORTS_PREFIX
from trainer.errors import UserError
from trainer.job import Job

log = logging.getLogger(__name__)
EVERY_S = 15.0
PATTERNS = ("tensorboard/*", "wandb/offline-run-*/**/*")
"""W&B's folder of a run that is online is its own business."""


class Mirror(threading.Thread):
    """Whole files, for no store can append; attempts have files of their own, so none overwrites another's."""

    def __init__(self, bucket: Bucket, folder: Path, *, every_s: float = EVERY_S) -> None:
        super().__init__(name="mirror", daemon=True)
        self._bucket = bucket
        self._folder = folder
        self._every_s = every_s
        self._ended = threading.Event()
        self._copied: dict[Path, tuple[int, int]] = {}

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.copy()

    def stop(self) -> None:
        self._ended.set()
        self.join(self._every_s)
        self.copy()

    def copy(self) -> None:
        """What has changed since the last time; a report that does not arrive stops no training."""
        try:
            for path in sorted(path for pattern in PATTERNS for path in self._folder.glob(pattern)):
                if path.is_symlink() or not path.is_file():
                    continue
                state = path.stat()
                if self._copied.get(path) != (state.st_size, state.st_mtime_ns):
                    self._bucket.put(
                        REPORTS_PREFIX + path.relative_to(self._folder).as_posix(), path.read_bytes()
                    )
                    self._copied[path] = (state.st_size, state.st_mtime_ns)
        except (UserError, OSError) as error:
            log.warning("reports are not copied for now: %s", error)


@contextmanager
def mirrored(bucket: Bucket, job: Job) -> Iterator[None]:
    """While the workers run, if the recipe reports to anything."""
    if not job.recipe.reports:
        yield
        return
    mirror = Mirror(bucket, job.reports)
    mirror.start()
    try:
        yield
    finally:
        mirror.stop()
