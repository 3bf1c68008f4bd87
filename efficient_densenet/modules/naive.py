"""The naive layers and blocks in plain ``nn`` modules: the truth of every test, and the fallback.

Module names are torchvision's, so that its state dicts load. Every constructor takes ``dims`` (1, 2
or 3 spatial dimensions).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVG_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def check_dims(dims: int) -> None:
    """Raise ``ValueError`` unless ``dims`` is 1, 2 or 3."""
    if dims not in NORMS:
        raise ValueError(f"dims must be 1, 2 or 3 spatial dimensions, got {dims!r}")


class BottleneckLayer(nn.Module):
    """DenseNet-B layer: BN - ReLU - Conv1x1 - BN - ReLU - Conv3x3 [- Dropout].

    Reads ``(N, num_input_features, *spatial)``, or the list of tensors whose concatenation has that
    shape, and returns the ``growth_rate`` new channels only, as torchvision's ``_DenseLayer`` does.
    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        *,
        dims: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = NORMS[dims](num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = CONVS[dims](num_input_features, width, kernel_size=1, bias=bias)
        self.norm2 = NORMS[dims](width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = CONVS[dims](width, growth_rate, kernel_size=3, padding=1, bias=bias)
        self.drop_rate = float(drop_rate)

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        x = torch.cat(input, 1) if isinstance(input, list) else input
        bottleneck = self.conv1(self.relu1(self.norm1(x)))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck)))
        return F.dropout(new_features, self.drop_rate, self.training)


class BasicLayer(nn.Module):
    """Basic layer of the first paper: BN - ReLU - Conv3x3 [- Dropout].

    Shapes as in :class:`BottleneckLayer`.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        drop_rate: float,
        *,
        dims: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[dims](num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = CONVS[dims](
            num_input_features, growth_rate, kernel_size=3, padding=1, bias=bias
        )
        self.drop_rate = float(drop_rate)

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        x = torch.cat(input, 1) if isinstance(input, list) else input
        new_features = self.conv1(self.relu1(self.norm1(x)))
        return F.dropout(new_features, self.drop_rate, self.training)


class DenseBlock(nn.ModuleDict):
    """Naive dense block: every layer reads the concatenation of all maps before it.

    Maps ``(N, num_input_features, *spatial)`` to
    ``(N, num_input_features + num_layers * growth_rate, *spatial)``. ``bn_size=None`` makes basic
    layers, a number makes bottleneck layers of ``bn_size * growth_rate`` channels.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        dims: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_dims(dims)
        for name, value in (
            ("num_layers", num_layers),
            ("num_input_features", num_input_features),
            ("growth_rate", growth_rate),
            ("bn_size", 1 if bn_size is None else bn_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not 0.0 <= drop_rate <= 1.0:
            raise ValueError(f"drop_rate must be between 0 and 1, got {drop_rate!r}")
        self.growth_rate = growth_rate
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer: nn.Module
            if bn_size is None:
                layer = BasicLayer(channels, growth_rate, drop_rate, dims=dims, bias=bias)
            else:
                layer = BottleneckLayer(
                    channels, growth_rate, bn_size, drop_rate, dims=dims, bias=bias
                )
            self[f"denselayer{i + 1}"] = layer

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Naive transition: BN - ReLU - Conv1x1 - 2x2 average pooling.

    With compression θ (DenseNet-C) the caller passes ``num_output_features = floor(θ * channels)``.
    """

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        *,
        dims: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm = NORMS[dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVS[dims](num_input_features, num_output_features, kernel_size=1, bias=bias)
        self.pool = AVG_POOLS[dims](kernel_size=2, stride=2)


def compressed(channels: int, compression: float) -> int:
    """Channels that a transition with compression θ leaves: ``floor(θ * channels)``."""
    if not 0.0 < compression <= 1.0:
        raise ValueError(f"compression must be in (0, 1], got {compression!r}")
    return math.floor(channels * compression)


def global_average(x: Tensor, dims: int) -> Tensor:
    """Mean over all positions: ``(N, channels, *spatial)`` to ``(N, channels, 1...)``."""
    return x.mean(tuple(range(2, 2 + dims)), keepdim=True)
