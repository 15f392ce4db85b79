"""Runs as their buckets record them: history, cost, limits and summary."""
