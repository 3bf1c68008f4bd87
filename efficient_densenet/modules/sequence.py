"""What lies around dense blocks: transitions, stems and heads that keep only their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.kernels.interface import RELU, Pool
from efficient_densenet.kernels.layout import in_format_of
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.calls import BlockCall, StemCall, check_input
from efficient_densenet.modules.naive import Transition, global_average
from efficient_densenet.modules.parts import (
    TRANSITION,
    Found,
    Structure,
    add_activation,
    add_conv,
    add_norm,
    add_norm_with_activation,
    add_pool,
    read_transition,
    stem_of,
)
from efficient_densenet.modules.reading import (
    CONVS,
    Unit,
    Unsupported,
    is_patched,
    read_norm,
    unit_of,
)
from efficient_densenet.modules.recomputing import (
    Recomputing,
    Settings,
    read_or_none,
    run_naive,
    run_or_none,
    supported,
)

M = TypeVar("M", bound=Recomputing)

STEMS = (
    (add_conv, add_norm, add_activation, add_pool),
    (add_conv, add_norm_with_activation, add_pool),
)


class RecomputingTransition(Recomputing):
    """What makes a transition recompute: a base in front of the class whose forward is naive."""

    _recomputing_structure: ClassVar[Structure] = TRANSITION

    def _recomputing_read(self, x: Tensor) -> BlockCall:
        call = BlockCall.of(x, (), None, "norm", self.kernels)
        return call.with_exit(self._recomputing_unit())

    def _recomputing_unit(self) -> Unit:
        """The transition as what reads all features of a block."""
        return read_transition(self, self._recomputing_structure, "the transition")


class EfficientTransition(RecomputingTransition, Transition):
    """Transition that keeps only its input, and pools before it convolves.

    Maps ``(N, num_input_features, *spatial)`` to ``(N, num_output_features, *spatial // 2)``, in
    its input's memory format. Parameters, state-dict keys, outputs, gradients and running
    statistics are those of torchvision's ``_Transition``: average pooling and a 1x1 convolution
    commute, and in this order the convolution has a quarter of the positions to visit.

    What the efficient path does not support runs on the naive one; :meth:`why_naive` says why.
    """


class RecomputingSequence(Settings):
    """What makes a sequence run its neighbours together: a base in front of ``nn.Sequential``.

    ``recompute`` is that of a stem among them: blocks and transitions have their own. The result
    has the memory format of the input, unless all of them are naive.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_naive(self) or not (isinstance(input, Tensor) and iterates_plainly(self)):
            return super().forward(input)
        modules = [module for module in self._modules.values() if module is not None]
        recompute_stems = self.recompute != "none"
        *before, last = modules
        if not is_patched(last):
            return in_format_of(input, run(modules, input, self.kernels, recompute_stems))
        # A hook on the last module holds what the caller gets, and may change in place.
        return last(in_format_of(input, run(before, input, self.kernels, recompute_stems)))


def is_naive(sequence: RecomputingSequence) -> bool:
    """Whether its stem, and every child that has a mode, has ``recompute="none"``."""
    modules = (sequence, *sequence._modules.values())
    return all(m.recompute == "none" for m in modules if isinstance(m, Settings))


def iterates_plainly(sequence: nn.Module) -> bool:
    """Whether ``nn.Sequential.forward`` calls all children in their order."""
    return type(sequence).__iter__ is nn.Sequential.__iter__  # type: ignore[attr-defined]


class EfficientSequential(RecomputingSequence, nn.Sequential):
    """``nn.Sequential`` that runs neighbours together where that keeps less.

    A stem (convolution, batch norm, activation, pooling) keeps only the image and convolves again
    in the backward pass. A transition after an :class:`EfficientDenseBlock` reads the block's
    features where they lie, shares their batch statistics and adds to their gradient, so that the
    block's output never exists beside them.

    Children, state-dict keys, outputs, gradients and running statistics are those of
    ``nn.Sequential``. A child with hooks is called by itself.
    """


class Head:
    """The norm after the last dense block, ReLU and global average: ``(N, channels, 1, ...)``."""

    def __init__(self, norm: nn.Module, dims: int, kernels: Kernels) -> None:
        self.norm, self.dims, self.kernels = norm, dims, kernels

    def _recomputing_unit(self) -> Unit:
        """The head as what reads all features of a block."""
        return unit_of(read_norm(self.norm, "the last norm"), RELU, pool=Pool("all"))

    def read(self, x: Tensor) -> BlockCall:
        """What a call on ``x`` would run; raises :class:`Unsupported`."""
        check_input(x)
        return BlockCall.of(x, (), None, "norm", self.kernels).with_exit(self._recomputing_unit())

    def __call__(self, x: Tensor) -> Tensor:
        call = supported(self.read, x)
        if call is not None:
            return call.run()
        return global_average(F.relu(self.norm(x)), self.dims)


def run(
    modules: Sequence[nn.Module], x: Tensor, kernels: Kernels = "auto", recompute_stems: bool = True
) -> Tensor:
    """``modules`` one after the other, as :class:`EfficientSequential` runs them.

    ``kernels`` are those of stems, and ``recompute_stems`` says whether they recompute; blocks and
    transitions have settings of their own.
    """
    i = 0
    while i < len(modules):
        here, after = modules[i], modules[i + 1] if i + 1 < len(modules) else None
        stem = read_stem(modules[i:], x, kernels) if recompute_stems else None
        if stem is not None:
            x, i = stem[0].run(), i + stem[1]
        elif is_plain(here, RecomputingBlock) and _reads_inside(after):
            x, i = _run_block(here, x, after), i + 2
        else:
            x, i = here(x), i + 1
    return x


def run_to_average(
    modules: Sequence[nn.Module],
    x: Tensor,
    dims: int,
    kernels: Kernels = "auto",
    recompute_stems: bool = True,
) -> Tensor:
    """ReLU and global average, ``(N, channels, 1, ...)``, of what ``modules`` make of ``x``.

    ``dims`` is the number of spatial dimensions; the rest is as for :func:`run`.
    A norm after the last dense block reads the features inside the block, as a transition does, and
    is naive after a block that is so by its mode.
    """
    *before, block, norm = modules
    naive = isinstance(block, Settings) and block.recompute == "none"
    if naive or is_patched(norm):
        return global_average(F.relu(run(modules, x, kernels, recompute_stems)), dims)
    head = Head(norm, dims, kernels)
    if is_plain(block, RecomputingBlock):
        return _run_block(block, run(before, x, kernels, recompute_stems), head)
    return head(run([*before, block], x, kernels, recompute_stems))


def _run_block(block: RecomputingBlock, x: Tensor, reader: RecomputingTransition | Head) -> Tensor:
    """A block and what reads its features: inside the block if that can be, otherwise after it."""
    call = read_or_none(block, x)
    if call is None:
        return reader(run_naive(block, x))
    if not isinstance(call, BlockCall):
        out = run_or_none(block, call)
        return reader(run_naive(block, x) if out is None else out)
    try:
        read = call.with_exit(reader._recomputing_unit())
    except Unsupported:
        out = run_or_none(block, call)
        return reader(run_naive(block, x) if out is None else out)
    out = run_or_none(block, read)
    return reader(run_naive(block, x)) if out is None else out


def _reads_inside(module: nn.Module | None) -> TypeGuard[RecomputingTransition]:
    """Whether ``module`` is a transition that recomputes, inside the block before it if it can."""
    return is_plain(module, RecomputingTransition) and module.recompute != "none"


def is_plain(module: nn.Module | None, base: type[M]) -> TypeGuard[M]:
    """Whether calling a module is calling the forward of ``base``, and that alone."""
    return (
        isinstance(module, base)
        and (module._recomputing_is_generated or type(module).forward is base.forward)
        and not is_patched(module)
    )


def read_stem(
    modules: Sequence[nn.Module], x: Tensor, kernels: Kernels
) -> tuple[StemCall, int] | None:
    """The stem with which the modules begin, for the image ``x``, and how many modules it is."""
    if type(modules[0]) not in CONVS:
        return None
    for parts in STEMS:
        if len(modules) < len(parts):
            continue
        found = Found()
        try:
            check_input(x)
            for add, module in zip(parts, modules, strict=False):
                add(module, type(module).__name__, found)
            return StemCall.of(x, *stem_of(found), kernels), len(parts)
        except Unsupported:
            continue
    return None
