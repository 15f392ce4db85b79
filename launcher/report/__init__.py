"""`python -m launcher report`: what a run took, on a terminal, as JSON, and as one HTML file."""
