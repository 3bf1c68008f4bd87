"""Runs modules through the recomputing functions: a stem, or dense layers and what reads them all.

The callers have made sure that the modules are supported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from efficient_densenet.functional import autograd
from efficient_densenet.functional.modes import Recompute
from efficient_densenet.functional.spec import BlockSpec, LayerSpec, StemSpec, Types, UnitSpec
from efficient_densenet.functional.synchronise import joined_count
from efficient_densenet.kernels.implementations import Kernels, check_kernels, explain_choice
from efficient_densenet.kernels.interface import RELU, Pool
from efficient_densenet.modules import reading as lowering
from efficient_densenet.modules.parts import Layer
from efficient_densenet.modules.reading import Seen


class ChoosesKernels(nn.Module):
    """A module whose ``kernels`` says which implementation of the operations it runs on.

    That one if it can run the input, otherwise the next slower one. ``"auto"`` leaves it to the
    environment variable ``EFFICIENT_DENSENET_KERNELS``; if that is not set, it is the fastest one.
    """

    _kernels: Kernels = "auto"

    @property
    def kernels(self) -> Kernels:
        """``"auto"``, ``"triton"`` or ``"eager"``."""
        return self._kernels

    @kernels.setter
    def kernels(self, name: Kernels) -> None:
        check_kernels(name)
        self._kernels = name

    def why_kernels(self, x: Tensor) -> str:
        """Which kernels the efficient path would run ``x`` on, and why not on faster ones."""
        types = lowering.types_of(x)
        return explain_choice(self.kernels, x.device, (types.compute, types.features), (RELU,))


class Exit(NamedTuple):
    """Modules that read all features: a norm, then (after a ReLU) a pooling, then a convolution.

    One of the last two may be missing.
    """

    norm: Any
    pool: Pool | None
    conv: Any = None

    def spec(self) -> UnitSpec:
        return lowering.unit_spec(self.norm, self.conv, self.pool)


def run_layers(
    layers: Sequence[Layer],
    x: Tensor,
    recompute: Recompute,
    exit: Exit | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """What dense layers, one after the other, and then ``exit`` make of ``x``.

    Returns the features, or the result of the exit. Running statistics are updated once.
    """
    spec = BlockSpec(
        layers=tuple(map(_layer_spec, layers)),
        exit=exit and exit.spec(),
        input_channels=x.shape[1],
        recompute=recompute,
        types=lowering.types_of(x),
        kernels=kernels,
        process_group=_process_group(all_norms(layers, exit)),
    )
    units = [lowering.unit_tensors(*unit) for layer in layers for unit in layer.units]
    if exit:
        units.append(lowering.unit_tensors(exit.norm, exit.conv))
    out, features, bottlenecks = autograd.dense_block(x, spec, units)
    count = joined_count(x.numel() // x.shape[1], spec.process_group, x.device)
    seen = [
        Seen(unit.norm, statistics)
        for layer, bottleneck in zip(layers, bottlenecks, strict=True)
        for unit, statistics in zip(layer.units, (features, bottleneck), strict=False)
    ]
    if exit:
        seen.append(Seen(exit.norm, features))
    lowering.update_running_statistics(seen, count)
    return out


def run_stem(conv: Any, norm: Any, pool: Any, x: Tensor, kernels: Kernels = "auto") -> Tensor:
    """What convolution, norm, ReLU and pooling make of an image; statistics are updated once."""
    compute = lowering.types_of(x).compute
    spec = StemSpec(
        conv=lowering.geometry(conv),
        unit=lowering.unit_spec(norm, None, lowering.pooling(pool)),
        # A convolution's result has the type in which it computes, and so has what follows.
        types=Types(compute, compute),
        kernels=kernels,
        process_group=_process_group([norm]),
    )
    tensors = lowering.unit_tensors(norm, None)
    tensors = tensors._replace(conv_weight=conv.weight, conv_bias=conv.bias)
    out, statistics, values = autograd.stem(x, spec, tensors)
    count = joined_count(values, spec.process_group, x.device)
    lowering.update_running_statistics([Seen(norm, statistics)], count)
    return out


def all_norms(layers: Iterable[Layer], exit: Exit | None = None) -> list[Any]:
    """The norms of dense layers and of what reads them all."""
    found = [unit.norm for layer in layers for unit in layer.units]
    return [*found, exit.norm] if exit else found


def _process_group(norms: Iterable[Any]) -> Any:
    groups = lowering.process_groups(norms)
    return groups[0] if groups else None


def _layer_spec(layer: Layer) -> LayerSpec:
    return LayerSpec(
        units=tuple(lowering.unit_spec(norm, conv) for norm, conv in layer.units),
        channels=layer.units[0].norm.num_features,
        width=layer.units[0].conv.out_channels,
        growth=layer.units[-1].conv.out_channels,
        drop_rate=layer.drop_rate,
        drops_maps=layer.drops_maps,
    )
