"""The backward passes: recompute what was not kept, and correct every map's gradient once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efficient_densenet.functional.forward import Saved, seed_of_each
from efficient_densenet.functional.gradients import GradientStorage, MapGradient
from efficient_densenet.functional.opaque import Opaque, Rebuilt, check_same, is_same, rebuild
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_means
from efficient_densenet.functional.units import UnitRunner
from efficient_densenet.kernels.interface import Unit

Gradients = Sequence[Tensor | None]
"""Of the tensors of one part, ``None`` where one has none or needs none."""


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
        # Of each opaque part, whether it made the same maps again: looked at once, at the end.
        self.same: list[tuple[str, Tensor]] = []

    def run(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the block's input and of ``flat``, as far as they are needed."""
        gradients: list[Gradients] = []  # of the last part first
        if self.spec.exit:
            gradients.append(self._exit(grad))
            self.units.workspace.narrow(self.spec.widest_in_layers)
        else:
            self.total.start(grad)
        del grad
        for i in reversed(range(len(self.layers))):
            if i < self.lowest:
                gradients += [(None,) * len(unit) for unit in reversed(self.layers[i])]
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

    def _layer(self, i: int) -> Iterator[Gradients]:
        """Gradients of the tensors of a layer's parts, the last first."""
        layer, seed = self.spec.layers[i], self.seeds[i]
        new = self.total.finish(layer.channels, layer.channels + layer.growth)
        if seed is not None:
            self.units.drop(new, layer, seed)
        below = self.needs_x or i > self.lowest
        needs_first = below or any(self.needs[i][0])
        first, grad = self._first(i, below), new if needs_first else None
        if len(layer.parts) == 2:
            own, grad = self._through_second(i, new, self._bottleneck(i, first), needs_first)
            yield own
        del new
        if grad is None:
            yield (None,) * len(self.layers[i][0])
        else:
            yield self._through_first(i, grad, first, below)

    def _first(self, i: int, below: bool) -> Unit | Rebuilt:
        """A layer's first part, ready to be gone back through."""
        layer, tensors, needs = self.spec.layers[i], self.layers[i][0], self.needs[i][0]
        part = layer.parts[0]
        if isinstance(part, UnitSpec):
            return self.total.ready(part, tensors, layer.channels)
        maps = self.total.maps[:, self.spec.span(0, layer.channels)].split(part.channels, 1)
        return self._rebuilt(i, part, maps, tensors, [*[below] * len(maps), *needs])

    def _rebuilt(
        self,
        i: int,
        part: Opaque,
        maps: Sequence[Tensor],
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> Rebuilt:
        random, surroundings = self.saved.random[i], self.spec.surroundings
        assert random is not None and surroundings is not None
        return rebuild(part, surroundings, maps, tensors, random, needs)

    def _bottleneck(self, i: int, first: Unit | Rebuilt) -> Tensor:
        kept = self.saved.bottlenecks[i]
        if kept is not None:
            return kept
        if isinstance(first, Unit):
            maps = self.total.first(first.channels, self.total.maps, 1)
            return self.units.forward(maps, first)[0]
        z = first.y.detach().contiguous(memory_format=self.units.memory_format)
        statistics = self.saved.bottleneck_statistics[i]
        assert statistics is not None
        # The map is not kept; its means show whether any share of it has changed.
        mean = z.mean((0, *range(2, z.dim())), dtype=statistics.mean.dtype)
        (mean,) = joined_means([mean], z.numel() // z.shape[1], self.spec.process_group)
        size = (statistics.var + statistics.mean.square()).max().sqrt()
        self._note(i, is_same(mean, statistics.mean, size))
        return z

    def _through_second(
        self, i: int, grad: Tensor, z: Tensor, needs_z: bool
    ) -> tuple[Gradients, Tensor | None]:
        """Gradients of the tensors of a layer's second part, and of its bottleneck map."""
        part, tensors, needs = self.spec.layers[i].parts[1], self.layers[i][1], self.needs[i][1]
        if isinstance(part, Opaque):
            rebuilt = self._rebuilt(i, part, [z], tensors, [needs_z, *needs])
            dz, *own = rebuilt.gradients(grad)
            self._compare(i, rebuilt.y.detach())
            inner = self.units.memory_format
            return own, None if dz is None else dz.contiguous(memory_format=inner)
        of_z = MapGradient(
            self.units,
            z,
            self.saved.bottleneck_statistics[i],
            self.spec.process_group,
            self.units.corrected_dtype,  # of one reader's contribution alone
            self.bottleneck_storage,
        )
        self.bottleneck_storage = of_z.storage
        width = self.spec.layers[i].width
        reader = of_z.ready(part, tensors, width)
        gradients = of_z.back_through(grad, reader, part, tensors, needs, needs_z)
        return gradients, of_z.finish(0, width) if needs_z else None

    def _through_first(self, i: int, grad: Tensor, first: Unit | Rebuilt, below: bool) -> Gradients:
        """Gradients of the tensors of a layer's first part; that of what it reads is added."""
        layer, tensors, needs = self.spec.layers[i], self.layers[i][0], self.needs[i][0]
        part = layer.parts[0]
        if isinstance(part, UnitSpec):
            assert isinstance(first, Unit)
            return self.total.back_through(grad, first, part, tensors, needs, below)
        assert isinstance(first, Rebuilt)
        found = first.gradients(grad)
        if len(layer.parts) == 1:
            self._compare(i, first.y.detach())
        totals = self.total.grad[:, self.spec.span(0, layer.channels)].split(part.channels, 1)
        for total, dx in zip(totals, found, strict=False):
            if dx is not None:
                total.add_(dx)
        return found[len(totals) :]

    def _compare(self, i: int, y: Tensor) -> None:
        """Note whether an opaque part made the layer's new maps again; ``y`` is lost."""
        layer, seed = self.spec.layers[i], self.seeds[i]
        if seed is not None:
            self.units.drop(y, layer, seed)
        new = self.spec.span(layer.channels, layer.channels + layer.growth)
        self._note(i, is_same(y, self.total.maps[:, new]))

    def _note(self, i: int, same: Tensor) -> None:
        opaque = self.spec.layers[i].opaque
        assert opaque is not None
        self.same.append((opaque.name, same))
