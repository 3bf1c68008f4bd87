"""What a dense block is, apart from its tensors: what the autograd function walks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvSpec:
    """A convolution of stride 1."""

    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class UnitSpec:
    """BN - ReLU [- pool] [- convolution].

    ``batch_statistics`` says whether the norm uses the batch's statistics or running ones.
    """

    eps: float
    batch_statistics: bool
    conv: ConvSpec | None
    pool: Callable[[Tensor], Tensor] | None = None


class UnitTensors(NamedTuple):
    """A value for each tensor of a unit, ``None`` where it has none.

    The values are the tensors, or their gradients, or whether those are wanted. Running statistics
    are there only where the norm uses them.
    """

    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    conv_weight: Any = None
    conv_bias: Any = None


@dataclass(frozen=True)
class LayerSpec:
    """A dense layer: one unit (basic) or two (bottleneck), reading the first ``channels`` features.

    The first unit leaves ``width`` channels, the last one ``growth``.
    """

    units: tuple[UnitSpec, ...]
    channels: int
    width: int
    growth: int
    drop_rate: float


@dataclass(frozen=True)
class BlockSpec:
    """A dense block, what is recomputed, and in which types.

    ``exit`` is a last unit that reads all features (a transition, or the norm before the
    classifier); with it the block returns its result and the features stay inside.
    ``recompute_bottleneck`` drops the bottleneck maps too and convolves again in the backward pass.
    Convolutions compute in ``compute_dtype``; features are stored in ``features_dtype``.
    """

    layers: tuple[LayerSpec, ...]
    exit: UnitSpec | None
    input_channels: int
    recompute_bottleneck: bool
    compute_dtype: torch.dtype
    features_dtype: torch.dtype

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.input_channels + sum(layer.growth for layer in self.layers)

    @property
    def widest(self) -> int:
        """Channels of the widest map that is normalised."""
        return max([self.channels, *(layer.width for layer in self.layers)])

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Type of means, variances and of all that is summed over a batch."""
        return torch.promote_types(self.features_dtype, torch.float32)

    def reads_statistics(self, layer: int) -> bool:
        """Whether a norm reads the statistics of the map that ``layer`` writes (-1: the input)."""
        readers = [later.units[0] for later in self.layers[layer + 1 :]]
        readers += [self.exit] if self.exit else []
        return any(unit.batch_statistics for unit in readers)

    def nested(self, flat: Sequence[Any]) -> tuple[list[list[UnitTensors]], UnitTensors]:
        """Values of all units, given flat, as those of each layer's units and those of the exit."""
        width = len(UnitTensors._fields)
        groups = iter([UnitTensors(*flat[i : i + width]) for i in range(0, len(flat), width)])
        layers = [[next(groups) for _ in layer.units] for layer in self.layers]
        return layers, next(groups, UnitTensors())
