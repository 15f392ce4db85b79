"""The worker, which fails unless it reads its checkpoint where that lies, and has let go of it when it trains:
`python -m tests.training.mapped_rank JOB_JSON`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.worker import __main__ as worker


def mapped_files() -> str:
    """Return the mappings of this process: https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html"""
    return Path("/proc/self/maps").read_text()


def watch() -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from trainer.worker.callback import Progress

    load, begin, seen = TorchCheckpointEngine.load, Progress.on_train_begin, []

    def mapped_load(self: Any, path: str, map_location: Any = None) -> Any:
        loaded = load(self, path, map_location)
        assert path in mapped_files(), f"{path} was copied"
        seen.append(path)
        return loaded

    def on_train_begin(self: Any, *arguments: Any, **named: Any) -> None:
        assert any(path.endswith("_optim_states.pt") for path in seen)
        assert not [path for path in seen if path in mapped_files()], "what is trained is the file"
        begin(self, *arguments, **named)

    TorchCheckpointEngine.load = mapped_load
    Progress.on_train_begin = on_train_begin  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    worker.main()
