"""How the training stack is imported: quietly, and only what the method needs."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.job import Job, Outcome
from trainer.method import METHODS
from trainer.worker.supervisor_channel import Channel

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL tells the Hub about each run otherwise
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
"""Variables that the stack reads, some of them when it is imported."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports, once in a process: they make a million objects and no garbage, and a collector that
    looks through all of them again and again takes a fifth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def train_function(name: str) -> Callable[[Job, Channel], Outcome]:
    """What trains by a recipe's `method`; imports the stack, which takes seconds."""
    module = importlib.import_module(METHODS[name].worker)
    train: Callable[[Job, Channel], Outcome] = module.train
    return train
