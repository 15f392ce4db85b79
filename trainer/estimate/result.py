"""What an estimate says: hours, and every second of a step with its reason."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SAVES = "saves"


class StepTerm(BaseModel):
    """One thing that an optimizer step waits for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    seconds: float
    """Of each optimizer step; what happens now and then (evaluation, saves) is spread over the steps."""
    why: str
    """The numbers that make it, and the formula's source where it is not plain division."""


class Estimate(BaseModel):
    """How long a recipe trains on a shape, with no preemption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    """Optimizer steps of the whole run."""
    step_s: float
    """The sum of `terms`."""
    load_s: float
    """Before the first step on a fresh node: the container, the model, the data set. A restore comes on top."""
    once_s: float
    """Spent once in the run and not in steps: precomputed log-probabilities of the reference, the last export."""
    checkpoint_bytes: int
    """What one save uploads."""
    restore_s: float
    """To download and load that checkpoint, on top of `load_s`."""
    save_s: float
    """What training waits for at a save; the upload runs in the background."""
    upload_s: float
    """From a save until it is committed: a loss before then goes back to the checkpoint before."""
    tokens: int
    """Of one step over all GPUs, without padding; a DPO pair has both of its sequences."""
    terms: tuple[StepTerm, ...]

    @property
    def saves_s(self) -> float:
        """Of the whole run, at the recipe's own `save_steps`."""
        return self.steps * sum(term.seconds for term in self.terms if term.name == SAVES)

    @property
    def work_s(self) -> float:
        """Training alone, without starts, restores and saves: the work of `launcher.plan.spot.spot_expectation`."""
        return self.steps * self.step_s + self.once_s - self.saves_s

    @property
    def hours(self) -> float:
        """Of one node's rent for an undisturbed run: load, work and saves."""
        return (self.load_s + self.work_s + self.saves_s) / 3600

    @property
    def tokens_per_s(self) -> float:
        """Over all GPUs, without padding."""
        return self.tokens / self.step_s
