"""How long a recipe trains on a shape, term by term; no I/O."""

from trainer.estimate.checkpoint import Rates
from trainer.estimate.efficiency import FUSED, TRANSFORMERS, TRANSFORMERS_4BIT, Stack
from trainer.estimate.estimate import estimate
from trainer.estimate.result import Estimate, StepTerm
from trainer.estimate.workload import Workload, counted_workload, known_workload

__all__ = [
    "FUSED",
    "TRANSFORMERS",
    "TRANSFORMERS_4BIT",
    "Estimate",
    "Rates",
    "Stack",
    "StepTerm",
    "Workload",
    "counted_workload",
    "estimate",
    "known_workload",
]
