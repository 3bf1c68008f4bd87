"""Modules that look like dense blocks and compute something else, or do more."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from support.wild import BasicSequence, DictBlock, K, ListLayer, LoopBlock, conv


class Looping(LoopBlock):
    """A loop block with something done to every result and every concatenation."""

    def __init__(
        self,
        result: Callable[[nn.Module, Tensor], Tensor] | None = None,
        joined: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.result, self.joined = result, joined

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        for layer in self.denselayers:
            new = layer(x)
            if self.result is not None:
                new = self.result(self, new)
            x = torch.cat([x, new], 1)
            if self.joined is not None:
                x = self.joined(self, x)
        return x


def scaled() -> nn.Module:
    """Each result is scaled by a parameter that starts at 1."""
    block = Looping(lambda self, new: new * self.scale)
    block.scale = nn.Parameter(torch.ones(1))
    return block


def pools_large_maps() -> nn.Module:
    def pooled(self: nn.Module, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1) if x.shape[-1] > 16 else x

    return Looping(joined=pooled)


@torch.jit.script
def halved_if_large(x: Tensor) -> Tensor:
    if x.size(2) > 1000:
        return x * 0.5
    return torch.relu(x)


class Reversing(torch.autograd.Function):
    """The identity, with a gradient of the other sign."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return -grad


