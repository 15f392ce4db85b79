"""A machine that dies at any single store operation leaves a checkpoint from which the next attempt resumes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from obstore.store import MemoryStore

from tests.servers.s3 import FaultyS3
from tests.servers.stores import Died, FailsAt, MemoryBucket
from trainer.bucket import Bucket, open_run
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.bucket.manifest import committed, sizes
from trainer.bucket.restore import restore
from trainer.bucket.retention import prune
from trainer.staged import Staged

ROOT = Path(__file__).resolve().parents[2]
NEVER = 10**9
Scenario = Callable[[Bucket, Path], None]


def stage(folder: Path, step: int) -> Staged:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "nested").mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "nested/rank_0.pt", "trainer_state.json"):
        (checkpoint / name).write_text(f"{name} of step {step}")
    return Staged(folder=checkpoint.name, step=step)


def save(bucket: Bucket, attempt: Attempt, folder: Path, step: int) -> None:
    commit(bucket, attempt, folder, stage(folder, step), "digest")


def first_attempt(store: MemoryStore, folder: Path) -> None:
    """Fill the bucket with steps 10, 20 and 30, and the files of an unfinished upload of step 40."""
    bucket = MemoryBucket(store)
    attempt = claim(bucket, {})
    for step in (10, 20, 30):
        save(bucket, attempt, folder, step)
    bucket.put("checkpoints/step-00000040/0001/model.safetensors", b"never committed")


def save_two(bucket: Bucket, folder: Path) -> None:
    attempt = claim(bucket, {})
    save(bucket, attempt, folder, 40)
    save(bucket, attempt, folder, 50)


def save_again(bucket: Bucket, folder: Path) -> None:
    """Commit step 30 again: the attempt rejected it and resumed from step 20."""
    save(bucket, claim(bucket, {}), folder, 30)


def save_and_prune(bucket: Bucket, folder: Path) -> None:
    attempt = claim(bucket, {})
    save(bucket, attempt, folder, 50)
    assert prune(bucket, attempt, 2) == [10, 20]


def restore_only(bucket: Bucket, folder: Path) -> None:
    claim(bucket, {})
    assert restore(bucket, folder / "restored", lambda *_: None)


SCENARIOS: dict[str, tuple[Scenario, int]] = {
    # what is done, and the newest step that must be there after a death before its end
    "save": (save_two, 30),
    "save again": (save_again, 30),
    "save and prune": (save_and_prune, 30),
    "restore": (restore_only, 30),
}


def operations(scenario: Scenario) -> int:
    """Return how many store operations a scenario takes without a failure."""
    store = MemoryStore()
    with TemporaryDirectory() as folder:
        first_attempt(store, Path(folder))
        bucket = FailsAt(store, NEVER)
        scenario(bucket, Path(folder))
    return bucket.operations


CASES = [
    pytest.param(
        scenario,
        at_least,
        operation,
        lost_answer,
        id=f"{name}-{operation}-{'after' if lost_answer else 'before'}",
    )
    for name, (scenario, at_least) in SCENARIOS.items()
    for operation in range(operations(scenario))
    for lost_answer in (False, True)
]


@pytest.mark.parametrize(("scenario", "at_least", "operation", "lost_answer"), CASES)
def test_a_death_at_any_operation_leaves_the_newest_commit_whole(
    tmp_path: Path, scenario: Scenario, at_least: int, operation: int, lost_answer: bool
) -> None:
    """The next attempt rejects no checkpoint, resumes from the newest commit, and finishes the run."""
    store = MemoryStore()
    first_attempt(store, tmp_path / "first")
    dying = FailsAt(store, operation, lost_answer=lost_answer)
    with pytest.raises(Died):
        scenario(dying, tmp_path / "dying")
    assert dying.fired

    bucket = MemoryBucket(store)
    rejected: list[tuple[int, str]] = []
    restored = restore(bucket, tmp_path / "restored", lambda step, reason: rejected.append((step, reason)))
    assert restored is not None
    assert rejected == []
    assert restored.manifest.step >= at_least
    expected = f"model.safetensors of step {restored.manifest.step}"
    assert (restored.path / "model.safetensors").read_text() == expected
    there, manifests = sizes(bucket, "checkpoints/"), committed(bucket)
    assert len(manifests) >= 2
    assert not any(manifest.fault(there) for manifest in manifests)

    next_attempt = claim(bucket, {})
    save(bucket, next_attempt, tmp_path / "next", 60)
    prune(bucket, next_attempt, 2)
    newest = committed(bucket)
    assert [manifest.step for manifest in newest] == [60, restored.manifest.step]
    named = {manifest.prefix + file.path for manifest in newest for file in manifest.files}
    assert {key for key, _ in bucket.list("checkpoints/")} == named


def test_the_scenarios_are_long_enough_to_mean_something() -> None:
    """Each scenario takes several store operations, and each of them is tested."""
    counts = [operations(scenario) for scenario, _ in SCENARIOS.values()]
    assert min(counts) >= 8
    assert len(CASES) == 2 * sum(counts)


COMMIT = """
import sys
from pathlib import Path
from trainer.bucket.attempts import Attempt
from trainer.bucket import open_run
from trainer.bucket.commit import commit
from trainer.staged import Staged
bucket = open_run(sys.argv[1], "run")
commit(bucket, Attempt(bucket, 1), Path(sys.argv[2]), Staged(folder="checkpoint-20", step=20), "digest")
"""


@pytest.mark.parametrize("held", ["checkpoints/step-00000020/.*/trainer_state.json", "commits/step-00000020"])
def test_a_process_killed_in_the_middle_of_a_request_commits_nothing(
    s3: str, faulty_s3: FaultyS3, tmp_path: Path, held: str
) -> None:
    """If the process dies while it sends the last file or the manifest, the previous step stays the newest."""
    bucket = open_run(s3, "run")
    save(bucket, claim(bucket, {}), tmp_path, 10)
    stage(tmp_path, 20)
    faulty_s3.hold("PUT", held)
    process = subprocess.Popen([sys.executable, "-c", COMMIT, s3, str(tmp_path)], cwd=ROOT)
    assert faulty_s3.wait_for_held(60)
    process.kill()
    process.wait()
    faulty_s3.release()
    rejected: list[int] = []
    restored = restore(bucket, tmp_path / "restored", lambda step, _: rejected.append(step))
    assert restored is not None
    assert (restored.manifest.step, rejected) == (10, [])
    save(bucket, claim(bucket, {}), tmp_path, 20)
    assert [manifest.attempt for manifest in committed(bucket)] == [2, 1]
