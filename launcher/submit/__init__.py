"""A request becomes an order, the order a SkyPilot task; and what became of it."""
