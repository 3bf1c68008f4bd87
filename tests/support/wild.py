"""Dense blocks as people write them: small modules of every shape, and what each of them is.

:data:`BLOCKS` are to be recognised, :data:`TRAPS` look like dense blocks and are something else.
Names are deliberately no library's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as cp

NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DROPS: dict[int, type[nn.Module]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
C0, K, LAYERS, WIDTH = 6, 4, 3, 8


def conv(channels: int, out: int, size: int, dims: int = 2, bias: bool = False) -> nn.Module:
    return CONVS[dims](channels, out, size, padding=size // 2, bias=bias)


class ListLayer(nn.Module):
    """Takes a tensor or a list of maps, has checkpoint branches, and returns the new ones (A)."""

    def __init__(self, channels: int, p: float, saving: bool | None, dims: int) -> None:
        super().__init__()
        self.add_module("n1", NORMS[dims](channels))
        self.add_module("act", nn.ReLU(inplace=True))
        self.add_module("c1", conv(channels, WIDTH, 1, dims))
        self.add_module("n2", NORMS[dims](WIDTH))
        self.add_module("c2", conv(WIDTH, K, 3, dims))
        self.p, self.saving = p, saving

    def squeeze(self, maps: list[Tensor]) -> Tensor:
        return self.c1(self.act(self.n1(torch.cat(maps, 1))))

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor:
        maps = [maps] if isinstance(maps, Tensor) else maps
        if self.saving is not None and any(map.requires_grad for map in maps):
            narrow = cp.checkpoint(
                lambda *maps: self.squeeze(list(maps)), *maps, use_reentrant=self.saving
            )
        else:
            narrow = self.squeeze(maps)
        new = self.c2(self.act(self.n2(narrow)))  # one activation, used twice
        if self.p > 0:
            new = F.dropout(new, p=self.p, training=self.training)
        return new


class DictBlock(nn.ModuleDict):
    def __init__(self, p: float = 0.0, saving: bool | None = None, dims: int = 2) -> None:
        super().__init__()
        for i in range(LAYERS):
            self[f"unit{i}"] = ListLayer(C0 + i * K, p, saving, dims)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class StarLayer(ListLayer):
    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(list(maps))


class StarBlock(nn.Module):
    """Layers take ``*features`` and are children by name."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.add_module(f"step{i}", StarLayer(C0 + i * K, 0.0, None, 2))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _, layer in self.named_children():
            maps.append(layer(*maps))
        return torch.cat(maps, 1)


class JoiningSequence(nn.Sequential):
    """An ``nn.Sequential`` that appends its result to what it read (B)."""

    def __init__(self, channels: int, p: float = 0.0, dims: int = 2) -> None:
        norm, width = NORMS[dims], WIDTH
        super().__init__(
            OrderedDict(
                [
                    ("norm-1", norm(channels)),
                    ("relu-1", nn.ReLU(inplace=True)),
                    ("conv-1", conv(channels, width, 1, dims)),
                    ("norm-2", norm(width)),
                    ("relu-2", nn.ReLU(inplace=True)),
                    ("conv-2", conv(width, K, 3, dims)),
                ]
            )
        )
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.p > 0:
            new = F.dropout(new, self.p, self.training)
        return torch.cat([x, new], 1)


class TwoSequences(nn.Module):
    """A layer of two sequences of norm, ReLU and convolution (B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, WIDTH, 1))
        self.second = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), conv(WIDTH, K, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.second(self.first(x))), dim=1)


class SequenceBlock(nn.Sequential):
    def __init__(self, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.add_module(f"l{i}", layer(C0 + i * K))


class Bottleneck(nn.Module):
    """A plain module with functional activations (C); with new features first, C'."""

    def __init__(
        self,
        channels: int,
        p: float = 0.0,
        dims: int = 2,
        new_first: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
        early_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.bn1, self.conv1 = NORMS[dims](channels), conv(channels, WIDTH, 1, dims)
        self.bn2, self.conv2 = NORMS[dims](WIDTH), conv(WIDTH, K, 3, dims)
        self.p, self.new_first, self.activation = p, new_first, activation
        self.early_dropout = early_dropout

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.activation(self.bn1(x)))
        if self.early_dropout:
            out = F.dropout(out, p=self.p, training=self.training)
        out = self.conv2(self.activation(self.bn2(out)))
        if self.p > 0:
            out = F.dropout(out, p=self.p, training=self.training)
        return torch.cat([out, x] if self.new_first else [x, out], 1)


