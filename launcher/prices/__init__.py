"""Cloud prices of machines with GPUs: offers, their cache, and the shipped snapshot."""
