"""Evaluations that give way to a notice: a test set takes minutes, and a machine that goes may leave half of one."""

from __future__ import annotations

import logging
from typing import Any

from transformers.trainer_utils import SchedulerType

from trainer.worker.callback import Progress

log = logging.getLogger(__name__)


class EvaluationInterrupted(Exception):
    """An evaluation has ended before its end."""


class InterruptibleEvaluation:
    """For a TRL trainer: an evaluation that a notice finds under way is left, its step saved, and it is the first that the
    next attempt does (`eval_on_start`). That is exact: an evaluation draws its random numbers before its first batch,
    so those saved are those after it, and Transformers brings them back after the one at the start.
    """

    progress: Progress
    """Set before it trains."""

    def prediction_step(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.is_in_train and not _is_needed(self.args) and self.progress.must_stop(self.args, self.state):
            raise EvaluationInterrupted
        return super().prediction_step(*arguments, **named)  # type: ignore[misc]

    def evaluate(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        """Its metrics, or none.

        Raises:
            Cut: no step was taken since the start, so that there is nothing to save.
        """
        try:
            found: dict[str, float] = super().evaluate(*arguments, **named)  # type: ignore[misc]
        except EvaluationInterrupted:
            if self.state.global_step == self._initial_global_step:
                raise
            log.info("the evaluation of step %d gives way to the notice", self.state.global_step)
            self.progress.cut_evaluation(self.state, self.control)
            self.model.train()  # by which TRL's logs tell what its sums are of: these are of nothing whole
            return {}
        return found


def _is_needed(args: Any) -> bool:
    """Whether its result decides the next steps."""
    return bool(args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU)
