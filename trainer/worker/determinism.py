"""The same machine computes the same bits, on a GPU too, whose fastest kernels add in the order of chance.

Which they are: https://docs.pytorch.org/docs/stable/notes/randomness.html. The backward pass of attention is the one that every step
has. `full_determinism: true` in a recipe goes further, as Transformers does it: it also waits for each kernel. `false` takes
the fastest kernels, and a run that lost its machine then goes on only nearly as the undisturbed one.
"""

from __future__ import annotations

import os

from trainer.errors import UserError
from trainer.recipe import Recipe

KEY = "full_determinism"
REFUSAL = "does not have a deterministic implementation"
"""In the message of every kernel that PyTorch knows to have none."""


def compute_alike(recipe: Recipe) -> None:
    """Before anything is computed: of each operation the kernel that adds in one order; what has none raises."""
    if recipe.trainer_args.get(KEY) is False:
        return
    import torch

    # cuBLAS is the same in all its calls with a work space of a fixed size (the address above); read when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by Transformers, for the package flash-attn
    # With a warning alone, attention would keep its fast kernel: https://github.com/pytorch/pytorch/pull/182551
    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = False


def refused(error: BaseException) -> UserError | None:
    """What to say if an operation of the recipe's has no such kernel; None if `error` is another."""
    if not isinstance(error, RuntimeError) or REFUSAL not in str(error):
        return None
    return UserError(
        f"{str(error).partition(',')[0]}: the run could not be recovered to the same bits",
        hint=f"another `attn_implementation` may have one; with `{KEY}: false` recoveries are exact only nearly",
    )
