"""The recomputing functions as autograd sees them: what is saved, returned and refused.

The mathematics is in ``docs/derivation.md``; the passes are in ``forward.py`` and ``backward.py``.
What is being compiled takes ``operators.py`` instead of the functions here, and evaluation from
which nothing is learnt ``inference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from efficient_densenet.functional import inference, operators
from efficient_densenet.functional.backward import backward_block
from efficient_densenet.functional.forward import (
    Saved,
    draw_seeds,
    features_at_border,
    forward_block,
)
from efficient_densenet.functional.spec import BlockSpec, StemSpec, UnitTensors
from efficient_densenet.functional.stem import backward_stem, forward_stem
from efficient_densenet.kernels.interface import Statistics

Context = Any
"""What PyTorch hands from a forward to its backward pass; it takes any attribute."""
Inputs = tuple[Any, ...]
"""The arguments of a forward pass."""
Results = tuple[Tensor, ...]
"""What a forward pass returns, including what is kept for the backward pass."""
Gradients = tuple[Tensor | None, ...]
"""A gradient for each argument of a forward pass, ``None`` where there is none."""


def dense_block(
    x: Tensor, spec: BlockSpec, units: Sequence[Sequence[Tensor | None]]
) -> tuple[Tensor, Statistics, list[list[Statistics | None]]]:
    """The dense block of ``spec`` on ``x``, and the batch statistics that it computed on the way.

    ``x`` is ``(N, input_channels, *spatial)``; the features are ``(N, channels, *spatial)`` in the
    memory format of ``x``. Equals, layer by layer and then for the exit, ::

        x = torch.cat([x, dropout(conv(act(bn(x))))], 1)
        y = conv(pool(act(bn(x))))

    Never kept for the backward pass: concatenations, normalised maps, and with
    ``recompute="bottleneck"`` the bottleneck maps. ``units`` holds the tensors of the units of each
    layer in order, or those of an opaque part, then those of the exit.

    Returns the features (with an exit, its result), the features' statistics (written as far as a
    norm reads them), and per layer and part the statistics of the map that it leaves for the next
    part (``None`` where there is none or its norm uses running ones). Running statistics are the
    caller's to update. Dropout draws its seeds from the default generator of the device; there is
    no other side effect.
    """
    flat = [tensor for unit in units for tensor in unit]
    compiling = torch.compiler.is_compiling()
    if not compiling and inference.suits_block(spec, x, *flat):
        unseen = x.new_empty(0)  # no norm learns
        out = inference.infer_block(spec, x, flat)
        return out, Statistics(unseen, unseen), [[None] * len(layer.parts) for layer in spec.layers]
    if compiling:
        seeds = operators.draw_seeds(x, len(spec.layers)) if spec.drops else None
        out, kept = operators.dense_block(spec, seeds, x, flat)
    else:
        seeds = draw_seeds(x, len(spec.layers)) if spec.drops else None
        out, *kept = _DenseBlock.apply(spec, seeds, x, *flat)
    saved = Saved.of(spec, features_at_border(spec, x, out), kept)
    return out, saved.statistics, [[part.statistics for part in layer] for layer in saved.layers]


def stem(x: Tensor, spec: StemSpec, tensors: UnitTensors) -> tuple[Tensor, Statistics | None, int]:
    """Convolution, batch norm, activation and pooling of an image, which is all that is kept.

    ``x`` is ``(N, in_channels, *spatial)``. Equals ``pool(act(bn(conv(x))))``; the convolution is
    computed again in the backward pass, and no index of a pooling is kept. ``tensors`` holds the
    convolution's beside the norm's.

    Returns the result, and of the convolution's the statistics (``None`` if the norm uses running
    ones) and how many values a channel has. Nothing here has side effects.
    """
    count = x.shape[0] * spec.conv.positions(x.shape[2:], tensors.conv_weight.shape[2:])
    if torch.compiler.is_compiling():
        return *operators.stem(spec, x, tensors), count
    if inference.suits_stem(spec, x, *tensors):
        return inference.infer_stem(spec, x, tensors), None, count
    out, *vectors = _Stem.apply(spec, x, *tensors)
    return out, Statistics(*vectors) if vectors else None, count


class RecomputingFunction(torch.autograd.Function):
    """Base of what is computed outside of autograd and of ``torch.func``."""

    @staticmethod
    def vmap(*_: object) -> NoReturn:
        raise RuntimeError(
            "vmap cannot enter what recomputes in the backward pass: "
            'build the block or network with recompute="none"'
        )


class _DenseBlock(RecomputingFunction):
    @staticmethod
    def forward(spec: BlockSpec, seeds: Tensor | None, x: Tensor, *flat: Tensor | None) -> Results:
        out, saved = forward_block(spec, seeds, x, flat)
        return out, *saved.flat(spec)

    @staticmethod
    def setup_context(ctx: Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.spec, seeds, x, *flat = inputs
        out, *kept = output
        ctx.kept, ctx.input_dtype = len(kept), x.dtype
        ctx.save_for_backward(seeds, features_at_border(ctx.spec, x, out), *kept, *flat)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        seeds, border, *rest = _saved(ctx)
        saved, flat = Saved.of(ctx.spec, border, rest), rest[ctx.kept :]
        _, _, needs_x, *needs = ctx.needs_input_grad
        dx, grads = backward_block(ctx.spec, seeds, saved, flat, grad, needs_x, needs)
        dx = None if dx is None else dx.to(ctx.input_dtype)
        return None, None, *differentiable_once(grad, dx, *grads)


class _Stem(RecomputingFunction):
    @staticmethod
    def forward(spec: StemSpec, x: Tensor, *flat: Tensor | None) -> Results:
        out, statistics = forward_stem(spec, x, UnitTensors(*flat))
        return out, *(statistics or ())

    @staticmethod
    def setup_context(ctx: Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.spec, *tensors = inputs
        _, *vectors = output
        ctx.save_for_backward(*tensors, *vectors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*vectors)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *rest = ctx.saved_tensors
        width = len(UnitTensors._fields)
        tensors, vectors = UnitTensors(*rest[:width]), rest[width:]
        statistics = Statistics(*vectors) if vectors else None
        _, needs_x, *needs = ctx.needs_input_grad
        wanted = UnitTensors(*needs)
        dx, grads = backward_stem(ctx.spec, x, tensors, statistics, grad, needs_x, wanted)
        dx = None if dx is None else dx.to(x.dtype)
        return None, *differentiable_once(grad, dx, *grads)


def differentiable_once(grad: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _NoSecondDerivative.apply(grad, *grads) if torch.is_grad_enabled() else grads


def _saved(ctx: Context) -> Sequence[Tensor]:
    """What a block kept; its output is among it."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nA dense block keeps its own output for the backward pass: write "
            "x = x * y instead of x *= y, or change a copy, x.clone()"
        ) from error


class _NoSecondDerivative(RecomputingFunction):
    """Hands gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(grad: Tensor, *grads: Tensor | None) -> Gradients:
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def setup_context(ctx: Context, inputs: Inputs, output: Gradients) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, *_: Tensor | None) -> Gradients:
        raise RuntimeError(
            "what is recomputed outside of autograd has no second derivative: "
            'to differentiate twice, build the block or network with recompute="none"'
        )
