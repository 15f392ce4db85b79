"""A GPU that fails: no fault of the program's, so another machine goes on from the last commit."""

from __future__ import annotations

SIGNS = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "unspecified launch failure",
    "system not yet initialized",
    "devices are busy or unavailable",
    "device(s) is/are busy or unavailable",
    "no CUDA-capable device is detected",
    "CUDA error: unknown error",
)
"""What CUDA calls such errors
(https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html, `cudaError`). An illegal access is none: it is
mostly a kernel's own fault. A rank that is told of a partner's end says nothing of why that ended."""
HINT = "the run goes on from its newest commit; a machine that fails again and again is worth a report to who rents it out"


def broken(error: BaseException) -> str | None:
    """What a GPU's failure is called; None for any other error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, RuntimeError) and any(sign in str(link) for sign in SIGNS):
            return str(link).partition("\n")[0]
        link = link.__cause__ or link.__context__
    return None
