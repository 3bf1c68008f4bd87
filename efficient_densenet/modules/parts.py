"""Which modules a dense layer, a transition or a stem is made of, wherever its class keeps them.

Modules are read at every call: what has been replaced, hooked or switched since is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from efficient_densenet.modules import reading as lowering

PATCHED = " has hooks or a forward of its own"
NORM_ACT_TYPES = (
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
)
"""Batch norms with an activation inside, by name: their library need not be there."""
DROPOUT_TYPES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Kind(NamedTuple):
    """What a part does, and what about a module in its place is not known.

    ``role`` is ``"norm"``, ``"relu"``, ``"conv"``, ``"pool"``, ``"dropout"`` (which may be missing)
    or ``"container"`` (of further parts). ``unsupported`` returns the end of a sentence about the
    module, or ``None``.
    """

    role: str
    unsupported: Callable[[nn.Module], str | None]


def exactly(*types: type) -> Callable[[nn.Module], str | None]:
    """Knows modules of these types, but not of subclasses, which may compute otherwise."""

    def unsupported(module: nn.Module) -> str | None:
        if type(module) not in types:
            return f" is a {type(module).__name__}"
        return PATCHED if lowering.is_patched(module) else None

    return unsupported


def _unsupported_norm_act(module: nn.Module) -> str | None:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name not in NORM_ACT_TYPES:
        return f" is a {type(module).__name__}"
    if lowering.is_patched(module):
        return PATCHED
    for part, unsupported in (("drop", exactly(nn.Identity)), ("act", exactly(nn.ReLU))):
        reason = unsupported(getattr(module, part))
        if reason:
            return f".{part}{reason}"
    return None


NORM = Kind("norm", exactly(*lowering.NORM_TYPES))
NORM_ACT = Kind("norm", _unsupported_norm_act)
RELU = Kind("relu", exactly(nn.ReLU))
CONV = Kind("conv", exactly(*lowering.CONV_TYPES))
POOL = Kind("pool", exactly(*lowering.POOL_TYPES))
DROPOUT = Kind("dropout", exactly(*DROPOUT_TYPES))
SEQUENTIAL = Kind("container", exactly(nn.Sequential))


@dataclass(frozen=True)
class Anatomy:
    """The parts of a module, each with its path below it, in the order of registration and use.

    Norms, activations and convolutions alternate; a norm that rectifies has no activation beside
    it. ``drop_rate`` is the name of the attribute of a layer that applies dropout by itself.
    """

    parts: Mapping[str, Kind]
    drop_rate: str | None = None

    def paths(self, role: str) -> list[str]:
        """The paths of the parts with this role."""
        return [path for path, kind in self.parts.items() if kind.role == role]

    def find(self, module: nn.Module, role: str) -> list[Any]:
        """The modules with this role, without those that are missing."""
        found = (submodule(module, path) for path in self.paths(role))
        return [part for part in found if part is not None]

    def unsupported(self, module: nn.Module) -> str | None:
        """What about a module's parts is not known, as the end of a sentence about it."""
        if lowering.is_patched(module):
            return PATCHED
        found = self._below(module, "")
        for path, part in found:
            kind = self.parts.get(path)
            reason = kind.unsupported(part) if kind else f" is a {type(part).__name__}"
            if reason:
                return f".{path}{reason}"
        paths = [path for path, _ in found]
        if paths != [p for p, kind in self.parts.items() if p in paths or kind.role != "dropout"]:
            return f" has the children {paths}"
        return None

    def _below(self, module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
        """Every part and its path, a container before what it holds."""
        found = []
        for name, part in module._modules.items():
            if part is None:
                continue
            path = prefix + name
            found.append((path, part))
            if path in self.parts and self.parts[path].role == "container":
                found += self._below(part, f"{path}.")
        return found


BOTTLENECK = Anatomy(
    {"norm1": NORM, "relu1": RELU, "conv1": CONV, "norm2": NORM, "relu2": RELU, "conv2": CONV},
    drop_rate="drop_rate",
)
BASIC = Anatomy({"norm1": NORM, "relu1": RELU, "conv1": CONV}, drop_rate="drop_rate")
TRANSITION = Anatomy({"norm": NORM, "relu": RELU, "conv": CONV, "pool": POOL})


class Unit(NamedTuple):
    """Modules of BN - ReLU - convolution."""

    norm: Any
    conv: Any


class Layer(NamedTuple):
    """A dense layer as it is now: one unit (basic) or two (bottleneck), then dropout.

    ``drops_maps`` says that dropout zeroes whole maps of a sample, not single values.
    """

    units: tuple[Unit, ...]
    drop_rate: float
    drops_maps: bool = False


def read_layer(module: nn.Module, anatomy: Anatomy) -> Layer:
    """The modules of a layer that :func:`unsupported_layer` has found nothing about."""
    units = map(Unit, anatomy.find(module, "norm"), anatomy.find(module, "conv"))
    drop_rate, drops_maps = 0.0, False
    if anatomy.drop_rate and module.training:
        drop_rate = float(getattr(module, anatomy.drop_rate))
    for dropout in anatomy.find(module, "dropout"):
        drop_rate = float(dropout.p) if dropout.training else 0.0
        drops_maps = type(dropout) is not nn.Dropout
    return Layer(tuple(units), drop_rate, drops_maps)


def unsupported_layer(module: nn.Module, anatomy: Anatomy, channels: int | None) -> str | None:
    """What about a layer that reads ``channels`` channels is not known, as the end of a sentence.

    ``None`` channels are as many as it expects.
    """
    reason = anatomy.unsupported(module)
    if reason:
        return reason
    for path, conv in zip(anatomy.paths("conv"), anatomy.find(module, "conv"), strict=True):
        if not lowering.keeps_size(conv):
            return f".{path} has a stride, padding or padding mode that changes the map's size"
    expected = anatomy.find(module, "norm")[0].num_features
    if channels is not None and expected != channels:
        path = anatomy.paths("norm")[0]
        return f".{path} expects {expected} channels and gets {channels}"
    return None


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, ``None`` if there is none."""
    found: Any = module
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:
            return None
    return found
