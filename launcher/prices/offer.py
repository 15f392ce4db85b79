"""Offers: machines that can be rented and their prices, and how a catalog row becomes an offer."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict

from launcher.cloud.protocol import CatalogRow
from trainer.hardware import Gpu, Shape, known_gpu

LAMBDA_PCIE = ("gpu_1x_a100", "gpu_2x_a100", "gpu_4x_a100")
"""Lambda's instance types with PCIe boards, `A100 (40 GB PCIe)`; its `_sxm4` and 8x types have SXM boards.
https://docs.lambda.ai/api/cloud, `description` of `GET /instance-types`"""
RUNPOD_PCIE = ("A100-80GB", "H100")
"""RunPod's PCIe boards, by their names in SkyPilot's catalog; the names of its SXM boards end in `-SXM`.
https://github.com/skypilot-org/skypilot/blob/master/sky/catalog/data_fetchers/fetch_runpod.py"""


class Offer(BaseModel):
    """A machine that can be rented in a region, and its price."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    infra: str
    """SkyPilot's name for the cloud: `gcp`, `lambda`."""
    region: str
    """Required, because the cheapest region for spot is not the cheapest on demand."""
    zone: str | None
    """None: any zone of the region; a catalog has the prices of the cheapest zone."""
    instance_type: str
    shape: Shape
    usd_per_h: float | None
    """On-demand price of the whole machine with its accelerators; None: not offered on demand."""
    spot_usd_per_h: float | None
    """None: not offered on spot."""


class Prices(BaseModel):
    """Offers, with the age and the source of their prices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offers: tuple[Offer, ...]
    as_of: date
    """When the oldest prices were read from the catalog."""
    source: Literal["skypilot", "cache", "snapshot"]
    """The least fresh source among them."""
    notes: tuple[str, ...] = ()
    """What a user should know about the prices: why they are old, and which clouds have none."""


def offer_of(row: CatalogRow) -> Offer | None:
    """Return a row as an offer; None if its accelerator is not in the table of GPUs, such as a TPU."""
    board = _board(row)
    if board is None:
        return None
    return Offer(
        infra=row.infra,
        region=row.region,
        zone=None,
        instance_type=row.instance_type,
        shape=Shape(
            accelerator=row.accelerator,
            board=board.name if board.name.endswith("-PCIE") else None,
            count=row.gpus,
            memory_gib=board.memory_gib,
            cores=row.cores,
            host_memory_gib=row.host_memory_gib,
            node=row.instance_type,
        ),
        usd_per_h=row.usd_per_h,
        spot_usd_per_h=row.spot_usd_per_h,
    )


def _board(row: CatalogRow) -> Gpu | None:
    pcie = (
        "pcie" in row.instance_type.lower()
        or (row.infra == "lambda" and row.instance_type in LAMBDA_PCIE)
        or (row.infra == "runpod" and row.accelerator in RUNPOD_PCIE)
    )
    return (known_gpu(f"{row.accelerator}-PCIE") if pcie else None) or known_gpu(row.accelerator)
