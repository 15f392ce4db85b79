"""The training process. Only this package imports torch, Transformers, TRL and PEFT."""
