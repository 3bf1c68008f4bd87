"""The recomputing functions as autograd sees them: what is saved, returned and refused.

The mathematics is in ``docs/derivation.md``; the passes are in ``forward.py`` and ``backward.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.backward import BlockBackward, StemBackward
from efficient_densenet.forward import Saved, forward_block, forward_stem
from efficient_densenet.kernels.interface import Conv, Statistics
from efficient_densenet.spec import BlockSpec, StemSpec, UnitTensors


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
    none or its norm uses running ones). Running statistics are the caller's to update. Dropout
    draws its seeds from torch's default generator; there is no other side effect.
    """
    drops = any(layer.drop_rate > 0 for layer in spec.layers)
    seeds = torch.randint(2**62, (len(spec.layers),)).tolist() if drops else [0] * len(spec.layers)
    flat = [tensor for unit in units for tensor in unit]
    out, mean, var, *vectors = _DenseBlock.apply(spec, seeds, x, *flat)
    return out, Statistics(mean, var), _paired(vectors)


def stem(x: Tensor, spec: StemSpec, tensors: UnitTensors) -> tuple[Tensor, Statistics | None, int]:
    """Convolution, batch norm, ReLU and pooling of an image, which is all that is kept.

    ``x`` is ``(N, in_channels, *spatial)``. Equals ``pool(relu(bn(conv(x))))``; the convolution is
    computed again in the backward pass, and no index of a pooling is kept. ``tensors`` holds the
    convolution's beside the norm's.

    Returns the result, and of the convolution's the statistics (``None`` if the norm uses running
    ones) and how many values a channel has. Nothing here has side effects.
    """
    out, mean, var, count = _Stem.apply(spec, x, *tensors)
    (statistics,) = _paired([mean, var])
    return out, statistics, count


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: BlockSpec, seeds: list[int], x: Tensor, *flat: Tensor | None
    ) -> Any:
        with _outside_autocast(x.device):
            saved, out = forward_block(spec, seeds, x, flat)
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
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        layers = len(ctx.spec.layers)
        tensors = iter(ctx.saved_tensors)
        features, mean, var = islice(tensors, 3)
        vectors = _paired(list(islice(tensors, 2 * layers)))
        saved = Saved(features, Statistics(mean, var), list(islice(tensors, layers)), vectors)
        _, _, needs_x, *needs = ctx.needs_input_grad
        with torch.no_grad(), _outside_autocast(features.device):
            walk = BlockBackward(ctx.spec, ctx.seeds, saved, list(tensors), needs_x, needs)
            dx, grads = walk.run(grad)
            dx = None if dx is None else dx.to(ctx.input_dtype)
        return None, None, *_differentiable_once(grad, dx, *grads)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: StemSpec, x: Tensor, *flat: Tensor | None) -> Any:
        tensors = UnitTensors(*flat)
        conv = Conv(tensors.conv_weight, tensors.conv_bias, spec.conv)
        with _outside_autocast(x.device):
            out, statistics, count = forward_stem(spec, x, conv, tensors)
        vectors = statistics or (None, None)
        ctx.spec = spec
        ctx.save_for_backward(x, *vectors, *flat)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(statistics or ()))
        return out, *vectors, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, mean, var, *flat = ctx.saved_tensors
        tensors = UnitTensors(*flat)
        conv = Conv(tensors.conv_weight, tensors.conv_bias, ctx.spec.conv)
        (statistics,) = _paired([mean, var])
        _, needs_x, *needs = ctx.needs_input_grad
        with torch.no_grad(), _outside_autocast(x.device):
            walk = StemBackward(ctx.spec, x, conv, tensors, statistics, grad)
            dx, grads = walk.run(needs_x, UnitTensors(*needs))
            dx = None if dx is None else dx.to(x.dtype)
        return None, *_differentiable_once(grad, dx, *grads)


def _differentiable_once(grad: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _NoSecondDerivative.apply(grad, *grads) if torch.is_grad_enabled() else grads


class _NoSecondDerivative(torch.autograd.Function):
    """Hands gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *grads: Tensor | None) -> Any:
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            "what is recomputed outside of autograd has no second derivative: "
            'to differentiate twice, build the block or network with recompute="none"'
        )


def _outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _paired(vectors: Sequence[Tensor | None]) -> list[Statistics | None]:
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [None if mean is None or var is None else Statistics(mean, var) for mean, var in pairs]
