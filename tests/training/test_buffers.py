"""Saves reuse the memory of earlier saves, and never that of a checkpoint that still waits for upload."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.mounts import tmpfs
from trainer.worker.checkpoint.buffers import DTYPES, Buffers

FILE = "rank-00000.safetensors"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((40, 3), value), "random/cpu": torch.full((5,), value).to(torch.uint8)}


def save(buffers: Buffers, staging: Path, step: int) -> Path:
    """Save the number of the step as a checkpoint, and return its folder."""
    folder = staging / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    buffers.save(tensors(step), folder)
    return folder


def holds(folder: Path, value: float) -> bool:
    read, wanted = load_file(folder / FILE), tensors(value)
    assert read.keys() == wanted.keys()
    return all(torch.equal(read[name], tensor) for name, tensor in wanted.items())


@pytest.fixture
def buffers(tmp_path: Path) -> Buffers:
    return Buffers(tmp_path / "buffers", FILE)


def test_memory_is_used_again_once_a_checkpoint_is_uploaded(tmp_path: Path, buffers: Buffers) -> None:
    """The folder of the first checkpoint is removed after its upload. The second one is in the same file of the disk."""
    first = save(buffers, tmp_path, 1)
    inode = (first / FILE).stat().st_ino
    shutil.rmtree(first)
    second = save(buffers, tmp_path, 2)
    assert (second / FILE).stat().st_ino == inode
    assert holds(second, 2)
    assert len(list((tmp_path / "buffers").iterdir())) == 1


def test_a_checkpoint_that_waits_is_never_overwritten(tmp_path: Path, buffers: Buffers) -> None:
    """Two checkpoints wait, and a stop saves a third one: each has its own file until its folder is gone."""
    folders = [save(buffers, tmp_path, step) for step in (1, 2, 3)]
    assert all(holds(folder, step) for step, folder in enumerate(folders, start=1))
    shutil.rmtree(folders[1])
    last = save(buffers, tmp_path, 4)
    assert [holds(folder, step) for folder, step in ((folders[0], 1), (folders[2], 3), (last, 4))] == [
        True
    ] * 3
    assert len(list((tmp_path / "buffers").iterdir())) == 3


def test_a_bucket_that_is_a_folder_keeps_its_file(tmp_path: Path, buffers: Buffers) -> None:
    """Such a bucket has a hard link to the staged file. Its memory is not used again before retention deletes it."""
    first = save(buffers, tmp_path, 1)
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / FILE).hardlink_to(first / FILE)
    shutil.rmtree(first)
    second = save(buffers, tmp_path, 2)
    assert holds(bucket, 1)
    assert holds(second, 2)


def test_a_step_that_is_saved_twice_has_the_later_values(tmp_path: Path, buffers: Buffers) -> None:
    """A notice during an evaluation saves a step again that was saved and not staged."""
    folder = save(buffers, tmp_path, 1)
    buffers.save(tensors(7), folder)
    assert holds(folder, 7)


def test_an_optimizer_gets_states_after_the_first_save(tmp_path: Path, buffers: Buffers) -> None:
    """Free memory of another layout is given back."""
    shutil.rmtree(save(buffers, tmp_path, 1))
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    buffers.save({**tensors(2), "exp_avg/a": torch.ones(40, 3)}, folder)
    assert torch.equal(load_file(folder / FILE)["exp_avg/a"], torch.ones(40, 3))
    assert len(list((tmp_path / "buffers").iterdir())) == 1


def test_every_dtype_and_shape_is_read_as_it_was_saved(tmp_path: Path, buffers: Buffers) -> None:
    """Tensors of other sizes of elements, without dimensions, empty, and of strided memory."""
    mixed = {f"of {name}": torch.arange(7).to(getattr(torch, name)) for name in DTYPES}
    mixed |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.rand(6, 5).T[1::2]}
    buffers.save(mixed, tmp_path)
    read = load_file(tmp_path / FILE)
    assert read.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """The file's room is reserved before it is mapped: without room, a copy into it would end the process."""
    with tmpfs(tmp_path / "small", mib=1) as small:
        buffers = Buffers(small / "buffers", FILE)
        with pytest.raises(OSError, match="No space left on device"):
            buffers.save({"weights/a": torch.zeros(2**19)}, small)
        assert list((small / "buffers").iterdir()) == []
        assert not (small / FILE).exists()
