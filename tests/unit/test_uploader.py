"""The uploader commits staged folders one at a time, and reports every failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from tests.servers.s3 import FaultyS3
from tests.servers.stores import Down, MemoryBucket
from trainer.bucket import Bucket, Checked, open_run
from trainer.bucket.address import Patience
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.manifest import Manifest, committed, final
from trainer.bucket.uploader import DRAIN_TRIES, Uploader, backoff_s
from trainer.errors import BucketError, Superseded, Unavailable
from trainer.staged import Staged, mark_staged, pending


class Told:
    """A listener that records the callbacks and lets tests wait for them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.reasons: list[str] = []
        self._changed = threading.Condition()

    def committing(self) -> None:
        """A no-op."""

    def committed(self, manifest: Manifest, seconds: float) -> None:
        assert seconds >= 0
        self._add("committed" if manifest.kind == "checkpoint" else "exported", manifest.step)

    def dropped(self, step: int) -> None:
        self._add("dropped", step)

    def upload_failed(self, step: int, reason: str) -> None:
        self.reasons.append(reason)
        self._add("failed", step)

    def _add(self, what: str, step: int) -> None:
        with self._changed:
            self.events.append((what, step))
            self._changed.notify_all()

    def wait_for(self, what: str, step: int, *, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.events.count((what, step)) >= count, 30), self.events


