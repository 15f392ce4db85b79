"""The thread that uploads staged checkpoints to the bucket while training continues."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from trainer.bucket.attempts import Attempt
from trainer.bucket.commit import WAITING, Node, Skipped, Waiting, commit, gather, upload_part
from trainer.bucket.manifest import File, Manifest
from trainer.bucket.reference_cache import ReferenceCache
from trainer.bucket.retention import prune
from trainer.bucket.store import Bucket
from trainer.errors import BucketError, Unavailable, UserError
from trainer.staged import STAGED_SUFFIX, Staged, pending

log = logging.getLogger(__name__)
ALONE = Node()
FAULTS = (BucketError, Unavailable)
"""Errors after which an upload is retried while training continues. The store worked when the run was claimed, so a user
may mend a refusal meanwhile, such as expired credentials."""
DRAIN_TRIES = 4
"""Consecutive failures, each with the store's own retries, after which an ending attempt gives up."""


class Listener(Protocol):
    """Callbacks for the progress of staged checkpoints; called on the uploader's thread."""

    def committing(self) -> None: ...
    def committed(self, manifest: Manifest, seconds: float) -> None: ...
    def dropped(self, step: int) -> None: ...
    def upload_failed(self, step: int, reason: str) -> None: ...


def backoff_s(failures: int) -> float:
    """Return the pause after so many consecutive failures, in seconds: exponential up to a minute, with jitter."""
    return float(min(60.0, 2.0**failures) * random.uniform(0.5, 1.0))


