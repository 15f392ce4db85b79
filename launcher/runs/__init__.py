"""A run, read from its bucket, and what it came to."""
