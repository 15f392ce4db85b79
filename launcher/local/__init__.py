"""This machine as a backend: starts a supervisor, follows it, recovers it."""