class Single(nn.Module):
    """A basic layer as a plain module (C)."""

    def __init__(self, channels: int, new_first: bool = False) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv, self.new_first = conv(channels, K, 3), new_first

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv(self.relu(self.bn(x)))
        return torch.cat([new, x], 1) if self.new_first else torch.cat([x, new], 1)


def plain(layer: Callable[..., nn.Module], **options: object) -> nn.Module:
    """A bare ``nn.Sequential`` of layers, as a method of a network makes it."""
    return nn.Sequential(*(layer(C0 + i * K, **options) for i in range(LAYERS)))


class BasicSequence(nn.Sequential):
    def __init__(self, channels: int, p: float | None = None, dims: int = 2) -> None:
        parts = [NORMS[dims](channels), nn.ReLU(inplace=True), conv(channels, K, 3, dims, True)]
        super().__init__(*parts, *([] if p is None else [DROPS[dims](p)]))


class Wrapped(nn.Module):
    """A layer inside another module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = BasicSequence(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class LoopBlock(nn.Module):
    """The loop is in the block (D); it returns all maps, or only the new ones."""

    def __init__(
        self,
        layer: Callable[[int], nn.Module] = BasicSequence,
        only_new: bool = False,
        new_first: bool = False,
    ) -> None:
        super().__init__()
        self.denselayers = nn.ModuleList(layer(C0 + i * K) for i in range(LAYERS))
        self.only_new, self.new_first = only_new, new_first

    def forward(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        made = []
        for layer in self.denselayers:
            new = layer(x)
            x = torch.cat([new, x] if self.new_first else [x, new], 1)
            made.append(new)
        if self.only_new:
            return torch.cat(made[::-1] if self.new_first else made, 1)
        return x


class ChildrenBlock(nn.Module):
    """The loop is over the block's own children (D)."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.add_module(str(i), BasicSequence(C0 + i * K))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat((x, layer(x)), dim=1)
        return x


class UnrolledBlock(nn.Module):
    """No loop, no layers: norms and convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(C0 + i * K) for i in range(LAYERS))
        self.convs = nn.ModuleList(conv(C0 + i * K, K, 3) for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        a = self.convs[0](F.relu(self.norms[0](x)))
        b = self.convs[1](F.relu(self.norms[1](torch.cat([x, a], 1))))
        c = self.convs[2](F.relu(self.norms[2](torch.cat([torch.cat([x, a], 1), b], 1))))
        return torch.cat([x, a, b, c], 1)


class Stage(nn.Sequential):
    """A transition and dense layers in one sequence, without a block."""

    def __init__(self) -> None:
        super().__init__()
        before = 2 * C0
        self.add_module(
            "shrink",
            nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), conv(before, C0, 1), nn.AvgPool2d(2)),
        )
        for i in range(LAYERS):
            self.add_module(f"u{i}", Bottleneck(C0 + i * K))


class GroupLayer(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.GroupNorm(2, channels), nn.ReLU(), conv(channels, K, 3))


class Attentive(nn.Module):
    """A layer with squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.new, self.gate = BasicSequence(channels), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        samples, channels = new.shape[:2]
        gate = torch.sigmoid(self.gate(new.mean((2, 3)))).view(samples, channels, 1, 1)
        return new * gate


def weight_normed(channels: int) -> nn.Module:
    layer = BasicSequence(channels)
    torch.nn.utils.parametrizations.weight_norm(layer[2])
    return layer


def hooked(channels: int) -> nn.Module:
    layer = BasicSequence(channels)
    layer[2].register_forward_hook(lambda module, args, result: None)
    return layer


@dataclass(frozen=True)
class Wild:
    """A block, and what is to be found in it.

    Attributes:
        make: makes the block, which reads ``C0`` channels (a :class:`Stage` twice as many).
        units: of each layer; 0 if it is a layer of any other kind.
        dims: spatial dimensions.
        layers: how many.
        new_first: whether new maps come before older ones.
        only_new: whether only new maps are returned.
        p: of the dropout after each layer.
        drops_maps: whether it drops whole maps.
        activation: by its name.
        extra: further arguments.
        library: what its structure is called.
    """

    make: Callable[[], nn.Module]
    units: int = 2
    dims: int = 2
    layers: int = LAYERS
    new_first: bool = False
    only_new: bool = False
    p: float = 0.0
    drops_maps: bool = False
    activation: str = "relu"
    extra: tuple[object, ...] = ()
    library: str = ""

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        channels = 2 * C0 if self.make is Stage else C0
        sizes = {1: (16,), 2: (8, 6), 3: (4, 6, 5)}[self.dims]
        return torch.randn(3, channels, *sizes, dtype=torch.float64).to(dtype)


