"""The backends that run jobs: SkyPilot, this machine, and a stand-in for tests."""
