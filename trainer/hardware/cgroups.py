"""The limits of the container or job that this process is in, as the kernel's control groups write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import psutil

CGROUPS = "/sys/fs/cgroup"
LARGEST_CGROUP_BYTES = 2**60
"""cgroup v1 writes "no limit" as a number near 2^63."""

Read = Callable[[str], str | None]


def read_file(path: str) -> str | None:
    """A file's text; None if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def host_available_bytes() -> int:
    """Memory of the host that can be had without swapping, whatever share of it is ours."""
    return int(psutil.virtual_memory().available)


def available_bytes(*, read: Read = read_file, memory: Callable[[], int] = host_available_bytes) -> int:
    """Memory that this process can still have, within the limits of the container or job it is in."""
    return min([memory(), *_memory_left(groups(read), read)])


def groups(read: Read) -> dict[str, list[str]]:
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


def core_limits(groups: Mapping[str, list[str]], read: Read) -> list[float]:
    """Cores that each limit on the way up allows."""
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


def memory_limits(groups: Mapping[str, list[str]], read: Read) -> list[int]:
    """Bytes that each limit on the way up allows."""
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
