"""What recognised calls are, as plain data: dense blocks, transitions, stems and their norms.

Modules are named by their paths in the module that was called; ``""`` is that module itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from efficient_densenet.convert.recognition.region import Region
from efficient_densenet.convert.recognition.steps import Conv, Norm, Step, What, chain
from efficient_densenet.convert.recording.graph import Call, Recording
from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.opaque import Form
from efficient_densenet.modules.reading import Dropout, Unsupported

IDENTITY = Activation("identity")
NO_DROPOUT = Dropout()
Returns = Literal["new", "all"]


@dataclass(frozen=True)
class UnitMatch:
    """Norm, activation and perhaps convolution, then dropout; a rate of 0 is none."""

    norm: str
    activation: Activation
    conv: str | None
    dropout: Dropout = NO_DROPOUT


@dataclass(frozen=True)
class LayerCall:
    """The call of the module at ``path``, which is exactly a layer, to be made again."""

    path: str
    form: Form


ChainMatch = tuple[UnitMatch | tuple[str, ...], ...]
"""Units, and between them the paths of modules that are called one after the other."""


@dataclass(frozen=True)
class LayerMatch:
    """A dense layer that adds ``growth`` channels.

    Attributes:
        units: what it is made of, if that is known; otherwise there are none.
        call: the module whose call is this layer, if there is one. A layer without units has one.
        why_opaque: why there are no units: subject and predicate of a sentence.
        chain: what a layer without units is made of in spite of that, if anything of it is known.
    """

    growth: int
    units: tuple[UnitMatch, ...]
    call: LayerCall | None
    why_opaque: tuple[str, str] | None = None
    chain: ChainMatch = ()


@dataclass(frozen=True)
class DenseMatch:
    """A dense block: each layer reads the concatenation of all maps before it.

    Attributes:
        input_channels: of the map that enters.
        layers: in the order of their use.
        new_first: whether new maps are put before the older ones: layer ``l`` then reads
            ``cat([new_(l-1), …, new_0, input])``, and the block returns its maps in this order.
        returns: ``"all"`` maps, or only the ``"new"`` ones.
        argument: which of the tensors that the call takes enters, in the order of arguments.
        entry: path of a module that reads that tensor and makes the map that enters, if there is
            one.
    """

    input_channels: int
    layers: tuple[LayerMatch, ...]
    new_first: bool
    returns: Returns
    argument: int = 0
    entry: str | None = None

    def new_maps(self, features: Tensor) -> Tensor:
        """Of all maps those that the layers add: a view."""
        new = sum(layer.growth for layer in self.layers)
        return features[:, :new] if self.new_first else features[:, -new:]


@dataclass(frozen=True)
class TransitionMatch:
    """Norm, activation, convolution and pooling.

    Without ``pool`` there is none; ``pools_first`` if it comes before the convolution. A
    ``dropout`` is after the convolution.
    """

    norm: str
    activation: Activation
    conv: str
    pool: Pool | None
    pools_first: bool = False
    dropout: Dropout = NO_DROPOUT


@dataclass(frozen=True)
class StemMatch:
    """Convolution, norm, activation and pooling; without ``pool`` there is none."""

    conv: str
    norm: str
    activation: Activation
    pool: Pool | None


@dataclass(frozen=True)
class NormMatch:
    """A norm and an activation in one module."""

    norm: str
    activation: Activation


def match_transition(recording: Recording, call: Call) -> TransitionMatch:
    """The transition that a recorded call is.

    Raises:
        Unsupported: if it is none.
    """
    whats = _whole_chain(Region(recording, call))
    norm, activation = _take(whats, Norm), _take(whats, Activation)
    early = _take(whats, Pool)
    conv, dropout, late = _take(whats, Conv), _take(whats, Dropout), _take(whats, Pool)
    if whats or norm is None or conv is None or (early and late):
        raise Unsupported("the call", "is not norm, activation, convolution and pooling")
    return TransitionMatch(
        norm.path,
        activation or IDENTITY,
        conv.path,
        early or late,
        early is not None,
        dropout or NO_DROPOUT,
    )


def match_stem(recording: Recording, call: Call) -> StemMatch:
    """The stem that a recorded call is.

    Raises:
        Unsupported: if it is none.
    """
    whats = _whole_chain(Region(recording, call))
    conv, norm = _take(whats, Conv), _take(whats, Norm)
    activation, pool = _take(whats, Activation), _take(whats, Pool)
    if whats or norm is None or conv is None:
        raise Unsupported("the call", "is not convolution, norm, activation and pooling")
    return StemMatch(conv.path, norm.path, activation or IDENTITY, pool)


def match_norm(recording: Recording, call: Call) -> NormMatch:
    """The norm and activation that a recorded call is.

    Raises:
        Unsupported: if it is not both.
    """
    whats = _whole_chain(Region(recording, call))
    norm, activation = _take(whats, Norm), _take(whats, Activation)
    if whats or norm is None or activation is None:
        raise Unsupported("the call", "is not norm and activation")
    return NormMatch(norm.path, activation)


def _whole_chain(region: Region) -> list[What]:
    """All that a call does to its first argument."""
    region.check_runs_forward()
    start = region.arguments[0] if region.arguments else None
    steps = chain(region, region.result, lambda value: value is start)
    region.check_nothing_else(node for step in steps for node in step.nodes)
    return [step.what for step in steps]


W = TypeVar("W", Norm, Activation, Conv, Dropout, Pool)


def _take(whats: list[What], kind: type[W]) -> W | None:
    """The first of ``whats``, taken from the list, if it is of this kind."""
    if whats and isinstance(whats[0], kind):
        return whats.pop(0)  # type: ignore[return-value]
    return None


def units_of(steps: Iterable[Step]) -> tuple[UnitMatch, ...]:
    """The units of a dense layer.

    Raises:
        Unsupported: if the steps are no sequence of units.
    """
    whats, units = [step.what for step in steps], []
    while whats:
        norm, activation = _take(whats, Norm), _take(whats, Activation)
        conv, dropout = _take(whats, Conv), _take(whats, Dropout)
        if norm is None or (activation is None and conv is None):
            raise Unsupported("the layer", "is not made of norm, activation and convolution")
        path = None if conv is None else conv.path
        units.append(UnitMatch(norm.path, activation or IDENTITY, path, dropout or NO_DROPOUT))
    return tuple(units)
