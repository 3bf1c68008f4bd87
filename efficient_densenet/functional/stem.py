"""The stem: convolution, batch norm, activation and pooling of an image, which is all that is kept.

Mathematics in ``docs/derivation.md``, section 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_densenet.functional.gradients import gradient_like
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import StemSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_means, joined_statistics
from efficient_densenet.functional.units import Reading, UnitRunner
from efficient_densenet.kernels.aten import convolve, convolve_backward
from efficient_densenet.kernels.interface import Conv, Statistics, UnitGradients, Waiting
from efficient_densenet.kernels.layout import empty_map

# If one sample takes more than this, it is computed in groups of channels, each about half of this
# and at least as many as a convolution computes together.
LARGE_SAMPLE_BYTES = 4 << 20
LEAST_CHANNELS = 16


def stem_groups(spec: StemSpec, x: Tensor, weight: Tensor) -> list[slice]:
    """The channels of a stem that are computed together: all, unless a sample of them is large.

    Up to the pooling a stem works on each channel by itself: of a large volume not even one sample
    has to exist with all its channels.
    """
    channels = len(weight)
    positions = spec.conv.positions(x.shape[2:], weight.shape[2:])
    sample = channels * positions * spec.types.statistics.itemsize
    groups = 1
    if sample > LARGE_SAMPLE_BYTES and spec.conv.groups == 1:
        groups = max(1, min(-(-2 * sample // LARGE_SAMPLE_BYTES), channels // LEAST_CHANNELS))
    step = -(-channels // groups)
    return [slice(start, start + step) for start in range(0, channels, step)]


def forward_stem(
    spec: StemSpec, x: Tensor, tensors: UnitTensors
) -> tuple[Tensor, Statistics | None]:
    """Convolve the image, normalise, activate and pool: the result, and the batch statistics."""
    groups = stem_groups(spec, x, tensors.conv_weight)
    with outside_autocast(x.device):
        parts = [_stem_channels(spec, x, tensors.only(channels)) for channels in groups]
    if len(parts) == 1:
        return parts[0]
    outs, statistics = zip(*parts, strict=True)
    out = torch.cat(outs, 1).contiguous(memory_format=spec.format(x))
    if not spec.unit.batch_statistics:
        return out, None
    return out, Statistics(*(torch.cat(vectors) for vectors in zip(*statistics, strict=True)))


def _stem_channels(
    spec: StemSpec, x: Tensor, tensors: UnitTensors
) -> tuple[Tensor, Statistics | None]:
    memory_format = spec.format(x)
    conv = Conv(tensors.conv_weight, tensors.conv_bias, spec.conv)
    y = convolve(x.to(spec.types.compute, memory_format=memory_format), conv)
    units = UnitRunner(spec, y, y.shape[1], memory_format)
    statistics = None
    if spec.unit.batch_statistics:
        statistics = units.ops.batch_statistics(y, spec.types.statistics)
        statistics = joined_statistics(statistics, y, spec.process_group)
    ready = units.ready(spec.unit, tensors, Reading(y, y.shape[1], statistics))
    out, _ = units.forward(y, ready)
    return out, statistics


def backward_stem(
    spec: StemSpec,
    x: Tensor,
    tensors: UnitTensors,
    statistics: Statistics | None,
    grad: Tensor,
    needs_x: bool,
    needs: UnitTensors,
) -> tuple[Tensor | None, UnitTensors]:
    """The gradients of the image and of all tensors, the convolution's in those of the unit."""
    parts = []
    for channels in stem_groups(spec, x, tensors.conv_weight):
        own = statistics and Statistics(statistics.mean[channels], statistics.var[channels])
        with torch.no_grad(), outside_autocast(x.device):
            walk = StemBackward(spec, x, tensors.only(channels), own, grad[:, channels])
            parts.append(walk.run(needs_x, needs))
        del walk
    dxs, gradients = zip(*parts, strict=True)
    if len(parts) == 1:
        return dxs[0], gradients[0]
    whole = (None if g[0] is None else torch.cat(g) for g in zip(*gradients, strict=True))
    return _total(dxs), UnitTensors(*whole)


