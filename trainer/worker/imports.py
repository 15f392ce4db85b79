"""Imports the training packages: without progress bars, and only what the training method needs."""

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
    "HF_HUB_DISABLE_TELEMETRY": "1",  # otherwise TRL reports each run to the Hub
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
"""Environment variables for the packages; some are read on import, so they are set before."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable the garbage collector around imports, once in a process.

    The imports make a million objects and no garbage. Repeated collections take a fifth of the time of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def train_function(name: str) -> Callable[[Job, Channel], Outcome]:
    """Return the training function of a recipe's `method`. This imports the packages, which takes seconds."""
    module = importlib.import_module(METHODS[name].worker)
    train: Callable[[Job, Channel], Outcome] = module.train
    return train
