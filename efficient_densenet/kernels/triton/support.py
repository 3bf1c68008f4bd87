"""What the Triton kernels can run, answered without importing Triton."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import torch

from efficient_densenet.kernels.interface import RELU, Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first GPUs whose tensor cores take bfloat16.
LEAST_CAPABILITY = (8, 0)


def why_not(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    activations: Iterable[Activation],
    small: bool = False,
) -> str | None:
    """Why these kernels cannot run such a pass, or ``None``. The cheapest question comes first."""
    if device.type != "cuda" and not (device.type == "cpu" and _is_interpreted()):
        return f"the input is on {device.type!r}, and Triton kernels are for CUDA"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip:
        return "the GPU is not one of NVIDIA's"
    if device.type == "cuda" and device.index is not None:  # or it is imagined
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"the GPU has compute capability {capability}, below {LEAST_CAPABILITY}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"there are no Triton kernels for {dtype}"
    for activation in activations:
        if activation != RELU:
            return f"there are no Triton kernels with the activation {activation.name!r}"
    return None


def _is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which it does on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
