"""Compile DeepSpeed's Adam for the CPU and write it, with what says that it is there, below a folder.

DeepSpeed compiles for the processor that it is on. A node's is another one, and offloading would die there of an
illegal instruction: this is for any x86-64 with AVX2, which is every one that GPUs are rented with. Adam reads and
writes 28 bytes a parameter for some ten operations, so memory is its limit and wider vectors gain little.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

AVX2 = ["-march=x86-64-v3", "-mtune=generic", "-D__AVX256__"]
"""https://gitlab.com/x86-psABIs/x86-64-ABI: level 3 has AVX2 and FMA."""
LOADED_FROM = Path("deepspeed/ops/adam")
SAYS_SO = Path("deepspeed/git_version_info_installed.py")


def main(folder: Path) -> None:
    import torch
    from deepspeed.git_version_info import version
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
    from torch.utils import cpp_extension

    builder = CPUAdamBuilder()
    name = builder.absolute_name().rpartition(".")[2]
    portable = ["-O3", "-fopenmp", "-Wno-reorder", *AVX2]
    work = folder.with_suffix(".work")
    work.mkdir(parents=True)
    cpp_extension.load(
        name=name,
        sources=[builder.deepspeed_src_path(path) for path in builder.sources()],
        extra_include_paths=[builder.deepspeed_src_path(path) for path in builder.include_paths()],
        extra_cflags=portable if platform.machine() == "x86_64" else builder.cxx_args(),
        build_directory=str(work),
        with_cuda=False,
    )
    (folder / LOADED_FROM).mkdir(parents=True)
    shutil.copy(work / f"{name}.so", folder / LOADED_FROM)
    about = {
        "version": version,
        "git_hash": "unknown",
        "git_branch": "unknown",
        "installed_ops": {builder.name: True},
        "accelerator_name": "cuda" if torch.version.cuda else "cpu",
        "torch_info": {
            "version": ".".join(torch.__version__.split(".")[:2]),
            "cuda_version": ".".join((torch.version.cuda or "0.0").split(".")[:2]),
            "bf16_support": False,
            "nccl_version": "0.0",
            "hip_version": "0.0",
        },
    }
    (folder / SAYS_SO).write_text("".join(f"{key} = {value!r}\n" for key, value in about.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
