"""Measure how long training waits for one checkpoint: `.venv-trainer/bin/python bench/stall.py`.

A model's weights and AdamW's two moments. `copy` is the limit of a save into new files: the same bytes, from memory to
tmpfs, and nothing else; with `--device cuda`, from the GPU to pinned memory. Ours is what the callback waits for: the copy into a buffer on tmpfs, the two JSON files and the
marker. `dcp.async_save` is torch's own, to files on tmpfs too. All in turn, medians. The first save of ours and of dcp,
which has to get its memory, is listed by itself. The last column is the host memory that a save has used beyond the
state at its peak, files on tmpfs included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from servers import mounted, touch_memory

from trainer.files import write_atomically
from trainer.staged import Staged, mark_staged
from trainer.worker.checkpoint.buffers import Buffers
from trainer.worker.checkpoint.format import INDEX_FILE, SCALARS_FILE, rank_file, tensor_name

Tensors = dict[str, torch.Tensor]
LAYERS = 12
COPY = "copy of the same bytes to new files on tmpfs (limit)"
PINNED = "copy of the same bytes to pinned memory (limit)"
OURS = "ours: copy into a buffer, JSON, marker"
DCP = "dcp.async_save to tmpfs, until it returns"
MOUNTED = "Trainer's save to a bucket mounted as MOUNT_CACHED"


def state(mib: int, device: str) -> tuple[Tensors, dict[str, object]]:
    """Return weights and optimizer state of `mib` MiB together, all float32."""
    count = mib * 2**20 // 4 // 3 // LAYERS

    def made() -> torch.Tensor:
        return torch.randn(count, device=device)

    weights = {f"layers.{layer}.weight": made() for layer in range(LAYERS)}
    moments = {layer: {"exp_avg": made(), "exp_avg_sq": made()} for layer in range(LAYERS)}
    return weights, {"state": moments, "param_groups": [{"params": list(range(LAYERS))}]}


def save(folder: Path, weights: Tensors, optimizer: dict[str, object]) -> None:
    """Save as Trainer does: safetensors for the model, torch.save for the optimizer."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    torch.save(optimizer, folder / "optimizer.pt")


def copy(folder: Path, weights: Tensors, optimizer: dict[str, object]) -> None:
    """Write one file after another, from the tensors' own memory."""
    folder.mkdir(parents=True)
    moments = optimizer["state"]
    assert isinstance(moments, dict)  # noqa: S101 (made above)
    with (folder / "model").open("wb", buffering=0) as model:
        for tensor in weights.values():
            model.write(memoryview(tensor.numpy()).cast("B"))
    with (folder / "optimizer").open("wb", buffering=0) as file:
        for moment in moments.values():
            for tensor in moment.values():
                file.write(memoryview(tensor.numpy()).cast("B"))


