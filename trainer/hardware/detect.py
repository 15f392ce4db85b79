"""The machine at hand: its GPUs, and the cores and the memory that this process may really use."""

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

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
MIB_PER_GIB = 1024

Run = Callable[[Sequence[str]], str | None]


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


def affinity() -> int:
    """Cores that the process may be scheduled on."""
    try:
        return len(psutil.Process().cpu_affinity() or ())
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1


def host_bytes() -> int:
    """Memory of the host, whatever share of it is ours."""
    return int(psutil.virtual_memory().total)


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


MAKERS = ("NVIDIA", "Tesla", "GeForce", "Quadro")
LARGER = {"A100": (60, "-80GB"), "V100": (20, "-32GB")}
"""GiB above which it is the larger of the two boards of that name."""
PCIE_BOARDS = ("A100", "A100-80GB", "H100")
"""SkyPilot calls them as it calls the SXM ones, which are faster or better linked."""


def accelerator_name(name: str, memory_gib: float) -> str:
    """SkyPilot's name for what `nvidia-smi` calls a GPU: `NVIDIA A100-SXM4-80GB` is `A100-80GB`."""
    words = _words(name)
    if not words:
        return "GPU"
    if words[0] in ("RTX", "GTX"):
        number = words[1:3] if words[1:2] == ["PRO"] else words[1:2]
        return words[0] + "".join(number) + ("-Ada" if "Ada" in words else "")
    least_gib, suffix = LARGER.get(words[0], (math.inf, ""))
    return words[0] + (suffix if memory_gib > least_gib else "")


def board_name(name: str, memory_gib: float) -> str | None:
    """The GPU table's name for a board that SkyPilot's name does not tell from a better one; None for others."""
    rented_as = accelerator_name(name, memory_gib)
    words = [word.upper() for word in _words(name)]
    if rented_as in PCIE_BOARDS and "PCIE" in words:
        return f"{rented_as}-PCIE"
    return "H100-NVL" if rented_as == "H100" and "NVL" in words else None


def _words(name: str) -> list[str]:
    return [word for word in name.replace("-", " ").split() if word not in MAKERS]
