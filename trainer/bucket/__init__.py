"""A run in its bucket: attempts, committed checkpoints, the exported model, and shared reference log-probabilities."""

from trainer.bucket.byte_streams import Checked
from trainer.bucket.store import Bucket, Object, list_runs, open_file, open_run

__all__ = ["Bucket", "Checked", "Object", "list_runs", "open_file", "open_run"]
