"""The table of training methods: everything that differs between SFT and DPO, except the training script itself.

To add a method, add a row here, its training script in `trainer/worker/`, and tests. The reader of recipes, the
predictions of memory and time, the fit, the worker and the reports all look the method up here.

This module imports nothing heavy: TRL's classes and the worker's modules are named as strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainer.metrics import LOSS, REWARD_ACCURACY

TRL_MAX_LENGTH = 1024
"""Tokens: the default `max_length` of SFTConfig and DPOConfig (https://huggingface.co/docs/trl)."""
PAIRS_OVERHEAD = 1.25
"""Factor on the arithmetic of DPO: measured step time over the time counted in `trainer.estimate`. It was set between
notus-7b-v1-lora and zephyr-7b-dpo-full. **Unexplained**. Candidates: every batch has another length, which defeats the
allocator's cache and the choice of kernels; and metrics that wait for the GPU at every step."""


class RowForm(NamedTuple):
    """One form that a row of training data can have."""

    columns: tuple[str, ...]
    note: str = ""
    """Added to the list of columns in messages."""

    def __str__(self) -> str:
        *first, last = [f"`{column}`" for column in self.columns]
        return (f"{', '.join(first)} and {last}" if first else last) + (
            f" ({self.note})" if self.note else ""
        )


class TrainingMethod(NamedTuple):
    """One training method."""

    name: str
    """The value of a recipe's `method`."""
    config_class: str
    """The class of `trl` that holds the method's settings. Its fields are the keys that a recipe may have."""
    worker: str
    """The module whose `train` trains with this method."""
    row_forms: tuple[RowForm, ...]
    """Forms of rows that the method can train on. A row needs all columns of one of them."""
    max_length: int = TRL_MAX_LENGTH
    """Tokens: the length that sequences are cut to if the recipe gives none."""
    sequences_per_row: int = 1
    """Sequences that one row puts through the model: a DPO pair is two."""
    needs_reference: bool = False
    """Whether the loss compares the model with a reference model."""
    averages_tokens: bool = False
    """Whether the loss is the mean over all learned tokens of a global batch. Otherwise it is the mean over rows."""
    micro_batch_losses: frozenset[str] = frozenset()
    """Values of `loss_type` that compare the rows of one micro batch with each other."""
    can_pack: bool = False
    """Whether several rows may share one sequence (`packing`)."""
    smooths_labels: bool = False
    """Whether the loss follows `label_smoothing_factor`, for which all logits are kept."""
    time_overhead: float = 1.0
    """Factor on the arithmetic of a step."""
    recipe_keys: tuple[str, ...] = ()
    """Recipe keys of this project, not of TRL, that only this method reads."""
    disabled_settings: tuple[str, ...] = ()
    """Settings of the config class that the worker turns off, because its own data preparation does their work."""
    test_metric: str = LOSS.test_key
    """The metric that summarises an evaluation."""

    @property
    def needed_columns(self) -> str:
        """The forms of rows as text, for messages."""
        return ", or ".join(str(form) for form in self.row_forms)


METHODS: Mapping[str, TrainingMethod] = {
    method.name: method
    for method in (
        TrainingMethod(
            name="sft",
            config_class="SFTConfig",
            worker="trainer.worker.sft",
            row_forms=(RowForm(("messages",)), RowForm(("prompt", "completion"))),
            averages_tokens=True,
            can_pack=True,
            smooths_labels=True,
            disabled_settings=("assistant_only_loss",),
        ),
        TrainingMethod(
            name="dpo",
            config_class="DPOConfig",
            worker="trainer.worker.dpo",
            row_forms=(
                RowForm(("chosen", "rejected"), note="whole chats"),
                RowForm(("prompt", "chosen", "rejected")),
                RowForm(("instruction", "chosen_response", "rejected_response")),
            ),
            sequences_per_row=2,
            needs_reference=True,
            # All other losses are means over pairs (https://huggingface.co/docs/trl/dpo_trainer), or the worker makes
            # them so (`trainer.worker.dpo`).
            micro_batch_losses=frozenset({"aot", "aot_unpaired", "bco_pair"}),
            time_overhead=PAIRS_OVERHEAD,
            recipe_keys=("max_prompt_length",),
            test_metric=REWARD_ACCURACY.test_key,
        ),
    )
}
