"""Detecting this machine's shape from the output of `nvidia-smi` and the kernel's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from trainer.hardware import Shape, accelerator_name, detect, run_command

A100 = "{0}, GPU-{0}a1b2, NVIDIA A100-SXM4-80GB, 81920\n"
GIB = 2**30


def shape_of(
    gpus: str | None = None,
    files: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    cores: int = 96,
) -> Shape:
    def run(command: Sequence[str]) -> str | None:
        assert command[0] == "nvidia-smi"
        return gpus

    return detect(
        run=run, read=(files or {}).get, environ=environ or {}, cores=lambda: cores, memory=lambda: 680 * GIB
    )


def test_eight_gpus_are_found_under_skypilots_name() -> None:
    """The shape has the name under which SkyPilot rents it."""
    shape = shape_of("".join(A100.format(number) for number in range(8)))
    assert (str(shape), shape.count, shape.memory_gib, shape.cores) == ("A100-80GB:8", 8, 80.0, 96)


@pytest.mark.parametrize("listing", [None, "", "No devices were found\n", "0, GPU-0, [Unknown], [N/A]\n"])
def test_without_a_working_gpu_the_shape_is_a_cpu(listing: str | None) -> None:
    """Without a driver, without a GPU, and with a lost GPU the shape is a CPU."""
    shape = shape_of(listing)
    assert (str(shape), shape.count, shape.memory_gib) == ("cpu (96 cores, 680 GiB)", 0, None)


@pytest.mark.parametrize(
    ("devices", "count"),
    [("0,1", 2), ("", 0), ("-1", 0), ("GPU-2", 1), ("1,9,0", 1), (" 3 ", 1), ("NoDevFiles", 0)],
)
def test_only_visible_gpus_count(devices: str, count: int) -> None:
    """CUDA stops reading the variable at the first entry that matches no GPU."""
    listing = "".join(A100.format(number) for number in range(4))
    assert shape_of(listing, environ={"CUDA_VISIBLE_DEVICES": devices}).count == count


def test_the_smallest_of_different_gpus_decides() -> None:
    """All GPUs get equal shares of the work, so the smallest one limits them."""
    shape = shape_of(A100.format(0) + "1, GPU-1, NVIDIA A100-PCIE-40GB, 40960\n")
    assert (str(shape), shape.memory_gib) == ("A100:2", 40.0)


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40.0, "A100"),
        ("NVIDIA A100 80GB PCIe", 80.0, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA H200", 140.4, "H200"),
        ("NVIDIA GH200 480GB", 95.6, "GH200"),
        ("NVIDIA L40S", 45.0, "L40S"),
        ("Tesla V100-SXM2-16GB", 16.0, "V100"),
        ("Tesla V100-SXM2-32GB", 32.0, "V100-32GB"),
        ("Tesla T4", 15.0, "T4"),
        ("NVIDIA A10G", 22.5, "A10G"),
        ("NVIDIA GeForce RTX 4090", 24.0, "RTX4090"),
        ("NVIDIA RTX A6000", 48.0, "RTXA6000"),
        ("NVIDIA RTX 6000 Ada Generation", 48.0, "RTX6000-Ada"),
        ("", 1.0, "GPU"),
    ],
)
def test_gpus_have_skypilot_s_names(name: str, memory_gib: float, expected: str) -> None:
    """`A100` is the board with 40 GB, and `A100-80GB` the one with 80 GB."""
    assert accelerator_name(name, memory_gib) == expected


@pytest.mark.parametrize(
    ("files", "cores", "memory_gib"),
    [
        ({}, 96, 680.0),
        ({"/proc/self/cgroup": "0::/"}, 96, 680.0),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, 96, 680.0),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "250000 100000"}, 2, 680.0),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "50000 100000"}, 1, 680.0),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/memory.max": str(16 * GIB)}, 96, 16.0),
        (
            {
                "/proc/self/cgroup": "0::/job/step",
                "/sys/fs/cgroup/job/cpu.max": "400000 100000",
                "/sys/fs/cgroup/job/step/cpu.max": "max 100000",
                "/sys/fs/cgroup/job/memory.max": str(8 * GIB),
                "/sys/fs/cgroup/job/step/memory.max": "max",
            },
            4,
            8.0,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": str(4 * GIB),
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            3,
            4.0,
        ),
        (
            {
                "/proc/self/cgroup": "2:cpu:/\n4:memory:/",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            96,
            680.0,
        ),
    ],
    ids=["none", "v2", "v2-max", "v2-quota", "v2-below-one", "v2-memory", "v2-parent", "v1", "v1-unlimited"],
)
def test_limits_of_the_container_count(files: dict[str, str], cores: int, memory_gib: float) -> None:
    """The limits of a container apply at every level of the tree of control groups."""
    shape = shape_of(files=files)
    assert (shape.cores, shape.host_memory_gib) == (cores, memory_gib)


def test_a_missing_or_failing_command_gives_none() -> None:
    """Most machines have no `nvidia-smi`."""
    assert run_command(["no-such-command-of-ours"]) is None
    assert run_command(["false"]) is None


def test_this_machine_has_a_shape() -> None:
    """Detection works on the kernel of this machine."""
    shape = detect()
    assert shape.cores >= 1
    assert shape.host_memory_gib > 0.1


def test_a_shape_survives_json() -> None:
    """The attempt's record contains the shape as JSON."""
    shape: Any = shape_of(A100.format(0))
    assert Shape.model_validate_json(shape.model_dump_json()) == shape
