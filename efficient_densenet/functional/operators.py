"""The recomputing functions as operators of ``torch.library``, for code that is being compiled.

A compiler sees one operator for each pass and never looks inside: it cannot decide to keep what is
recomputed, and what is kept is what the forward operator returns. An operator takes and returns
tensors, numbers and strings. So a specification goes in as text, and a list has no absent tensors:
``present`` says where in the units' tensors the given ones belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_densenet.functional import forward
from efficient_densenet.functional import stem as stems
from efficient_densenet.functional.backward import backward_block
from efficient_densenet.functional.encoding import decode, encode
from efficient_densenet.functional.forward import Saved, features_at_border
from efficient_densenet.functional.precision import Types
from efficient_densenet.functional.spec import (
    BlockSpec,
    StemSpec,
    UnitSpec,
    UnitTensors,
    operations_of,
)
from efficient_densenet.kernels.aten import convolve, pooled
from efficient_densenet.kernels.interface import Conv, Statistics
from efficient_densenet.kernels.layout import empty_map, outer_format


def dense_block(
    spec: BlockSpec, seeds: Tensor | None, x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """The result of a block, and ``Saved.flat``."""
    out, *kept = block_forward(x, seeds, encode(spec), *_dense(flat))
    return out, kept


def stem(
    spec: StemSpec, x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Tensor, Statistics | None]:
    """The stem's result, and the batch statistics of its convolution."""
    out, *vectors = stem_forward(x, encode(spec), *_dense(flat))
    return out, Statistics(*vectors) if vectors else None


