"""`python -m launcher watch`: follow a run without changing it."""
