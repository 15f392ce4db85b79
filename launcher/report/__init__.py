"""`python -m launcher report`: the cost and the course of a run, on a terminal, as JSON, or as one HTML file."""
