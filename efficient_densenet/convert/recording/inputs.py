"""Inputs without values for modules that nobody has called yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BATCH, SIZE = 2, 224
"""Without values no size is large; networks with a head for one size mostly expect this one."""


def input_for(module: nn.Module) -> Tensor | None:
    """A map for the first norm or convolution below ``module``, ``None`` if there is neither.

    As many dimensions as convolutions have, as many channels as the first of them reads, and the
    type of their weights.
    """
    weight = next((t for t in module.parameters() if not is_lazy(t) and t.dim() > 2), None)
    channels = next((c for part in module.modules() if (c := _channels(part))), None)
    if channels is None:
        return None
    if weight is not None:
        dims = weight.dim() - 2
    else:
        dims = next((i for i, norm in enumerate(NORMS, 1) if isinstance(module, norm)), 2)
    return map_for(module, (BATCH, channels, *(SIZE,) * dims))


def map_for(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """A map of the type and on the device of a module's parameters: one value, expanded."""
    like = next((t for t in module.parameters() if t.is_floating_point()), torch.empty(()))
    with _disable_current_modes():  # whoever counts allocations is not to count this one
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(*shape)


def _channels(part: nn.Module) -> int | None:
    """How many channels a norm or convolution reads."""
    for name in ("in_channels", "num_features", "num_channels"):
        value: Any = getattr(part, name, None)
        if isinstance(value, int) and part._parameters:
            return value
    return None
