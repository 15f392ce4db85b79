"""List, verify, pull and prune the checkpoints of a run."""
