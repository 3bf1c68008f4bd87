"""The backward passes: recompute what was not kept, and correct every map's gradient once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.forward import Saved, seed_of_each
from efficient_densenet.functional.gradients import GradientStorage, MapGradient
from efficient_densenet.functional.opaque import Opaque, Rebuilt, check_same, is_same, rebuild
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_means
from efficient_densenet.functional.units import Reading, UnitRunner
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


class Ready(NamedTuple):
    """A part of a layer that is ready to be gone back through, and what it reads."""

    reading: Reading
    run: Unit | Rebuilt

    @property
    def dtype(self) -> torch.dtype:
        """That of what it leaves."""
        return self.run.tail.dtype if isinstance(self.run, Unit) else self.run.y.dtype


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
        # Of gradients of what the second, third, ... part of a layer reads.
        self.storage: dict[int, GradientStorage] = {}
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
        ready = self.units.ready(unit, tensors, self.total.reading(self.spec.channels))
        below = self.needs_x or self.lowest < len(self.layers)
        return self.total.back_through(grad, ready, unit, tensors, self.needs_exit, below)

    def _layer(self, i: int) -> list[Gradients]:
        """Gradients of the tensors of a layer's parts, the last first."""
        layer, seed, needs = self.spec.layers[i], self.seeds[i], self.needs[i]
        new = self.total.finish(layer.channels, layer.channels + layer.growth)
        if seed is not None:
            self.units.drop(new, layer, seed)
        grad: Tensor | None = new
        del new
        below = self.needs_x or i > self.lowest
        needs_read = [below or any(map(any, needs[:j])) for j in range(len(needs))]
        ready = self._run_again(i, needs_read)
        gradients: list[Gradients] = []
        for j in reversed(range(len(needs))):
            own: Gradients = (None,) * len(needs[j])
            part = ready.pop()
            if grad is not None:
                own, grad = self._through(i, j, grad, part, needs_read[j])
            gradients.append(own)
        return gradients

    def _run_again(self, i: int, needs_read: Sequence[bool]) -> list[Ready]:
        """A layer's parts, of which all but a last unit run again where their maps are not kept.

        ``needs_read`` says of each whether what it reads needs a gradient.
        """
        layer, kept = self.spec.layers[i], self.saved.layers[i]
        maps, channels, statistics = self.total.reading(layer.channels)
        dtype = maps.dtype
        found: list[Ready] = []
        for j, part in enumerate(layer.parts):
            if j:
                channels, statistics = layer.widths[j - 1], kept[j - 1].statistics
                dtype = found[-1].dtype
            unit = None
            if isinstance(part, UnitSpec):
                tensors = self.layers[i][j]
                unit = self.units.ready_for(part, tensors, dtype, channels, statistics)
            if j:
                maps = self._made(i, j - 1, found[-1], unit)
            reading = Reading(maps, channels, statistics)
            found.append(Ready(reading, unit or self._rebuilt(i, j, reading, needs_read[j])))
        return found

    def _rebuilt(self, i: int, j: int, reading: Reading, needs_read: bool) -> Rebuilt:
        part, random = self.spec.layers[i].parts[j], self.saved.layers[i][j].random
        surroundings = self.spec.surroundings
        assert isinstance(part, Opaque) and random is not None and surroundings is not None
        maps = reading.parts(part.channels)
        needs = [*[needs_read] * len(maps), *self.needs[i][j]]
        return rebuild(part, surroundings, maps, self.layers[i][j], random, needs)

    def _made(self, i: int, j: int, ready: Ready, reader: Unit | None) -> Tensor:
        """The map that a part leaves for the next one, kept or made again for its ``reader``."""
        (reading, run), (kept, statistics, _) = ready, self.saved.layers[i][j]
        if kept is not None:
            return kept
        if isinstance(run, Unit):
            return self.units.forward(reading.maps, run, reader=reader)[0]
        z = run.y.detach().contiguous(memory_format=self.units.memory_format)
        assert statistics is not None
        # The map is not kept; its means show whether any share of it has changed.
        mean = z.mean((0, *range(2, z.dim())), dtype=statistics.mean.dtype)
        (mean,) = joined_means([mean], z.numel() // z.shape[1], self.spec.process_group)
        size = (statistics.var + statistics.mean.square()).max().sqrt()
        self._note(i, j, is_same(mean, statistics.mean, size))
        return z

    def _through(
        self, i: int, j: int, grad: Tensor, ready: Ready, needs_read: bool
    ) -> tuple[Gradients, Tensor | None]:
        """Gradients of a part's tensors, and of what it reads; that of the features is added."""
        (reading, run), tensors = ready, self.layers[i][j]
        part, needs = self.spec.layers[i].parts[j], self.needs[i][j]
        if isinstance(run, Unit):
            assert isinstance(part, UnitSpec)
            of = self._gradient_of(i, j, reading, run) if j else self.total
            through = of.back_through(grad, run, part, tensors, needs, needs_read)
            return through, of.finish(0, reading.channels) if j and needs_read else None
        assert isinstance(part, Opaque)
        found = run.gradients(grad)
        if j + 1 == len(self.needs[i]):
            self._compare(i, j, run.y.detach())
        maps, own = found[: len(part.channels)], found[len(part.channels) :]
        if not j:
            self.total.add(maps, part.channels)
            return own, None
        (dz,) = maps
        return own, None if dz is None else dz.contiguous(memory_format=self.units.memory_format)

    def _gradient_of(self, i: int, j: int, reading: Reading, reader: Unit) -> MapGradient:
        """That of the map that the ``j``-th part of a layer reads, and nothing else.

        Of every layer in turn in the same memory: fresh pages cost more than what is computed. But
        for autograd, which may hand it on to who keeps it.
        """
        reuses = isinstance(self.spec.layers[i].parts[j - 1], UnitSpec)
        of = MapGradient(
            self.units,
            reading.maps,
            reading.statistics,
            self.spec.process_group,
            self.units.corrected_dtype,  # of one reader's contribution alone
            self.storage.get(j) if reuses else None,
            waits=self.units.can_wait(reading.maps, reader),
        )
        if reuses:
            self.storage[j] = of.storage
        return of

    def _compare(self, i: int, j: int, y: Tensor) -> None:
        """Note whether an opaque part made the layer's new maps again."""
        layer, seed = self.spec.layers[i], self.seeds[i]
        if seed is not None:
            y = self.units.dropped(y, layer, seed)
        new = self.spec.span(layer.channels, layer.channels + layer.growth)
        self._note(i, j, is_same(y, self.total.maps[:, new]))

    def _note(self, i: int, j: int, same: Tensor) -> None:
        part = self.spec.layers[i].parts[j]
        assert isinstance(part, Opaque)
        self.same.append((part.name, same))
