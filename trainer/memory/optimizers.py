"""What an optimizer keeps for each weight, and what it takes in passing while it steps."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 256
"""Weights to a float32 scale in bitsandbytes' blockwise states (arXiv:2110.02861, and `blocksize` in
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py)."""


class Optimizer(NamedTuple):
    """An optimizer of Transformers' `optim`."""

    states: int
    """Numbers kept for each weight."""
    bytes_each: float | None
    """Of a state; None: as the weight that is stepped."""
    in_passing: int = 0
    """Numbers more for each weight while it steps: torch's multi-tensor code takes the root of a whole state at once,
    https://github.com/pytorch/pytorch/blob/main/torch/optim/adamw.py (`_foreach_sqrt`)."""
    offloads: bool = True
    """It can step on the host, as DeepSpeed's offload wants; bitsandbytes' CUDA kernels cannot."""

    def state_bytes(self, stepped_bytes: int) -> float:
        """For each weight that is stepped in numbers of `stepped_bytes`."""
        return self.states * (self.bytes_each or stepped_bytes)


ADAM8, ADAM32 = 1 + 4 / BLOCK, 4.0
OPTIMIZERS = {
    "adamw_torch": Optimizer(2, None, in_passing=1),
    "adamw_torch_fused": Optimizer(2, None),
    "rmsprop": Optimizer(1, None, in_passing=1),
    "adagrad": Optimizer(1, None, in_passing=1),
    "sgd": Optimizer(0, None),
    "paged_adamw_32bit": Optimizer(2, ADAM32, offloads=False),
    "paged_adamw_8bit": Optimizer(2, ADAM8, offloads=False),
    "adamw_8bit": Optimizer(2, ADAM8, offloads=False),
    "adamw_bnb_8bit": Optimizer(2, ADAM8, offloads=False),
    "lion_32bit": Optimizer(1, ADAM32, offloads=False),
    "lion_8bit": Optimizer(1, ADAM8, offloads=False),
    "paged_lion_32bit": Optimizer(1, ADAM32, offloads=False),
    "paged_lion_8bit": Optimizer(1, ADAM8, offloads=False),
    "rmsprop_bnb": Optimizer(1, ADAM32, offloads=False),
    "rmsprop_bnb_32bit": Optimizer(1, ADAM32, offloads=False),
    "rmsprop_bnb_8bit": Optimizer(1, ADAM8, offloads=False),
    "ademamix": Optimizer(3, ADAM32, offloads=False),
    "ademamix_8bit": Optimizer(3, ADAM8, offloads=False),
    "paged_ademamix_32bit": Optimizer(3, ADAM32, offloads=False),
    "paged_ademamix_8bit": Optimizer(3, ADAM8, offloads=False),
}
"""By `optim`. Paged states (arXiv:2305.14314, section 3) count as on the GPU: where they are moved out, a step waits."""
LIKE_ADAM = Optimizer(3, ADAM32, in_passing=1, offloads=False)
"""One that is not listed: more than most take."""


def optimizer_of(name: str) -> Optimizer:
    return OPTIMIZERS.get(name, LIKE_ADAM)
