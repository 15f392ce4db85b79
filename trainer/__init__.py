"""The program on the machine that trains: the contract with the launcher, the supervisor, and the worker."""
