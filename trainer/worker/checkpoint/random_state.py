"""The random numbers of a process, as tensors: those of Python, of NumPy, and of torch on the CPU and on CUDA."""

from __future__ import annotations

import random
from typing import Any


def capture() -> dict[str, Any]:
    """Return the state of every generator of this process."""
    import numpy as np
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return pack(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002 (the global generator)


def pack(python: Any, numpy: Any, cpu: Any, cuda: Any | None) -> dict[str, Any]:
    """Return the states as tensors.

    Args:
        python: `random.getstate()`, https://docs.python.org/3/library/random.html
        numpy: `numpy.random.get_state()`, https://numpy.org/doc/stable/reference/random/generated/numpy.random.get_state.html
        cpu: `torch.get_rng_state()`.
        cuda: `torch.cuda.get_rng_state()` of this process's device; None without CUDA.
    """
    import torch

    version, words, next_gauss = python
    _, keys, position, has_gauss, cached = numpy
    gauss = [next_gauss is not None, next_gauss or 0.0, has_gauss, cached]
    packed = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "gauss": torch.tensor([float(each) for each in gauss], dtype=torch.float64),
        "cpu": cpu,
    }
    return packed if cuda is None else {**packed, "cuda": cuda}


def restore(packed: dict[str, Any]) -> None:
    """Set every generator of this process. A state of CUDA is ignored on a machine without CUDA."""
    import numpy as np
    import torch

    has_next, next_gauss, has_gauss, cached = packed["gauss"].tolist()
    version, *words = packed["python"].tolist()
    random.setstate((version, tuple(words), next_gauss if has_next else None))
    *keys, position = packed["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))  # noqa: NPY002
    torch.set_rng_state(packed["cpu"])
    if "cuda" in packed and torch.cuda.is_available():
        torch.cuda.set_rng_state(packed["cuda"])
