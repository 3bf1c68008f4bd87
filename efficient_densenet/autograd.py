"""The recomputing function of a dense block: only features (and vectors) survive the forward pass.

The mathematics is in ``docs/derivation.md``; the operations are in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.kernels import eager as ops
from efficient_densenet.kernels.interface import Conv, Norm, Tail, per_channel
from efficient_densenet.spec import BlockSpec, UnitSpec, UnitTensors

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Statistics(NamedTuple):
    """Batch statistics of a map: mean and biased variance, vectors ``(channels,)``."""

    mean: Tensor
    var: Tensor

    def first(self, channels: int) -> Statistics:
        """Those of the first ``channels``."""
        return Statistics(self.mean[:channels], self.var[:channels])


def dense_block(
    x: Tensor, spec: BlockSpec, units: Sequence[UnitTensors]
) -> tuple[Tensor, Statistics, list[Statistics | None]]:
    """The dense block of ``spec`` on ``x``, and the batch statistics that it computed on the way.

    ``x`` is ``(N, input_channels, *spatial)``; the features are ``(N, channels, *spatial)`` in the
    memory format of ``x``. Equals, layer by layer and then for the exit, ::

        x = torch.cat([x, dropout(conv(relu(bn(x))))], 1)
        y = conv(pool(relu(bn(x))))

    Never kept for the backward pass: concatenations, normalised maps, and with
    ``recompute_bottleneck`` the bottleneck maps. ``units`` holds the tensors of every layer's units
    in order, then those of the exit.

    Returns the features (with an exit, its result), the features' statistics (written as far as a
    norm reads them), and per layer the statistics of its bottleneck map (``None`` where there is
    none or its norm uses running ones). Running statistics are the caller's to update: nothing here
    has side effects.
    """
    drops = any(layer.drop_rate > 0 for layer in spec.layers)
    seeds = torch.randint(2**62, (len(spec.layers),)).tolist() if drops else [0] * len(spec.layers)
    flat = [tensor for unit in units for tensor in unit]
    out, mean, var, *vectors = _DenseBlock.apply(spec, seeds, x, *flat)
    return out, Statistics(mean, var), _paired(vectors)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map are its fastest dimension in memory."""
    return (
        x.dim() in CHANNELS_LAST and x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    )


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    ``bottlenecks`` and ``bottleneck_statistics`` have an entry per layer.
    """

    features: Tensor
    statistics: Statistics
    bottlenecks: list[Tensor | None]
    bottleneck_statistics: list[Statistics | None]


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: BlockSpec, seeds: list[int], x: Tensor, *flat: Tensor | None
    ) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            saved, out = _forward(spec, seeds, x, flat)
        vectors = [v for entry in saved.bottleneck_statistics for v in entry or (None, None)]
        ctx.spec, ctx.seeds, ctx.input_dtype = spec, seeds, x.dtype
        ctx.save_for_backward(
            saved.features, *saved.statistics, *vectors, *saved.bottlenecks, *flat
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved.statistics, *(v for v in vectors if v is not None))
        return out, *saved.statistics, *vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        spec: BlockSpec = ctx.spec
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = iter(ctx.saved_tensors)
        features, mean, var = islice(tensors, 3)
        vectors = _paired(list(islice(tensors, 2 * len(spec.layers))))
        bottlenecks = list(islice(tensors, len(spec.layers)))
        saved = _Saved(features, Statistics(mean, var), bottlenecks, vectors)
        _, _, needs_x, *needs = ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            flat = list(tensors)
            dx, grads = _backward(spec, ctx.seeds, saved, flat, needs_x, needs, grad)
            dx = None if dx is None else dx.to(ctx.input_dtype)
        if torch.is_grad_enabled():
            dx, *grads = _NoSecondDerivative.apply(grad, dx, *grads)
        return None, None, dx, *grads


class _NoSecondDerivative(torch.autograd.Function):
    """Hands gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *grads: Tensor | None) -> Any:
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            "an efficient dense block has no second derivative, since what it saves is recomputed "
            'outside of autograd; set recompute="none" to differentiate twice'
        )


