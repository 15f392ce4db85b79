"""The worker, which fails unless it maps its checkpoint's files and has released them when it trains:
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
    from trainer.worker.callback import Progress
    from trainer.worker.checkpoint import trainer_mixin
    from trainer.worker.checkpoint.format import RANK_FILES

    load, begin, seen = trainer_mixin.load, Progress.on_train_begin, []

    def mapped_load(trainer: Any, target: Any, folder: Path) -> Any:
        saved = load(trainer, target, folder)
        seen.extend(str(path) for path in folder.glob(RANK_FILES) if str(path) in mapped_files())
        return saved

    def on_train_begin(self: Any, *arguments: Any, **named: Any) -> None:
        assert seen, "the checkpoint was copied"
        assert not [path for path in seen if path in mapped_files()], "a file of the checkpoint is in use"
        begin(self, *arguments, **named)

    trainer_mixin.load = mapped_load
    Progress.on_train_begin = on_train_begin  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    worker.main()
