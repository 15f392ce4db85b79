"""The thread that brings staged checkpoints into the bucket while training goes on."""

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
"""What is waited out while training goes on: the store worked when the run was claimed, so a refusal, such as
that of expired credentials, is one that somebody may mend meanwhile."""
DRAIN_TRIES = 4
"""Failed tries in a row, each with the store's own retries, after which an ending attempt gives up."""


class Listener(Protocol):
    """Who is told what becomes of staged checkpoints; called on the uploader's thread."""

    def committing(self) -> None: ...
    def committed(self, manifest: Manifest, seconds: float) -> None: ...
    def dropped(self, step: int) -> None: ...
    def upload_failed(self, step: int, reason: str) -> None: ...


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time up to a minute, with jitter."""
    return float(min(60.0, 2.0**failures) * random.uniform(0.5, 1.0))


class Uploader(threading.Thread):
    """Uploads what lies complete in staging, one at a time; tries again for as long as training lasts.

    At most one checkpoint waits: an older one is dropped when a newer one is complete. The final
    model is uploaded after the checkpoint, so when it is committed, all is. The thread ends by
    itself only with `error` set.
    """

    def __init__(  # noqa: PLR0913 (three places, two facts of the run, and who is told)
        self,
        bucket: Bucket,
        attempt: Attempt,
        staging: Path,
        *,
        recipe_digest: str,
        keep: int,
        tell: Listener,
        node: Node = ALONE,
        waiting: Waiting = WAITING,
        shelf: ReferenceCache | None = None,
        rejected: Collection[int] = (),
        poll_s: float = 0.2,
        backoff: Callable[[int], float] = backoff_s,
    ) -> None:
        """Uploads from `staging`; keeps the newest `keep` checkpoints in the bucket; looks every `poll_s`.

        Of several nodes each uploads its part, and node 0, which waits for the others as `waiting` says, commits and
        keeps order; `rejected` are steps that it does not count, as `prune`. What is staged of a reference goes onto the `shelf`, before the checkpoints that depend on it.
        """
        super().__init__(name="uploader", daemon=True)  # a transfer that hangs must not hold up the exit
        self._bucket = bucket
        self._attempt = attempt
        self._staging = staging
        self._recipe_digest = recipe_digest
        self._keep = keep
        self._tell = tell
        self._node = node
        self._waiting = waiting
        self._shelf = shelf
        self._rejected = rejected
        self._poll_s = poll_s
        self._backoff = backoff
        self._changed = threading.Condition()  # guards what follows, and what is removed from staging
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
        """Wait until all that is staged is committed.

        Returns:
            False if the time was up, or if the thread ended with an error.
        """
        with self._changed:
            self._draining = True
            self._failures = 0
            self._hurry.set()
            self._changed.wait_for(lambda: self._error or self._idle(), timeout_s)
            return self._error is None and self._idle()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Begin nothing more, and wait a little for what has begun; staging is left as it is."""
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
        except Exception as error:  # noqa: BLE001 (whoever waits for this thread must learn why it ended)
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
        """Upload what comes next, if anything does; False if the store could not be reached."""
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
        """The reference, the newest checkpoint, else the final model; what is older is dropped."""
        with self._changed:
            waiting = pending(self._staging)
            references = [staged for staged in waiting if staged.kind == "reference"]
            checkpoints = [staged for staged in waiting if staged.kind == "checkpoint"]
            for stale in references[:-1] + checkpoints[:-1]:
                self._remove(stale)
            self._busy = bool(waiting)
        for stale in checkpoints[:-1]:
            self._tell.dropped(stale.step)
        return next(iter(references[-1:] or checkpoints[-1:] or waiting), None)

    def _upload(self, staged: Staged) -> None:
        began = time.monotonic()
        try:
            manifest = self._bring(staged)
        except Skipped as reason:
            log.warning("%s; it is not committed", reason)
            self._tell.dropped(staged.step)
            manifest = None
        with self._changed:
            self._remove(staged)
        self._failures = 0
        if manifest:
            self._tell.committed(manifest, time.monotonic() - began)
            self._prune()

    def _bring(self, staged: Staged) -> Manifest | None:
        """The manifest that was committed; None from a node that only uploads its part, and of a reference."""
        if staged.kind == "reference":
            if self._shelf:
                shelved = self._shelf.put(self._staging / staged.folder, staged)
                log.info(
                    "kept the reference's log-probabilities of %d pairs for later attempts", shelved.pairs
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
            ready=self._tell.committing,
            others=lambda: self._others(staged),
        )

    def _others(self, staged: Staged) -> tuple[File, ...]:
        """What the other nodes wrote of it; the final model is node 0's alone."""
        if self._node.nodes == 1 or staged.kind == "final":
            return ()
        return gather(self._bucket, self._attempt, staged, nodes=self._node.nodes, waiting=self._waiting)

    def _prune(self) -> None:
        try:
            prune(self._bucket, self._attempt, self._keep, rejected=self._rejected)
        except FAULTS as error:  # the next commit prunes again
            log.warning("old checkpoints stay for now: %s", error.message)

    def _failed(self, staged: Staged | None, error: UserError) -> None:
        self._failures += 1
        if staged and staged.kind == "reference" and self._failures >= DRAIN_TRIES:
            log.warning("the reference's log-probabilities are not kept: %s", error.message)
            with self._changed:
                self._remove(staged)  # a later attempt computes them again; checkpoints do not wait for it
            return
        if staged:
            self._tell.upload_failed(staged.step, error.message)
        if self._draining and self._failures >= DRAIN_TRIES:
            raise Unavailable(error.message, hint=error.hint) from None

    def _remove(self, staged: Staged) -> None:
        """The marker first: without it, what is left of the folder is nothing."""
        (self._staging / f"{staged.folder}{STAGED_SUFFIX}").unlink()
        shutil.rmtree(self._staging / staged.folder, ignore_errors=True)
