"""Staging is in memory or on disk, depending on sizes. Errors have the numbers, and folders are removed afterwards."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.servers.stores import MemoryBucket
from trainer.bucket.attempts import claim
from trainer.bucket.commit import commit
from trainer.disk_full import BALLAST, is_full, no_room, room_in
from trainer.errors import ExitCode, NoRoom
from trainer.hardware import available_bytes
from trainer.job import Job
from trainer.staged import BUFFERS_FOLDER, Staged, mark_staged
from trainer.supervisor.staging import (
    AttemptFolders,
    Capacity,
    Size,
    StagingChoice,
    attempt_folders,
    choose_placement,
    expected_size,
)

GB = 10**9
COMMITTED = Size(10 * GB, "as committed at step 100", measured=True)
BOUND = Size(10 * GB, "at most", measured=False)
PLENTY = Capacity(disk=1000 * GB, tmpfs=500 * GB, memory=400 * GB)


@pytest.mark.parametrize(
    ("size", "capacity", "wanted", "staging", "restored"),
    [
        (COMMITTED, PLENTY, "auto", "tmpfs", "disk"),
        (BOUND, PLENTY, "auto", "tmpfs", "disk"),
        (None, PLENTY, "auto", "disk", "disk"),
        (None, PLENTY, "tmpfs", "tmpfs", "tmpfs"),
        (COMMITTED, PLENTY, "disk", "disk", "disk"),
        (COMMITTED, PLENTY, "tmpfs", "tmpfs", "tmpfs"),
        (COMMITTED, PLENTY._replace(memory=30 * GB), "auto", "tmpfs", "disk"),
        (COMMITTED, PLENTY._replace(memory=30 * GB - 1), "auto", "disk", "disk"),
        (COMMITTED, PLENTY._replace(tmpfs=30 * GB - 1), "auto", "disk", "disk"),
        (COMMITTED, PLENTY._replace(tmpfs=0), "auto", "disk", "disk"),
        (COMMITTED, PLENTY._replace(memory=-GB, disk=40 * GB), "auto", "disk", "disk"),
        (BOUND, PLENTY._replace(memory=GB, disk=GB), "auto", "disk", "disk"),
        (BOUND, PLENTY._replace(memory=GB), "tmpfs", "tmpfs", "tmpfs"),
    ],
)
def test_memory_is_chosen_if_three_checkpoints_fit(
    size: Size | None, capacity: Capacity, wanted: StagingChoice, staging: str, restored: str
) -> None:
    """Otherwise disk is chosen. An explicit choice is kept, and an upper bound that is too large causes no error."""
    placed = choose_placement(size, capacity, wanted)
    assert (placed.staging, placed.restored) == (staging, restored)


@pytest.mark.parametrize(
    ("capacity", "wanted"),
    [
        (Capacity(disk=40 * GB - 1, tmpfs=29 * GB, memory=100 * GB), "auto"),
        (Capacity(disk=9 * GB, tmpfs=100 * GB, memory=100 * GB), "auto"),
        (Capacity(disk=40 * GB - 1, tmpfs=100 * GB, memory=100 * GB), "disk"),
        (Capacity(disk=400 * GB, tmpfs=100 * GB, memory=40 * GB - 1), "tmpfs"),
    ],
)
def test_a_checkpoint_that_fits_nowhere_is_an_error_with_the_numbers(
    capacity: Capacity, wanted: StagingChoice
) -> None:
    """It is raised before training and asks for a recovery. It has the required and available space, and a hint."""
    with pytest.raises(NoRoom, match=r"3 checkpoints of 10\.00 GB \(as committed at step 100\)") as caught:
        choose_placement(COMMITTED, capacity, wanted)
    assert f"{capacity.disk / 1e9:,.2f} GB of disk" in caught.value.message
    assert "--work" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.RECOVER


def test_an_adapter_is_staged_on_disk() -> None:
    """Its checkpoints are small and do not show the size of the model that may be merged from it."""
    assert choose_placement(COMMITTED, PLENTY, "auto", adapter=True).staging == "disk"
    assert choose_placement(COMMITTED, PLENTY, "tmpfs", adapter=True).staging == "tmpfs"


def test_the_size_is_that_of_the_newest_commit(tmp_path: Path) -> None:
    """Otherwise it is the predicted size, then an upper bound from the model's files, then None."""
    bucket = MemoryBucket()
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(bytes(1000))
    assert expected_size(bucket, None) is None
    assert expected_size(bucket, "some/model-of-the-hub") is None
    assert expected_size(bucket, str(model)) == Size(
        6000, "at most 6 times the model's files", measured=False
    )
    assert expected_size(bucket, str(model), 300) == Size(
        300, "as predicted from the model's architecture", measured=False
    )
    attempt = claim(bucket, {})
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(bytes(100 * step))
        commit(bucket, attempt, tmp_path, Staged(folder=f"checkpoint-{step}", step=step), "digest")
    assert expected_size(bucket, str(model), 300) == Size(200, "as committed at step 2", measured=True)


