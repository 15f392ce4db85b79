"""Detect the shape of this machine: its GPUs, and the cores and memory that this process may use."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import psutil

from trainer.hardware.cgroups import Read, core_limits, groups, memory_limits, read_file
from trainer.hardware.shape import Shape
from trainer.hardware.table import MIB_PER_GIB

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
MAKERS = ("NVIDIA", "Tesla", "GeForce", "Quadro")
"""Words of a GPU's name that SkyPilot's names omit."""
LARGER = {"A100": (60, "-80GB"), "V100": (20, "-32GB")}
"""Two boards share each of these names. A board with more than this memory in GiB is the larger one, and gets the suffix."""
PCIE_BOARDS = ("A100", "A100-80GB", "H100")
"""SkyPilot uses these names also for the SXM boards, which are faster or better connected."""

Run = Callable[[Sequence[str]], str | None]


class _Gpu(NamedTuple):
    """One line of `nvidia-smi`'s output."""

    number: str
    uuid: str
    name: str
    memory_gib: float


def run_command(command: Sequence[str]) -> str | None:
    """Return the output of a command. None if it does not exist, fails, or takes longer than 30 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def affinity() -> int:
    """Return the number of cores that the process may be scheduled on."""
    try:
        return len(psutil.Process().cpu_affinity() or ())
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1


def host_bytes() -> int:
    """Return the host's total memory, regardless of this process's limits."""
    return int(psutil.virtual_memory().total)


def detect(
    *,
    run: Run = run_command,
    read: Read = read_file,
    environ: Mapping[str, str] = os.environ,
    cores: Callable[[], int] = affinity,
    memory: Callable[[], int] = host_bytes,
) -> Shape:
    """Return the shape of this machine, within the limits of the container or job that this process is in.

    If the GPUs differ, the shape has the smallest one's name and memory.
    """
    gpus = _visible(_gpus(run(QUERY) or ""), environ.get("CUDA_VISIBLE_DEVICES"))
    smallest = min(gpus, key=lambda gpu: gpu.memory_gib, default=None)
    limits = groups(read)
    return Shape(
        accelerator=accelerator_name(smallest.name, smallest.memory_gib) if smallest else None,
        board=board_name(smallest.name, smallest.memory_gib) if smallest else None,
        count=len(gpus),
        memory_gib=smallest.memory_gib if smallest else None,
        cores=max(1, math.floor(min([cores(), *core_limits(limits, read)]))),
        host_memory_gib=min([memory(), *memory_limits(limits, read)]) / 2**30,
        node=platform.node(),
    )


def _gpus(listing: str) -> list[_Gpu]:
    """Parse the output of `nvidia-smi`. Lost GPUs are left out."""
    gpus = []
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[3].isdecimal():  # a lost GPU has "[N/A]" or an error instead
            gpus.append(_Gpu(cells[0], cells[1], cells[2], int(cells[3]) / MIB_PER_GIB))
    return gpus


def _visible(gpus: list[_Gpu], devices: str | None) -> list[_Gpu]:
    """Return the GPUs that CUDA shows for `$CUDA_VISIBLE_DEVICES`.

    An entry is an index or the start of a UUID. CUDA ignores the first entry that does not match exactly one GPU, and all
    entries after it.
    """
    if devices is None:
        return gpus
    shown: list[_Gpu] = []
    for device in (word.strip() for word in devices.split(",")):
        matching = [gpu for gpu in gpus if device and (gpu.number == device or gpu.uuid.startswith(device))]
        if len(matching) != 1:
            break
        shown += matching
    return shown


def accelerator_name(name: str, memory_gib: float) -> str:
    """Return SkyPilot's name for a GPU by its name in `nvidia-smi`: `NVIDIA A100-SXM4-80GB` is `A100-80GB`."""
    words = _words(name)
    if not words:
        return "GPU"
    if words[0] in ("RTX", "GTX"):
        number = words[1:3] if words[1:2] == ["PRO"] else words[1:2]
        return words[0] + "".join(number) + ("-Ada" if "Ada" in words else "")
    least_gib, suffix = LARGER.get(words[0], (math.inf, ""))
    return words[0] + (suffix if memory_gib > least_gib else "")


def board_name(name: str, memory_gib: float) -> str | None:
    """Return the GPU table's own name for a board whose SkyPilot name also covers a better board. None for other boards."""
    rented_as = accelerator_name(name, memory_gib)
    words = [word.upper() for word in _words(name)]
    if rented_as in PCIE_BOARDS and "PCIE" in words:
        return f"{rented_as}-PCIE"
    return "H100-NVL" if rented_as == "H100" and "NVL" in words else None


def _words(name: str) -> list[str]:
    return [word for word in name.replace("-", " ").split() if word not in MAKERS]