def _forward(
    spec: BlockSpec, seeds: Sequence[int], x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[_Saved, Tensor]:
    layers, exit_tensors = spec.nested(flat)
    memory_format = _inner_format(spec, x)
    workspace = _workspace(spec, x, memory_format)
    entry = x.to(spec.features_dtype).contiguous(memory_format=memory_format)
    features = entry if not layers else _empty_map(entry, spec.channels, memory_format)
    statistics = Statistics(*entry.new_empty(2, spec.channels, dtype=spec.statistics_dtype))
    bottlenecks: list[Tensor | None] = []
    bottleneck_statistics: list[Statistics | None] = []

    def append(y: Tensor, start: int, read: bool) -> None:
        channels = slice(start, start + y.shape[1])
        if layers:
            features[:, channels] = y
        if read:
            mean, var = ops.batch_statistics(y.to(spec.features_dtype), spec.statistics_dtype)
            statistics.mean[channels], statistics.var[channels] = mean, var

    append(entry, 0, spec.reads_statistics(-1))
    del entry
    for i, (layer, tensors) in enumerate(zip(spec.layers, layers, strict=True)):
        y = features[:, : layer.channels]
        norm = _norm(spec, layer.units[0], tensors[0], statistics.first(layer.channels), y)
        y = ops.norm_relu_tail(y, norm, _tail(layer.units[0], tensors[0]), workspace)
        bottleneck, inner = None, None
        if len(layer.units) == 2:
            bottleneck = y
            if layer.units[1].batch_statistics:
                inner = Statistics(*ops.batch_statistics(y, spec.statistics_dtype))
            norm = _norm(spec, layer.units[1], tensors[1], inner, y)
            y = ops.norm_relu_tail(y, norm, _tail(layer.units[1], tensors[1]), workspace)
        bottlenecks.append(None if spec.recompute_bottleneck else bottleneck)
        bottleneck_statistics.append(inner)
        if layer.drop_rate:
            y.mul_(_dropout_mask(y, layer.drop_rate, seeds[i], memory_format))
        append(y, layer.channels, spec.reads_statistics(i))
        del y, bottleneck
    if spec.exit:
        norm = _norm(spec, spec.exit, exit_tensors, statistics, features)
        out = ops.norm_relu_tail(features, norm, _tail(spec.exit, exit_tensors), workspace)
    else:
        outer = memory_format if is_channels_last(x) else torch.contiguous_format
        features = out = features.contiguous(memory_format=outer)
    return _Saved(features, statistics, bottlenecks, bottleneck_statistics), out


class _MapGradient:
    """Gradient of a map, summed over the units that read it: ``G``, ``S1`` and ``S2``.

    Batch norm's correction is the same for every reader, so it waits until the map is finished.
    """

    def __init__(
        self, spec: BlockSpec, maps: Tensor, mean: Tensor | None, workspace: ops.Workspace
    ) -> None:
        self.spec, self.maps, self.mean, self.workspace = spec, maps, mean, workspace
        # In the statistics' type: contributions are as many as layers, and rounding them to 16 bits
        # before the correction would cost the precision that the naive block has.
        self.grad = _empty_map(maps, maps.shape[1], workspace.memory_format, spec.statistics_dtype)
        self.s1, self.s2 = maps.new_zeros(2, maps.shape[1], dtype=spec.statistics_dtype)
        self.written = False
        self.corrected = 0

    def start(self, grad: Tensor) -> None:
        """Begin with the gradient that arrives from outside the block."""
        self.grad.copy_(grad)
        self.written = True

    def back_through(
        self,
        grad: Tensor,
        unit: UnitSpec,
        tensors: UnitTensors,
        statistics: Statistics | None,
        channels: int,
        needs: UnitTensors,
        needs_maps: bool,
    ) -> UnitTensors:
        """Add the gradient through ``unit``, which reads the first ``channels``; return its own."""
        x = self.maps[:, :channels]
        norm = _norm(self.spec, unit, tensors, statistics, x)
        needs_norm = needs.weight or needs.bias
        weight, bias, sum_d, sum_dx = ops.norm_relu_tail_backward(
            grad,
            x,
            norm,
            _tail(unit, tensors),
            self.workspace,
            need_weight=needs.conv_weight,
            need_bias=needs.conv_bias,
            need_sums=needs_norm or (needs_maps and unit.batch_statistics),
            target=self.grad[:, :channels] if needs_maps else None,
            accumulate=self.written,
        )
        self.written = self.written or needs_maps
        dgamma = None
        if sum_d is not None and sum_dx is not None:
            dgamma = norm.invstd.flatten() * sum_dx
            if needs_maps and unit.batch_statistics:
                self._collect(norm, sum_d, dgamma)
        return UnitTensors(
            weight=_like(dgamma, tensors.weight, needs.weight),
            bias=_like(sum_d, tensors.bias, needs.bias),
            conv_weight=_like(weight, tensors.conv_weight, needs.conv_weight),
            conv_bias=_like(bias, tensors.conv_bias, needs.conv_bias),
        )

    def _collect(self, norm: Norm, sum_d: Tensor, dgamma: Tensor) -> None:
        scale, invstd = norm.scale.flatten(), norm.invstd.flatten()
        self.corrected = max(self.corrected, len(scale))
        self.s1[: len(scale)] += scale * sum_d
        self.s2[: len(scale)] += scale * invstd * dgamma

    def finish(self, start: int, stop: int) -> Tensor:
        """The gradient of the channels ``[start, stop)``, whose readers have all been walked."""
        grad, x = self.grad[:, start:stop], self.maps[:, start:stop]
        whole = stop - start == self.maps.shape[1]
        out = self.grad if whole else _empty_map(grad, stop - start, self.workspace.memory_format)
        if self.mean is None or start >= self.corrected:
            return out if whole else out.copy_(grad)
        count = x.numel() // x.shape[1]
        mean, a, b = (
            per_channel(vector, x.dim())
            for vector in (
                self.mean[start:stop],
                self.s1[start:stop] / count,
                self.s2[start:stop] / count,
            )
        )
        return ops.correct(grad, x, mean, a, b, out, self.workspace)


def _backward(
    spec: BlockSpec,
    seeds: Sequence[int],
    saved: _Saved,
    flat: Sequence[Tensor | None],
    needs_x: bool,
    needs_flat: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, list[Tensor | None]]:
    layers, exit_tensors = spec.nested(flat)
    needs, needs_exit = spec.nested(needs_flat)
    memory_format = _inner_format(spec, saved.features)
    workspace = _workspace(spec, saved.features, memory_format)
    features = saved.features.contiguous(memory_format=memory_format)
    wanted = [any(any(unit) for unit in layer) for layer in needs]
    lowest = 0 if needs_x else next((i for i, want in enumerate(wanted) if want), len(layers))
    total = _MapGradient(spec, features, saved.statistics.mean, workspace)
    gradients: list[UnitTensors] = []
    if spec.exit:
        below = needs_x or lowest < len(layers)
        gradients.append(
            total.back_through(
                grad, spec.exit, exit_tensors, saved.statistics, spec.channels, needs_exit, below
            )
        )
    else:
        total.start(grad)
    for i in reversed(range(len(layers))):
        layer, units = spec.layers[i], layers[i]
        if i < lowest:
            gradients += [UnitTensors()] * len(layer.units)
            continue
        below = needs_x or i > lowest
        statistics = saved.statistics.first(layer.channels)
        grad = total.finish(layer.channels, layer.channels + layer.growth)
        if layer.drop_rate:
            grad.mul_(_dropout_mask(grad, layer.drop_rate, seeds[i], memory_format))
        if len(layer.units) == 2:
            z, inner = saved.bottlenecks[i], saved.bottleneck_statistics[i]
            if z is None:
                x = features[:, : layer.channels]
                norm = _norm(spec, layer.units[0], units[0], statistics, x)
                z = ops.norm_relu_tail(x, norm, _tail(layer.units[0], units[0]), workspace)
            bottleneck = _MapGradient(spec, z, inner and inner.mean, workspace)
            needs_z = below or any(needs[i][0])
            gradients.append(
                bottleneck.back_through(
                    grad, layer.units[1], units[1], inner, layer.width, needs[i][1], needs_z
                )
            )
            grad = bottleneck.finish(0, layer.width) if needs_z else grad
            del z, bottleneck
        if below or any(needs[i][0]):
            gradients.append(
                total.back_through(
                    grad, layer.units[0], units[0], statistics, layer.channels, needs[i][0], below
                )
            )
        else:
            gradients.append(UnitTensors())
    dx = total.finish(0, spec.input_channels) if needs_x else None
    return dx, [tensor for unit in reversed(gradients) for tensor in unit]


def _norm(
    spec: BlockSpec, unit: UnitSpec, tensors: UnitTensors, batch: Statistics | None, x: Tensor
) -> Norm:
    dtype = spec.statistics_dtype
    if unit.batch_statistics:
        assert batch is not None
        mean, var = batch
    else:
        mean, var = tensors.running_mean.to(dtype), tensors.running_var.to(dtype)
    invstd = (var + unit.eps).rsqrt_()
    scale = invstd if tensors.weight is None else tensors.weight.to(dtype) * invstd
    bias = torch.zeros_like(mean) if tensors.bias is None else tensors.bias.to(dtype)
    return Norm(*(per_channel(vector, x.dim()) for vector in (mean, invstd, scale, bias)))


def _tail(unit: UnitSpec, tensors: UnitTensors) -> Tail:
    if unit.conv is None:
        return Tail(unit.pool, None)
    padding, dilation, groups = unit.conv.padding, unit.conv.dilation, unit.conv.groups
    conv = Conv(tensors.conv_weight, tensors.conv_bias, padding, dilation, groups)
    return Tail(unit.pool, conv)


def _dropout_mask(
    like: Tensor, rate: float, seed: int, memory_format: torch.memory_format
) -> Tensor:
    # Drawn again in the backward pass from the same seed and in the same layout.
    mask = _empty_map(like, like.shape[1], memory_format)
    if rate == 1.0:
        return mask.zero_()
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
    return mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)


def _inner_format(spec: BlockSpec, x: Tensor) -> torch.memory_format:
    # Convolutions on a CPU are several times faster with the channels last; a block that returns
    # its features converts them back.
    follows_input = x.is_cuda or not spec.layers
    if x.dim() not in CHANNELS_LAST or (follows_input and not is_channels_last(x)):
        return torch.contiguous_format
    return CHANNELS_LAST[x.dim()]


def _workspace(spec: BlockSpec, x: Tensor, memory_format: torch.memory_format) -> ops.Workspace:
    return ops.Workspace(x, spec.widest, spec.compute_dtype, spec.statistics_dtype, memory_format)


def _empty_map(
    like: Tensor,
    channels: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (len(like), channels, *like.shape[2:])
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _like(gradient: Tensor | None, tensor: Tensor | None, needed: bool) -> Tensor | None:
    if gradient is None or tensor is None or not needed:
        return None
    return gradient.to(tensor.dtype)


def _paired(vectors: Sequence[Tensor | None]) -> list[Statistics | None]:
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [None if mean is None or var is None else Statistics(mean, var) for mean, var in pairs]
