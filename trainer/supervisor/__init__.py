"""The supervisor: a process apart from the training program that runs an attempt.

It claims the run, restores the newest checkpoint, starts the workers, uploads what they stage, and commits it.
"""