class Gate(MemoryBucket):
    """A bucket whose uploads wait at a gate."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.reached = threading.Event()
        self.open = threading.Event()

    def upload(self, key: str, path: Path) -> Checked:
        self.reached.set()
        assert self.open.wait(30)
        return super().upload(key, path)


Start = Callable[..., Uploader]


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def start(staging: Path, told: Told) -> Iterator[Start]:
    started: list[Uploader] = []

    def begin(bucket: Bucket, attempt: Attempt, **options: Any) -> Uploader:
        options = {"keep": 2, "poll_s": 0.01, "backoff": lambda _: 0.01, "listener": told, **options}
        uploader = Uploader(bucket, attempt, staging, recipe_digest="digest", **options)
        started.append(uploader)
        uploader.start()
        return uploader

    yield begin
    for uploader in started:
        uploader.stop()


def stage(staging: Path, *steps: int, final: bool = False) -> None:
    for step in steps:
        name = "final" if final else f"checkpoint-{step}"
        (staging / name).mkdir()
        (staging / name / "model.safetensors").write_bytes(f"{step}".encode())
        mark_staged(staging, Staged(folder=name, step=step, kind="final" if final else "checkpoint"))


def test_what_is_staged_is_committed_and_leaves_staging(
    uri: str, staging: Path, told: Told, start: Start
) -> None:
    """Staging uses host memory, which is freed as soon as the checkpoint is committed."""
    bucket = open_run(uri, "run")
    uploader = start(bucket, claim(bucket, {}))
    stage(staging, 10)
    told.wait_for("committed", 10)
    stage(staging, 20)
    stage(staging, 20, final=True)
    assert uploader.drain()
    assert told.events[-1] == ("exported", 20)
    assert [manifest.step for manifest in committed(bucket)] == [20, 10]
    assert final(bucket) is not None
    assert list(staging.iterdir()) == []
    assert uploader.error is None


def test_a_folder_without_its_marker_is_left_alone(staging: Path, start: Start, told: Told) -> None:
    """A checkpoint that is still being written is not uploaded."""
    bucket = MemoryBucket()
    (staging / "checkpoint-10").mkdir()
    uploader = start(bucket, claim(bucket, {}))
    assert uploader.drain()
    assert told.events == []
    assert (staging / "checkpoint-10").exists()


def test_only_the_newest_waits(staging: Path, told: Told, start: Start) -> None:
    """An older waiting checkpoint is dropped; one that is being uploaded is not."""
    bucket = Gate()
    uploader = start(bucket, claim(bucket, {}))
    stage(staging, 10)
    assert bucket.reached.wait(30)
    stage(staging, 20, 30, 40)
    bucket.open.set()
    assert uploader.drain()
    assert told.events == [("committed", 10), ("dropped", 20), ("dropped", 30), ("committed", 40)]
    assert list(staging.iterdir()) == []


def test_the_last_checkpoint_goes_before_the_final_model(staging: Path, told: Told, start: Start) -> None:
    """The final model is committed last. If the machine dies before, the next attempt resumes from the checkpoint."""
    bucket = MemoryBucket()
    stage(staging, 20, final=True)
    stage(staging, 10, 20)
    assert start(bucket, claim(bucket, {})).drain()
    assert told.events == [("dropped", 10), ("committed", 20), ("exported", 20)]


def test_old_checkpoints_are_pruned_after_each_commit(staging: Path, told: Told, start: Start) -> None:
    """The bucket does not grow with the length of the run."""
    bucket = MemoryBucket()
    uploader = start(bucket, claim(bucket, {}))
    for step in (10, 20, 30, 40):
        stage(staging, step)
        told.wait_for("committed", step)
    assert uploader.drain()
    assert [manifest.step for manifest in committed(bucket)] == [40, 30]


def test_an_outage_is_told_and_waited_out(staging: Path, told: Told, start: Start) -> None:
    """The checkpoint stays staged until the store is reachable again, and is then committed."""
    store = MemoryStore()
    attempt = claim(MemoryBucket(store), {})
    waits: list[int] = []

    def no_wait(failures: int) -> float:
        waits.append(failures)
        return 0.0

    stage(staging, 10)
    uploader = start(Down(store, lasts=3), attempt, backoff=no_wait)
    told.wait_for("committed", 10)
    assert uploader.drain()
    assert told.events == [("failed", 10)] * 3 + [("committed", 10)]
    assert told.reasons == ["on request"] * 3
    assert waits == [1, 2, 3]


def test_an_outage_over_sockets_is_waited_out(
    s3: str, faulty_s3: FaultyS3, staging: Path, told: Told, start: Start
) -> None:
    """The complete checkpoint is uploaded after the outage."""
    bucket = open_run(s3, "run", patience=Patience(transfer_s=0.2))
    uploader = start(bucket, claim(bucket, {}))
    faulty_s3.answer(503, "SlowDown", "PUT", "checkpoints/")
    stage(staging, 10)
    told.wait_for("failed", 10)
    assert pending(staging)
    faulty_s3.clear()
    assert uploader.drain()
    assert told.events[-1] == ("committed", 10)
    assert "503 SlowDown" in told.reasons[0]


def test_a_newer_checkpoint_takes_the_place_of_one_that_failed(
    staging: Path, told: Told, start: Start
) -> None:
    """After an outage only the newest checkpoint is uploaded."""
    store = MemoryStore()
    attempt = claim(MemoryBucket(store), {})
    bucket = Down(store, lasts=1)

    def stage_meanwhile(failures: int) -> float:
        stage(staging, 20)
        return 0.0

    stage(staging, 10)
    uploader = start(bucket, attempt, backoff=stage_meanwhile)
    assert uploader.drain()
    assert told.events == [("failed", 10), ("dropped", 10), ("committed", 20)]


def test_an_ending_attempt_gives_up_on_a_store_that_stays_away(
    staging: Path, told: Told, start: Start
) -> None:
    """A rented machine does not wait forever, and the error allows a recovery."""
    store = MemoryStore()
    attempt = claim(MemoryBucket(store), {})
    stage(staging, 10)
    uploader = start(Down(store), attempt, backoff=lambda _: 0.0)
    assert not uploader.drain()
    assert isinstance(uploader.error, Unavailable)
    assert len(told.events) >= DRAIN_TRIES
    assert pending(staging)


def test_draining_has_a_time_limit(staging: Path, start: Start) -> None:
    """A preemption notice leaves seconds, so `drain` returns False after its timeout."""
    bucket = Gate()
    attempt = claim(bucket, {})
    stage(staging, 10)
    uploader = start(bucket, attempt)
    assert bucket.reached.wait(30)
    assert not uploader.drain(timeout_s=0.01)
    assert uploader.error is None
    bucket.open.set()
    assert uploader.drain()


class SlowListener(Told):
    """A listener whose `committed` callback is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def committed(self, manifest: Manifest, seconds: float) -> None:
        self.reached.set()
        assert self.go_on.wait(30)
        super().committed(manifest, seconds)


def test_draining_waits_until_the_commit_was_told(staging: Path, start: Start) -> None:
    """After `drain`, every commit has been reported to the listener."""
    bucket = MemoryBucket()
    told = SlowListener()
    stage(staging, 10)
    uploader = start(bucket, claim(bucket, {}), listener=told)
    assert told.reached.wait(30)
    assert not uploader.drain(timeout_s=0.01)
    told.go_on.set()
    assert uploader.drain()
    assert told.events == [("committed", 10)]


