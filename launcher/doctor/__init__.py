"""Check that everything a run requires is set up, and report how to fix what is missing."""
