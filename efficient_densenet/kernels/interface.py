"""The operations that the passes are written against, and what they exchange.

A map is ``(samples, channels, *spatial)``, of any floating-point type. A vector, one value per
channel, is ``(channels,)``. Vectors, and all that is summed over a batch, are in the statistics'
type: float32, or float64 where maps are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from efficient_densenet.kernels.workspace import Workspace


class Activation(NamedTuple):
    """An elementwise function, by its name and its parameters.

    ``"relu"``, ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` (approximate), ``"leaky_relu"`` (its
    negative slope), ``"elu"`` (its alpha) or ``"identity"``.
    """

    name: str
    parameters: tuple[float, ...] = ()


RELU = Activation("relu")


class Statistics(NamedTuple):
    """Batch statistics of a map: mean and biased variance of every channel, two vectors."""

    mean: Tensor
    var: Tensor

    def first(self, channels: int) -> Statistics:
        """Those of the first ``channels``, without a call into PyTorch where they are all."""
        return self if self.mean.shape[0] == channels else self.of(slice(channels))

    def of(self, channels: slice) -> Statistics:
        """Those of some channels, in the same memory."""
        return Statistics(self.mean[channels], self.var[channels])


Norm = Any
"""A batch norm ready to apply, as :meth:`Operations.make_norm` made it."""

Sums = Any
"""What :meth:`Operations.collect` makes dβ and dγ of, in a form of the implementation's own."""


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
    """A convolution with its tensors.

    ``weight`` is ``(out_channels, in_channels / groups, *kernel)``, ``bias`` ``(out_channels,)``;
    of any type, they are converted to that in which the convolution computes.
    """

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
    """What reads a normalised and activated map: pooling, a convolution, or one after the other.

    It reads, computes and leaves maps of ``dtype``. There may be neither.
    """

    pool: Pool | None
    conv: Conv | None
    dtype: torch.dtype

    @property
    def is_empty(self) -> bool:
        """Whether the normalised and activated map is itself the result."""
        return self.pool is None and self.conv is None


class Unit(NamedTuple):
    """What the first ``channels`` of a map go through: ``tail(activation(norm(x)))``.

    ``batch_statistics`` says whether the norm's are those of the map itself.
    """

    norm: Norm
    activation: Activation
    tail: Tail
    channels: int
    batch_statistics: bool = True


Waiting = Callable[[slice, Tensor, Tensor], Tensor]
"""Makes the gradient of some samples of a map that one unit alone reads, by the vectors ``a`` and
``b`` of :meth:`Operations.correct`; of each sample once."""


class UnitGradients(NamedTuple):
    """Gradients of a unit's convolution, and the sums that :meth:`Operations.collect` reads.

    ``conv_weight`` is ``(out_channels, in_channels / groups, *kernel)``, ``conv_bias``
    ``(out_channels,)``, each of the implementation's type; ``None`` where it was not wanted.
    ``waiting`` makes the gradient of what the unit reads, where that can wait.
    """

    conv_weight: Tensor | None
    conv_bias: Tensor | None
    sums: Sums
    waiting: Waiting | None = None


class Operations(Protocol):
    """An implementation of the operations: a module of this package.

    ``kernels/eager.py`` runs everywhere and is the truth of every other one. Maps and vectors are
    given whole: an operation says which of their channels it reads and writes.
    """

    def make_norm(
        self,
        statistics: Statistics,
        channels: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Norm:
        """The norm of the first ``channels``, by γ and β, ``(channels,)``.

        ``y = (x - mean) * scale + β`` with ``scale = γ * invstd``, ``invstd = (var + eps)^(-1/2)``;
        absent, γ is one and β zero.
        """

    def make_tail(self, tail: Tail) -> Tail:
        """The tail as both passes want it: the weight in the type that they read it in."""

    def batch_statistics(self, x: Tensor, dtype: torch.dtype) -> Statistics:
        """Mean and biased variance of each channel of a map, summed in ``dtype``."""

    def append(
        self, y: Tensor, into: Tensor | None, start: int, statistics: Statistics | None
    ) -> None:
        """Write ``y`` into the channels of ``into`` from ``start`` on.

        And into the same channels of ``statistics`` those of what lies there. ``None``: not wanted.
        Without a place they are the statistics of ``y`` where it is.
        """

    def forward_unit(
        self,
        x: Tensor,
        unit: Unit,
        workspace: Workspace,
        *,
        need_statistics: bool,
        reader: Unit | None = None,
    ) -> tuple[Tensor, Statistics | None]:
        """``y = tail(activation((x - mean) * scale + bias))``, and the batch statistics of ``y``.

        The normalised map is not kept; ``y`` has memory of its own. For the unit that reads ``y``
        next an implementation may leave it activated in the workspace.
        """

    def backward_unit(
        self,
        grad: Tensor,
        x: Tensor,
        unit: Unit,
        workspace: Workspace,
        *,
        need_weight: bool,
        need_bias: bool,
        need_sums: bool,
        target: Tensor | None,
        accumulate: bool,
    ) -> UnitGradients:
        """Gradients of :meth:`forward_unit`.

        Batch norm's two batch terms are left to :meth:`correct`, but for implementations that
        correct each reader: what those write is the whole gradient of ``x``.

        ``grad`` is the gradient of ``y``, and not overwritten. With
        ``a = (x - mean) * scale + bias`` and ``d = ∂L/∂activation(a) * activation'(a)``, writes
        ``scale * d`` into ``target``, a map as ``x`` (adds it if ``accumulate``; ``None``: not
        wanted), and returns the convolution's gradients and the sums that :meth:`collect` reads,
        good until the next operation.

        Without a target, but with sums, the gradient of ``x`` is left ``waiting`` for its batch
        terms, as far as it :meth:`can_wait`.
        """

    def can_wait(self, x: Tensor, unit: Unit, workspace: Workspace) -> bool:
        """Whether the gradient of a map that only ``unit`` reads can wait for its batch terms.

        It is then written once, instead of without them first.
        """

    def collect(
        self,
        sums: Sums,
        unit: Unit,
        share: float,
        totals: tuple[Tensor, Tensor] | None,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        """``dβ = Σ d`` and ``dγ = invstd * Σ d * (x - mean)``, two vectors.

        Both are in the statistics' type. Writes ``share * scale * dβ`` and
        ``share * scale * invstd * dγ`` into the first ``unit.channels`` of ``totals``, two vectors,
        or adds them if ``accumulate``. With a ``share`` of one by the number of values of a channel
        they are what :meth:`correct` takes for ``a`` and ``b``.
        """

    def correct(
        self,
        grad: Tensor,
        x: Tensor,
        channels: slice,
        mean: Tensor,
        a: Tensor,
        b: Tensor,
        out: Tensor,
    ) -> Tensor:
        """``out = grad - a - (x - mean) * b``: batch norm's two batch terms, for a finished map.

        Of these ``channels`` of the maps ``grad`` and ``x`` and the vectors ``mean``, ``a`` and
        ``b``; ``out`` has no others. It may be ``grad``, and is of its type or of
        :meth:`corrected_dtype`.
        """

    def drop(
        self,
        y: Tensor,
        seed: Tensor,
        rate: float,
        whole_maps: bool,
        memory_format: torch.memory_format,
    ) -> None:
        """Dropout of a map in place: each value times zero or ``1 / (1 - rate)``.

        Single values are drawn, or with ``whole_maps`` one number for each map of a sample. The
        same are zero whenever ``seed``, an int64 number on the device of ``y``, and ``rate``,
        ``memory_format`` and the shape of ``y`` are the same. Its value is not read on the host:
        other values may lie there when a recorded graph is replayed.
        """

    def corrects_each_reader(self) -> bool:
        """Whether :meth:`backward_unit` subtracts batch norm's batch terms by itself."""

    def inner_format(self, x: Tensor) -> torch.memory_format:
        """The memory format of maps inside a pass on ``x``."""

    def scratch_dtype(self, features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        """The widest type that the workspace holds where maps are stored in ``features``."""

    def summed_dtype(self, features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        """The type in which the gradients of maps stored in ``features`` are summed."""

    def corrected_dtype(self, compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        """The type of a corrected gradient whose readers compute in ``compute``."""


def per_channel(vector: Tensor, dim: int) -> Tensor:
    """The vector ``(channels,)`` shaped to broadcast over a map of ``dim`` dimensions."""
    return vector.view(-1, *(1,) * (dim - 2))
