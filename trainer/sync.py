"""Checkpoints to the bucket and back: what the supervisor needs of it, under one name."""

from trainer.commit import commit, prune
from trainer.restore import CorruptCheckpoint, Restored, fetch, restore
from trainer.uploader import Listener, Uploader

__all__ = ["CorruptCheckpoint", "Listener", "Restored", "Uploader", "commit", "fetch", "prune", "restore"]