class Pinned:
    """Copies from the GPU into pinned memory that exists already: the limit of its connection to the host."""

    def __init__(self) -> None:
        self._memory: dict[int, torch.Tensor] = {}

    def __call__(self, folder: Path, weights: Tensors, optimizer: dict[str, object]) -> None:
        folder.mkdir(parents=True)
        moments = optimizer["state"]
        assert isinstance(moments, dict)  # noqa: S101 (made above)
        tensors = [*weights.values(), *(tensor for moment in moments.values() for tensor in moment.values())]
        for number, tensor in enumerate(tensors):
            if number not in self._memory:
                self._memory[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._memory[number].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()


class Staging:
    """Saves as `trainer.worker.checkpoint` does: into buffers that it keeps."""

    def __init__(self, folder: Path) -> None:
        self._buffers = Buffers(folder / "buffers", rank_file(0))

    def __call__(self, folder: Path, weights: Tensors, optimizer: dict[str, object]) -> None:
        folder.mkdir(parents=True)
        tensors = {tensor_name("weights", name): tensor for name, tensor in weights.items()}
        moments = optimizer["state"]
        assert isinstance(moments, dict)  # noqa: S101 (made above)
        for layer, moment in moments.items():
            tensors |= {tensor_name(key, str(layer)): tensor for key, tensor in moment.items()}
        self._buffers.save(tensors, folder)
        write_atomically(folder / SCALARS_FILE, json.dumps({key: {"step": 1} for key in weights}))
        write_atomically(folder / INDEX_FILE, json.dumps({name: [0, 1] for name in tensors}))
        mark_staged(folder.parent, Staged(folder=folder.name, step=1))


def asynchronous(folder: Path, weights: Tensors, optimizer: dict[str, object]) -> Future[object]:
    """Return when the state is staged in memory. The write continues in the background."""
    writing = dcp.async_save({"model": weights, "optimizer": optimizer}, checkpoint_id=folder)
    assert isinstance(writing, Future)  # noqa: S101 (dcp's other answer is not asked for)
    return writing


def cases(
    tmpfs: Path, disk: Path, mount: Path | None, device: str
) -> dict[str, tuple[Callable[..., object], Path]]:
    """Return what is measured, and the folder that it writes. `OURS` and `DCP` keep memory from one save to the next."""
    limit = {COPY: copy} if device == "cpu" else {PINNED: Pinned()}
    plain = {
        **{name: (call, tmpfs / "copy" / "checkpoint-1") for name, call in limit.items()},
        OURS: (Staging(tmpfs), tmpfs / "staging" / "checkpoint-1"),
        DCP: (asynchronous, tmpfs / "dcp"),
        "Trainer's save to tmpfs": (save, tmpfs / "plain" / "checkpoint-1"),
        "Trainer's save to disk": (save, disk / "checkpoint-1"),
    }
    return plain | ({MOUNTED: (save, mount / "run" / "checkpoint-1")} if mount else {})


class Used:
    """The largest host memory in use: this process's own, and the files on tmpfs."""

    def __init__(self, tmpfs: Path) -> None:
        self.tmpfs = tmpfs
        self.peak = 0
        self.ends = threading.Event()

    def now(self) -> int:
        files = sum(path.stat().st_blocks * 512 for path in _unlinked_once(self.tmpfs))
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return own * 1024 + files

    def watch(self) -> None:
        while not self.ends.wait(0.02):
            self.peak = max(self.peak, self.now())


def _unlinked_once(folder: Path) -> Iterator[Path]:
    """Yield each file once, however many names it has."""
    seen: set[int] = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_ino not in seen:
            seen.add(path.stat().st_ino)
            yield path


@contextmanager
def watched(tmpfs: Path) -> Iterator[Used]:
    used = Used(tmpfs)
    thread = threading.Thread(target=used.watch)
    thread.start()
    try:
        yield used
    finally:
        used.ends.set()
        thread.join()


def stall_s(call: Callable[..., object], folder: Path, *arguments: object) -> float:
    """Return the seconds until training could continue. Then wait for the rest, and delete it."""
    began = time.perf_counter()
    going_on = call(folder, *arguments)
    seconds = time.perf_counter() - began
    if isinstance(going_on, Future):
        going_on.result()
    shutil.rmtree(folder.parent if folder.name == "checkpoint-1" else folder)
    return seconds


def memory_of(call: Callable[..., object], folder: Path, tmpfs: Path, *arguments: object) -> int:
    """Return the bytes of host memory that a save uses beyond what was in use before the first one."""
    with watched(tmpfs) as used:
        stall_s(call, folder, *arguments)
    return used.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))  # noqa: S108 (the point of it)
    parser.add_argument("--disk", type=Path, default=Path())
    parser.add_argument("--rclone", help="the program, for the case of a mounted bucket")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    arguments = state(options.mib, options.device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    memory: dict[str, int] = {}
    with (
        tempfile.TemporaryDirectory(dir=options.tmpfs) as tmpfs,
        tempfile.TemporaryDirectory(dir=options.disk, prefix=".bench-") as disk,
        mounted(Path(tmpfs), rclone=options.rclone) if options.rclone else nullcontext() as mount,
    ):
        measured = cases(Path(tmpfs), Path(disk) / "plain", mount, options.device)
        for name in (
            DCP,
            OURS,
        ):  # their first saves, before anything else has touched the memory that they get
            call, folder = measured[name]
            gc.collect()
            before = Used(Path(tmpfs)).now()
            first[name] = stall_s(call, folder, *arguments)
            memory[name] = memory_of(call, folder, Path(tmpfs), *arguments) - before
        for repeat in range(options.repeats):
            turned = list(measured.items())
            at = repeat % len(turned)
            for name, (call, folder) in turned[at:] + turned[:at]:
                touch_memory(Path(tmpfs), 2 * options.mib)
                found.setdefault(name, []).append(stall_s(call, folder, *arguments))
    dist.destroy_process_group()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.mib} MiB, {os.cpu_count()} cores, torch {torch.__version__}, load {load}\n")
    print("| stall per checkpoint | median s | best-worst s | of the copy | first s | memory |")
    print("|---|--:|--:|--:|--:|--:|")
    limit = statistics.median(next(iter(found.values())))
    for name, times in found.items():
        middle = statistics.median(times)
        cold = f"{first[name]:.2f}" if name in first else ""
        size = f"{memory[name] / 2**20 / options.mib:.2f}x" if name in memory else ""
        print(
            f"| {name} | {middle:.3f} | {min(times):.3f}-{max(times):.3f} | {middle / limit:.2f}x | {cold} | {size} |"
        )


if __name__ == "__main__":
    main()