def staged_in(found: AttemptFolders, capacity: Capacity, wanted: StagingChoice = "auto") -> Path:
    found.create(choose_placement(COMMITTED, capacity, wanted))
    staging = found.work / "staging"
    (staging / "checkpoint-1").mkdir()
    return staging


def test_both_folders_are_removed_when_the_attempt_ends(tmp_path: Path) -> None:
    """`staging/` is in the work folder, or is a link there. The memory is freed afterwards."""
    shm = tmp_path / "shm"
    shm.mkdir()
    with attempt_folders(tmp_path / "work", 1, shm) as found:
        staging = staged_in(found, PLENTY)
        assert staging.resolve().is_relative_to(shm)
        assert next(shm.iterdir()).stat().st_mode & 0o077 == 0
    assert not list(shm.glob("*/*"))
    assert not list((tmp_path / "work").glob("*"))


def killed(work: Path, shm: Path) -> Path:
    """Run an attempt that is killed, and return the staging folder that it leaves behind."""
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.unit.test_staging import PLENTY, attempt_folders, staged_in\n"
        "with attempt_folders(Path(sys.argv[1]), 1, Path(sys.argv[2])) as mine:\n"
        "    print(staged_in(mine, PLENTY).resolve(), flush=True)\n    os._exit(9)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(work), str(shm)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    left = Path(process.stdout.strip())
    assert left.is_dir()
    return left


def test_the_folders_of_a_killed_attempt_are_removed(tmp_path: Path) -> None:
    """A killed attempt cannot remove them, so the next attempt does. On tmpfs they would hold memory forever."""
    shm, work = tmp_path / "shm", tmp_path / "work"
    shm.mkdir()
    left = killed(work, shm)
    with attempt_folders(work, 2, shm) as found:
        assert not left.exists()
        assert [path.name for path in work.iterdir() if path.is_dir()] == ["attempt-0002"]
        assert not (staged_in(found, PLENTY, "disk")).is_symlink()


@pytest.mark.parametrize("newer", [{"attempt": 2}, {"attempt": 1, "node": 1}], ids=["attempt", "node"])
def test_the_folders_of_another_running_supervisor_are_kept(tmp_path: Path, newer: dict[str, int]) -> None:
    """A supervisor removes only its own folders, also if the other one is superseded or shares the disk."""
    shm, work = tmp_path / "shm", tmp_path / "work"
    shm.mkdir()
    with attempt_folders(work, 1, shm) as earlier:
        staging = staged_in(earlier, PLENTY)
        with attempt_folders(work, tmpfs=shm, **newer) as later:
            other = staged_in(later, PLENTY)
            assert staging.is_dir()
            assert other.is_dir()
        assert staging.is_dir()
        assert (earlier.work / "staging").is_symlink()


def test_a_machine_without_tmpfs_stages_on_disk(tmp_path: Path) -> None:
    """A Mac has no /dev/shm. Requesting it explicitly is an error."""
    with attempt_folders(tmp_path / "work", 1, tmp_path / "missing") as found:
        room = found.measure_capacity(reserved=0)
        assert room.tmpfs == 0
        assert room.disk > 0
        assert choose_placement(Size(1, "", measured=True), room, "auto").staging == "disk"
        with pytest.raises(NoRoom, match="missing"):
            found.create(choose_placement(None, room, "tmpfs"))


