"""A run's checkpoints, looked at, verified, pulled and pruned."""
