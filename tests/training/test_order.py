"""One order of samples: what a step is made of does not depend on who computes which part of it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.training.jobs import LAPTOP  # noqa: F401 (the trainer's environment is here)
from trainer.recipe import Recipe
from trainer.recipe.model import may_sort
from trainer.worker.sampling import Batches, Split, dealt, lengths_of, shuffled

ROWS = 107
LENGTHS = np.random.default_rng(0).integers(5, 500, ROWS)
SPLITS = [Split(1, 8, 1), Split(1, 4, 2), Split(1, 1, 8), Split(2, 4, 1), Split(2, 2, 2), Split(4, 2, 1)]
SPLITS += [Split(4, 1, 2), Split(8, 1, 1)]


def batches(split: Split, rank: int, *, epoch: int = 0, lengths: Any = LENGTHS) -> Batches:
    made = Batches(ROWS, split, rank=rank, seed=7, data="abc", lengths=lengths)
    made.set_epoch(epoch)
    return made


def seen(split: Split, *, epoch: int = 0, lengths: Any = LENGTHS) -> list[list[int]]:
    """The rows of each step: what the ranks read of it, put together in the order of micro batches and ranks."""
    ranks = [list(batches(split, rank, epoch=epoch, lengths=lengths)) for rank in range(split.processes)]
    micro = [row for together in zip(*ranks, strict=True) for rows in together for row in rows]
    return [micro[start : start + split.batch] for start in range(0, len(micro), split.batch)]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["plain", "by length"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_sees_the_same_samples_in_the_same_order(split: Split, lengths: Any) -> None:
    """Processes x micro batch x accumulation: the sequence of sample ids is equal, epoch after epoch."""
    for epoch in range(3):
        assert seen(split, epoch=epoch, lengths=lengths) == seen(SPLITS[0], epoch=epoch, lengths=lengths)


def test_an_epoch_has_whole_steps_of_different_rows() -> None:
    """No row comes twice in an epoch; those that fill no global batch are others in the next one."""
    left_out = []
    for epoch in range(4):
        steps = seen(SPLITS[0], epoch=epoch)
        rows = [row for step in steps for row in step]
        assert len(steps) == ROWS // 8
        assert len(set(rows)) == len(rows) == ROWS // 8 * 8
        left_out.append(frozenset(range(ROWS)) - set(rows))
    assert len(set(left_out)) == 4


def test_sorting_changes_no_batch_and_saves_padding() -> None:
    """A global batch is the same set of rows; in micro batches of like lengths less of it is padding."""
    plain, by_length = (np.array(seen(SPLITS[1], lengths=lengths)) for lengths in (None, LENGTHS))
    assert (np.sort(plain) == np.sort(by_length)).all()
    padded = [LENGTHS[rows].reshape(-1, 4).max(axis=1).sum() for rows in (plain, by_length)]
    assert padded[1] < padded[0]


def test_the_order_is_of_seed_epoch_and_data_alone() -> None:
    """It can be computed again anywhere, and none of the three leaves it as it is."""
    order = shuffled(1000, seed=1, epoch=0, data="abc")
    assert sorted(order) == list(range(1000))
    assert (order == shuffled(1000, seed=1, epoch=0, data="abc")).all()
    for other in ({"seed": 2}, {"epoch": 1}, {"data": "abd"}):
        assert (order != shuffled(1000, **{"seed": 1, "epoch": 0, "data": "abc", **other})).any()


def test_the_order_is_written_down() -> None:
    """A newer numpy, or a change of ours, must not mend the order of a run that is on its way."""
    assert shuffled(12, seed=42, epoch=3, data="fingerprint").tolist() == WRITTEN_DOWN


WRITTEN_DOWN = [9, 6, 2, 11, 10, 1, 7, 8, 3, 5, 0, 4]


def test_neighbours_are_no_likelier_than_chance() -> None:
    """Rows that follow one another in the data are not found together in the order."""
    order = shuffled(20_000, seed=0, epoch=0, data="")
    assert np.mean(np.abs(np.diff(order))) == pytest.approx(20_000 / 3, rel=0.02)
    assert np.corrcoef(order, np.arange(20_000))[0, 1] == pytest.approx(0, abs=0.02)


def test_a_skip_reads_no_data() -> None:
    """Going on in the middle of an epoch, Transformers asks for the rows from there on only."""
    from accelerate import PartialState
    from transformers.trainer import skip_first_batches

    class Rows(list[int]):
        read: list[int]

        def __getitem__(self, row: Any) -> Any:
            self.read.append(row)
            return super().__getitem__(row)

    rows = Rows(range(ROWS))
    rows.read = []
    PartialState(cpu=True)
    whole = [row for micro in batches(SPLITS[1], 0, epoch=2) for row in micro]
    loader = skip_first_batches(DataLoader(rows, batch_sampler=batches(SPLITS[1], 0)), 10)
    loader.batch_sampler.batch_sampler.set_epoch(2)  # as the Trainer does
    assert [row for batch in loader for row in batch.tolist()] == whole[40:] == rows.read


def test_too_few_rows_for_a_batch_are_repeated(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has one step then, as the estimate says, of the recipe's batch; the user is told."""
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)  # another test may have tamed it
    few = Batches(3, Split(1, 8, 1), rank=0, seed=0, data="")
    (step,) = few
    assert len(few) == 1
    assert sorted(step.count(row) for row in range(3)) == [2, 3, 3]
    assert "3 training rows are repeated to fill the global batch of 8" in caplog.text


