"""What trains: torch, Transformers, TRL and PEFT are imported here and nowhere else."""
