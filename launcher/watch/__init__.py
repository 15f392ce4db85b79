"""`python -m launcher watch`: a run as it goes on, without touching it."""
