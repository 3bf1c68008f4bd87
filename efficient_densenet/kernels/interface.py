"""What the operations exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """A batch norm ready to apply: ``y = (x - mean) * scale + bias``, ``scale = γ * invstd``.

    Every vector has one value per channel and the map's number of dimensions.
    """

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    bias: Tensor


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Conv(NamedTuple):
    """A convolution with its tensors."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


class Tail(NamedTuple):
    """What reads a normalised and rectified map: pooling, a convolution, or one after the other.

    It computes in ``dtype``.
    """

    pool: Callable[[Tensor], Tensor] | None
    conv: Conv | None
    dtype: torch.dtype


class UnitGradients(NamedTuple):
    """Gradients of the convolution, and the two sums per channel that batch norm's need.

    ``sum_d = Σ d`` and ``sum_dx = Σ d * (x - mean)`` for the gradient ``d`` at the rectifier's
    input, in the shape of the norm's vectors.
    """

    conv_weight: Tensor | None
    conv_bias: Tensor | None
    sum_d: Tensor | None
    sum_dx: Tensor | None


def per_channel(vector: Tensor, dim: int) -> Tensor:
    """The vector ``(channels,)`` shaped to broadcast over a map of ``dim`` dimensions."""
    return vector.view(-1, *(1,) * (dim - 2))
