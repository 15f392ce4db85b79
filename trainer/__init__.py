"""What runs on the machine that trains: the contract with the launcher, the supervisor, the worker."""
