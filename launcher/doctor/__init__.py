"""What a run needs, looked at all at once: what is there, what is missing, and how to get it."""
