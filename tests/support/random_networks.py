"""Networks of random dense blocks: shapes, layers and perturbations in any combination.

A network is made from a seed alone. Its blocks compute what their parts say, and whether that is a
dense block is up to chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.wild import CONVS, DROPS, NORMS

POOLS: dict[int, object] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.SiLU,
    nn.GELU,
    lambda: nn.LeakyReLU(0.2),
    nn.ELU,
    nn.Identity,
    nn.Hardswish,
)


def conv(dice: random.Random, dims: int, channels: int, out: int) -> nn.Module:
    size = dice.choice((1, 3))
    bias, dilation = dice.random() < 0.3, dice.choice((1, 1, 2))
    padding = dilation * (size // 2)
    made = CONVS[dims](channels, out, size, padding=padding, dilation=dilation, bias=bias)
    kind = dice.random()
    if kind < 0.1:
        torch.nn.utils.parametrizations.weight_norm(made)
    return nn.Sequential(nn.Hardtanh(-2, 2), made) if kind > 0.9 else made


def norm(dice: random.Random, dims: int, channels: int) -> nn.Module:
    if dice.random() < 0.1:
        return nn.GroupNorm(1, channels)
    made = NORMS[dims](channels, eps=dice.choice((1e-5, 1e-3)), affine=dice.random() < 0.9)
    made.momentum = dice.choice((0.1, 0.1, 0.3, None))
    return made.eval() if dice.random() < 0.1 else made


def parts(dice: random.Random, dims: int, channels: int, growth: int) -> list[nn.Module]:
    """Norm, activation and convolution, once or twice or three times, with dropout that rests."""
    found, units = [], dice.choice((1, 1, 2, 2, 2, 3))
    for unit in range(units):
        out = growth if unit == units - 1 else dice.choice((4, 6))
        found += [norm(dice, dims, channels), dice.choice(ACTIVATIONS)()]
        found += [conv(dice, dims, channels, out)]
        channels = out
    if dice.random() < 0.1:
        found += [norm(dice, dims, channels), dice.choice(ACTIVATIONS)()]
    if dice.random() < 0.2:
        found.append(dice.choice((nn.Dropout, DROPS[dims]))(0.0))
    return found


class Layer(nn.Module):
    """A layer that takes maps in one of three ways, and may do more than its parts."""

    def __init__(self, dice: random.Random, dims: int, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*parts(dice, dims, channels, growth))
        self.extra = dice.choice((*["nothing"] * 8, "gate", "scale", "hook", "asks"))
        if self.extra == "gate":
            self.gate = nn.Linear(growth, growth)
        if self.extra == "scale":
            self.scale = nn.Parameter(torch.ones(1))
        if self.extra == "hook":
            self.body[-1].register_forward_hook(lambda module, args, result: None)

    def forward(self, *maps: object) -> Tensor:
        first = maps[0]
        maps = tuple(first) if isinstance(first, list) else maps
        x = torch.cat(maps, 1) if len(maps) > 1 else maps[0]
        new: Tensor = self.body(x)
        if self.extra == "gate":
            gate = torch.sigmoid(self.gate(new.flatten(2).mean(2)))
            new = new * gate.view(*gate.shape, *(1,) * (new.dim() - 2))
        if self.extra == "scale":
            new = new * self.scale
        if self.extra == "asks" and x.shape[-1] > 1000:
            new = -new
        return new


class Joining(Layer):
    """A layer that joins its maps to those that it read."""

    def __init__(
        self, dice: random.Random, dims: int, channels: int, growth: int, new_first: bool
    ) -> None:
        super().__init__(dice, dims, channels, growth)
        self.new_first = new_first

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        return torch.cat([new, x] if self.new_first else [x, new], 1)


class Loop(nn.Module):
    """A loop over layers, and perhaps something else on the way."""

    def __init__(self, dice: random.Random, dims: int, channels: int, growths: Sequence[int]):
        super().__init__()
        layers = []
        self.channels = channels
        for growth in growths:
            layers.append(Layer(dice, dims, self.channels, growth))
            self.channels += growth
        self.layers = nn.ModuleList(layers)
        self.takes = dice.choice(("tensor", "list", "arguments"))
        self.new_first = dice.random() < 0.3
        self.only_new = dice.random() < 0.2
        self.twist = dice.choice((*["nothing"] * 8, "scale", "noise", "pool", "twice", "count"))
        self.weight = nn.Parameter(torch.ones(1)) if self.twist == "scale" else None
        self.calls = 0
        if self.only_new:
            self.channels -= channels

    def forward(self, x: Tensor) -> Tensor:
        maps, new_maps = [x], []
        for layer in self.layers:
            taken = maps if self.takes != "tensor" else [torch.cat(maps, 1)]
            new = layer(list(taken)) if self.takes == "list" else layer(*taken)
            if self.twist == "scale":
                new = new * self.weight
            if self.twist == "noise":
                new = new + 0.1 * torch.randn(new.shape, dtype=new.dtype)
            if self.twist == "twice":
                new = F.relu(new)
            maps = [new, *maps] if self.new_first else [*maps, new]
            new_maps = [new, *new_maps] if self.new_first else [*new_maps, new]
        if self.twist == "count":
            self.calls += 1
        out = torch.cat(new_maps if self.only_new else maps, 1)
        return F.pad(out, (1, 1)) if self.twist == "pool" else out


def sequence(
    dice: random.Random, dims: int, channels: int, growths: Sequence[int]
) -> tuple[nn.Module, int]:
    """A bare ``nn.Sequential`` of layers that join; rarely they do not agree on the order."""
    new_first, layers = dice.random() < 0.3, []
    for growth in growths:
        order = new_first if dice.random() < 0.95 else not new_first
        layers.append(Joining(dice, dims, channels, growth, order))
        channels += growth
    return nn.Sequential(*layers), channels


class RandomNetwork(nn.Sequential):
    """A stem, one or two blocks with transitions between them, and a head.

    Attributes:
        blocks: the paths of its blocks.
        image: the shape of an input.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        dice = random.Random(seed)
        torch.manual_seed(seed)
        dims, channels = dice.choice((1, 2, 2, 2, 3)), dice.choice((4, 6))
        self.blocks: list[str] = []
        self.image = (3, 2, *(dice.choice((6, 8)) for _ in range(dims)))
        self.append(CONVS[dims](2, channels, 3, padding=1))
        for i in range(dice.choice((1, 1, 2))):
            if i:
                self.append(nn.Sequential(*self.transition(dims, channels)))
            growths = [dice.choice((2, 3, 4)) for _ in range(dice.choice((2, 3, 4)))]
            if dice.random() < 0.5:
                block: nn.Module = Loop(dice, dims, channels, growths)
                channels = block.channels
            else:
                block, channels = sequence(dice, dims, channels, growths)
            self.blocks.append(str(len(self)))
            self.append(block)
        self.append(nn.Sequential(NORMS[dims](channels), nn.ReLU(), nn.Flatten(2)))

    @staticmethod
    def transition(dims: int, channels: int) -> list[nn.Module]:
        conv = CONVS[dims](channels, channels, 1)
        return [NORMS[dims](channels), nn.ReLU(), conv, POOLS[dims](2)]


def _negative(layer: Layer, *maps: object) -> Tensor:
    return -Layer.forward(layer, *maps)


def change_later(dice: random.Random, model: nn.Module) -> None:
    """Something that happens to a model between two steps."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kind = dice.choice(("nothing", "freeze", "evaluate", "activation", "hook", "method"))
    if kind == "freeze":
        dice.choice(norms).eval()
    if kind == "evaluate":
        model.eval()
    if kind == "activation":
        layers = [m for m in model.modules() if isinstance(m, Layer)]
        dice.choice(layers).body[1] = nn.Softplus()
    if kind == "hook":
        dice.choice(norms).register_forward_hook(lambda module, args, result: 2 * result)
    if kind == "method":
        for layer in model.modules():
            if type(layer) is Layer:
                layer.forward = partial(_negative, layer)  # type: ignore[method-assign]
