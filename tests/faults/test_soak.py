"""A small run of `make soak` passes, and its checks find each kind of fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import RunView
from tests.soak.ledger import Ledger, Reference
from tests.soak.soak import KEEP, Trial, soak
from trainer.bucket import Bucket, attempts, open_run
from trainer.bucket.commit import commit
from trainer.bucket.layout import commit_key
from trainer.bucket.manifest import committed
from trainer.staged import Staged

STEPS = (10, 20, 30, 40)
EXPECTED = Reference(
    told={step: {"kind": "step", "step": step, "loss": 1 / step} for step in STEPS},
    commits={},
    final="never",
    seconds=1.0,
)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    """A run of one attempt with four checkpoints and their events."""
    bucket = open_run(str(tmp_path / "runs"), "r")
    attempt = attempts.claim(bucket, {})
    for step in STEPS:
        staging = tmp_path / f"staging-{step}"
        (staging / "saved").mkdir(parents=True)
        (staging / "saved" / "model.safetensors").write_bytes(step.to_bytes(4) * 1000)
        commit(bucket, attempt, staging, Staged(folder="saved", step=step), "digest")
    tell(bucket, 1, *EXPECTED.told.values())
    return bucket


@pytest.fixture
def ledger(bucket: Bucket, tmp_path: Path) -> Ledger:
    """A ledger that has recorded all four checkpoints."""
    ledger = Ledger(RunView(str(tmp_path / "runs"), "r"), EXPECTED, KEEP)
    ledger.look()
    assert (ledger.seen, ledger.newest, ledger.lost, ledger.diverged) == (set(STEPS), 40, [], [])
    return ledger


def tell(bucket: Bucket, attempt: int, *events: dict[str, object]) -> None:
    lines = (json.dumps({**event, "attempt": attempt, "time": "now"}) + "\n" for event in events)
    bucket.put(f"events/{attempt:04d}.jsonl", "".join(lines).encode())


def test_fifteen_kills_lose_no_commit_and_change_no_step(tmp_path: Path) -> None:
    """After each kill the newest commit verifies, and the run ends with the same model."""
    result = soak(Trial(str(tmp_path / "bucket"), tmp_path / "machine", kills=15, seed=3))
    assert (result.lost, result.diverged, result.failed) == ([], [], [])
    assert (result.kills, result.runs > 0, result.commits > 0) == (15, True, True)
    assert "commits lost 0, resumes that diverge 0" in str(result)


def test_a_program_that_forgets_its_state_is_found_out(tmp_path: Path) -> None:
    """The soak fails for a program that does not restore its state."""
    trial = Trial(
        str(tmp_path / "bucket"),
        tmp_path / "machine",
        kills=40,
        seed=3,
        environ={"COUNTING_FAULT": "forgets"},
    )
    result = soak(trial)
    assert result.diverged
    assert not result.good
    assert not result.lost


def test_what_retention_allows_is_no_loss(bucket: Bucket, ledger: Ledger) -> None:
    """The oldest checkpoint may be deleted when three newer ones exist."""
    bucket.delete([commit_key(10)])
    ledger.look()
    assert ledger.lost == []


@pytest.mark.parametrize("step", [20, 40])
def test_a_commit_that_vanished_is_a_loss(bucket: Bucket, ledger: Ledger, step: int) -> None:
    """A missing commit is reported, even if it is the newest and the others are intact."""
    bucket.delete([commit_key(step)])
    ledger.look()
    assert [f"step {step} is gone" in line for line in ledger.lost] == [True]


def test_a_flipped_bit_in_the_newest_is_a_loss(bucket: Bucket, ledger: Ledger) -> None:
    """The damage is found by the checksum, since the size is right."""
    key = committed(bucket)[0].prefix + "model.safetensors"
    data = bytearray(bucket.get(key))
    data[5] ^= 1
    bucket.put(key, bytes(data))
    ledger.look()
    assert [key in line for line in ledger.lost] == [True]


def test_a_resume_from_below_the_newest_is_a_loss(bucket: Bucket, ledger: Ledger) -> None:
    """An attempt must resume from the newest commit."""
    tell(bucket, 2, {"kind": "restored", "step": 30})
    ledger.look()
    assert ledger.lost == ["attempt 2 was restored to 30, not 40"]


def test_a_step_told_otherwise_is_a_divergence(bucket: Bucket, ledger: Ledger) -> None:
    """A loss that differs in its last bit is reported."""
    tell(
        bucket, 2, {"kind": "restored", "step": 40}, {"kind": "step", "step": 40, "loss": 0.02500000000000001}
    )
    ledger.look()
    assert (ledger.lost, ledger.diverged) == ([], ["attempt 2 told other steps"])


def test_another_model_at_the_end_is_a_divergence(ledger: Ledger) -> None:
    """A different or missing final model is reported."""
    ledger.conclude()
    assert ledger.diverged == ["the final model is not that of the undisturbed run"]
