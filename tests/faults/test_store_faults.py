"""Faults of a store during a save or a restore lose no checkpoint and hide no damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers.s3 import ACCESS, FaultyS3, Rule
from tests.unit.test_uploader import Told, stage
from trainer.bucket import Bucket, open_run
from trainer.bucket.address import Patience
from trainer.bucket.attempts import claim
from trainer.bucket.manifest import committed
from trainer.bucket.restore import restore
from trainer.bucket.uploader import Uploader
from trainer.errors import BucketError, Unavailable
from trainer.staged import pending

QUICK = Patience(open_s=0.5, transfer_s=0.3, request_s=0.5)
ALL = "checkpoints/|commits/"
Break = Callable[[FaultyS3], Rule]

LASTING: dict[str, Break] = {
    "500": lambda proxy: proxy.answer(500, "InternalError", key=ALL),
    "503": lambda proxy: proxy.answer(503, "SlowDown", key=ALL),
    "reset": lambda proxy: proxy.reset(key=ALL),
    "time-out": lambda proxy: proxy.hold(key=ALL),
    "expired": lambda proxy: proxy.answer(403, "ExpiredToken", key=ALL),
    "answer lost": lambda proxy: proxy.cut("PUT", ALL),
}


@pytest.fixture
def bucket(s3: str, faulty_s3: FaultyS3) -> Bucket:
    return open_run(s3, "run", patience=QUICK)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


@pytest.fixture
def uploader(bucket: Bucket, staging: Path, told: Told) -> Iterator[Uploader]:
    """A running uploader of an attempt that owns the run."""
    thread = Uploader(
        bucket, claim(bucket, {}), staging,
        recipe_digest="digest", keep=2, listener=told, poll_s=0.01, backoff=lambda _: 0.01,
    )  # fmt: skip
    thread.start()
    yield thread
    thread.stop()


@pytest.mark.parametrize("fault", LASTING)
def test_a_save_outlasts_whatever_the_store_does(
    bucket: Bucket,
    faulty_s3: FaultyS3,
    uploader: Uploader,
    staging: Path,
    told: Told,
    tmp_path: Path,
    fault: str,
) -> None:
    """During the fault the checkpoint stays staged; afterwards it is committed completely."""
    rule = LASTING[fault](faulty_s3)
    stage(staging, 10)
    told.wait_for("failed", 10, count=2)
    assert rule.hits >= 2
    assert pending(staging)
    assert uploader.error is None
    faulty_s3.clear()
    told.wait_for("committed", 10)
    assert uploader.drain()
    restored = restore(bucket, tmp_path, lambda *_: pytest.fail("rejected"))
    assert restored
    assert restored.manifest.step == 10


@pytest.mark.parametrize("fault", ["500", "503", "reset", "time-out"])
def test_a_restore_from_a_store_that_stays_away_is_no_verdict(
    bucket: Bucket,
    faulty_s3: FaultyS3,
    uploader: Uploader,
    staging: Path,
    told: Told,
    tmp_path: Path,
    fault: str,
) -> None:
    """An unreadable checkpoint is not rejected as damaged. The attempt ends with an error that allows a recovery."""
    stage(staging, 10)
    told.wait_for("committed", 10)
    assert uploader.drain()
    rule = LASTING[fault](faulty_s3)
    with pytest.raises(Unavailable):
        restore(bucket, tmp_path, lambda *_: pytest.fail("rejected"))
    assert rule.hits >= 1
    assert not list(tmp_path.glob("checkpoint-*"))
    faulty_s3.clear()
    assert restore(bucket, tmp_path, lambda *_: pytest.fail("rejected"))


def test_a_restore_with_expired_credentials_says_how_to_go_on(
    bucket: Bucket, faulty_s3: FaultyS3, uploader: Uploader, staging: Path, told: Told, tmp_path: Path
) -> None:
    """Expired credentials are reported with a hint, and no checkpoint is rejected because of them."""
    stage(staging, 10)
    told.wait_for("committed", 10)
    LASTING["expired"](faulty_s3)
    with pytest.raises(BucketError, match="403 ExpiredToken") as caught:
        restore(bucket, tmp_path, lambda *_: pytest.fail("rejected"))
    assert "renew them" in str(caught.value)


PASSING: dict[str, Break] = {
    "500": lambda proxy: proxy.answer(500, "InternalError", "GET", "checkpoints/", times=2),
    "503": lambda proxy: proxy.answer(503, "SlowDown", "GET", "checkpoints/", times=2),
    "reset": lambda proxy: proxy.reset("GET", "checkpoints/", times=2),
    "truncated": lambda proxy: proxy.truncate("checkpoints/", times=2),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_a_restore_nothing(
    s3: str, faulty_s3: FaultyS3, uploader: Uploader, staging: Path, told: Told, tmp_path: Path, fault: str
) -> None:
    """The request is retried, and the checkpoint verifies."""
    stage(staging, 10)
    told.wait_for("committed", 10)
    rule = PASSING[fault](faulty_s3)
    restored = restore(open_run(s3, "run"), tmp_path, lambda *_: pytest.fail("rejected"))
    assert restored
    assert rule.hits == 2


def test_a_flipped_bit_sends_a_restore_to_the_checkpoint_before(
    bucket: Bucket, faulty_s3: FaultyS3, uploader: Uploader, staging: Path, told: Told, tmp_path: Path
) -> None:
    """The damaged file is named, and the previous checkpoint is restored."""
    for step in (10, 20):
        stage(staging, step)
        told.wait_for("committed", step)
    rule = faulty_s3.flip_bit("step-00000020/.*safetensors")
    rejected: list[tuple[int, str]] = []
    restored = restore(bucket, tmp_path, lambda step, reason: rejected.append((step, reason)))
    assert restored
    assert restored.manifest.step == 10
    assert [step for step, _ in rejected] == [20]
    assert "xxh3" in rejected[0][1]
    assert rule.hits >= 1


def profile(path: Path, token: str) -> None:
    """Write a credentials file like a tool that renews credentials."""
    lines = ["[trainer]", f"aws_access_key_id = {ACCESS['AWS_ACCESS_KEY_ID']}"]
    lines += [f"aws_secret_access_key = {ACCESS['AWS_SECRET_ACCESS_KEY']}", f"aws_session_token = {token}"]
    path.write_text("\n".join(lines))


def test_credentials_that_come_back_in_their_file_are_used(
    s3: str, faulty_s3: FaultyS3, staging: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile is read anew, so a run can outlive its first credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "trainer")
    profile(tmp_path / "credentials", "first")
    bucket = open_run(s3, "run", patience=QUICK)
    uploader = Uploader(
        bucket, claim(bucket, {}), staging,
        recipe_digest="digest", keep=2, listener=told, poll_s=0.01, backoff=lambda _: 0.01,
    )  # fmt: skip
    uploader.start()
    rule = faulty_s3.answer(403, "ExpiredToken", headers={"x-amz-security-token": "first"})
    stage(staging, 10)
    told.wait_for("failed", 10, count=2)
    profile(tmp_path / "credentials", "second")
    told.wait_for("committed", 10)
    assert uploader.drain()
    uploader.stop()
    assert rule.hits >= 2
    assert [manifest.step for manifest in committed(bucket)] == [10]
