"""What was recognised, read as what its modules are now: specifications and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.convert.recognition.match import (
    NO_DROPOUT,
    DenseMatch,
    LayerCall,
    LayerMatch,
    StemMatch,
    TransitionMatch,
    UnitMatch,
)
from efficient_densenet.modules.opaque import read_opaque
from efficient_densenet.modules.parts import layer_of
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
    """A layer of which some parts are known, or none."""
    module = part(block, call.path)
    units = [unit for unit in layer.chain if isinstance(unit, UnitMatch)]
    if not units or any(unit.conv and not keeps_size(part(block, unit.conv)) for unit in units):
        return read_opaque(module, name, channels, layer.growth, call.form)
    parts = [
        _read_unit(block, match)
        if isinstance(match, UnitMatch)
        else nn.Sequential(*(part(block, path) for path in match))
        for match in layer.chain
    ]
    last = layer.chain[-1]
    dropout = last.dropout if isinstance(last, UnitMatch) else NO_DROPOUT
    return _fitting(layer_of(module, name, parts, channels, layer.growth, dropout), name, layer)


def _fitting(read: Layer, name: str, layer: LayerMatch) -> Layer:
    """What was read, if it adds as many channels as it did; raises Misfit."""
    if read.spec.growth != layer.growth:
        raise Misfit(name, f"adds {read.spec.growth} channels, and not {layer.growth} as it did")
    return read


def run_again(block: nn.Module, match: DenseMatch) -> Iterator[str]:
    """Why layers of a recognised block, or parts of them, are run again as they are."""
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
    *inner, last = [unit.dropout for unit in layer.units]
    if any(dropout.rate for dropout in inner):
        raise Unsupported(name, "drops values between its convolutions")
    units = [_read_unit(block, unit) for unit in layer.units]
    for match in layer.units:
        if match.conv and not keeps_size(part(block, match.conv)):
            raise Misfit(match.conv, "changes the size of the map")
    return _fitting(Layer.of(units, name, channels, layer.growth, last), name, layer)


def _read_unit(block: nn.Module, unit: UnitMatch) -> Unit:
    conv = None if unit.conv is None else part(block, unit.conv)
    return unit_of(part(block, unit.norm), unit.activation, conv)


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
