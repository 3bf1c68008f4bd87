"""One dense connection, of which not even the concatenation that it reads is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_densenet.functional import inference
from efficient_densenet.functional.autograd import (
    Context,
    Gradients,
    Inputs,
    RecomputingFunction,
    Results,
    differentiable_once,
)
from efficient_densenet.functional.backward import backward_block
from efficient_densenet.functional.forward import Saved, forward_block
from efficient_densenet.functional.opaque import Opaque, Surroundings, rebuild, run_once
from efficient_densenet.functional.spec import BlockSpec, UnitTensors
from efficient_densenet.kernels.interface import Statistics


def connect(
    maps: Sequence[Tensor], spec: BlockSpec, tensors: UnitTensors
) -> tuple[Tensor, Statistics]:
    """The exit of a block without layers on ``torch.cat(maps, 1)``, and that one's statistics.

    The maps are kept for the backward pass, and joined again in it.
    """
    if inference.suits_block(spec, *maps, *tensors):
        x = torch.cat(list(maps), 1)
        unseen = x.new_empty(0)  # the norm does not learn
        return inference.infer_block(spec, x, tensors), Statistics(unseen, unseen)
    out, mean, var = _Unit.apply(spec, len(maps), *maps, *tensors)
    return out, Statistics(mean, var)


def connect_opaque(maps: Sequence[Tensor], opaque: Opaque, tensors: Sequence[Tensor]) -> Tensor:
    """An opaque layer on ``torch.cat(maps, 1)``; the maps and ``tensors`` are kept.

    Raises:
        Unfit: if it cannot be recomputed.
    """
    surroundings = Surroundings.of(maps[0], None)
    out: Tensor
    out, _ = _Opaque.apply(opaque, surroundings, len(maps), *maps, *tensors)
    return out


class _Unit(RecomputingFunction):
    @staticmethod
    def forward(spec: BlockSpec, count: int, *tensors: Tensor | None) -> Results:
        x = torch.cat(tensors[:count], 1)  # type: ignore[arg-type]
        out, saved = forward_block(spec, None, x, tensors[count:])
        return out, *saved.flat(spec)

    @staticmethod
    def setup_context(ctx: Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.count, *tensors = inputs
        ctx.save_for_backward(*output[1:], *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, var, *tensors = ctx.saved_tensors
        maps, flat = tensors[: ctx.count], tensors[ctx.count :]
        _, _, *needs = ctx.needs_input_grad
        needs_maps, needs = needs[: ctx.count], needs[ctx.count :]
        x = torch.cat(maps, 1)
        saved = Saved.of(ctx.spec, x, [mean, var])
        dx, grads = backward_block(ctx.spec, None, saved, flat, grad, any(needs_maps), needs)
        parts = _parts(dx, maps, needs_maps)
        return None, None, *differentiable_once(grad, *parts, *grads)


class _Opaque(RecomputingFunction):
    @staticmethod
    def forward(
        opaque: Opaque, surroundings: Surroundings, count: int, *tensors: Tensor
    ) -> Results:
        learns = any(tensor.requires_grad for tensor in tensors)
        return run_once(opaque, surroundings, tensors[:count], tensors[count:], learns)

    @staticmethod
    def setup_context(ctx: Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.opaque, ctx.surroundings, ctx.count, *tensors = inputs
        _, random = output
        ctx.save_for_backward(random, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(random)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        random, *tensors = ctx.saved_tensors
        maps, own = tensors[: ctx.count], tensors[ctx.count :]
        needs = ctx.needs_input_grad[3:]
        rebuilt = rebuild(ctx.opaque, ctx.surroundings, maps, own, random, needs)
        return None, None, None, *differentiable_once(grad, *rebuilt.gradients(grad))


def _parts(dx: Tensor | None, maps: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of a concatenation as those of the maps that need one."""
    if dx is None:
        return [None] * len(maps)
    parts = dx.split([x.shape[1] for x in maps], 1)
    return [
        part.to(x.dtype) if need else None for part, x, need in zip(parts, maps, needs, strict=True)
    ]
