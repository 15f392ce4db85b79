"""The attempt that claimed a run last owns it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.servers.s3 import FaultyS3
from tests.servers.stores import MemoryBucket, Unconditional
from trainer.bucket import open_run
from trainer.bucket.attempts import Attempt, claim
from trainer.errors import Superseded


def test_attempts_are_numbered_from_one_and_say_who_they_are(uri: str) -> None:
    """Users can see in the bucket which node ran each attempt."""
    bucket = open_run(uri, "run")
    assert [claim(bucket, {"node": name}).number for name in ("a", "b")] == [1, 2]
    card = json.loads(bucket.get("attempts/0002.json"))
    assert (card["attempt"], card["node"]) == (2, "b")
    assert "claimed" in card


def test_an_attempt_learns_that_it_was_superseded(uri: str) -> None:
    """The older attempt stops with an error that names the newer one; the newer one continues."""
    bucket = open_run(uri, "run")
    older = claim(bucket, {})
    older.check()
    newer = claim(bucket, {})
    with pytest.raises(Superseded, match="attempt 1 of run run is superseded by attempt 2"):
        older.check()
    newer.check()


def test_claims_at_the_same_time_get_different_numbers(uri: str) -> None:
    """Concurrent claims get distinct numbers, so one attempt is the newest."""
    bucket = open_run(uri, "run")
    with ThreadPoolExecutor(6) as pool:
        attempts = list(pool.map(lambda _: claim(bucket, {}), range(6)))
    assert sorted(attempt.number for attempt in attempts) == [1, 2, 3, 4, 5, 6]


class RacedBucket(MemoryBucket):
    """A bucket in which another machine claims the run between our listing and our claim."""

    def create(self, key: str, data: bytes) -> bool:
        super().create("attempts/0001.json", b"{}")
        return super().create(key, data)


def test_a_lost_race_is_followed_by_another_try() -> None:
    """Two attempts never share a number."""
    assert claim(RacedBucket(), {}).number == 2


def test_a_claim_whose_answer_was_lost_owns_the_run(s3: str, faulty_s3: FaultyS3) -> None:
    """The attempt recognises its own claim, so it keeps the number."""
    bucket = open_run(s3, "run")
    rule = faulty_s3.cut("PUT", "attempts/", times=1)
    attempt = claim(bucket, {})
    attempt.check()
    assert rule.hits == 1
    assert (attempt.number, attempt.exclusive) == (1, True)


def test_a_store_that_keeps_its_word_is_believed(uri: str) -> None:
    """Folders, S3 and GCS give each number to one attempt only, and a trial write shows that."""
    assert claim(open_run(uri, "run"), {}).exclusive


def test_a_store_that_ignores_conditions_still_lets_the_later_one_supersede(rclone: str) -> None:
    """Without conditional writes, a later attempt still supersedes an earlier one."""
    bucket = open_run(rclone, "run")
    older, newer = claim(bucket, {}), claim(bucket, {})
    assert (older.number, newer.number) == (1, 2)
    assert not older.exclusive
    with pytest.raises(Superseded):
        older.check()
    newer.check()


class RacedUnconditional(Unconditional):
    """A store without conditional writes in which others claim number 1 just before we read our claim."""

    def __init__(self, races: int) -> None:
        super().__init__()
        self._races = races

    def get(self, key: str) -> bytes:
        if self._races:
            self._races -= 1
            self.put("attempts/0001.json", b'{"token": "of another"}')
        return super().get(key)


def test_without_conditions_the_loser_of_a_race_sees_it_on_its_card() -> None:
    """If the claim of a number is another's, the attempt takes the next number."""
    bucket = RacedUnconditional(races=1)
    attempt = claim(bucket, {})
    assert (attempt.number, attempt.exclusive) == (2, False)
    attempt.check()


def test_without_conditions_a_race_lost_after_the_claim_shows_before_the_commit() -> None:
    """The later write owns the number, so the attempt that finds another's claim stops."""
    bucket = Unconditional()
    attempt = claim(bucket, {})
    bucket.put("attempts/0001.json", b'{"token": "of another"}')
    with pytest.raises(Superseded, match="claimed by another at the same moment"):
        attempt.check()


def test_other_objects_are_no_attempts() -> None:
    """Unrelated files in the folder do not supersede an attempt."""
    bucket = MemoryBucket()
    attempt = Attempt(bucket, 3)
    for key in ("attempts/readme.txt", "attempts/0009.json.bak", "attempts/9/9.json"):
        bucket.put(key, b"")
    attempt.check()
    assert claim(bucket, {}).number == 1
