"""The training metrics that users see: their keys in `step` and `eval` events, their titles, units and formats.

A metric that is added to `METRICS` appears in the supervisor's log. Each other output names the metrics that it shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.events import Event


class Metric(NamedTuple):
    """One metric: `key` is its field in `step` events, `test_key` its field in `eval` events."""

    key: str
    test_key: str
    """Empty for a metric that evaluations do not have."""
    title: str
    unit: str
    """Label of a chart's vertical axis."""
    format: str
    """Format specification of a training value in a line of text."""
    test_format: str
    """The same for a value of an evaluation, which is a mean over more rows and has more digits."""

    def text(self, event: Event) -> str:
        """Return the training value as text, or an empty string if the event has none."""
        return _text(event.get(self.key), self.format)

    def test_text(self, event: Event) -> str:
        """Return the value of an evaluation as text, or an empty string if the event has none."""
        return _text(event.get(self.test_key), self.test_format)


LOSS = Metric("loss", "eval_loss", "loss", "loss", ".4f", ".4f")
LEARNING_RATE = Metric("learning_rate", "", "lr", "learning rate", ".2e", ".2e")
REWARD_ACCURACY = Metric(
    "rewards/accuracies", "eval_rewards/accuracies", "reward accuracy", "share of pairs", ".2f", ".3f"
)
TOKEN_ACCURACY = Metric(
    "mean_token_accuracy", "eval_mean_token_accuracy", "token accuracy", "share of tokens", ".2f", ".3f"
)

METRICS = (LOSS, LEARNING_RATE, REWARD_ACCURACY, TOKEN_ACCURACY)
"""All of them, in the order of the log's lines."""
CURVES = (LOSS, REWARD_ACCURACY, TOKEN_ACCURACY)
"""Those that reports draw over the steps."""
TEST_PREFIX = "eval_"
"""Begin of every key of an evaluation's metrics."""


def log_text(event: Event) -> str:
    """Return all metrics of a `step` or `eval` event as one text, as in `loss 0.6931  reward accuracy 0.52`."""
    values = [(metric.title, metric.text(event) or metric.test_text(event)) for metric in METRICS]
    return "  ".join(f"{title} {value}" for title, value in values if value)


def _text(value: Any, specification: str) -> str:
    return format(value, specification) if isinstance(value, int | float) else ""
