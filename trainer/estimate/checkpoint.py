"""What a save and a start cost.

The rates to and from the network are round figures for a cloud's own bucket and for the Hub; a run's events tell
the real ones (`committed` has bytes and seconds), and the caller may pass them in.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from trainer import memory
from trainer.estimate.arithmetic import HALF, StepInputs

STAGING_BYTES_PER_S = 2.4e9
"""Of one process, into memory: 512 MiB in 0.22 s (`bench/checkpoint.md`)."""


class Rates(BaseModel):
    """What the network of a node gives, GB/s and seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bucket_gbps: float = Field(default=1.0, gt=0)
    """To and from the bucket, of one node. A guess, a twelfth of a 100 Gbit/s network."""
    hub_gbps: float = Field(default=0.3, gt=0)
    """From the model's home. A guess."""
    start_s: float = Field(default=240.0, ge=0)
    """From a machine's start to a running supervisor: SkyPilot's set-up and the pull of an image. A guess."""
    import_s: float = Field(default=45.0, ge=0)
    """Imports of torch, Transformers and TRL, 25 s without compiled files, and the data set's preparation."""


def checkpoint_bytes(run: StepInputs) -> int:
    """What one save uploads."""
    return memory.checkpoint_bytes(run.recipe, run.architecture, run.layout)


def save_s(run: StepInputs) -> float:
    """What training waits for: the copy into staging, by every process that holds a part."""
    return checkpoint_bytes(run) / run.layout.state_shards / STAGING_BYTES_PER_S


def upload_s(run: StepInputs, rates: Rates) -> float:
    """In the background, by all nodes at once if the state is sharded."""
    return checkpoint_bytes(run) / _writers(run) / (rates.bucket_gbps * 1e9)


def restore_s(run: StepInputs, rates: Rates) -> float:
    """Down from the bucket, and into memory."""
    return upload_s(run, rates) + save_s(run)


def load_s(run: StepInputs, rates: Rates) -> float:
    """A fresh node until its first step: the machine's set-up, the model, the imports."""
    model = HALF * run.architecture.parameters if run.recipe.model_name_or_path else 0
    copies = 2 if run.layout.reference == "model" else 1
    reading = copies * model / STAGING_BYTES_PER_S
    return rates.start_s + model / (rates.hub_gbps * 1e9) + reading + rates.import_s


def _writers(run: StepInputs) -> int:
    return run.layout.nodes if run.layout.state_shards > 1 else 1
