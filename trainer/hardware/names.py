"""From what `nvidia-smi` calls a GPU to what it is rented as."""

from __future__ import annotations

import math

MAKERS = ("NVIDIA", "Tesla", "GeForce", "Quadro")
LARGER = {"A100": (60, "-80GB"), "V100": (20, "-32GB")}
"""GiB above which it is the larger of the two boards of that name."""
PCIE_BOARDS = ("A100", "A100-80GB", "H100")
"""SkyPilot calls them as it calls the SXM ones, which are faster or better linked."""


def accelerator_name(name: str, memory_gib: float) -> str:
    """SkyPilot's name for what `nvidia-smi` calls a GPU: `NVIDIA A100-SXM4-80GB` is `A100-80GB`."""
    words = _words(name)
    if not words:
        return "GPU"
    if words[0] in ("RTX", "GTX"):
        number = words[1:3] if words[1:2] == ["PRO"] else words[1:2]
        return words[0] + "".join(number) + ("-Ada" if "Ada" in words else "")
    least_gib, suffix = LARGER.get(words[0], (math.inf, ""))
    return words[0] + (suffix if memory_gib > least_gib else "")


def board_name(name: str, memory_gib: float) -> str | None:
    """The GPU table's name for a board that SkyPilot's name does not tell from a better one; None for others."""
    rented_as = accelerator_name(name, memory_gib)
    words = [word.upper() for word in _words(name)]
    if rented_as in PCIE_BOARDS and "PCIE" in words:
        return f"{rented_as}-PCIE"
    return "H100-NVL" if rented_as == "H100" and "NVL" in words else None


def _words(name: str) -> list[str]:
    return [word for word in name.replace("-", " ").split() if word not in MAKERS]
