"""Compile DeepSpeed's CPU Adam into a folder, with the file that marks it as installed.

By default DeepSpeed compiles for the processor of the building machine. A node may have another one, where offloading
would crash with an illegal instruction. This build runs on every x86-64 processor with AVX2, which all machines with
rented GPUs have. Wider vectors would gain little: Adam reads and writes 28 bytes per parameter for about ten operations,
so memory bandwidth limits it.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

AVX2 = ["-march=x86-64-v3", "-mtune=generic", "-D__AVX256__"]
"""https://gitlab.com/x86-psABIs/x86-64-ABI: level 3 has AVX2 and FMA."""
LIBRARY_FOLDER = Path("deepspeed/ops/adam")
"""Where DeepSpeed loads the compiled library from."""
INSTALLED_OPS = Path("deepspeed/git_version_info_installed.py")
"""Where DeepSpeed looks up which compiled operations are installed."""


def main(folder: Path) -> None:
    """Compile the library and write both files below `folder`, in the layout of site-packages."""
    import torch
    from deepspeed.git_version_info import version
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
    from torch.utils import cpp_extension

    builder = CPUAdamBuilder()
    name = builder.absolute_name().rpartition(".")[2]
    portable_flags = ["-O3", "-fopenmp", "-Wno-reorder", *AVX2]
    work = folder.with_suffix(".work")
    work.mkdir(parents=True)
    # As one file: torch's headers take longer to read than the code takes to compile.
    whole = work / "whole.cpp"
    whole.write_text(
        "".join(f'#include "{builder.deepspeed_src_path(path)}"\n' for path in builder.sources())
    )
    cpp_extension.load(
        name=name,
        sources=[str(whole)],
        extra_include_paths=[builder.deepspeed_src_path(path) for path in builder.include_paths()],
        extra_cflags=portable_flags if platform.machine() == "x86_64" else builder.cxx_args(),
        build_directory=str(work),
        with_cuda=False,
    )
    (folder / LIBRARY_FOLDER).mkdir(parents=True)
    shutil.copy(work / f"{name}.so", folder / LIBRARY_FOLDER)
    installed = {
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
    (folder / INSTALLED_OPS).write_text("".join(f"{key} = {value!r}\n" for key, value in installed.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
