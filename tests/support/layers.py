"""Dense layers that are not norm, activation and convolution: what people put into their blocks.

Each is a change of a block of bottleneck layers, in two or three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from efficient_densenet import recompute_dense_block
from efficient_densenet.modules.naive import CONVS

Block = nn.ModuleDict
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def dims_of(layer: nn.Module) -> int:
    return layer.conv2.weight.dim() - 2


class ChannelNorm(nn.LayerNorm):
    """Layer norm of the channels at each position."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcitation(nn.Module):
    """A convolution whose maps are scaled by what their means say."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        channels = conv.out_channels
        self.conv, self.gate = conv, nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(self.gate(y.flatten(2).mean(2)))
        return y * gate.view(*gate.shape, *(1,) * (y.dim() - 2))


class LoRA(nn.Module):
    """A frozen convolution, and a learnt one of low rank beside it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        kind = type(conv)
        self.down = kind(conv.in_channels, 2, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = kind(2, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is standardised; it has no other dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class Gaussian(nn.Module):
    """Multiplies by noise in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.3 * torch.randn_like(x)) if self.training else x


def each(change: Callable[[nn.Module], object]) -> Callable[[Block], None]:
    """The change of a block that makes ``change`` of each of its layers."""

    def change_all(block: Block) -> None:
        for layer in block.values():
            change(layer)

    return change_all


def every_second(change: Callable[[nn.Module], object]) -> Callable[[Block], None]:
    """The same of the second layer, the fourth, ..."""

    def change_some(block: Block) -> None:
        for layer in list(block.values())[1::2]:
            change(layer)

    return change_some


def group_norm(layer: nn.Module) -> None:
    layer.norm1 = nn.GroupNorm(1, layer.norm1.num_features)
    layer.norm2 = nn.GroupNorm(2, layer.norm2.num_features)


def instance_norm(layer: nn.Module) -> None:
    norm = INSTANCE_NORMS[dims_of(layer)]
    layer.norm1 = norm(layer.norm1.num_features, affine=True, track_running_stats=True)


def layer_norm(layer: nn.Module) -> None:
    layer.norm1 = ChannelNorm(layer.norm1.num_features)


def no_norm(layer: nn.Module) -> None:
    layer.norm1 = nn.Identity()


def squeeze(layer: nn.Module) -> None:
    layer.conv2 = SqueezeExcitation(layer.conv2)


def lora(layer: nn.Module) -> None:
    layer.conv1 = LoRA(layer.conv1)
    layer.conv2 = LoRA(layer.conv2)


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer.conv1)


def old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer.conv2)


def spectral_norm(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer.conv2)


def old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer.conv1)


def custom_conv(layer: nn.Module) -> None:
    width, growth = layer.conv2.in_channels, layer.conv2.out_channels
    layer.conv2 = StandardisedConv(width, growth, 3, padding=1)


def other_activation(layer: nn.Module) -> None:
    layer.relu2 = nn.Hardswish(inplace=True)


def reflecting(layer: nn.Module) -> None:
    conv = layer.conv2
    kind = CONVS[dims_of(layer)]
    layer.conv2 = kind(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="reflect")


def doubling_hook(layer: nn.Module) -> None:
    layer.relu1.register_forward_hook(lambda module, args, out: out * 2)


def backward_hook(layer: nn.Module) -> None:
    layer.conv2.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def dropout_inside(layer: nn.Module) -> None:
    layer.conv1 = nn.Sequential(nn.Dropout(0.3), layer.conv1)


def noise(layer: nn.Module) -> None:
    layer.relu1 = nn.Sequential(nn.ReLU(), Gaussian())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "group-norm": group_norm,
    "instance-norm": instance_norm,
    "layer-norm": layer_norm,
    "no-norm": no_norm,
    "squeeze-and-excitation": squeeze,
    "lora": lora,
    "weight-norm": weight_norm,
    "weight-norm-by-hook": old_weight_norm,
    "spectral-norm": spectral_norm,
    "spectral-norm-by-hook": old_spectral_norm,
    "other-activation": other_activation,
    "reflecting": reflecting,
    "hook": doubling_hook,
    "backward-hook": backward_hook,
    "dropout": dropout_inside,
    "noise": noise,
}
"""The change of one layer, by name: in any number of dimensions."""

EFFECTS = {"all": each, "second": every_second}


def changes() -> Iterator[tuple[str, Callable[[Block], None]]]:
    """Every change of a block, by name."""
    for name, change in CHANGES.items():
        for part, spread in EFFECTS.items():
            yield f"{name}-{part}", spread(change)


class Loop(nn.Module):
    """A dense block of own layers that add 4 channels each to the 5 of its input."""

    def __init__(self, make: Callable[[int], nn.Module], naive: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(5 + 4 * i) for i in range(3))
        self.naive = naive

    def forward(self, x: Tensor) -> Tensor:
        if not self.naive:
            return recompute_dense_block(self.layers, x, 4)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x
