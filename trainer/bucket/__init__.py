"""A run in its bucket: a place for checkpoints that can be believed."""

from trainer.bucket.store import Bucket, Checked, Object, list_runs, open_file, open_run

__all__ = ["Bucket", "Checked", "Object", "list_runs", "open_file", "open_run"]
