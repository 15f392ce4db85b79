"""Predict how long a recipe trains on a shape, term by term. This package does no I/O."""

from trainer.estimate.efficiency import FUSED, TRANSFORMERS, TRANSFORMERS_4BIT, Stack
from trainer.estimate.estimate import Estimate, StepTerm, estimate, step_s
from trainer.estimate.traffic import Rates
from trainer.estimate.workload import (
    Workload,
    counted_workload,
    full_workload,
    known_workload,
    usual_workload,
)

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
    "full_workload",
    "known_workload",
    "step_s",
    "usual_workload",
]
