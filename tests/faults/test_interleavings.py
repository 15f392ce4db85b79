"""The bucket stays consistent for any order of saves, kills, restarts, deletions, take-overs and outages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from obstore.store import MemoryStore

from tests.servers.stores import Died, FailsAt, MemoryBucket
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.bucket.manifest import committed, sizes
from trainer.bucket.restore import restore
from trainer.bucket.retention import prune
from trainer.errors import Superseded, Unavailable
from trainer.staged import Staged

STEP = 10
OPERATIONS = st.integers(0, 14)
"""After how many operations on the store a fault comes; a save takes about ten."""


def content(step: int) -> bytes:
    """Return the bytes of a step, which are equal in all attempts, since training is exact."""
    return f"weights of step {step}".encode() * 10


class Runs(RuleBasedStateMachine):
    """Any number of attempts at one run. The newest attempt owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.store = MemoryStore()
        self.bucket = MemoryBucket(self.store)
        self.saves = 0
        self.step = 0
        self.promised: list[int] = []
        """Steps whose commit was answered, newest last."""
        self.owner = claim(self.bucket, {})
        self.superseded: list[Attempt] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule()
    def save(self) -> None:
        self.step += STEP
        self._commit(self.bucket, self.owner, self.step)
        self._promise()

    @rule(operation=OPERATIONS, lost_answer=st.booleans())
    def die_in_a_save_and_restart(self, operation: int, lost_answer: bool) -> None:
        """The machine dies at an operation of a save or of retention, and another machine resumes the run."""
        self.step += STEP
        dying = FailsAt(self.store, operation, lost_answer=lost_answer)
        try:
            attempt = Attempt(dying, self.owner.number)
            self._commit(dying, attempt, self.step)
            prune(dying, attempt, 2)
        except Died:
            pass
        self.restart()

    @rule(operation=OPERATIONS, lost_answer=st.booleans(), lasts=st.integers(1, 3))
    def save_through_an_outage(self, operation: int, lost_answer: bool, lasts: int) -> None:
        """The uploader repeats the call until it succeeds."""
        self.step += STEP
        flaky = FailsAt(self.store, operation, lost_answer=lost_answer, fault=Unavailable, lasts=lasts)
        for _ in range(lasts + 1):
            try:
                self._commit(flaky, Attempt(flaky, self.owner.number), self.step)
                break
            except Unavailable:
                continue
        else:
            pytest.fail("the outage was over, and the commit failed all the same")
        self._promise()

    @rule(keep=st.integers(1, 4))
    def prune(self, keep: int) -> None:
        prune(self.bucket, self.owner, keep)
        self.promised = self.promised[-max(keep, 2) :]

    @rule()
    def restart(self) -> None:
        """Another machine claims the run and resumes from the checkpoint that it restores."""
        self._take_over()
        self.step = self._restore()
        assert self.step >= (self.promised[-1] if self.promised else 0)
        self._promise()

    @precondition(lambda self: self.superseded)
    @rule(data=st.data())
    def wake_a_superseded_attempt(self, data: st.DataObject) -> None:
        """The attempt tries its next operation, which changes nothing."""
        sleeper = data.draw(st.sampled_from(self.superseded))
        before = self._objects()
        with pytest.raises(Superseded):
            self._commit(self.bucket, sleeper, data.draw(st.integers(1, 9)) * STEP)
        with pytest.raises(Superseded):
            prune(self.bucket, sleeper, 2)
        assert self._objects() == before

    @rule()
    def be_taken_over_in_a_save(self) -> None:
        """Another machine claims the run between upload and commit, so nothing is committed."""
        self.step += STEP
        with pytest.raises(Superseded):
            self._commit(self.bucket, self.owner, self.step, ready=self._take_over)
        assert self.step not in {manifest.step for manifest in committed(self.bucket)}
        self.step = self._restore()
        self._promise()

    def _take_over(self) -> None:
        self.superseded.append(self.owner)
        self.owner = claim(self.bucket, {})

    @invariant()
    def the_newest_checkpoint_verifies(self) -> None:
        assert self._restore() >= (self.promised[-1] if self.promised else 0)

    @invariant()
    def nothing_that_retention_keeps_is_missing(self) -> None:
        there = sizes(self.bucket, "checkpoints/")
        whole = [manifest.step for manifest in committed(self.bucket) if not manifest.fault(there)]
        assert set(self.promised[-2:]) <= set(whole)

    def _commit(
        self,
        bucket: MemoryBucket,
        attempt: Attempt,
        step: int,
        *,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.saves += 1
        staging = Path(self.folder.name) / f"staging-{self.saves}"
        (staging / "checkpoint").mkdir(parents=True)
        (staging / "checkpoint" / "model.safetensors").write_bytes(content(step))
        (staging / "checkpoint" / "rank_0.pt").write_bytes(b"0")
        commit(bucket, attempt, staging, Staged(folder="checkpoint", step=step), "digest", ready=ready)

    def _promise(self) -> None:
        self.promised = [step for step in self.promised if step != self.step] + [self.step] * bool(self.step)

    def _restore(self) -> int:
        """Restore the newest step, and check that no newer checkpoint is damaged."""
        rejected: list[tuple[int, str]] = []
        with TemporaryDirectory() as into:
            restored = restore(self.bucket, Path(into), lambda step, why: rejected.append((step, why)))
            assert rejected == []
            if restored is None:
                return 0
            step = restored.manifest.step
            assert (restored.path / "model.safetensors").read_bytes() == content(step)
            return step

    def _objects(self) -> dict[str, bytes]:
        return {item.key: self.bucket.get(item.key) for item in self.bucket.list()}


TestRuns = Runs.TestCase
TestRuns.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
