"""What clouds ask for machines with GPUs: offers, the cache of them, and the snapshot that is shipped."""
