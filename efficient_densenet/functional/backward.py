"""The backward passes: recompute what was not kept, and correct every map's gradient once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.forward import Saved, seed_of_each
from efficient_densenet.functional.opaque import check_same, is_same, run_again
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_means
from efficient_densenet.functional.units import UnitRunner
from efficient_densenet.kernels.interface import Statistics, Unit
from efficient_densenet.kernels.layout import empty_map, in_dtype


class GradientStorage(NamedTuple):
    """Where the gradients of a map are summed.

    ``grad`` is ``(N, channels, *spatial)``. ``mean_d`` and ``mean_dx`` are ``S1 / M`` and
    ``S2 / M`` of docs/derivation.md, section 6: vectors ``(channels,)`` in the statistics' type.
    """

    grad: Tensor
    mean_d: Tensor
    mean_dx: Tensor


class MapGradient:
    """Gradient of a map, summed over the units that read it: ``G``, ``S1 / M`` and ``S2 / M``.

    Batch norm's correction is the same for every reader, so it waits until the map is finished
    (docs/derivation.md, section 6). ``maps`` is ``(N, channels, *spatial)``, ``G`` of its shape and
    of ``dtype``; ``statistics`` are those of ``maps``, ``None`` if no reader uses any. The sums are
    written into ``storage`` if it has the map's shape. The channels of a block's features are
    counted by age; ``spec`` says where they lie.
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
    ) -> None:
        self.units, self.maps, self.statistics = units, maps, statistics
        self.process_group = process_group
        self.spec = spec if spec and spec.new_first else None
        if storage is None or storage.grad.shape != maps.shape:
            exact = units.types.statistics
            means = [maps.new_empty(maps.shape[1], dtype=exact) for _ in range(2)]
            storage = GradientStorage(
                empty_map(maps, maps.shape[1], units.memory_format, dtype), *means
            )
        self.storage = storage
        self.grad, self.mean_d, self.mean_dx = storage
        self.count = maps.numel() // maps.shape[1]
        self.written = False
        self.corrected_channels = 0

    def ready(self, unit: UnitSpec, tensors: UnitTensors, channels: int) -> Unit:
        """A unit that reads the first ``channels``."""
        statistics = self.statistics
        if self.spec and statistics:
            statistics = self.spec.oldest_statistics(statistics, channels)
        return self.units.ready(unit, tensors, statistics, channels)

    def first(self, channels: int, vector: Tensor, dim: int = 0) -> Tensor:
        """A vector (or map, ``dim=1``) seen so that the first ``channels`` are those by age."""
        return vector if self.spec is None else self.spec.oldest(vector, channels, dim)

    def start(self, grad: Tensor) -> None:
        """Begin with the gradient that arrives from outside the block."""
        self.grad.copy_(grad)
        self.written = True

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
        weight, bias, sums = self.units.backward(
            grad,
            self.first(ready.channels, self.maps, 1),
            ready,
            needs,
            need_sums=needs.weight or needs.bias or defers,
            target=self.first(ready.channels, self.grad, 1) if needs_maps else None,
            accumulate=self.written,
        )
        self.written = self.written or needs_maps
        dbeta = dgamma = None
        if sums is not None:
            channels = ready.channels
            totals = self.first(channels, self.mean_d), self.first(channels, self.mean_dx)
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
        if self.process_group is not None:
            self._join(channels)
        vectors = (self.statistics.mean, self.mean_d, self.mean_dx)
        return self.units.ops.correct(self.grad, self.maps, channels, *vectors, out)

    def _join(self, channels: slice) -> None:
        """Take the means over all processes, of channels that are finished."""
        means = [self.mean_d[channels], self.mean_dx[channels]]
        joined = joined_means(means, self.count, self.process_group)
        for mean, of_all in zip(means, joined, strict=True):
            mean.copy_(of_all)


