"""Offers, and the rows that a cache, a snapshot and SkyPilot's adapter hold them as."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict

from launcher.cloud.protocol import CatalogRow
from trainer.hardware import Gpu, Shape, known_gpu

LAMBDA_PCIE = ("gpu_1x_a100", "gpu_2x_a100", "gpu_4x_a100")
"""What Lambda describes as `A100 (40 GB PCIe)`; its `_sxm4` and 8x types are SXM.
https://docs.lambda.ai/api/cloud, `description` of `GET /instance-types`"""
RUNPOD_PCIE = ("A100-80GB", "H100")
"""What SkyPilot's catalog calls RunPod's PCIe boards; the SXM ones end in `-SXM` there.
https://github.com/skypilot-org/skypilot/blob/master/sky/catalog/data_fetchers/fetch_runpod.py"""


class Offer(BaseModel):
    """A machine that can be rented, and what it costs there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    infra: str
    """SkyPilot's name of the cloud: `gcp`, `lambda`."""
    region: str
    """Never left out: the cheapest region on spot is not the cheapest on demand."""
    zone: str | None
    """None: any of the region; a catalog's prices are those of its cheapest zone."""
    instance_type: str
    shape: Shape
    usd_per_h: float | None
    """On demand, of the whole machine, accelerators included; None: not to be had on demand."""
    spot_usd_per_h: float | None
    """None: no spot there."""


class Prices(BaseModel):
    """Offers, and how much they are to be believed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offers: tuple[Offer, ...]
    as_of: date
    """When the oldest of them was asked for."""
    source: Literal["skypilot", "cache", "snapshot"]
    """Of the least live of them."""
    notes: tuple[str, ...] = ()
    """What a reader of the prices should know: why they are old, what has none."""


def offer_of(row: CatalogRow) -> Offer | None:
    """The offer that a row is; None if its accelerator is no GPU of the table, as TPUs are not."""
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
