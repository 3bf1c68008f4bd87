"""Gradients of maps that many units read, and of a unit's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.spec import BlockSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_means
from efficient_densenet.functional.units import Reading, UnitRunner
from efficient_densenet.kernels.interface import Statistics, Unit, Waiting
from efficient_densenet.kernels.layout import empty_map, in_dtype


class GradientStorage(NamedTuple):
    """Where the gradients of a map are summed.

    ``grad`` is ``(N, channels, *spatial)``, ``None`` of one that waits. ``mean_d`` and ``mean_dx``
    are ``S1 / M`` and ``S2 / M`` of docs/derivation.md, section 6: vectors ``(channels,)`` in the
    statistics' type.
    """

    grad: Tensor | None
    mean_d: Tensor
    mean_dx: Tensor

    def fits(self, maps: Tensor, waits: bool) -> bool:
        """Whether the gradient of these maps can lie here."""
        if self.grad is None:
            return waits and len(self.mean_d) == maps.shape[1]
        return not waits and self.grad.shape == maps.shape


class MapGradient:
    """Gradient of a map, summed over the units that read it: ``G``, ``S1 / M`` and ``S2 / M``.

    Batch norm's correction is the same for every reader, so it waits until the map is finished
    (docs/derivation.md, section 6). ``maps`` is ``(N, channels, *spatial)``, ``G`` of its shape and
    of ``dtype``; ``statistics`` are those of ``maps``, ``None`` if no reader uses any. The sums are
    written into ``storage`` if it has the map's shape. The channels of a block's features are
    counted by age; ``spec`` says where they lie. That of a map with one reader ``waits`` if it can:
    it is written once, when it is finished.
    """

    def __init__(
        self,
        units: UnitRunner,
        maps: Tensor,
        statistics: Statistics | None,
        process_group: Any,
        dtype: torch.dtype,
        storage: GradientStorage | None = None,
        spec: BlockSpec | None = None,
        waits: bool = False,
    ) -> None:
        self.units, self.maps, self.statistics = units, maps, statistics
        self.process_group = process_group
        self.spec = spec if spec and spec.new_first else None
        if storage is None or not storage.fits(maps, waits):
            exact, channels = units.types.statistics, maps.shape[1]
            means = [maps.new_empty(channels, dtype=exact) for _ in range(2)]
            grad = None if waits else empty_map(maps, channels, units.memory_format, dtype)
            storage = GradientStorage(grad, *means)
        self.storage = storage
        _, self.mean_d, self.mean_dx = storage
        self.waits = waits
        self.waiting: Waiting | None = None
        self.count = maps.numel() // maps.shape[1]
        self.written = False
        self.corrected_channels = 0

    @property
    def grad(self) -> Tensor:
        """``G``, which one that waits has not."""
        assert self.storage.grad is not None
        return self.storage.grad

    def reading(self, channels: int) -> Reading:
        """The first ``channels``, for a part that reads them."""
        statistics = self.statistics
        if self.spec and statistics:
            statistics = self.spec.oldest_statistics(statistics, channels)
        return Reading(self._first(channels, self.maps, 1), channels, statistics)

    def _first(self, channels: int, vector: Tensor, dim: int = 0) -> Tensor:
        """A vector (or map, ``dim=1``) seen so that the first ``channels`` are those by age."""
        return vector if self.spec is None else self.spec.oldest(vector, channels, dim)

    def start(self, grad: Tensor) -> None:
        """Begin with the gradient that arrives from outside the block."""
        self.grad.copy_(grad)
        self.written = True

    def add(self, parts: Sequence[Tensor | None], channels: Sequence[int]) -> None:
        """Add the gradients of the first channels, in parts of so many ``channels`` each."""
        totals = self._first(sum(channels), self.grad, 1)[:, : sum(channels)].split(channels, 1)
        for total, part in zip(totals, parts, strict=True):
            if part is not None:
                total.add_(part)

    def back_through(
        self,
        grad: Tensor,
        ready: Unit,
        unit: UnitSpec,
        tensors: UnitTensors,
        needs: UnitTensors,
        needs_maps: bool,
    ) -> UnitTensors:
        """Add the gradient through ``unit``, which reads the channels of its norm.

        Returns the gradients of the unit's own tensors.
        """
        corrects = needs_maps and unit.batch_statistics
        defers = corrects and not self.units.ops.corrects_each_reader()
        written = needs_maps and not self.waits
        weight, bias, sums, waiting = self.units.backward(
            grad,
            self._first(ready.channels, self.maps, 1),
            ready,
            needs,
            need_sums=needs.weight or needs.bias or defers,
            target=self._first(ready.channels, self.grad, 1) if written else None,
            accumulate=self.written,
        )
        self.waiting = waiting if needs_maps and self.waits else None
        self.written = self.written or needs_maps
        dbeta = dgamma = None
        if sums is not None:
            channels = ready.channels
            totals = self._first(channels, self.mean_d), self._first(channels, self.mean_dx)
            # The first reader has the most channels: it writes all that the others add to.
            adds = self.corrected_channels > 0
            dbeta, dgamma = self.units.ops.collect(
                sums, ready, 1.0 / self.count, totals if defers else None, adds
            )
            self.corrected_channels = max(self.corrected_channels, ready.channels if defers else 0)
        return UnitTensors(
            weight=gradient_like(dgamma, tensors.weight, needs.weight),
            bias=gradient_like(dbeta, tensors.bias, needs.bias),
            conv_weight=gradient_like(weight, tensors.conv_weight, needs.conv_weight),
            conv_bias=gradient_like(bias, tensors.conv_bias, needs.conv_bias),
        )

    def finish(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient of the channels ``[start, stop)``, whose readers have all been walked.

        In ``dtype``, by default in the type of corrected gradients.
        """
        if self.waiting is not None:
            self._join(slice(None))
            return self.waiting(slice(0, self.maps.shape[0]), self.mean_d, self.mean_dx)
        dtype, channels = dtype or self.units.corrected_dtype, slice(start, stop)
        if self.spec:
            channels = self.spec.span(start, stop)
        whole = stop - start == self.maps.shape[1]
        corrects = self.statistics is not None and start < self.corrected_channels
        if whole and (dtype == self.grad.dtype or not corrects):
            out = self.grad
        else:
            out = empty_map(self.grad, stop - start, self.units.memory_format, dtype)
        if self.statistics is None or not corrects:
            return out if whole else out.copy_(self.grad[:, channels])
        self._join(channels)
        vectors = (self.statistics.mean, self.mean_d, self.mean_dx)
        return self.units.ops.correct(self.grad, self.maps, channels, *vectors, out)

    def _join(self, channels: slice) -> None:
        """Take the means over all processes, if there are several, of finished channels."""
        if self.process_group is None:
            return
        means = [self.mean_d[channels], self.mean_dx[channels]]
        joined = joined_means(means, self.count, self.process_group)
        for mean, of_all in zip(means, joined, strict=True):
            mean.copy_(of_all)


def gradient_like(gradient: Tensor | None, tensor: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient as autograd takes it for ``tensor``, ``None`` where none is needed."""
    if gradient is None or tensor is None or not needed:
        return None
    if gradient.shape != tensor.shape:
        gradient = gradient.view_as(tensor)
    gradient = in_dtype(gradient, tensor.dtype)
    # As the tensor lies in memory: autograd would make a copy, and both would live for a while.
    lies = zip(gradient.shape, gradient.stride(), tensor.stride(), strict=True)
    if all(here == there for size, here, there in lies if size > 1):
        return gradient
    return torch.empty_like(tensor).copy_(gradient)
