"""Measure how long training waits for one checkpoint: `.venv-trainer/bin/python bench/stall.py`.

A model's weights and AdamW's two moments, written as Transformers' Trainer writes them. `copy` is the
limit: the same bytes, from memory to tmpfs, and nothing else. Ours is what the callback waits for: the
Trainer's own save, but into staging on tmpfs, and the marker. All in turn, medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from servers import mounted, touch_memory

from trainer.staged import Staged, mark_staged

Tensors = dict[str, torch.Tensor]
LAYERS = 12
MOUNTED = "Trainer's save to a bucket mounted as MOUNT_CACHED"


def state(mib: int) -> tuple[Tensors, dict[str, object]]:
    """Return weights and optimizer state of `mib` MiB together, all float32."""
    count = mib * 2**20 // 4 // 3 // LAYERS
    weights = {f"layers.{layer}.weight": torch.randn(count) for layer in range(LAYERS)}
    moments = {
        layer: {"exp_avg": torch.randn(count), "exp_avg_sq": torch.rand(count)} for layer in range(LAYERS)
    }
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


def stage(folder: Path, weights: Tensors, optimizer: dict[str, object]) -> None:
    torch.serialization.set_crc32_options(compute_crc32=False)  # as trainer.worker.train_and_export does
    try:
        save(folder, weights, optimizer)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    mark_staged(folder.parent, Staged(folder=folder.name, step=1))


def asynchronous(folder: Path, weights: Tensors, optimizer: dict[str, object]) -> Future[object]:
    """Return when the state is staged in memory. The write continues in the background."""
    writing = dcp.async_save({"model": weights, "optimizer": optimizer}, checkpoint_id=folder)
    assert isinstance(writing, Future)  # noqa: S101 (dcp's other answer is not asked for)
    return writing


def cases(tmpfs: Path, disk: Path, mount: Path | None) -> dict[str, tuple[Callable[..., object], Path]]:
    plain = {
        "copy of the same bytes to tmpfs (limit)": (copy, tmpfs / "copy" / "checkpoint-1"),
        "ours: save into staging on tmpfs, marker": (stage, tmpfs / "staging" / "checkpoint-1"),
        "Trainer's save to disk": (save, disk / "checkpoint-1"),
        "dcp.async_save, until it returns": (asynchronous, disk / "dcp"),
    }
    return plain | ({MOUNTED: (save, mount / "run" / "checkpoint-1")} if mount else {})


def stall_s(call: Callable[..., object], folder: Path, *arguments: object) -> float:
    """Return the seconds until training could continue. Then wait for the rest, and delete it."""
    began = time.perf_counter()
    going_on = call(folder, *arguments)
    seconds = time.perf_counter() - began
    if isinstance(going_on, Future):
        going_on.result()
    shutil.rmtree(folder.parent if folder.name == "checkpoint-1" else folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))  # noqa: S108 (the point of it)
    parser.add_argument("--disk", type=Path, default=Path())
    parser.add_argument("--rclone", help="the program, for the case of a mounted bucket")
    options = parser.parse_args()
    arguments = state(options.mib)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=options.tmpfs) as tmpfs,
        tempfile.TemporaryDirectory(dir=options.disk, prefix=".bench-") as disk,
        mounted(Path(tmpfs), rclone=options.rclone) if options.rclone else nullcontext() as mount,
    ):
        for repeat in range(options.repeats):
            turned = list(cases(Path(tmpfs), Path(disk) / "plain", mount).items())
            at = repeat % len(turned)
            for name, (call, folder) in turned[at:] + turned[:at]:
                touch_memory(Path(tmpfs), 2 * options.mib)
                found.setdefault(name, []).append(stall_s(call, folder, *arguments))
    dist.destroy_process_group()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.mib} MiB, {os.cpu_count()} cores, torch {torch.__version__}, load {load}\n")
    print("| stall per checkpoint | median s | best-worst s | of the copy |\n|---|--:|--:|--:|")
    names = list(cases(Path(), Path(), Path()))
    limit = statistics.median(found[names[0]])
    for name in filter(found.__contains__, names):
        times = found[name]
        print(
            f"| {name} | {statistics.median(times):.2f} | {min(times):.2f}-{max(times):.2f}"
            f" | {statistics.median(times) / limit:.2f}x |"
        )


if __name__ == "__main__":
    main()
