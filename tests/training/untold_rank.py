"""A rank of FSDP 2 on the CPU that does not tell Accelerate that there is anything to cut for."""

from __future__ import annotations

from accelerate import PartialState

from trainer.worker import __main__ as worker
from trainer.worker import fsdp


def untold() -> None:
    PartialState(cpu=True)


if __name__ == "__main__":
    fsdp.start = untold
    worker.main()
