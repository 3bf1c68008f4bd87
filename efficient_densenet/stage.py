"""Runs modules through the recomputing functions: a stem, or dense layers and what reads them all.

The callers have made sure that the modules are supported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from efficient_densenet import autograd, lowering
from efficient_densenet.kernels.interface import Pool
from efficient_densenet.lowering import Seen
from efficient_densenet.reference import BasicLayer, BottleneckLayer
from efficient_densenet.spec import BlockSpec, LayerSpec, StemSpec, Types, UnitSpec
from efficient_densenet.synchronise import joined_count


class Exit(NamedTuple):
    """Modules that read all features: a norm, then (after a ReLU) a pooling, then a convolution."""

    norm: Any
    pool: Pool
    conv: Any = None

    def spec(self) -> UnitSpec:
        return lowering.unit_spec(self.norm, self.conv, self.pool)


def run_layers(
    layers: Iterable[nn.Module], x: Tensor, recompute_bottleneck: bool, exit: Exit | None = None
) -> Tensor:
    """What dense layers, one after the other, and then ``exit`` make of ``x``.

    Returns the features, or the result of the exit. Running statistics are updated once.
    """
    layers = list(layers)
    spec = BlockSpec(
        layers=tuple(map(_layer_spec, layers)),
        exit=exit and exit.spec(),
        input_channels=x.shape[1],
        recompute_bottleneck=recompute_bottleneck,
        types=lowering.types_of(x),
        process_group=_process_group(all_norms(layers, exit)),
    )
    units = [
        lowering.unit_tensors(norm, conv)
        for layer in layers
        for norm, conv in zip(norms(layer), convs(layer), strict=True)
    ]
    if exit:
        units.append(lowering.unit_tensors(exit.norm, exit.conv))
    out, features, bottlenecks = autograd.dense_block(x, spec, units)
    count = joined_count(x.numel() // x.shape[1], spec.process_group, x.device)
    seen = [
        Seen(norm, statistics)
        for layer, bottleneck in zip(layers, bottlenecks, strict=True)
        for norm, statistics in zip(norms(layer), (features, bottleneck), strict=False)
    ]
    if exit:
        seen.append(Seen(exit.norm, features))
    lowering.update_running_statistics(seen, count)
    return out


def run_stem(conv: Any, norm: Any, pool: Any, x: Tensor) -> Tensor:
    """What convolution, norm, ReLU and pooling make of an image; statistics are updated once."""
    compute = lowering.types_of(x).compute
    spec = StemSpec(
        conv=lowering.geometry(conv),
        unit=lowering.unit_spec(norm, None, lowering.pooling(pool)),
        # A convolution's result has the type in which it computes, and so has what follows.
        types=Types(compute, compute),
        process_group=_process_group([norm]),
    )
    tensors = lowering.unit_tensors(norm, None)
    tensors = tensors._replace(conv_weight=conv.weight, conv_bias=conv.bias)
    out, statistics, values = autograd.stem(x, spec, tensors)
    count = joined_count(values, spec.process_group, x.device)
    lowering.update_running_statistics([Seen(norm, statistics)], count)
    return out


def norms(layer: Any) -> list[Any]:
    """The norms of a dense layer in the order of their use."""
    return [layer.norm1, layer.norm2] if isinstance(layer, BottleneckLayer) else [layer.norm1]


def all_norms(layers: Iterable[nn.Module], exit: Exit | None = None) -> list[Any]:
    """The norms of dense layers and of what reads them all."""
    found = [norm for layer in layers for norm in norms(layer)]
    return [*found, exit.norm] if exit else found


def convs(layer: Any) -> list[Any]:
    """The convolutions of a dense layer in the order of their use."""
    return [layer.conv1, layer.conv2] if isinstance(layer, BottleneckLayer) else [layer.conv1]


def unsupported_layer(layer: nn.Module, channels: int) -> str | None:
    """What about a dense layer the efficient path does not know, as the end of a sentence."""
    if type(layer) not in (BottleneckLayer, BasicLayer):
        return f" is a {type(layer).__name__}"
    if lowering.is_patched(layer):
        return " has hooks or a forward of its own"
    reason = lowering.unsupported_children(layer)
    if reason:
        return reason
    for i, conv in enumerate(convs(layer), start=1):
        if not lowering.keeps_size(conv):
            return f".conv{i} has a stride, padding or padding mode that changes the map's size"
    expected = norms(layer)[0].num_features
    if expected != channels:
        return f".norm1 expects {expected} channels and gets {channels}"
    return None


def _process_group(norms: Iterable[Any]) -> Any:
    groups = lowering.process_groups(norms)
    return groups[0] if groups else None


def _layer_spec(layer: Any) -> LayerSpec:
    units = tuple(
        lowering.unit_spec(norm, conv)
        for norm, conv in zip(norms(layer), convs(layer), strict=True)
    )
    return LayerSpec(
        units=units,
        channels=layer.norm1.num_features,
        width=convs(layer)[0].out_channels,
        growth=convs(layer)[-1].out_channels,
        drop_rate=layer.drop_rate if layer.training else 0.0,
    )