class StemBackward:
    """Two walks over channels of the convolved image, for batch norm's sums and the convolution.

    The gradient of the convolved image exists one slab at a time: whole, it would be the largest
    tensor of many a step.
    """

    def __init__(
        self,
        spec: StemSpec,
        x: Tensor,
        tensors: UnitTensors,
        statistics: Statistics | None,
        grad: Tensor,
    ) -> None:
        self.spec, self.tensors, self.grad = spec, tensors, grad
        self.conv = conv = Conv(tensors.conv_weight, tensors.conv_bias, spec.conv)
        memory_format = spec.format(x)
        self.image = x.to(spec.types.compute, memory_format=memory_format)
        self.y = y = convolve(self.image, conv)
        self.units = UnitRunner(spec, y, y.shape[1], memory_format)
        self.statistics = statistics
        self.waiting: Waiting | None = None
        self.ready = self.units.ready(spec.unit, tensors, Reading(y, y.shape[1], statistics))

    def run(self, needs_x: bool, needs: UnitTensors) -> tuple[Tensor | None, UnitTensors]:
        """The gradients of the image and of all tensors, the convolution's in those of the unit."""
        needs_conv = (needs_x, needs.conv_weight, needs.conv_bias)
        corrects = any(needs_conv) and self.spec.unit.batch_statistics
        corrects = corrects and not self.units.ops.corrects_each_reader()
        dbeta = dgamma = dx = weight = bias = corrections = None
        if needs.weight or needs.bias or corrects:
            sums, self.waiting = self._back_through(slice(None), None)[2:]
            assert sums is not None
            count = self.y.numel() // self.y.shape[1]
            totals = self._vector(), self._vector()
            dbeta, dgamma = self.units.ops.collect(sums, self.ready, 1.0 / count, totals, False)
            if corrects:
                corrections = joined_means([*totals], count, self.spec.process_group)
        if any(needs_conv):
            rows = self.units.workspace.slabs(self.y)
            parts = zip(*(self._slab(r, corrections, needs_conv) for r in rows), strict=True)
            dxs, weights, biases = parts
            dx = torch.cat(dxs) if needs_x else None
            weight, bias = _total(weights), _total(biases)
        return dx, UnitTensors(
            weight=gradient_like(dgamma, self.tensors.weight, needs.weight),
            bias=gradient_like(dbeta, self.tensors.bias, needs.bias),
            conv_weight=gradient_like(weight, self.tensors.conv_weight, needs.conv_weight),
            conv_bias=gradient_like(bias, self.tensors.conv_bias, needs.conv_bias),
        )

    def _vector(self) -> Tensor:
        return self.y.new_empty(self.y.shape[1], dtype=self.spec.types.statistics)

    def _back_through(self, rows: slice, target: Tensor | None) -> UnitGradients:
        """Through pool, activation and norm: the sums if there is no ``target`` to write into."""
        return self.units.backward(
            self.grad[rows],
            self.y[rows],
            self.ready,
            UnitTensors(),
            need_sums=target is None,
            target=target,
        )

    def _slab(
        self,
        rows: slice,
        corrections: list[Tensor] | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One slab's gradients of image, weight and bias."""
        dy = self._gradient_of(rows, corrections).to(self.y.dtype)
        return convolve_backward(dy, self.image[rows], self.conv, needs)

    def _gradient_of(self, rows: slice, corrections: list[Tensor] | None) -> Tensor:
        """That of samples of the convolved image."""
        if self.waiting and corrections:
            return self.waiting(rows, *corrections)
        y = self.y[rows]
        dy = empty_map(y, y.shape[1], self.units.memory_format, self.units.corrected_dtype)
        self._back_through(rows, dy)
        if corrections and self.statistics:
            (mean, _), (mean_d, mean_dx) = self.statistics, corrections
            self.units.ops.correct(dy, y, slice(0, y.shape[1]), mean, mean_d, mean_dx, dy)
        return dy


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None