def test_reserved_memory_is_not_available(tmp_path: Path) -> None:
    """Data loaders and an offloaded optimizer need it."""
    with attempt_folders(tmp_path / "work", 1, tmp_path) as found:
        assert found.measure_capacity(reserved=2**60).memory < 0
        assert found.measure_capacity(reserved=2**60).in_memory == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000),
        ({"/proc/self/cgroup": "0::/job", "/sys/fs/cgroup/job/memory.max": "max"}, 1000),
        (
            {
                "/proc/self/cgroup": "0::/job",
                "/sys/fs/cgroup/job/memory.max": "800",
                "/sys/fs/cgroup/job/memory.current": "500",
                "/sys/fs/cgroup/job/memory.stat": "anon 300\ninactive_file 100\nactive_file 50",
            },
            400,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/job",
                "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "700",
                "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "500",
            },
            200,
        ),
    ],
)
def test_available_memory_is_limited_by_the_container(files: dict[str, str], expected: int) -> None:
    """If the limit of the container is lower than the free memory of the host, it counts."""
    assert available_bytes(read=files.get, memory=lambda: 1000) == expected


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_a_full_disk_is_recognized_by_its_error(error: Exception, full: bool) -> None:
    """It is also recognized as the context of another error."""
    assert is_full(error) is full
    above = RuntimeError("the file cannot be written")
    above.__context__ = error
    assert is_full(above) is full


def test_a_full_disk_frees_all_but_what_is_staged(tmp_path: Path) -> None:
    """Saves reuse files, which are linked into the folders of checkpoints. A full disk's message counts what the failed
    save has written, once, and neither the checkpoint that waits for its upload nor the memory that no save uses.
    """
    staging = tmp_path / "staging"
    for name, link, size in (
        ("0", "checkpoint-2", 3_000_000),
        ("1", "checkpoint-4", 2_000_000),
        ("2", None, 1_000_000),
    ):
        buffer = staging / BUFFERS_FOLDER / f"{name}-rank-00000.safetensors"
        buffer.parent.mkdir(parents=True, exist_ok=True)
        buffer.write_bytes(bytes(size))
        if link:
            (staging / link).mkdir()
            os.link(buffer, staging / link / "rank-00000.safetensors")
    mark_staged(staging, Staged(folder="checkpoint-2", step=2))
    (tmp_path / BALLAST).write_bytes(b"reserved")
    job = cast("Job", SimpleNamespace(staging=staging, work=tmp_path))
    outcome = no_room(job, OSError(errno.ENOSPC, "No space left on device"))
    assert outcome is not None
    assert outcome.status == "no_room"
    assert outcome.message.endswith("after 2.0 MB of the save were written")
    assert [path.name for path in sorted(staging.iterdir())] == ["checkpoint-2", "checkpoint-2.staged"]
    assert (staging / "checkpoint-2" / "rank-00000.safetensors").stat().st_size == 3_000_000
    assert not (tmp_path / BALLAST).exists()
    assert no_room(job, OSError(errno.EIO, "Input/output error")) is None


def test_a_full_disk_becomes_a_user_error(tmp_path: Path) -> None:
    """It names the folder and the free space. Other errors are not changed."""
    with pytest.raises(NoRoom, match=str(tmp_path)) as caught, room_in(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "MB are free" in caught.value.message
    with pytest.raises(PermissionError), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_the_memory_of_killed_supervisors_of_other_runs_is_freed(tmp_path: Path) -> None:
    """A run that is never resumed must not hold memory until the machine is shut down."""
    shm = tmp_path / "shm"
    shm.mkdir()
    with attempt_folders(tmp_path / "alive", 1, shm) as alive:
        staging = staged_in(alive, PLENTY)
        left = killed(tmp_path / "killed", shm)
        with attempt_folders(tmp_path / "other", 1, shm):
            assert not left.exists()
            assert staging.is_dir()
    assert not list(shm.glob("*/*"))


def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    """A link in place of our folder could make us remove the files of others."""
    shm, victim = tmp_path / "shm", tmp_path / "victim"
    shm.mkdir()
    (victim / "run").mkdir(parents=True)
    (victim / "run.lock").touch()
    (shm / f"aeolus-{os.getuid()}").symlink_to(victim)
    with attempt_folders(tmp_path / "work", 1, shm) as found:
        assert (victim / "run").is_dir()
        assert found.measure_capacity(reserved=0).tmpfs == 0
