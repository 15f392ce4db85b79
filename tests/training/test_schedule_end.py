"""SFT's schedule ends with its data: TRL once counted the rows before they were packed, and stopped too early."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tests.training.jobs import Trained
from trainer.estimate.batch import count_steps
from trainer.estimate.workload import Workload
from trainer.worker.checkpoint.format import open_format_2

BATCH, RATE, LENGTH, ROWS = 4, 1e-3, 128, 24
EPOCH = (
    "max_steps=-1",
    "num_train_epochs=1",
    f"learning_rate={RATE}",
    "warmup_steps=0",
    f"max_length={LENGTH}",
    "assistant_only_loss=false",
    "save_steps=1000",
)
WRAPPED = ("packing=true", "packing_strategy=wrapped")
PACKED = ("packing=true", "packing_strategy=bfd")


@pytest.mark.parametrize("packing", [(), PACKED, WRAPPED], ids=["unpacked", "packed", "wrapped"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_step_is_the_schedules_last(
    small: Callable[..., Trained], packing: tuple[str, ...], schedule: str
) -> None:
    """As many steps as the sequences need, one epoch by then, and each at the rate of a schedule of that length."""
    trained = small("zephyr-tiny/sft", *EPOCH, *packing, f"lr_scheduler_type={schedule}")
    assert trained.outcome.status == "done"
    started, taken = trained.of("started")[0], trained.of("step")
    last = max(1, started["samples"] // BATCH)
    assert (started["samples"] < ROWS) == bool(packing)
    assert started["total_steps"] == len(taken) == last
    assert taken[-1]["epoch"] == 1

    done = [number / last for number in range(last + 1)]  # before each step, and after the last
    shape = {"linear": lambda part: 1 - part, "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2}
    rates = [RATE * shape[schedule](part) for part in done]
    assert [line["learning_rate"] for line in taken] == pytest.approx(rates[:-1])
    schedule = open_format_2(trained.checkpoint(last)).schedule
    assert schedule["_last_lr"] == pytest.approx(
        [0, 0], abs=1e-12
    )  # of weights that decay, and of the others


@pytest.mark.parametrize("epochs", [0.3, 1.4])
def test_a_part_of_an_epoch_has_the_steps_that_the_estimate_counts(
    small: Callable[..., Trained], epochs: float
) -> None:
    """Transformers rounds them up, so the estimate does; that many are trained, and the schedule ends with the last."""
    trained = small("zephyr-tiny/sft", *EPOCH, "lr_scheduler_type=linear", f"num_train_epochs={epochs}")
    counted = count_steps(trained.job.recipe, Workload(rows=ROWS, tokens=10, source="test"))
    taken = trained.of("step")
    assert (
        trained.of("started")[0]["total_steps"] == len(taken) == counted == math.ceil(epochs * ROWS / BATCH)
    )
    assert taken[-1]["learning_rate"] == pytest.approx(RATE / counted)


def test_wrapping_cuts_nothing_away(small: Callable[..., Trained]) -> None:
    """Chats longer than a sequence go on in the next one, so the sequences are all full but the last."""
    short = "max_length=32"
    whole, cut = (small("zephyr-tiny/sft", *EPOCH, *more).of("started")[0] for more in ((), (short,)))
    started = small("zephyr-tiny/sft", *EPOCH, *WRAPPED, short).of("started")[0]
    assert started["tokens"] == whole["tokens"] > cut["tokens"] > 0
    assert started["samples"] == math.ceil(started["tokens"] / 32)
