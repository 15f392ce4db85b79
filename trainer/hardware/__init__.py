"""Hardware: the machine that this process runs on, the shapes that runs use, and the table of GPUs."""

from trainer.hardware.cgroups import available_bytes, host_available_bytes, read_file
from trainer.hardware.detect import accelerator_name, affinity, board_name, detect, host_bytes, run_command
from trainer.hardware.shape import Shape
from trainer.hardware.table import (
    FLASH_ATTENTION_CAPABILITY,
    Gpu,
    gpu,
    gpu_of,
    has_bf16,
    known_gpu,
    usable_gib,
)

__all__ = [
    "FLASH_ATTENTION_CAPABILITY",
    "Gpu",
    "Shape",
    "accelerator_name",
    "affinity",
    "available_bytes",
    "board_name",
    "detect",
    "gpu",
    "gpu_of",
    "has_bf16",
    "host_available_bytes",
    "host_bytes",
    "known_gpu",
    "read_file",
    "run_command",
    "usable_gib",
]
