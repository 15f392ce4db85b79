"""Hardware: the machine at hand, the shapes that runs have, and the table of GPUs."""

from trainer.hardware.board import Gpu
from trainer.hardware.cgroups import available_bytes, host_available_bytes, read_file
from trainer.hardware.detect import accelerator_name, affinity, board_name, detect, host_bytes, run_command
from trainer.hardware.lookup import gpu, gpu_of, known_gpu, usable_gib
from trainer.hardware.shape import Shape

__all__ = [
    "Gpu",
    "Shape",
    "accelerator_name",
    "affinity",
    "available_bytes",
    "board_name",
    "detect",
    "gpu",
    "gpu_of",
    "host_available_bytes",
    "host_bytes",
    "known_gpu",
    "read_file",
    "run_command",
    "usable_gib",
]
