"""What was recognised, read as what its modules are now: specifications and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.convert.match import (
    DenseMatch,
    LayerCall,
    LayerMatch,
    StemMatch,
    TransitionMatch,
    UnitMatch,
)
from efficient_densenet.modules.opaque import read_opaque, read_part
from efficient_densenet.modules.reading import (
    Layer,
    Misfit,
    Unit,
    Unsupported,
    is_plain_average,
    is_pointwise,
    keeps_size,
    unit_of,
)


def part(module: nn.Module, path: str) -> Any:
    """The module at a path below ``module``."""
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


def read_layers(block: nn.Module, match: DenseMatch) -> Iterator[Layer]:
    """The layers of a recognised block.

    Raises:
        Unsupported: if one of them is neither made of units that are supported together nor the
            call of a module.
    """
    channels = match.input_channels
    for number, layer in enumerate(match.layers):
        name = layer.call.path if layer.call else f"layer {number + 1}"
        try:
            yield _read_units(block, layer, name, channels)
        except Misfit:
            raise
        except Unsupported:
            if layer.call is None:
                raise
            yield _read_opaque(block, layer, layer.call, name, channels)
        channels += layer.growth


def _read_opaque(
    block: nn.Module, layer: LayerMatch, call: LayerCall, name: str, channels: int
) -> Layer:
    """A layer of which half is known, or nothing."""
    module, half = part(block, call.path), layer.half
    if half is None or not keeps_size(part(block, half.unit.conv)):
        return read_opaque(module, name, channels, layer.growth, call.form)
    unit = _read_unit(block, half.unit)
    width = unit.leaves if half.unit_first else unit.norm.num_features
    reads, leaves = (channels, width) if half.unit_first else (width, layer.growth)
    if (unit.norm.num_features, unit.leaves) != (reads, leaves):
        raise Misfit(name, f"has a unit that does not read {reads} channels and leave {leaves}")
    calls = nn.Sequential(*(part(block, path) for path in half.calls))
    other = read_part(calls, name, (width if half.unit_first else channels,), module)
    parts = (unit, other) if half.unit_first else (other, unit)
    return Layer.of(parts, channels, width, layer.growth, half.unit.dropout)


def run_again(block: nn.Module, match: DenseMatch) -> Iterator[str]:
    """Why layers of a recognised block, or halves of them, are run again as they are."""
    channels = match.input_channels
    for number, layer in enumerate(match.layers):
        try:
            _read_units(block, layer, f"layer {number + 1}", channels)
        except Unsupported as reason:
            yield str(reason)
        channels += layer.growth


def _read_units(block: nn.Module, layer: LayerMatch, name: str, channels: int) -> Layer:
    if layer.why_opaque is not None:
        raise Unsupported(*layer.why_opaque)
    if len(layer.units) > 2:
        raise Unsupported(name, f"has {len(layer.units)} convolutions: one or two are known")
    *inner, last = [unit.dropout for unit in layer.units]
    if any(dropout.rate for dropout in inner):
        raise Unsupported(name, "drops values between its convolutions")
    units = tuple([_read_unit(block, unit) for unit in layer.units])
    convs, reads = [part(block, unit.conv) for unit in layer.units], channels
    for unit, conv in zip(layer.units, convs, strict=True):
        if not keeps_size(conv):
            raise Misfit(unit.conv, "changes the size of the map")
        expected = conv.weight.shape[1] * conv.groups
        if expected != reads:
            raise Misfit(unit.conv, f"expects {expected} channels and gets {reads}")
        reads = conv.weight.shape[0]
    if reads != layer.growth:
        raise Misfit(name, f"adds {reads} channels, and not {layer.growth} as it did")
    return Layer.of(units, channels, convs[0].weight.shape[0], reads, last)


def _read_unit(block: nn.Module, unit: UnitMatch) -> Unit:
    return unit_of(part(block, unit.norm), unit.activation, part(block, unit.conv))


def run_layer(block: nn.Module, layer: LayerMatch, x: Tensor) -> Tensor:
    """The maps ``x`` with the new ones of a layer, which is called as its block calls it."""
    assert layer.call is not None
    form = layer.call.form
    taken = form.arrange(x.split(form.parts(x.shape[1]), 1), None)
    new = form.call(part(block, layer.call.path), taken, layer.growth)
    return torch.cat([new, x] if form.new_first else [x, new], 1)


def read_transition(transition: nn.Module, match: TransitionMatch) -> Unit:
    """A recognised transition as what reads all features of a block; raises Unsupported."""
    conv, pool = part(transition, match.conv), match.pool
    if match.dropout.rate:
        raise Unsupported("the transition", "drops values")
    if pool is None or not (is_pointwise(conv) and is_plain_average(pool)):
        raise Unsupported(
            "the transition",
            "does not convolve 1x1 and average without padding: the two do not commute",
        )
    return unit_of(part(transition, match.norm), match.activation, conv, pool)


def read_stem(stem: nn.Module, match: StemMatch) -> tuple[_ConvNd, Unit]:
    """The convolution of a recognised stem, and the unit that reads its result."""
    unit = unit_of(part(stem, match.norm), match.activation, pool=match.pool)
    return part(stem, match.conv), unit
