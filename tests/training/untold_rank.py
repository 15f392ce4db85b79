"""A rank of FSDP 2 on the CPU that does not tell Accelerate so."""

from __future__ import annotations

from trainer.worker import __main__ as worker
from trainer.worker import fsdp

if __name__ == "__main__":
    fsdp.start = lambda: None
    worker.main()
