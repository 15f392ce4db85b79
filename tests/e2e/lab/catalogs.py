"""The shipped price snapshot as the files that SkyPilot downloads, so that its optimizer and our plan see one price.

https://github.com/skypilot-org/skypilot-catalog has the originals. What the snapshot does not have is made up:
one zone a region, and of Google's prices, which are of machine and GPUs apart, which part is the GPUs'.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.cloud.protocol import CatalogRow
from launcher.prices.store import SNAPSHOT

GCP = "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"
LAMBDA = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice"
IMAGES = "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId"
QUOTAS = "Accelerator,OnDemandInstanceCode,SpotInstanceCode"
IMAGE_TAGS = ("custom-gpu-ubuntu-2204", "custom-gpu-ubuntu-2204-cuda13", "gpu-direct-cos")
"""What SkyPilot starts GPU machines with on Google's cloud (sky/clouds/gcp.py)."""

Line = dict[str, object]


def write(folder: Path) -> None:
    """Write `folder`, which SkyPilot has at `~/.sky/catalogs/v8`."""
    rows = [CatalogRow(*row) for row in json.loads(SNAPSHOT.read_text())["rows"]]
    _write(folder / "gcp" / "vms.csv", GCP, _gcp([row for row in rows if row.infra == "gcp"]))
    _write(
        folder / "lambda" / "vms.csv", LAMBDA, map(_lambda, (row for row in rows if row.infra == "lambda"))
    )
    images = (
        {"Tag": f"skypilot:{tag}", "ImageId": f"projects/pretend/global/images/{tag}"} for tag in IMAGE_TAGS
    )
    _write(folder / "gcp" / "images.csv", IMAGES, images)
    _write(folder / "gcp" / "accelerator_quota_mapping.csv", QUOTAS, ())
    _write(folder / "common" / "accelerators.csv", "AcceleratorName,Clouds", _accelerators(rows))


def _write(path: Path, columns: str, lines: Iterable[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns.split(","), restval="")
        writer.writeheader()
        writer.writerows(lines)


def _accelerators(rows: Iterable[CatalogRow]) -> Iterator[Line]:
    clouds: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        clouds[row.accelerator].add({"gcp": "GCP", "lambda": "Lambda"}[row.infra])
    for name, found in sorted(clouds.items()):
        yield {"AcceleratorName": name, "Clouds": sorted(found)}


def _lambda(row: CatalogRow) -> Line:
    return {
        "InstanceType": row.instance_type,
        "AcceleratorName": row.accelerator,
        "AcceleratorCount": row.gpus,
        "vCPUs": row.cores,
        "MemoryGiB": row.host_memory_gib,
        "Price": row.usd_per_h,
        "Region": row.region,
    }


def _gcp(rows: list[CatalogRow]) -> Iterator[Line]:
    """The GPUs cost what the cheapest machine with them costs; a machine costs the rest."""
    alike: dict[tuple[str, int, str], list[CatalogRow]] = defaultdict(list)
    for row in rows:
        alike[row.accelerator, row.gpus, row.region].append(row)
    for (accelerator, gpus, region), machines in alike.items():
        where = {"Region": region, "AvailabilityZone": f"{region}-a"}
        price = _least(machine.usd_per_h for machine in machines)
        spot = _least(machine.spot_usd_per_h for machine in machines)
        cost = {"Price": price, "SpotPrice": spot}
        yield {"AcceleratorName": accelerator, "AcceleratorCount": gpus, **cost, **where}
        for machine in machines:
            yield {
                "InstanceType": machine.instance_type,
                "vCPUs": machine.cores,
                "MemoryGiB": machine.host_memory_gib,
                "Price": _rest(machine.usd_per_h, price),
                "SpotPrice": _rest(machine.spot_usd_per_h, spot),
                **where,
            }


def _least(prices: Iterable[float | None]) -> float | None:
    return min((price for price in prices if price is not None), default=None)


def _rest(price: float | None, part: float | None) -> float | None:
    return None if price is None or part is None else round(price - part, 5)
