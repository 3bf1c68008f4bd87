"""Dense blocks whose layers decide by what they are given, and how they follow a change of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet import convert_
from support.compare import assert_same_training

INPUT = torch.randn(2, 4, 6, 5, dtype=torch.float64)


class Layer(nn.Module):
    """Norm, what ``activate(layer, map)`` makes of it, convolution."""

    def __init__(self, channels: int, activate: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 3, padding=1)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activate(self, self.bn(x)))


class Block(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def block(
    activate: Callable[[Layer, Tensor], Tensor],
    give: Callable[[Layer], object] = lambda layer: None,
    layer: type[Layer] = Layer,
) -> Block:
    """Three layers, each of which has been given what it decides by."""
    made = Block([layer(4 + 3 * i, activate) for i in range(3)])
    for part in made.layers:
        give(part)
    return made.double()


def either(is_leaky: bool, y: Tensor) -> Tensor:
    return F.leaky_relu(y, 0.3) if is_leaky else F.relu(y)


def assert_follows(
    original: nn.Module, change: Callable[[nn.Module], object], why_naive: str | None = None
) -> None:
    """A converted block trains as the original does, before and after both are changed."""
    converted = copy.deepcopy(original)
    convert_(converted)
    assert converted.why_naive(INPUT) is None
    for model in (converted, original):
        model.train()
    assert_same_training(converted, original, INPUT, rtol=1e-9)
    for model in (converted, original):
        change(model)
    assert converted.why_naive(INPUT) == why_naive
    assert_same_training(converted, original, INPUT, rtol=1e-9)
