"""The operations that the passes are written against, and what they exchange.

A map is ``(samples, channels, *spatial)``. Vectors of one value per channel have as many dimensions
as the map, to broadcast over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise function, by its name in ``torch.nn.functional``, and its parameters.

    ``"relu"``, ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"leaky_relu"`` (negative slope),
    ``"elu"`` (alpha) or ``"identity"``.
    """

    name: str
    parameters: tuple[float, ...] = ()


RELU = Activation("relu")


class Statistics(NamedTuple):
    """Batch statistics of a map: mean and biased variance of every channel."""

    mean: Tensor
    var: Tensor

    def first(self, channels: int) -> Statistics:
        """Those of the first ``channels``."""
        return self.of(slice(channels))

    def of(self, channels: slice) -> Statistics:
        """Those of some channels, in the same memory."""
        return Statistics(self.mean[channels], self.var[channels])


class Norm(NamedTuple):
    """A batch norm ready to apply: ``y = (x - mean) * scale + bias``, ``scale = γ * invstd``."""

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

    def positions(self, size: Sequence[int], kernel: Sequence[int]) -> int:
        """Positions that a convolution with this ``kernel`` leaves of a map of this ``size``."""
        count = 1
        steps = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        for n, k, s, p, d in steps:
            count *= (n + 2 * p - d * (k - 1) - 1) // s + 1
        return count


class Conv(NamedTuple):
    """A convolution with its tensors."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


class Pool(NamedTuple):
    """A pooling: ``"average"`` or ``"maximum"`` of windows, or the average of ``"all"`` positions.

    The fields after ``kind`` are the arguments of PyTorch's pooling modules.
    """

    kind: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_padding: bool = True
    divisor: int | None = None


class Tail(NamedTuple):
    """What reads a normalised and rectified map: pooling, a convolution, or one after the other.

    It computes in ``dtype``.
    """

    pool: Pool | None
    conv: Conv | None
    dtype: torch.dtype


class UnitGradients(NamedTuple):
    """Gradients of the convolution, and the sums per channel that batch norm's need.

    ``sums`` is the implementation's own form of ``Σ d`` and ``Σ d * (x - mean)`` for the gradient
    ``d`` at the rectifier's input: what :meth:`Operations.collect` reads.
    """

    conv_weight: Tensor | None
    conv_bias: Tensor | None
    sums: Any


class Operations(Protocol):
    """An implementation of the operations: a module of this package.

    ``kernels/eager.py`` runs everywhere and is the truth of every other one.
    """

    def Workspace(
        self, like: Tensor, widest: int, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Any:
        """The shared BN storage of one pass, which every layer overwrites.

        ``like`` is a map of the samples and the size that will be normalised, ``widest`` the
        channels of the widest of them; ``dtype`` is that of statistics, the widest one stored. Its
        ``narrow(widest)`` says that what is still to come is no wider than that.
        """

    def ready(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Norm:
        """A norm from statistics shaped to broadcast over a map, and vectors γ and β.

        ``invstd = (var + eps)^(-1/2)``, ``scale = γ * invstd``; absent, γ is one and β zero.
        """

    def batch_statistics(self, x: Tensor, dtype: torch.dtype) -> Statistics:
        """Mean and biased variance of each channel of a map, summed in ``dtype``."""

    def append(self, y: Tensor, into: Tensor | None, statistics: Statistics | None) -> None:
        """Write ``y`` into the place ``into``, and into ``statistics`` those of what lies there.

        ``None``: not wanted. Without a place they are the statistics of ``y`` where it is.
        """

    def norm_relu_tail(
        self, x: Tensor, norm: Norm, tail: Tail, workspace: Any, *, need_statistics: bool
    ) -> tuple[Tensor, Statistics | None]:
        """``y = tail(relu((x - mean) * scale + bias))``, and the batch statistics of ``y``.

        The normalised map is not kept.
        """

    def norm_relu_tail_backward(
        self,
        grad: Tensor,
        x: Tensor,
        norm: Norm,
        tail: Tail,
        workspace: Any,
        *,
        need_weight: bool,
        need_bias: bool,
        need_sums: bool,
        target: Tensor | None,
        accumulate: bool,
    ) -> UnitGradients:
        """Gradients of :meth:`norm_relu_tail`; batch norm's correction is left to :meth:`correct`.

        With ``d`` the gradient at the rectifier's input, writes ``scale * d`` into ``target`` (adds
        it if ``accumulate``; ``None``: not wanted) and returns the convolution's gradients and what
        :meth:`collect` reads.
        """

    def collect(
        self, sums: Any, norm: Norm, share: float, totals: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """``dβ = Σ d`` and ``dγ = invstd * Σ d * (x - mean)``, the gradients of a batch norm.

        Adds ``share * scale * dβ`` and ``share * scale * invstd * dγ`` to ``totals``: with a share
        of one by the number of values, what :meth:`correct` takes for ``a`` and ``b``.
        """

    def correct(
        self, grad: Tensor, x: Tensor, mean: Tensor, a: Tensor, b: Tensor, out: Tensor
    ) -> Tensor:
        """``out = grad - a - (x - mean) * b``: batch norm's two batch terms, for a finished map.

        ``out`` may be ``grad``, and is of its type or of :meth:`corrected_dtype`.
        """

    def corrected_dtype(self, compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        """The type of a corrected gradient whose readers compute in ``compute``."""


def per_channel(vector: Tensor, dim: int) -> Tensor:
    """The vector ``(channels,)`` shaped to broadcast over a map of ``dim`` dimensions."""
    return vector.view(-1, *(1,) * (dim - 2))
