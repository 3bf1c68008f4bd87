"""Forward passes without gradients or batch statistics: one buffer, and batch norms folded.

A batch norm after a convolution, with running statistics, is part of it: its scale multiplies the
convolution's weight, its shift is added to the bias. So a bottleneck layer normalises once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_densenet.functional.forward import FeatureBuffer
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, LayerSpec, StemSpec, UnitSpec, UnitTensors
from efficient_densenet.kernels.activations import activate_
from efficient_densenet.kernels.aten import convolve, pooled
from efficient_densenet.kernels.interface import Conv
from efficient_densenet.kernels.layout import outer_format


def suits_block(spec: BlockSpec, *tensors: Tensor | None) -> bool:
    """Whether a block's pass draws no masks and needs neither gradients nor batch statistics."""
    units = [unit for layer in spec.layers for unit in layer.units]
    convolve = all(unit.conv for unit in units)
    units += [spec.exit] if spec.exit else []
    return (
        bool(units)
        and convolve
        and all(layer.is_known for layer in spec.layers)
        and not any(unit.batch_statistics for unit in units)
        and not any(layer.drop_rate for layer in spec.layers)
        and _nothing_learns(tensors)
    )


def suits_stem(spec: StemSpec, *tensors: Tensor | None) -> bool:
    """The same of a stem's pass."""
    return not spec.unit.batch_statistics and _nothing_learns(tensors)


def infer_block(spec: BlockSpec, x: Tensor, flat: Sequence[Tensor | None]) -> Tensor:
    """The result of a block, as ``forward.forward_block`` returns it."""
    layers, exit_tensors = spec.nested(flat)
    with torch.no_grad(), outside_autocast(x.device):
        buffer = FeatureBuffer(spec, x)
        for layer, tensors in zip(spec.layers, layers, strict=True):
            _infer_layer(buffer, layer, tensors)
        if spec.exit:
            return buffer.read(spec.exit, exit_tensors)
        return buffer.maps.contiguous(memory_format=outer_format(x))


def _infer_layer(buffer: FeatureBuffer, layer: LayerSpec, tensors: Sequence[UnitTensors]) -> None:
    units = list(zip(layer.units, tensors, strict=True))
    y: Tensor | None = None
    for (unit, own), after in zip(units, (*units[1:], None), strict=True):
        own = folded(own, *after) if after else own
        if y is None:
            y = buffer.read(unit, own)
        else:
            assert unit.conv is not None
            activate_(y, unit.activation)
            y = convolve(y, Conv(own.conv_weight, own.conv_bias, unit.conv))
    assert y is not None
    buffer.append(y)


def infer_stem(spec: StemSpec, x: Tensor, tensors: UnitTensors) -> Tensor:
    """The result of a stem, as ``stem.forward_stem`` returns it."""
    assert spec.unit.pool is not None
    with torch.no_grad(), outside_autocast(x.device):
        unit = folded(tensors, spec.unit, tensors)
        image = x.to(spec.types.compute, memory_format=spec.format(x))
        y = convolve(image, Conv(unit.conv_weight, unit.conv_bias, spec.conv))
        return pooled(activate_(y, spec.unit.activation), spec.unit.pool)


def folded(conv: UnitTensors, unit: UnitSpec, norm: UnitTensors) -> UnitTensors:
    """The tensors of ``conv`` with ``norm``, which follows it, folded into the convolution.

    ``scale = γ / sqrt(var + eps)``; weight ``scale * W``, bias ``β + scale * (b - mean)``.
    """
    scale = (norm.running_var + unit.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean
    before = -mean if conv.conv_bias is None else conv.conv_bias - mean
    bias = scale * before if norm.bias is None else torch.addcmul(norm.bias, scale, before)
    weight = conv.conv_weight * scale.view(-1, *(1,) * (conv.conv_weight.dim() - 1))
    return conv._replace(conv_weight=weight, conv_bias=bias)


def _nothing_learns(tensors: Sequence[Tensor | None]) -> bool:
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )
