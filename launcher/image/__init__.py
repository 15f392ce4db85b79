"""The trainer's container image: what is in it, and how it is built and pushed."""
