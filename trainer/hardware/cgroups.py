"""The memory and core limits of the container or job that this process is in, from the kernel's control groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import psutil

CGROUPS = "/sys/fs/cgroup"
LARGEST_CGROUP_BYTES = 2**60
"""A larger limit means no limit: cgroup v1 writes "no limit" as a number near 2^63."""

Read = Callable[[str], str | None]


def read_file(path: str) -> str | None:
    """Return a file's text. None if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def host_available_bytes() -> int:
    """Return the host's memory that is available without swapping, regardless of this process's limits."""
    return int(psutil.virtual_memory().available)


def available_bytes(*, read: Read = read_file, memory: Callable[[], int] = host_available_bytes) -> int:
    """Return the memory that this process can still allocate, within the limits of its container or job."""
    return min([memory(), *_memory_left(groups(read), read)])


def groups(read: Read) -> dict[str, list[str]]:
    """Return the folders whose limits apply to this process, by controller, innermost first.

    The key of cgroup version 2 is the empty text.
    """
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
    """Return the cores that each limit allows, from the innermost group to the root."""
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
    """Return the bytes that each limit allows, from the innermost group to the root."""
    files = [f"{folder}/memory.max" for folder in groups.get("", [])]
    files += [f"{folder}/memory.limit_in_bytes" for folder in groups.get("memory", [])]
    found = [text for path in files if (text := read(path)) and text.isdecimal()]
    return [int(text) for text in found if int(text) < LARGEST_CGROUP_BYTES]


def _memory_left(groups: Mapping[str, list[str]], read: Read) -> list[int]:
    """Return the bytes left within each limit. Inactive pages of the file cache count as left, since the kernel frees them."""
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
    """Return the bytes of inactive file pages in a group."""
    for line in (read(f"{folder}/memory.stat") or "").splitlines():
        name, _, count = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and count.isdecimal():
            return int(count)
    return 0
