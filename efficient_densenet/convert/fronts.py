"""What stands in front of the class of a converted module: it recomputes what was recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.convert.converted import check_not_derived
from efficient_densenet.convert.layers import (
    part,
    read_layers,
    read_stem,
    read_transition,
    run_layer,
)
from efficient_densenet.convert.recognition.dense import match_dense
from efficient_densenet.convert.recognition.match import (
    DenseMatch,
    NormMatch,
    StemMatch,
    TransitionMatch,
    match_norm,
    match_stem,
    match_transition,
)
from efficient_densenet.convert.recording.arguments import own_class
from efficient_densenet.convert.recording.graph import Arguments, Keywords, Recording
from efficient_densenet.convert.recording.graph import Call as RecordedCall
from efficient_densenet.convert.recording.inputs import input_for
from efficient_densenet.convert.recording.record import record
from efficient_densenet.convert.recording.twin import Unrecordable, tensors_in
from efficient_densenet.convert.state.snapshot import Known, Snapshot
from efficient_densenet.convert.state.values import PLAIN, Describer, Nest
from efficient_densenet.functional.precision import types_of
from efficient_densenet.functional.spec import BlockSpec
from efficient_densenet.kernels.interface import Activation
from efficient_densenet.kernels.layout import in_format_of
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.calls import BlockCall, StemCall
from efficient_densenet.modules.parts import NormWithActivation
from efficient_densenet.modules.reading import Layer, Unit, Unsupported
from efficient_densenet.modules.recomputing import Recomputing, check_is_map, run, warn
from efficient_densenet.modules.sequence import RecomputingSequence, RecomputingTransition

M = TypeVar("M", DenseMatch, TransitionMatch, StemMatch, NormMatch)
Args = Arguments | None
TENSOR, PARAMETER = "tensor", "parameter"
ONE_TENSOR = ((TENSOR,), ())


def arguments_of(args: Arguments, kwargs: Mapping[str, Nest]) -> Nest:
    """What Python may decide by in the arguments of a call; ``ONE_TENSOR`` is that of most."""
    if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
        return ONE_TENSOR
    return (
        tuple([_described(arg) for arg in args]),
        tuple([(name, _described(arg)) for name, arg in kwargs.items()]),
    )


def _described(thing: Nest) -> Nest:
    if isinstance(thing, Tensor):
        return PARAMETER if isinstance(thing, nn.Parameter) else own_class(thing) or TENSOR
    if thing is None or isinstance(thing, PLAIN):
        return type(thing), thing
    if isinstance(thing, (list, tuple)):
        return tuple([_described(item) for item in thing])
    if isinstance(thing, Mapping):
        return tuple([(_described(key), _described(item)) for key, item in thing.items()])
    return _Arguments(draws=True)(thing)


class _Arguments(Describer):
    """Describes an object with tensors in it, of which each call may have others."""

    def __call__(self, value: Nest) -> Nest:
        return _described(value) if isinstance(value, Tensor) else super().__call__(value)


class Front(nn.Module):
    """What stands before the class of a converted module of this kind."""

    _recomputing_kind: ClassVar[str]

    def _recomputing_learn(
        self,
        match: object,
        args: Arguments,
        kwargs: Mapping[str, Nest],
        snapshot: Snapshot | None = None,
    ) -> None:
        """Be told what a call with these arguments computes, as the module is now or was then."""


class Recognised(Front):
    """A module that knows what it computes, and looks again when something has changed."""

    _recomputing_is_recorded: ClassVar[bool] = True
    """That it looks by recording a copy of itself."""
    _recomputing_known: Known | None = None

    @staticmethod
    def _recomputing_recognise(recording: Recording, call: RecordedCall) -> Nest:
        """What a recorded call computes; raises :class:`Unsupported`."""
        raise NotImplementedError

    def _recomputing_learn(
        self,
        match: object,
        args: Arguments,
        kwargs: Mapping[str, Nest],
        snapshot: Snapshot | None = None,
    ) -> None:
        arguments, known = arguments_of(args, kwargs), self._recomputing_known
        if snapshot is not None or known is None or known.find(self, arguments) is None:
            _note(self, snapshot or Snapshot(self), arguments, match)

    def _recomputing_maps(self, args: Arguments, kwargs: Keywords) -> Iterable[Nest]:
        return tensors_in((args, kwargs))


def _note(module: Recognised, snapshot: Snapshot, arguments: Nest, found: object) -> None:
    known = module._recomputing_known
    if known is None:
        known = vars(module)["_recomputing_known"] = Known()  # its class may let nobody set it
    known.add(snapshot, arguments, found)


def recognised(
    module: Recognised, as_: type[M], args: Args = None, kwargs: Mapping[str, Nest] | None = None
) -> M:
    """What a call with these arguments computes, by default with one tensor.

    Raises:
        Unsupported: if it is not known.
    """
    if not module._recomputing_is_generated:
        check_not_derived(type(module))
    arguments = ONE_TENSOR if args is None else arguments_of(args, kwargs or {})
    known = module._recomputing_known
    found = None if known is None else known.find(module, arguments)
    if found is None:
        if torch.compiler.is_compiling():
            new = "has not been called since it was made: call it once before it is compiled"
            changed = "has changed since it was recognised"
            raise Unsupported("the module", new if known is None or known.is_empty else changed)
        found = _look(module, args, kwargs or {})
        _note(module, Snapshot(module), arguments, found)
    if isinstance(found, Unsupported):
        raise Unsupported(*found.args)  # without the traceback of its first time
    assert isinstance(found, as_)
    return found


def _look(module: Recognised, args: Args, kwargs: Mapping[str, Nest]) -> object:
    try:
        recording = record(module, (input_for(module),) if args is None else args, kwargs)
        return module._recomputing_recognise(recording, recording.root)
    except Unrecordable as reason:
        return Unsupported("the forward function", f"cannot be recorded: {reason}")
    except Unsupported as reason:
        return reason.with_traceback(None)


class DenseFront(Recognised, RecomputingBlock):
    """A dense block."""

    _recomputing_recognise = staticmethod(match_dense)
    _recomputing_kind = "dense block"

    def _recomputing_read(self, *args: Nest, **kwargs: Nest) -> BlockCall | _NewMaps | _AfterEntry:
        match = recognised(self, DenseMatch, args, kwargs)
        x = list(tensors_in((args, kwargs)))[match.argument]
        layers = tuple(read_layers(self, match))
        if match.entry is not None:
            return _AfterEntry(self, x, match, layers)
        call = _call_on(self, x, match, layers)
        return _NewMaps(call, match) if match.returns == "new" else call

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        return run(self, *args, **kwargs)


def _call_on(
    block: DenseFront, x: Tensor, match: DenseMatch, layers: tuple[Layer, ...]
) -> BlockCall:
    """The call of the layers on the map that enters; raises :class:`Unsupported`."""
    check_is_map(x)
    if x.shape[1] != match.input_channels:
        expected = f"expects {match.input_channels} channels and gets {x.shape[1]}"
        raise Unsupported("the block", expected)
    for unit in layers[0].units:
        weight = unit.tensors.conv_weight
        if weight is not None and x.dim() != weight.dim():
            raise Unsupported("the input", f"has {x.dim()} dimensions")
    return BlockCall.of(x, layers, None, block.recompute, block.kernels, match.new_first)


@dataclass(frozen=True)
class _NewMaps:
    """A call whose result is only the maps that it adds: a view of all."""

    call: BlockCall
    match: DenseMatch

    @property
    def spec(self) -> BlockSpec:
        return self.call.spec

    def run(self) -> Tensor:
        return self.match.new_maps(self.call.run())


@dataclass(frozen=True)
class _AfterEntry:
    """A call of layers on what another module, called first, makes of ``x``."""

    block: DenseFront
    x: Tensor
    match: DenseMatch
    layers: tuple[Layer, ...]

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(
            layers=tuple([layer.spec for layer in self.layers]),
            exit=None,
            input_channels=self.match.input_channels,
            recompute=self.block.recompute,
            types=types_of(self.x),
            kernels=self.block.kernels,
        )

    def run(self) -> Tensor:
        assert self.match.entry is not None
        x = part(self.block, self.match.entry)(self.x)
        try:
            features = _call_on(self.block, x, self.match, self.layers).run()
        except Unsupported as reason:
            warn(self.block, reason)
            features = x
            for layer in self.match.layers:
                features = run_layer(self.block, layer, features)
        return features if self.match.returns == "all" else self.match.new_maps(features)


class TransitionFront(Recognised, RecomputingTransition):
    """A transition."""

    _recomputing_recognise = staticmethod(match_transition)
    _recomputing_kind = "transition"

    def _recomputing_read(self, *args: Nest, **kwargs: Nest) -> BlockCall:
        unit = read_transition(self, recognised(self, TransitionMatch, args, kwargs))
        x = next(tensors_in((args, kwargs)))  # which is the one that it reads
        return BlockCall.of(x, (), None, "norm", self.kernels).with_exit(unit)

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        return run(self, *args, **kwargs)

    def _recomputing_unit(self) -> Unit:
        return read_transition(self, recognised(self, TransitionMatch))


class StemFront(Recognised, Recomputing):
    """A module that is a stem, and keeps only the image."""

    _recomputing_recognise = staticmethod(match_stem)
    _recomputing_kind = "stem"

    def _recomputing_read(self, *args: Nest, **kwargs: Nest) -> StemCall:
        read = read_stem(self, recognised(self, StemMatch, args, kwargs))
        return StemCall.of(next(tensors_in((args, kwargs))), *read, self.kernels)

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        result = run(self, *args, **kwargs)
        x = next(tensors_in((args, kwargs)), None)
        return result if x is None else in_format_of(x, result)


class NormFront(Recognised, NormWithActivation):
    """A batch norm with its activation inside, which a sequence runs as a part of a stem."""

    _recomputing_recognise = staticmethod(match_norm)
    _recomputing_kind = "norm of a stem"

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        return super().forward(*args, **kwargs)

    def _recomputing_parts(self) -> tuple[_BatchNorm, Activation]:
        match = recognised(self, NormMatch)
        return part(self, match.norm), match.activation


class SequenceFront(Front, RecomputingSequence):
    """A sequence that runs a block and the transition after it together, and a stem as one."""

    _recomputing_kind = "sequence"