def test_sequential_is_the_datas_own_order() -> None:
    """`train_sampling_strategy: sequential` shuffles nothing."""
    made = batches(Split(1, 8, 1), 0, lengths=None)
    made.sequential = True
    assert next(iter(made)) == list(range(8))


def test_the_longest_come_first() -> None:
    """If a step is too large for a GPU's memory, the run's first micro batch says so."""
    rows = dealt(np.arange(8), 4, np.array([3, 9, 1, 4, 2, 2, 7, 8]))
    assert rows.tolist() == [[1, 3, 0, 2], [7, 6, 4, 5]]


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("sft", {}, True),
        ("sft", {"average_tokens_across_devices": False}, False),
        ("dpo", {}, True),
        ("dpo", {"loss_type": "ipo"}, True),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}, True),
        ("dpo", {"loss_type": "aot"}, False),
    ],
)
def test_rows_are_dealt_by_length_where_the_split_changes_no_gradient(
    method: str, settings: dict[str, Any], expected: bool
) -> None:
    """Means over tokens of all ranks, or over pairs, do not care; comparisons within a micro batch do."""
    recipe = {"name": "r", "method": method, "init": "tiny", "global_batch_size": 8, "trainer_args": settings}
    recipe["dataset_mixture"] = {"datasets": [{"id": "generated:chats"}]}
    assert may_sort(Recipe.model_validate(recipe)) is expected


def test_lengths_are_those_of_the_padded_rows() -> None:
    """For a pair, the length is the prompt plus the longer answer."""
    from datasets import Dataset

    assert lengths_of(Dataset.from_dict({"input_ids": [[1, 2, 3], [1]], "labels": [[1], [1]]})).tolist() == [
        3,
        1,
    ]
    pairs = {"prompt_ids": [[1, 2], [1]], "chosen_ids": [[1], [1, 2, 3]], "rejected_ids": [[1, 2], [1]]}
    assert lengths_of(Dataset.from_dict(pairs).select([1, 0])).tolist() == [4, 4]


@pytest.mark.parametrize("rows", [3, 8, 15, 16, 107])
def test_an_epoch_has_the_steps_that_the_estimate_counts(rows: int) -> None:
    """What a user was told before paying is what is trained."""
    from trainer.estimate.batch import count_steps
    from trainer.estimate.workload import Workload

    recipe = Recipe.model_validate(
        {
            "name": "r",
            "method": "sft",
            "init": "tiny",
            "global_batch_size": 8,
            "dataset_mixture": {"datasets": [{"id": "generated:chats"}]},
            "trainer_args": {"num_train_epochs": 1},
        }
    )
    split = Split(2, 2, 2)
    counted = len(Batches(rows, split, rank=1, seed=0, data="")) // split.accumulation
    assert counted == count_steps(recipe, Workload(rows=rows, tokens=10, source="test"))
