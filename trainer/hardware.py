"""The machine at hand: its GPUs, and the cores and the memory that this process may really use."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict

CGROUPS = "/sys/fs/cgroup"
LARGEST_CGROUP_BYTES = 2**60
"""cgroup v1 writes "no limit" as a number near 2^63."""
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
MIB_PER_GIB = 1024

Run = Callable[[Sequence[str]], str | None]
Read = Callable[[str], str | None]


class Shape(BaseModel):
    """What a node has; the launcher knows the same of a node that it has not rented yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None
    """SkyPilot's name of the GPU, as in `A100-80GB`; None without a GPU."""
    count: int
    memory_gib: float | None
    """Of one GPU; of the smallest, if they differ."""
    cores: int
    """That this process may use, not those of the host."""
    host_memory_gib: float
    node: str

    def __str__(self) -> str:
        if self.accelerator:
            return f"{self.accelerator}:{self.count}"
        return f"cpu ({self.cores} core{'s' if self.cores > 1 else ''}, {self.host_memory_gib:.0f} GiB)"


class _Gpu(NamedTuple):
    number: str
    uuid: str
    name: str
    memory_gib: float


def run_command(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is not there, fails, or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_file(path: str) -> str | None:
    """A file's text; None if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def affinity() -> int:
    """Cores that the process may be scheduled on."""
    try:
        return len(psutil.Process().cpu_affinity() or ())
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1


def host_bytes() -> int:
    """Memory of the host, whatever share of it is ours."""
    return int(psutil.virtual_memory().total)


def host_available_bytes() -> int:
    """Memory of the host that can be had without swapping, whatever share of it is ours."""
    return int(psutil.virtual_memory().available)


def detect(
    *,
    run: Run = run_command,
    read: Read = read_file,
    environ: Mapping[str, str] = os.environ,
    cores: Callable[[], int] = affinity,
    memory: Callable[[], int] = host_bytes,
) -> Shape:
    """The shape of this machine, within the limits of the container or job that this process is in."""
    gpus = _visible(_gpus(run(QUERY) or ""), environ.get("CUDA_VISIBLE_DEVICES"))
    smallest = min(gpus, key=lambda gpu: gpu.memory_gib, default=None)
    groups = _cgroups(read)
    return Shape(
        accelerator=accelerator_name(smallest.name, smallest.memory_gib) if smallest else None,
        count=len(gpus),
        memory_gib=smallest.memory_gib if smallest else None,
        cores=max(1, math.floor(min([cores(), *_core_limits(groups, read)]))),
        host_memory_gib=min([memory(), *_memory_limits(groups, read)]) / 2**30,
        node=platform.node(),
    )


def accelerator_name(name: str, memory_gib: float) -> str:
    """SkyPilot's name for what `nvidia-smi` calls a GPU: `NVIDIA A100-SXM4-80GB` is `A100-80GB`."""
    words = [word for word in name.replace("-", " ").split() if word not in ("NVIDIA", "Tesla", "GeForce")]
    if not words:
        return "GPU"
    if words[0] in ("RTX", "GTX", "Quadro"):
        return "".join(words[:2]) + ("-Ada" if "Ada" in words else "")
    larger = {"A100": (60, "-80GB"), "V100": (20, "-32GB")}  # GiB above which it is the larger of the two
    least_gib, suffix = larger.get(words[0], (math.inf, ""))
    return words[0] + (suffix if memory_gib > least_gib else "")


def _gpus(listing: str) -> list[_Gpu]:
    gpus = []
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[3].isdecimal():  # a GPU that is lost says "[N/A]" or an error
            gpus.append(_Gpu(cells[0], cells[1], cells[2], int(cells[3]) / MIB_PER_GIB))
    return gpus


def _visible(gpus: list[_Gpu], devices: str | None) -> list[_Gpu]:
    """Those that CUDA shows: by index or by the start of the UUID, up to the first that is not there."""
    if devices is None:
        return gpus
    shown: list[_Gpu] = []
    for device in (word.strip() for word in devices.split(",")):
        matching = [gpu for gpu in gpus if device and (gpu.number == device or gpu.uuid.startswith(device))]
        if len(matching) != 1:
            break
        shown += matching
    return shown


def _cgroups(read: Read) -> dict[str, list[str]]:
    """Folders that may limit this process, by controller (`` is version 2), innermost first."""
    folders: dict[str, list[str]] = {}
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            root = PurePosixPath(CGROUPS, "" if not controller else controllers)
            inner = root / path.lstrip("/")
            chain = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
            folders[controller] = [str(folder) for folder in chain]
    return folders


def available_bytes(*, read: Read = read_file, memory: Callable[[], int] = host_available_bytes) -> int:
    """Memory that this process can still have, within the limits of the container or job it is in."""
    return min([memory(), *_memory_left(_cgroups(read), read)])


def _core_limits(groups: Mapping[str, list[str]], read: Read) -> list[float]:
    limits = []
    for folder in groups.get("", []):
        quota, _, period = (read(f"{folder}/cpu.max") or "max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    for folder in groups.get("cpu", []):
        quota, period = read(f"{folder}/cpu.cfs_quota_us") or "-1", read(f"{folder}/cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    return limits


def _memory_limits(groups: Mapping[str, list[str]], read: Read) -> list[int]:
    files = [f"{folder}/memory.max" for folder in groups.get("", [])]
    files += [f"{folder}/memory.limit_in_bytes" for folder in groups.get("memory", [])]
    found = [text for path in files if (text := read(path)) and text.isdecimal()]
    return [int(text) for text in found if int(text) < LARGEST_CGROUP_BYTES]


def _memory_left(groups: Mapping[str, list[str]], read: Read) -> list[int]:
    """Of each limit; pages of files that nobody has touched lately count as left."""
    files = [(f"{folder}/memory.max", f"{folder}/memory.current") for folder in groups.get("", [])]
    files += [
        (f"{folder}/memory.limit_in_bytes", f"{folder}/memory.usage_in_bytes")
        for folder in groups.get("memory", [])
    ]
    left = []
    for limit_file, used_file in files:
        limit, used = read(limit_file) or "", read(used_file) or ""
        if limit.isdecimal() and used.isdecimal() and int(limit) < LARGEST_CGROUP_BYTES:
            left.append(int(limit) - int(used) + _idle_pages(str(PurePosixPath(used_file).parent), read))
    return left


def _idle_pages(folder: str, read: Read) -> int:
    for line in (read(f"{folder}/memory.stat") or "").splitlines():
        name, _, count = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and count.isdecimal():
            return int(count)
    return 0