@torch.library.custom_op(
    "efficient_densenet::draw_seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def draw_seeds(x: Tensor, layers: int) -> Tensor:
    """A seed for the dropout mask of each layer, from the device's default generator.

    Not before ``x`` is there: a compiler may not draw for a later block first.
    """
    return forward.draw_seeds(x, layers)


@draw_seeds.register_fake
def _(x: Tensor, layers: int) -> Tensor:
    return torch.empty(layers, dtype=torch.int64, device=x.device)


@torch.library.custom_op("efficient_densenet::block_forward", mutates_args=())
def block_forward(
    x: Tensor, seeds: Tensor | None, spec: str, present: Sequence[bool], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The result, and ``Saved.flat``."""
    block = decode(spec)
    out, saved = forward.forward_block(block, seeds, x, _spread(tensors, present))
    inner, outer = _formats(block, x)
    out = out.contiguous(memory_format=inner if block.exit else outer)
    kept = saved.flat(block)
    return [out] + [t.contiguous(memory_format=inner) if t.dim() == x.dim() else t for t in kept]


@block_forward.register_fake
def _(
    x: Tensor, seeds: Tensor | None, spec: str, present: Sequence[bool], tensors: Sequence[Tensor]
) -> list[Tensor]:
    block = decode(spec)
    types, (inner, outer) = block.types, _formats(block, x)
    returned = []
    if block.exit:
        exit_tensors = block.nested(_spread(tensors, present))[1]
        features = empty_map(x, block.channels, inner)
        returned.append(_unit_result(features, block.exit, exit_tensors, types, inner))
    if block.layers:
        format = inner if block.exit else outer
        returned.append(empty_map(x, block.channels, format, types.features))
    returned += [_vector(x, block.channels, types.statistics) for _ in range(2)]
    for layer, keeps in zip(block.layers, block.keeps, strict=True):
        for keep, width in zip(keeps, layer.widths, strict=True):
            if keep.made:
                returned.append(empty_map(x, width, inner, types.compute))
            if keep.statistics:
                returned += [_vector(x, width, types.statistics) for _ in range(2)]
    return returned


@torch.library.custom_op("efficient_densenet::block_backward", mutates_args=())
def block_backward(
    grad: Tensor,
    border: Tensor | None,
    kept: Sequence[Tensor],
    seeds: Tensor | None,
    spec: str,
    present: Sequence[bool],
    tensors: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the input and of ``tensors``, only those that are needed."""
    block = decode(spec)
    saved = Saved.of(block, border, kept)
    flat, needs_flat = _spread(tensors, present), _spread(needs, present, False)
    dx, grads = backward_block(block, seeds, saved, flat, grad, needs_x, needs_flat)
    inner, _ = _formats(block, saved.features)
    found = [dx.contiguous(memory_format=inner)] if dx is not None else []
    return found + _laid_out_like(tensors, grads, needs)


@block_backward.register_fake
def _(
    grad: Tensor,
    border: Tensor | None,
    kept: Sequence[Tensor],
    seeds: Tensor | None,
    spec: str,
    present: Sequence[bool],
    tensors: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    block = decode(spec)
    features = Saved.of(block, border, kept).features
    inner, _ = _formats(block, features)
    ops, types = operations_of(block, features), block.types
    summed = ops.summed_dtype(types.features, types.statistics)
    dx = empty_map(features, block.input_channels, inner, summed)
    return [dx] * needs_x + _empty_like(tensors, needs)


@torch.library.custom_op("efficient_densenet::stem_forward", mutates_args=())
def stem_forward(
    x: Tensor, spec: str, present: Sequence[bool], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The result, and the batch statistics of the convolution if the norm uses them."""
    unit, _ = _stem_tensors(decode(spec), tensors, present)
    out, statistics = stems.forward_stem(decode(spec), x, unit)
    return [out.contiguous(memory_format=decode(spec).format(x)), *(statistics or ())]


@stem_forward.register_fake
def _(x: Tensor, spec: str, present: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor]:
    stem = decode(spec)
    _, conv = _stem_tensors(stem, tensors, present)
    y = convolve(x.to(stem.types.compute), conv)
    out = _unit_result(y, stem.unit, UnitTensors(), stem.types, stem.format(x))
    batch = [_vector(x, y.shape[1], stem.types.statistics) for _ in range(2)]
    return [out, *batch] if stem.unit.batch_statistics else [out]


@torch.library.custom_op("efficient_densenet::stem_backward", mutates_args=())
def stem_backward(
    grad: Tensor,
    x: Tensor,
    vectors: Sequence[Tensor],
    spec: str,
    present: Sequence[bool],
    tensors: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the image and of ``tensors``, only those that are needed."""
    unit, _ = _stem_tensors(decode(spec), tensors, present)
    statistics = Statistics(*vectors) if vectors else None
    wanted = UnitTensors(*_spread(needs, present, False))
    dx, grads = stems.backward_stem(decode(spec), x, unit, statistics, grad, needs_x, wanted)
    found = [dx.contiguous(memory_format=decode(spec).format(x))] if dx is not None else []
    return found + _laid_out_like(tensors, grads, needs)


@stem_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    vectors: Sequence[Tensor],
    spec: str,
    present: Sequence[bool],
    tensors: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    stem = decode(spec)
    dx = empty_map(x, x.shape[1], stem.format(x), stem.types.compute)
    return [dx] * needs_x + _empty_like(tensors, needs)


def _keep_block(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, seeds, ctx.spec, ctx.present, tensors = inputs
    border = features_at_border(decode(ctx.spec), x, output[0])
    ctx.kept, ctx.input_dtype = len(output) - 1, x.dtype
    ctx.save_for_backward(seeds, border, *output[1:], *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _block_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    seeds, border, *rest = ctx.saved_tensors
    kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
    needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    if grads[0] is None:
        return None, None, None, None, [None] * len(tensors)
    found = block_backward(
        grads[0], border, kept, seeds, ctx.spec, ctx.present, tensors, needs_x, needs
    )
    dx = found.pop(0).to(ctx.input_dtype) if needs_x else None
    return dx, None, None, None, _spread(found, needs)


def _keep_stem(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, ctx.spec, ctx.present, tensors = inputs
    ctx.kept = len(output) - 1
    ctx.save_for_backward(x, *output[1:], *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _stem_gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    vectors, tensors = rest[: ctx.kept], rest[ctx.kept :]
    needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if grads[0] is None:
        return None, None, None, [None] * len(tensors)
    found = stem_backward(grads[0], x, vectors, ctx.spec, ctx.present, tensors, needs_x, needs)
    dx = found.pop(0).to(x.dtype) if needs_x else None
    return dx, None, None, _spread(found, needs)


block_forward.register_autograd(_block_gradients, setup_context=_keep_block)
stem_forward.register_autograd(_stem_gradients, setup_context=_keep_stem)


def _formats(spec: BlockSpec, x: Tensor) -> tuple[torch.memory_format, torch.memory_format]:
    """Memory formats inside the block and at its borders, by its input or its features."""
    outer = outer_format(x)
    return spec.format(x), outer


def _stem_tensors(
    spec: StemSpec, tensors: Sequence[Tensor], present: Sequence[bool]
) -> tuple[UnitTensors, Conv]:
    unit = UnitTensors(*_spread(tensors, present))
    return unit, Conv(unit.conv_weight, unit.conv_bias, spec.conv)


def _unit_result(
    x: Tensor,
    unit: UnitSpec,
    tensors: UnitTensors,
    types: Types,
    memory_format: torch.memory_format,
) -> Tensor:
    """An uninitialised map of the shape and type that ``unit`` returns for ``x``."""
    y = x.to(types.compute if unit.conv else types.features)
    y = pooled(y, unit.pool) if unit.pool else y
    y = convolve(y, Conv(tensors.conv_weight, tensors.conv_bias, unit.conv)) if unit.conv else y
    return empty_map(y, y.shape[1], memory_format)


def _vector(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(channels, dtype=dtype)


def _dense(flat: Sequence[Tensor | None]) -> tuple[list[bool], list[Tensor]]:
    """For each place whether it has a tensor, and the tensors."""
    return [t is not None for t in flat], [t for t in flat if t is not None]


def _spread(values: Sequence[Any], present: Sequence[bool], absent: Any = None) -> list[Any]:
    """The values at the places that are ``present``; the inverse of :func:`_dense`."""
    rest = iter(values)
    return [next(rest) if is_in else absent for is_in in present]


def _laid_out_like(
    tensors: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are not ``None``, each with the strides of its tensor."""
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    found = [grad for grad in grads if grad is not None]
    return [
        grad if grad.stride() == tensor.stride() else torch.empty_like(tensor).copy_(grad)
        for tensor, grad in zip(wanted, found, strict=True)
    ]


def _empty_like(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need]
