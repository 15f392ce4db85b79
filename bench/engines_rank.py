"""A rank of `bench/engines.py`: the trainer's own rank, with measurements of preparation, steps and memory."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

LEAVES = "BENCH_LEAVES"
"""Environment variable: exit as soon as the checkpoint is restored."""
PROCESS = Path("/proc/self")


def kib(name: str) -> int:
    """Return `VmRSS`, or `VmHWM`, the peak since the last `reset`."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset() -> None:
    """Reset the peak (`man 5 proc_pid_clear_refs`)."""
    (PROCESS / "clear_refs").write_text("5")


class Watch:
    """Wraps the calls of a training, and writes `measured-RANK.json` next to the job."""

    def __init__(self, folder: Path) -> None:
        self._into = folder / f"measured-{os.environ.get('RANK', '0')}.json"
        self._found: dict[str, Any] = {"cpu_s": []}
        self._began = 0.0

    def put(self) -> None:
        from transformers import Trainer

        from trainer.worker import engine, model
        from trainer.worker.callback import Progress
        from trainer.worker.checkpoint.trainer_mixin import CheckpointMixin

        train, prepare, load = Trainer.train, CheckpointMixin._prepare_for_training, model.load  # noqa: SLF001
        log, whole = Progress.on_log, engine.whole_weights

        def loading(*given: Any, **named: Any) -> Any:
            self._found["before_mib"] = kib("VmRSS") / 1024
            return load(*given, **named)

        def training(*given: Any, **named: Any) -> Any:
            self._began = time.perf_counter()
            return train(*given, **named)

        def preparing(*given: Any) -> Any:
            prepared = prepare(*given)
            self._found["prepared_s"] = time.perf_counter() - self._began
            if LEAVES in os.environ:
                self._leave()
            reset()
            return prepared

        def logging(*given: Any, **named: Any) -> Any:
            used = resource.getrusage(resource.RUSAGE_SELF)
            self._found["cpu_s"].append(used.ru_utime + used.ru_stime)
            return log(*given, **named)

        def ending(*given: Any) -> Any:
            self._found["peak_mib"] = kib("VmHWM") / 1024
            self._write()
            return whole(*given)

        model.load = loading
        Trainer.train = training
        CheckpointMixin._prepare_for_training = preparing  # type: ignore[method-assign] # noqa: SLF001
        Progress.on_log = logging  # type: ignore[method-assign]
        engine.whole_weights = ending

    def _write(self) -> None:
        self._into.write_text(json.dumps(self._found))

    def _leave(self) -> None:
        import torch.distributed as dist

        self._write()
        if dist.is_initialized():
            dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    from trainer.worker import __main__ as worker

    Watch(Path(sys.argv[1]).parent).put()
    worker.main()
