"""A dense block of your own layers, as one call that keeps only the features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from efficient_densenet.modules.calls import BlockCall, check_input
from efficient_densenet.modules.naive import BasicLayer, BottleneckLayer
from efficient_densenet.modules.opaque import read_opaque
from efficient_densenet.modules.parts import (
    BASIC,
    BOTTLENECK,
    Child,
    children_of,
    read_layer,
)
from efficient_densenet.modules.reading import (
    NO_DROPOUT,
    Declined,
    Dropout,
    Layer,
    Misfit,
    Unsupported,
    check_plain,
)

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


OWN = {BottleneckLayer.forward: BOTTLENECK, BasicLayer.forward: BASIC}


def recompute_dense_block(
    layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, growth_rate: int | Sequence[int]
) -> Tensor:
    """A dense block of any layers, of which only the features are kept. Equals ::

        for layer in layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    ``x`` is ``(N, channels, *spatial)``, the result ``(N, channels + growth, *spatial)``, where
    ``growth`` is the sum over all layers. Neither the concatenations nor any map inside a layer is
    kept for the backward pass.

    In an ``nn.Sequential`` (with dropout at the end, or none) every batch norm with an activation
    after it, and the convolution after that, run as in :class:`EfficientDenseBlock`. Everything
    between those, and any other layer, is run again by autograd in the backward pass: the peak is
    near that of one layer. Its buffers are updated once, it draws the same random numbers, and it
    runs in the same modes and under the same autocast as in the forward pass.

    Args:
        layers: modules that map the concatenation so far to new maps; or functions that read no
            parameters.
        x: the input of the first layer.
        growth_rate: channels that each layer returns: one number for all, or a sequence of them.

    Raises:
        ValueError: if there is no layer, or not one growth rate for each.

    If a layer cannot be recomputed, the loop above runs as it is written, and a warning says why;
    while being compiled, exported or traced, without a warning.
    """
    growths = [growth_rate] * len(layers) if isinstance(growth_rate, int) else list(growth_rate)
    if not layers or len(growths) != len(layers):
        raise ValueError(
            f"layers must be at least one, each with a growth rate, got {len(layers)} layers and "
            f"growth_rate={growth_rate!r}"
        )
    try:
        return _read(layers, x, growths).run()
    except Declined:
        pass
    except Unsupported as reason:
        if not torch.compiler.is_compiling():
            warnings.warn(f"recompute_dense_block is naive, since {reason}", stacklevel=2)
    for layer in layers:
        x = torch.cat([x, layer(x)], 1)
    return x


def _read(
    layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, growths: Sequence[int]
) -> BlockCall:
    """What a call would run; raises :class:`Unsupported`."""
    check_input(x)
    read, channels = [], x.shape[1]
    for i, (layer, growth) in enumerate(zip(layers, growths, strict=True)):
        read.append(_read_layer(layer, f"layer {i}", channels, growth))
        channels += growth
    return BlockCall.of(x, read, None, "bottleneck", "auto")


def _read_layer(layer: Callable[[Tensor], Tensor], path: str, channels: int, growth: int) -> Layer:
    try:
        found = _read_parts(layer, path, channels, growth)
        if found.spec.growth == growth:
            return found
    except Misfit:
        raise
    except Unsupported:
        pass
    return read_opaque(layer, path, channels, growth)


def _read_parts(layer: object, path: str, channels: int, growth: int) -> Layer:
    """A layer by what it runs one after the other."""
    structure = OWN.get(type(layer).forward) if isinstance(layer, nn.Module) else None
    if structure is not None:
        assert isinstance(layer, nn.Module)
        children, dropout = structure.children(layer, path), structure.dropout(layer)
    elif type(layer) is nn.Sequential:
        children, dropout = children_of(layer, path), NO_DROPOUT
        if children and type(children[-1].module) in DROPOUTS:
            dropout = _read_dropout(children.pop())
    else:
        raise Unsupported(path, f"is a {type(layer).__name__}")
    check_plain(layer, path)
    return read_layer(layer, path, children, channels, growth, dropout)


def _read_dropout(child: Child) -> Dropout:
    """Dropout of single values or of whole maps."""
    module = child.module
    check_plain(module, child.path)
    assert isinstance(module, DROPOUTS)
    return Dropout(float(module.p) if module.training else 0.0, type(module) is not nn.Dropout)