def without_gradient(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(x)


def counts(self: nn.Module, new: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return new


def appends() -> nn.Module:
    def appended(self: nn.Module, new: Tensor) -> Tensor:
        self.seen.append(new)
        return new

    block = Looping(appended)
    block.seen = []
    return block


def learns() -> nn.Module:
    """A buffer follows the means of the results."""

    def followed(self: nn.Module, new: Tensor) -> Tensor:
        self.mean.lerp_(new.detach().mean((0, 2, 3)), 0.1)
        return new

    block = Looping(followed)
    block.register_buffer("mean", torch.zeros(K))
    return block


def reads_values(self: nn.Module, new: Tensor) -> Tensor:
    return new if new.sum() > 0 else -new


def stochastic_depth(self: nn.Module, new: Tensor) -> Tensor:
    return new * torch.bernoulli(torch.full((3, 1, 1, 1), 0.5))


def python_chance(self: nn.Module, new: Tensor) -> Tensor:
    return new if random.random() < 2 else -new


def same_mask() -> nn.Module:
    """One mask for the results of all layers."""

    class Block(LoopBlock):
        def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
            mask = torch.empty_like(x[:, :K]).bernoulli_(0.5).div_(0.5)
            for layer in self.denselayers:
                x = torch.cat([x, layer(x) * mask], 1)
            return x

    return Block()


class Sparse(LoopBlock):
    """Each layer reads the input and the last result only, although all are returned."""

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        made = [x]
        for layer in self.denselayers:
            made.append(
                layer(
                    F.pad(made[-1], (0, 0, 0, 0, 0, layer[0].num_features))[
                        :, : layer[0].num_features
                    ]
                )
            )
        return torch.cat(made, 1)


class Swapped(LoopBlock):
    """The second layer reads its maps in another order than the third."""

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        a = self.denselayers[0](x)
        b = self.denselayers[1](torch.cat([a, x], 1))
        c = self.denselayers[2](torch.cat([x, a, b], 1))
        return torch.cat([x, a, b, c], 1)


class OverwritesPrefix(nn.Sequential):
    """Rectifies in place what it was given, which is then joined."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.ReLU(inplace=True), conv(channels, K, 3))


class UnderAutocast(LoopBlock):
    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class WithoutGrad(LoopBlock):
    """The second layer runs without autograd."""

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.denselayers):
            with torch.set_grad_enabled(i != 1):
                new = layer(x)
            x = torch.cat([x, new], 1)
        return x


class Pair(LoopBlock):
    def forward(self, x: Tensor, scratch: Tensor | None = None) -> object:
        return super().forward(x), x


def own_forward() -> nn.Module:
    block = LoopBlock()
    layer = block.denselayers[1]
    layer.forward = lambda x: BasicSequence.forward(layer, x) * 2
    return block


def helper_of_instance() -> nn.Module:
    """A helper replaced by a function that knows the original layer."""
    block = DictBlock()
    layer = block["unit1"]
    layer.squeeze = lambda maps: layer.c1(torch.cat(maps, 1))
    return block


def method_of_instance() -> nn.Module:
    """A helper replaced by a bound method: the layer is another one, but a layer."""

    def squeeze(self: ListLayer, maps: list[Tensor]) -> Tensor:
        return 2 * self.c1(torch.relu(self.n1(torch.cat(maps, 1))))

    block = DictBlock()
    block["unit1"].squeeze = MethodType(squeeze, block["unit1"])
    return block


class OtherSqueeze(ListLayer):
    def squeeze(self, maps: list[Tensor]) -> Tensor:
        return super().squeeze(maps) * 1.5


def helper_of_subclass() -> nn.Module:
    block = DictBlock()
    block["unit1"].__class__ = OtherSqueeze
    return block


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


def other_convolution() -> nn.Module:
    block = LoopBlock()
    block.denselayers[2][2].__class__ = Standardised
    return block


def foreign_tensor() -> nn.Module:
    one = torch.ones(1)
    return Looping(lambda self, new: new * one)


TRAPS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled by a parameter": (scaled, "the forward function computes mul"),
    "pools large maps": (pools_large_maps, "asks a map for its shape"),
    "scripted size": (lambda: Looping(lambda self, new: halved_if_large(new)), "outside of Python"),
    "reversed gradient": (
        lambda: Looping(lambda self, new: Reversing.apply(new)),
        "the forward function computes view",
    ),
    "no gradient": (lambda: Looping(without_gradient), "which autograd does not see"),
    "detached": (lambda: Looping(lambda self, new: new.detach()), "computes detach"),
    "data": (lambda: Looping(lambda self, new: new.data), "computes detach"),
    "gradient hook": (
        lambda: Looping(lambda self, new: (new.register_hook(lambda g: 2 * g), new)[1]),
        "calls register_hook on a map",
    ),
    "counts": (lambda: Looping(counts), "changes calls when it runs"),
    "appends": (appends, "changes seen when it runs"),
    "learns": (learns, "computes"),
    "reads values": (lambda: Looping(reads_values), "cannot run on stand-ins"),
    "stochastic depth": (lambda: Looping(stochastic_depth), "the forward function computes mul"),
    "python's chance": (lambda: Looping(python_chance), "random numbers"),
    "same mask": (same_mask, "computes mul"),
    "sparse": (Sparse, "computes"),
    "swapped": (Swapped, "computes cat"),
    "in place": (lambda: LoopBlock(OverwritesPrefix), "joins one module's result"),
    "layer without gradient": (WithoutGrad, "which autograd does not see"),
    "returns a pair": (Pair, "does not return one tensor"),
    "forward of an instance": (own_forward, "denselayers.1 has a forward function of its own"),
    "helper of an instance": (helper_of_instance, "reads a tensor that is no part of it"),
    "foreign tensor": (foreign_tensor, "reads a tensor that is no part of it"),
    "converted type": (lambda: Looping(lambda self, new: new.float()), "converts a map (float)"),
    "asks for the device": (
        lambda: Looping(lambda self, new: -new if new.device.type == "cuda" else new),
        "asks a map for its device",
    ),
    "own autocast": (UnderAutocast, "under an autocast of its own"),
}
"""What must not be taken for a dense block, and a part of the reason."""

OPAQUE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "method of an instance": (method_of_instance, 1),
    "helper of a subclass": (helper_of_subclass, 1),
    "other convolution": (other_convolution, 2),
}
"""Dense blocks in which one layer is not what its class leads one to expect, and which."""