def backward_block(
    spec: BlockSpec,
    seeds: Tensor | None,
    saved: Saved,
    flat: Sequence[Tensor | None],
    grad: Tensor,
    needs_x: bool,
    needs_flat: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the input of a block and of ``flat``, as far as they are needed.

    ``grad`` is that of the result; the rest is as :func:`forward.forward_block` took and left it.
    """
    with torch.no_grad(), outside_autocast(grad.device):
        walk = BlockBackward(spec, seed_of_each(spec, seeds), saved, flat, needs_x, needs_flat)
        return walk.run(grad)


class BlockBackward:
    """The walk from the block's exit down to its first layer."""

    def __init__(
        self,
        spec: BlockSpec,
        seeds: Sequence[Tensor | None],
        saved: Saved,
        flat: Sequence[Tensor | None],
        needs_x: bool,
        needs_flat: Sequence[bool],
    ) -> None:
        self.spec, self.seeds, self.saved, self.needs_x = spec, seeds, saved, needs_x
        self.layers, self.exit_tensors = spec.nested(flat)
        self.needs, self.needs_exit = spec.nested(needs_flat)
        # Below the lowest layer that has something to learn, nothing is computed.
        learning = (i for i, needs in enumerate(self.needs) if any(map(any, needs)))
        self.lowest = 0 if needs_x else next(learning, len(self.layers))
        x = saved.features
        memory_format = spec.format(x)
        features = x.contiguous(memory_format=memory_format)
        self.units = UnitRunner(spec, features, spec.widest, memory_format)
        group, summed = spec.process_group, self.units.summed_dtype
        self.total = MapGradient(self.units, features, saved.statistics, group, summed, spec=spec)
        # Every layer's bottleneck gradient in turn: fresh pages cost more than what is computed.
        self.bottleneck_storage: GradientStorage | None = None
        # Of each opaque layer, whether it made the same maps again: looked at once, at the end.
        self.same: list[tuple[str, Tensor]] = []

    def run(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the block's input and of ``flat``, as far as they are needed."""
        gradients: list[Sequence[Tensor | None]] = []  # of the last unit first
        if self.spec.exit:
            gradients.append(self._exit(grad))
            self.units.workspace.narrow(self.spec.widest_in_layers)
        else:
            self.total.start(grad)
        del grad
        for i in reversed(range(len(self.layers))):
            if i < self.lowest:
                gradients += [(None,) * len(unit) for unit in reversed(self.layers[i])]
            elif self.spec.layers[i].opaque:
                gradients.append(self._opaque(i))
            else:
                gradients += self._layer(i)
        check_same(self.same)
        dx = None
        if self.needs_x:
            dx = self.total.finish(0, self.spec.input_channels, self.total.grad.dtype)
        return dx, [tensor for unit in reversed(gradients) for tensor in unit]

    def _exit(self, grad: Tensor) -> UnitTensors:
        unit, tensors = self.spec.exit, self.exit_tensors
        assert unit is not None
        ready = self.total.ready(unit, tensors, self.spec.channels)
        below = self.needs_x or self.lowest < len(self.layers)
        return self.total.back_through(grad, ready, unit, tensors, self.needs_exit, below)

    def _layer(self, i: int) -> Iterator[UnitTensors]:
        """Gradients of a layer's units, the last first."""
        layer, needs = self.spec.layers[i], self.needs[i]
        first, *second = zip(layer.units, self.layers[i], strict=True)
        ready = self.total.ready(*first, layer.channels)
        below = self.needs_x or i > self.lowest
        grad = self.total.finish(layer.channels, layer.channels + layer.growth)
        seed = self.seeds[i]
        if seed is not None:
            self.units.drop(grad, layer, seed)
        needs_first = below or any(needs[0])
        if second:
            z = MapGradient(
                self.units,
                self._bottleneck(i, ready),
                self.saved.bottleneck_statistics[i],
                self.spec.process_group,
                self.units.corrected_dtype,  # of one reader's contribution alone
                self.bottleneck_storage,
            )
            self.bottleneck_storage = z.storage
            reader = z.ready(*second[0], layer.width)
            yield z.back_through(grad, reader, *second[0], needs[1], needs_first)
            grad = z.finish(0, layer.width) if needs_first else grad
            del z
        if needs_first:
            yield self.total.back_through(grad, ready, *first, needs[0], below)
        else:
            yield UnitTensors()

    def _opaque(self, i: int) -> list[Tensor | None]:
        """Gradients of the tensors of an opaque layer, which is run again."""
        layer, tensors, needs = self.spec.layers[i], self.layers[i][0], self.needs[i][0]
        random, surroundings = self.saved.random[i], self.spec.surroundings
        assert layer.opaque is not None and random is not None and surroundings is not None
        channels, below = layer.channels, self.needs_x or i > self.lowest
        grad = self.total.finish(channels, channels + layer.growth)
        read = self.spec.span(0, channels)
        maps, totals = (
            tensor[:, read].split(layer.opaque.channels, 1)
            for tensor in (self.total.maps, self.total.grad)
        )
        wanted = [*[below] * len(maps), *needs]
        found, y = run_again(layer.opaque, surroundings, maps, tensors, random, grad, wanted)
        kept = self.total.maps[:, self.spec.span(channels, channels + layer.growth)]
        self.same.append((layer.opaque.name, is_same(y, kept)))
        for total, dx in zip(totals, found, strict=False):
            if dx is not None:
                total.add_(dx)
        return found[len(maps) :]

    def _bottleneck(self, i: int, ready: Unit) -> Tensor:
        kept = self.saved.bottlenecks[i]
        if kept is not None:
            return kept
        maps = self.total.first(ready.channels, self.total.maps, 1)
        bottleneck, _ = self.units.forward(maps, ready)
        return bottleneck


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
