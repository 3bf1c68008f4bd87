"""What lies around dense blocks: transitions and stems that keep their inputs and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.kernels.interface import Pool
from efficient_densenet.kernels.layout import in_format_of
from efficient_densenet.modules import calls as stage
from efficient_densenet.modules import reading as lowering
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.calls import Exit
from efficient_densenet.modules.naive import Transition, global_average
from efficient_densenet.modules.parts import CONV, NORM, NORM_ACT, POOL, RELU, TRANSITION, Anatomy


class RecomputingTransition(stage.ChoosesKernels):
    """What makes a transition recompute: a base in front of the class whose forward is naive.

    A call that the efficient path does not support runs on the class behind; :meth:`why_naive`
    says why. The modules are read at every call, by the anatomy of the class.
    """

    anatomy: ClassVar[Anatomy] = TRANSITION

    def why_naive(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        reason = lowering.unsupported_call(x)
        if reason:
            return reason
        reason = self.unsupported()
        if reason:
            return f"the transition{reason}"
        norm = self.exit().norm
        if norm.num_features != x.shape[1]:
            return f"the transition expects {norm.num_features} channels and gets {x.shape[1]}"
        return lowering.unsupported_statistics(x, [norm])

    def unsupported(self) -> str | None:
        """What about its modules the efficient path does not know, as the end of a sentence."""
        reason = self.anatomy.unsupported(self)
        if reason:
            return reason
        conv, pool = (self.anatomy.find(self, role)[0] for role in ("conv", "pool"))
        if not (lowering.is_pointwise(conv) and lowering.is_plain_average(pool)):
            return " does not convolve 1x1 and average without padding: the two do not commute"
        return None

    def exit(self) -> Exit:
        """The transition as what reads all features of a block."""
        norm, conv, pool = (self.anatomy.find(self, role)[0] for role in ("norm", "conv", "pool"))
        return Exit(norm, lowering.pooling(pool), conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.why_naive(x):
            return super().forward(x)
        return stage.run_layers([], x, "norm", self.exit(), self.kernels)


class EfficientTransition(RecomputingTransition, Transition):
    """Transition that keeps its input alone, and pools before it convolves.

    Maps ``(N, num_input_features, *spatial)`` to ``(N, num_output_features, *spatial // 2)``, in
    its input's memory format. Parameters, state-dict keys, outputs, gradients and running
    statistics are those of torchvision's ``_Transition``: average pooling and a 1x1 convolution
    commute, and in this order the convolution has a quarter of the positions to visit.

    What the efficient path does not support runs on the naive one; :meth:`why_naive` says why.
    """


class RecomputingSequence(stage.ChoosesKernels):
    """What makes a sequence run its neighbours together: a base in front of ``nn.Sequential``.

    The result has the memory format of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return in_format_of(input, run(list(self._modules.values()), input, self.kernels))


class EfficientSequential(RecomputingSequence, nn.Sequential):
    """``nn.Sequential`` that runs neighbours together where that keeps less.

    A stem (convolution, batch norm, ReLU, max-pooling) keeps the image alone and convolves again
    in the backward pass. A transition after an :class:`EfficientDenseBlock` reads the block's
    features where they lie, shares their batch statistics and adds to their gradient, so that the
    block's output never exists beside them.

    Children, state-dict keys, outputs, gradients and running statistics are those of
    ``nn.Sequential``. A child with hooks is called by itself.
    """


def run(modules: Sequence[Any], x: Tensor, kernels: Kernels = "auto") -> Tensor:
    """``modules`` one after the other, as :class:`EfficientSequential` runs them.

    ``kernels`` are those of stems; blocks and transitions have their own.
    """
    i = 0
    while i < len(modules):
        here = modules[i:]
        stem = stem_at(here)
        if stem and not stem.why_naive(x):
            x, i = stage.run_stem(stem.conv, stem.norm, stem.pool, x, kernels), i + stem.modules
        elif (
            len(here) > 1
            and reads_features(here[1])
            and shares_features(here[0], here[1].exit().norm, x)
        ):
            x, i = here[0].run(x, here[1].exit()), i + 2
        else:
            x, i = here[0](x), i + 1
    return x


def run_to_average(modules: Sequence[Any], x: Tensor, kernels: Kernels = "auto") -> Tensor:
    """ReLU and global average, ``(N, channels, 1, ...)``, of what ``modules`` make of ``x``.

    A norm after the last dense block reads the block's features inside, as a transition does.
    """
    *before, block, norm = modules
    if type(norm) not in lowering.NORM_TYPES or lowering.is_patched(norm):
        return global_average(F.relu(run(modules, x, kernels)))
    x = run(before, x, kernels)
    if shares_features(block, norm, x):
        return block.run(x, Exit(norm, Pool("all")))
    x = block(x)
    if (
        norm.num_features != x.shape[1]
        or lowering.unsupported_call(x)
        or lowering.unsupported_statistics(x, [norm])
    ):
        return global_average(F.relu(norm(x)))
    return stage.run_layers([], x, "norm", Exit(norm, Pool("all")), kernels)


def shares_features(block: Any, norm: Any, x: Tensor) -> bool:
    """Whether a module is a dense block inside which ``norm`` may read the features, for ``x``."""
    runs_here = (
        isinstance(block, RecomputingBlock)
        and type(block).forward is RecomputingBlock.forward
        and not lowering.is_patched(block)
        and block.why_naive(x) is None
    )
    if not runs_here:
        return False
    layers = block.read_layers()
    channels = x.shape[1] + sum(layer.units[-1].conv.out_channels for layer in layers)
    return norm.num_features == channels and not lowering.unsupported_statistics(
        x, [*stage.all_norms(layers), norm]
    )


def reads_features(transition: Any) -> bool:
    """Whether a module is a transition that can read a block's features inside the block."""
    return (
        isinstance(transition, RecomputingTransition)
        and type(transition).forward is RecomputingTransition.forward
        and not lowering.is_patched(transition)
        and transition.unsupported() is None
    )


class Stem(NamedTuple):
    """The parts of a stem, and how many modules it is."""

    conv: Any
    norm: Any
    pool: Any
    modules: int

    def why_naive(self, x: Tensor) -> str | None:
        """Why the stem cannot keep the image ``x`` alone, or ``None`` if it can."""
        reason = lowering.unsupported_call(x)
        if reason:
            return reason
        if not lowering.has_plain_padding(self.conv):
            return "the convolution does not pad with zeros, as many as it says"
        if getattr(self.pool, "return_indices", False):
            return "the pooling returns indices"
        if x.dim() != self.conv.weight.dim():
            return f"the image has {x.dim()} dimensions"
        reason = lowering.unsupported_statistics(x, [self.norm])
        if reason:
            return reason
        if None in lowering.process_groups([self.norm]) and _may_leave_one_value(self.conv, x):
            return lowering.LACKS_VALUES
        return None


STEM_KINDS = ((CONV, NORM, RELU, POOL), (CONV, NORM_ACT, POOL))


def stem_at(modules: Sequence[Any]) -> Stem | None:
    """The stem with which the modules begin, if they begin with one."""
    for kinds in STEM_KINDS:
        here = modules[: len(kinds)]
        if [kind.unsupported(m) for kind, m in zip(kinds, here, strict=False)] == [None] * len(
            kinds
        ):
            parts = {kind.role: module for kind, module in zip(kinds, here, strict=True)}
            return Stem(parts["conv"], parts["norm"], parts["pool"], len(kinds))
    return None


def _may_leave_one_value(conv: Any, x: Tensor) -> bool:
    """Whether a convolution of the batch ``x`` could leave a single value per channel."""
    reach = zip(conv.kernel_size, conv.dilation, conv.stride, x.shape[2:], strict=True)
    return len(x) < 2 and all(size <= d * (k - 1) + stride for k, d, stride, size in reach)
