"""What a step's samples are known by: what the model saw, read when the step is over."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from tests.training.jobs import LAPTOP  # noqa: F401 (the trainer's environment is here)
from trainer.worker.callback import Taken, TrainedTokens

SEQUENCES = ([5, 6, 7], [8, 9], [1, 2, 3, 4], [5])


def taken(seen: TrainedTokens) -> Taken:
    return seen.take(TrainingArguments(output_dir="unused", use_cpu=True, report_to="none"))


def padded(sequences: tuple[list[int], ...], width: int) -> dict[str, torch.Tensor]:
    """A micro batch; whatever is under the mask is padding."""
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(sequences: tuple[list[int], ...]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
        "position_ids": torch.tensor([[at for sequence in sequences for at in range(len(sequence))]]),
    }


WAYS = {
    "one micro batch": [padded(SEQUENCES, 4)],
    "two, padded otherwise": [padded(SEQUENCES[2:], 9), padded(SEQUENCES[:2], 3)],
    "packed": [packed(SEQUENCES)],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_set_of_sequences_has_one_digest(way: str) -> None:
    """However they are dealt to micro batches, padded or packed; and the next step begins with nothing."""
    model, seen, whole = torch.nn.Identity(), TrainedTokens(), TrainedTokens()
    whole.hook(model, (), WAYS["one micro batch"][0])
    for inputs in WAYS[way]:
        seen.hook(model, (), inputs)
    first = taken(seen)
    assert (first.samples, first.tokens) == (taken(whole).samples, 10)
    assert (taken(seen).samples, taken(seen).tokens) == ("0" * 16, 0)


def test_other_tokens_have_another_digest() -> None:
    """One token less is seen."""
    digests = []
    for sequences in (SEQUENCES, (*SEQUENCES[:3], [])):
        seen = TrainedTokens()
        seen.hook(torch.nn.Identity(), (), padded(sequences, 4))
        digests.append(taken(seen).samples)
    assert digests[0] != digests[1]


def test_a_forward_is_not_held_up() -> None:
    """Before a forward nothing is read: on a GPU that would wait for all that was handed to it before."""
    unreadable = {"input_ids": torch.empty(2, 3, dtype=torch.int64, device="meta")}
    seen = TrainedTokens()
    seen.hook(torch.nn.Identity(), (), unreadable)
    with pytest.raises(NotImplementedError):
        taken(seen)


def test_evaluation_is_not_counted() -> None:
    """Neither a model in evaluation nor a pass without gradients is training."""
    seen, model = TrainedTokens(), torch.nn.Identity()
    with torch.no_grad():
        seen.hook(model, (), padded(SEQUENCES, 4))
    seen.hook(model.eval(), (), padded(SEQUENCES, 4))
    assert taken(seen).tokens == 0
