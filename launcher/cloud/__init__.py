"""What the launcher wants of a cloud, and SkyPilot, which has it."""