def test_draining_does_not_wait_out_a_backoff(staging: Path, told: Told, start: Start) -> None:
    """`drain` ends the backoff and retries at once."""
    store = MemoryStore()
    attempt = claim(MemoryBucket(store), {})
    stage(staging, 10)
    uploader = start(Down(store, lasts=1), attempt, backoff=lambda _: 3600.0)
    told.wait_for("failed", 10)
    assert uploader.drain(timeout_s=30)
    assert told.events == [("failed", 10), ("committed", 10)]


def test_a_superseded_uploader_stops_and_says_so(staging: Path, told: Told, start: Start) -> None:
    """A superseded attempt neither commits nor deletes."""
    bucket = MemoryBucket()
    attempt = claim(bucket, {})
    claim(bucket, {})
    stage(staging, 10)
    uploader = start(bucket, attempt)
    assert not uploader.drain()
    uploader.join(30)
    assert isinstance(uploader.error, Superseded)
    assert committed(bucket) == []
    assert told.events == []


class Refusing(MemoryBucket):
    """A bucket whose credentials are expired until `renewed` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.renewed = threading.Event()

    def upload(self, key: str, path: Path) -> Checked:
        if not self.renewed.is_set():
            raise BucketError(f"cannot write {key}: 400 ExpiredToken", hint="renew them")
        return super().upload(key, path)


def test_expired_credentials_are_waited_out(staging: Path, told: Told, start: Start) -> None:
    """Training continues, and the staged checkpoint is committed once the credentials are renewed."""
    bucket = Refusing()
    stage(staging, 10)
    uploader = start(bucket, claim(bucket, {}))
    told.wait_for("failed", 10, count=3)
    assert uploader.error is None
    bucket.renewed.set()
    told.wait_for("committed", 10)
    assert uploader.drain()


def test_an_ending_attempt_gives_up_on_expired_credentials(staging: Path, start: Start) -> None:
    """The next attempt may have new credentials, so the error allows a recovery and has a hint."""
    bucket = Refusing()
    stage(staging, 10)
    uploader = start(bucket, claim(bucket, {}))
    assert not uploader.drain()
    uploader.join(30)
    assert isinstance(uploader.error, Unavailable)
    assert "ExpiredToken" in uploader.error.message
    assert uploader.error.hint == "renew them"
    assert pending(staging)


class Buggy(MemoryBucket):
    """A bucket with a bug."""

    def upload(self, key: str, path: Path) -> Checked:
        return Checked(1 // 0, key)


def test_a_bug_ends_the_thread_with_its_error(staging: Path, start: Start) -> None:
    """The waiting thread gets the error."""
    bucket = Buggy()
    stage(staging, 10)
    uploader = start(bucket, claim(bucket, {}))
    assert not uploader.drain()
    uploader.join(30)
    assert isinstance(uploader.error, ZeroDivisionError)
    assert pending(staging)


class Undeletable(MemoryBucket):
    """A bucket that fails at deletions."""

    def delete(self, keys: object) -> None:
        raise Unavailable("cannot delete")


def test_a_prune_that_fails_does_not_undo_a_commit(staging: Path, told: Told, start: Start) -> None:
    """A failed deletion of old checkpoints does not undo the new commit."""
    bucket = Undeletable()
    uploader = start(bucket, claim(bucket, {}))
    for step in (10, 20, 30):
        stage(staging, step)
        told.wait_for("committed", step)
    assert uploader.drain()
    assert uploader.error is None
    assert told.events == [("committed", 10), ("committed", 20), ("committed", 30)]
    assert len(committed(bucket)) == 3


def test_a_stopped_uploader_begins_nothing_more(staging: Path, told: Told, start: Start) -> None:
    """After `stop`, staged folders stay in staging."""
    bucket = MemoryBucket()
    uploader = start(bucket, claim(bucket, {}))
    uploader.stop()
    assert not uploader.is_alive()
    stage(staging, 10)
    assert not uploader.drain(timeout_s=0.01)
    assert pending(staging)
    assert told.events == []


def test_backoff_doubles_up_to_a_minute() -> None:
    """The backoff doubles up to a minute, with jitter."""
    assert 1.0 <= backoff_s(1) <= 2.0
    assert 8.0 <= backoff_s(4) <= 16.0
    assert 30.0 <= backoff_s(1000) <= 60.0
