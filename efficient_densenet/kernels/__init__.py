"""The operations that the recomputing functions are written against, and their implementations.

Which of them runs: that of the argument ``kernels``; if it is ``"auto"``, that of the environment
variable ``EFFICIENT_DENSENET_KERNELS``; if that is ``auto`` or not there, Triton on a CUDA device
where :func:`why_eager` has no objection, otherwise eager.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Literal, get_args

import torch

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.interface import Operations

Kernels = Literal["auto", "eager", "triton"]

VARIABLE = "EFFICIENT_DENSENET_KERNELS"
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first GPUs whose tensor cores take bfloat16.
LEAST_CAPABILITY = (8, 0)


def check(name: str, source: str = "kernels") -> None:
    """Raise ``ValueError`` unless ``name`` is one of ``Kernels``."""
    if name not in get_args(Kernels):
        raise ValueError(f"{source} must be one of {get_args(Kernels)}, got {name!r}")


def requested(name: str) -> str:
    """The argument ``name``, or what the environment says if that leaves it open."""
    if name != "auto":
        return name
    wanted = os.environ.get(VARIABLE, "auto")
    check(wanted, VARIABLE)
    return wanted


def why_eager(name: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why maps of these types on ``device`` would run on the eager operations, or ``None``."""
    name = requested(name)
    if name == "eager":
        return 'kernels="eager"'
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    unknown = [dtype for dtype in dtypes if dtype not in TRITON_DTYPES]
    if unknown:
        return f"there are no Triton kernels for {unknown[0]}"
    if device.type == "cuda":
        return _unsuitable(device)
    if device.type == "cpu" and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels are for CUDA, and the input is on {device.type!r}"


def chosen(name: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> Operations:
    """The implementation for maps of these types on ``device``."""
    check(name)
    return load("eager" if why_eager(name, device, dtypes) else "triton")


def load(name: str) -> Operations:
    """The implementation of that name."""
    if name == "eager":
        return eager
    from efficient_densenet.kernels import triton  # imports Triton

    return triton


def _unsuitable(device: torch.device) -> str | None:
    if torch.version.hip:
        return "the GPU is not one of NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability}, below {LEAST_CAPABILITY}"
    return None