BLOCKS = {
    "A-dict": Wild(DictBlock),
    "A-dict-3d": Wild(lambda: DictBlock(dims=3), dims=3),
    "A-dropout": Wild(lambda: DictBlock(p=0.3), p=0.3),
    "A-checkpoint": Wild(lambda: DictBlock(saving=False)),
    "A-reentrant-checkpoint": Wild(lambda: DictBlock(p=0.2, saving=True), p=0.2),
    "A-star": Wild(StarBlock),
    "B-sequence": Wild(lambda: SequenceBlock(JoiningSequence)),
    "B-dropout": Wild(lambda: SequenceBlock(lambda c: JoiningSequence(c, 0.4)), p=0.4),
    "B-3d": Wild(lambda: SequenceBlock(lambda c: JoiningSequence(c, dims=3)), dims=3),
    "B-two-sequences": Wild(lambda: SequenceBlock(TwoSequences)),
    "C-plain": Wild(lambda: plain(Bottleneck)),
    "C-dropout": Wild(lambda: plain(Bottleneck, p=0.1), p=0.1),
    "C-3d": Wild(lambda: plain(Bottleneck, dims=3), dims=3),
    "C-1d": Wild(lambda: plain(Bottleneck, dims=1), dims=1),
    "C-basic": Wild(lambda: plain(Single), units=1),
    "C-new-first": Wild(lambda: plain(Bottleneck, new_first=True), new_first=True),
    "C-basic-new-first": Wild(lambda: plain(Single, new_first=True), units=1, new_first=True),
    "C-silu": Wild(lambda: plain(Bottleneck, activation=F.silu), activation="silu"),
    "C-gelu": Wild(lambda: plain(Bottleneck, activation=nn.GELU("tanh")), activation="gelu_tanh"),
    "C-leaky": Wild(
        lambda: plain(Bottleneck, activation=nn.LeakyReLU(0.2, inplace=True)),
        activation="leaky_relu",
    ),
    "C-elu": Wild(lambda: plain(Bottleneck, activation=nn.ELU(0.5)), activation="elu"),
    "C-linear": Wild(lambda: plain(Bottleneck, activation=nn.Identity()), activation="identity"),
    "D-loop": Wild(LoopBlock, units=1),
    "D-loop-3d": Wild(lambda: LoopBlock(lambda c: BasicSequence(c, dims=3)), units=1, dims=3),
    "D-map-dropout": Wild(
        lambda: LoopBlock(lambda c: BasicSequence(c, 0.2)), units=1, p=0.2, drops_maps=True
    ),
    "D-only-new": Wild(lambda: LoopBlock(only_new=True), units=1, only_new=True),
    "D-new-first": Wild(lambda: LoopBlock(new_first=True), units=1, new_first=True),
    "D-only-new-first": Wild(
        lambda: LoopBlock(only_new=True, new_first=True), units=1, only_new=True, new_first=True
    ),
    "D-wrapped": Wild(lambda: LoopBlock(Wrapped), units=1),
    "D-scratch": Wild(LoopBlock, units=1, extra=(torch.zeros(5),)),
    "D-children": Wild(ChildrenBlock, units=1),
    "D-unrolled": Wild(UnrolledBlock, units=1),
    "stage": Wild(Stage),
    "group-norm": Wild(lambda: LoopBlock(GroupLayer), units=0),
    "attention": Wild(lambda: LoopBlock(Attentive), units=0),
    "weight-norm": Wild(lambda: LoopBlock(weight_normed), units=0),
    "hooks": Wild(lambda: LoopBlock(hooked), units=0),
}
"""Every one of them is a dense block."""


def _structure(name: str, wild: Wild) -> str:
    if wild.new_first:
        return "New maps first"
    return STRUCTURES.get(name[0] if "-" in name[:2] else name, "Layers of any kind")


STRUCTURES = {
    "A": "Layers read a list",
    "B": "Layers are an `nn.Sequential`",
    "C": "Blocks are an `nn.Sequential`",
    "D": "A loop in the block",
    "stage": "A transition and layers in one `nn.Sequential`",
}
BLOCKS = {name: replace(wild, library=_structure(name, wild)) for name, wild in BLOCKS.items()}