class Uploader(threading.Thread):
    """Uploads complete folders in staging, one at a time, and retries as long as training lasts.

    At most one checkpoint waits: when a newer one is complete, the older one is dropped. The final model is uploaded
    after the checkpoint, so its commit is the last. The thread ends by itself only with `error` set.
    """

    def __init__(  # noqa: PLR0913 (three places, two facts of the run, and a listener)
        self,
        bucket: Bucket,
        attempt: Attempt,
        staging: Path,
        *,
        recipe_digest: str,
        keep: int,
        listener: Listener,
        node: Node = ALONE,
        waiting: Waiting = WAITING,
        reference_cache: ReferenceCache | None = None,
        rejected: Collection[int] = (),
        poll_s: float = 0.2,
        backoff: Callable[[int], float] = backoff_s,
    ) -> None:
        """Create the thread; `start` runs it.

        Args:
            bucket: the run's.
            attempt: the owner of the run.
            staging: the folder to upload from.
            recipe_digest: digest of the run's recipe.
            keep: number of checkpoints that retention keeps.
            listener: receives the callbacks.
            node: this node. Every node uploads its own files; node 0 commits and applies retention.
            waiting: how node 0 waits for the other nodes.
            reference_cache: receives staged log-probabilities of the reference, before the checkpoints that depend on
                them.
            rejected: steps that retention does not count, as in `prune`.
            poll_s: seconds between two looks at staging.
            backoff: seconds to pause after so many consecutive failures.
        """
        super().__init__(name="uploader", daemon=True)  # a transfer that hangs must not delay the exit
        self._bucket = bucket
        self._attempt = attempt
        self._staging = staging
        self._recipe_digest = recipe_digest
        self._keep = keep
        self._listener = listener
        self._node = node
        self._waiting = waiting
        self._reference_cache = reference_cache
        self._rejected = rejected
        self._poll_s = poll_s
        self._backoff = backoff
        self._changed = threading.Condition()  # guards the fields below, and removals from staging
        self._hurry = threading.Event()
        self._stopped = False
        self._draining = False
        self._busy = False
        self._failures = 0
        self._error: Exception | None = None

    @property
    def error(self) -> Exception | None:
        """Why the thread ended: Superseded, Unavailable after `drain` gave up, or a bug."""
        return self._error

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything staged is committed.

        Returns:
            False after the timeout, or if the thread ended with an error.
        """
        with self._changed:
            self._draining = True
            self._failures = 0
            self._hurry.set()
            self._changed.wait_for(lambda: self._error or self._idle(), timeout_s)
            return self._error is None and self._idle()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Start no further upload, and wait briefly for the current one. Staging is left as it is."""
        self._stopped = True
        self._hurry.set()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        try:
            while not self._stopped:
                pause_s = self._poll_s if self._try_next() else self._backoff(self._failures)
                self._hurry.wait(pause_s)
                self._hurry.clear()
        except Exception as error:  # noqa: BLE001 (`error` reports it to the threads that wait)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._stopped:
            log.debug("the uploader was stopped, then failed", exc_info=error)
        elif not isinstance(error, UserError):
            log.error("the uploader failed", exc_info=error)
        with self._changed:
            self._error = error
            self._busy = False
            self._changed.notify_all()

    def _idle(self) -> bool:
        return not self._busy and not pending(self._staging)

    def _try_next(self) -> bool:
        """Upload the next staged folder, if there is one. Return False if the store could not be reached."""
        staged = self._next()
        try:
            if staged:
                self._upload(staged)
        except FAULTS as error:
            self._failed(staged, error)
            return False
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        return True

    def _next(self) -> Staged | None:
        """Return the reference, else the newest checkpoint, else the final model. Older ones are dropped."""
        with self._changed:
            waiting = pending(self._staging)
            references = [staged for staged in waiting if staged.kind == "reference"]
            checkpoints = [staged for staged in waiting if staged.kind == "checkpoint"]
            for stale in references[:-1] + checkpoints[:-1]:
                self._remove(stale)
            self._busy = bool(waiting)
        for stale in checkpoints[:-1]:
            self._listener.dropped(stale.step)
        return next(iter(references[-1:] or checkpoints[-1:] or waiting), None)

    def _upload(self, staged: Staged) -> None:
        began = time.monotonic()
        try:
            manifest = self._upload_or_commit(staged)
        except Skipped as reason:
            log.warning("%s; it is not committed", reason)
            self._listener.dropped(staged.step)
            manifest = None
        with self._changed:
            self._remove(staged)
        self._failures = 0
        if manifest:
            self._listener.committed(manifest, time.monotonic() - began)
            self._prune()

    def _upload_or_commit(self, staged: Staged) -> Manifest | None:
        """Return the committed manifest; None for a reference, and on nodes that only upload their part."""
        if staged.kind == "reference":
            if self._reference_cache:
                manifest = self._reference_cache.put(self._staging / staged.folder, staged)
                log.info(
                    "saved the reference's log-probabilities of %d pairs for later attempts", manifest.pairs
                )
            return None
        if self._node.rank:
            upload_part(self._bucket, self._attempt, self._staging, staged, node=self._node.rank)
            return None
        return commit(
            self._bucket,
            self._attempt,
            self._staging,
            staged,
            self._recipe_digest,
            ready=self._listener.committing,
            others=lambda: self._files_of_others(staged),
        )

    def _files_of_others(self, staged: Staged) -> tuple[File, ...]:
        """Return the files of the other nodes. Only node 0 writes the final model."""
        if self._node.nodes == 1 or staged.kind == "final":
            return ()
        return gather(self._bucket, self._attempt, staged, nodes=self._node.nodes, waiting=self._waiting)

    def _prune(self) -> None:
        try:
            prune(self._bucket, self._attempt, self._keep, rejected=self._rejected)
        except FAULTS as error:  # the next commit prunes again
            log.warning("old checkpoints are not deleted now: %s", error.message)

    def _failed(self, staged: Staged | None, error: UserError) -> None:
        self._failures += 1
        if staged and staged.kind == "reference" and self._failures >= DRAIN_TRIES:
            log.warning("the reference's log-probabilities are not saved: %s", error.message)
            with self._changed:
                self._remove(staged)  # a later attempt recomputes them; checkpoints do not wait for them
            return
        if staged:
            self._listener.upload_failed(staged.step, error.message)
        if self._draining and self._failures >= DRAIN_TRIES:
            raise Unavailable(error.message, hint=error.hint) from None

    def _remove(self, staged: Staged) -> None:
        """Remove a folder from staging. The marker goes first, since a folder without a marker is incomplete."""
        (self._staging / f"{staged.folder}{STAGED_SUFFIX}").unlink()
        shutil.rmtree(self._staging / staged.folder, ignore_errors=True)
