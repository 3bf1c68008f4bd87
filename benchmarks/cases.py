"""What is benchmarked: one registered case, one builder, for every instrument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock

from benchmarks.floor import ConvolutionsAlone
from efficient_densenet import EfficientDenseBlock
from efficient_densenet.models import densenet121
from efficient_densenet.reference import DenseBlock

Kind = Literal["naive", "torchvision", "norm", "bottleneck"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES = {
    "torchvision": "torchvision memory_efficient",
    "floor": "(its convolutions alone, channels_last)",
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BN_SIZE = 4


@dataclass(frozen=True)
class Competitor:
    """A kind of model, the memory format of its weights and input, and whether it is compiled."""

    kind: Kind | Literal["floor"]
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        name = NAMES.get(self.kind, self.kind)
        name = f"{name}, torch.compile" if self.compiled else name
        return f"{name}, channels_last" if self.channels_last else name

    @property
    def ours(self) -> bool:
        return self.kind in ("norm", "bottleneck")

    def uncompiled(self) -> Competitor:
        return replace(self, compiled=False)


NAIVE = Competitor("naive")
NAIVE_CHANNELS_LAST = Competitor("naive", channels_last=True)
NAIVE_COMPILED = Competitor("naive", compiled=True)
COMPETITORS = (
    NAIVE,
    NAIVE_CHANNELS_LAST,
    NAIVE_COMPILED,
    Competitor("torchvision"),
    Competitor("norm"),
    Competitor("norm", channels_last=True),
    Competitor("bottleneck"),
    Competitor("bottleneck", channels_last=True),
)


FLOOR = Competitor("floor")
"""No competitor: the time below which none can go."""


@dataclass(frozen=True)
class Case:
    """A model in all its kinds, equal in parameters, and the shape of its input."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[Kind], nn.Module]

    def __str__(self) -> str:
        return self.name

    def subject(self, competitor: Competitor) -> Subject:
        """The case as ``competitor``: same weights, input and upstream gradient for all."""
        return self._subject(competitor, self.shape, torch.float32)

    def small_subject(self, competitor: Competitor) -> Subject:
        """The same in float64 with a batch of 2, to be judged without float32's noise.

        Not compiled: another dtype and shape would be another compilation.
        """
        return self._subject(competitor.uncompiled(), (2, *self.shape[1:]), torch.float64)

    def floor(self) -> ConvolutionsAlone:
        """The convolutions of the case and nothing else."""
        subject = self.subject(NAIVE)
        return ConvolutionsAlone(subject.model, subject.x)

    def _subject(
        self, competitor: Competitor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Subject:
        torch.manual_seed(0)
        weights = self.make("naive").state_dict()
        x = torch.randn(shape)
        model: nn.Module = self.make(competitor.kind)  # type: ignore[arg-type]
        model.load_state_dict(weights)
        layout = torch.channels_last if competitor.channels_last else torch.contiguous_format
        model = model.to(DEVICE, dtype, memory_format=layout)
        if competitor.compiled:
            model = torch.compile(model)
        return Subject(model, x.to(DEVICE, dtype, memory_format=layout).requires_grad_())


@dataclass
class Subject:
    """A model with the input of its training step, which starts backward from a random gradient."""

    model: nn.Module
    x: Tensor
    upstream: Tensor | None = field(default=None)

    def step(self) -> Tensor:
        """Forward and backward; returns the output."""
        output = self.model(self.x)
        if self.upstream is None:
            generator = torch.Generator().manual_seed(1)
            values = torch.randn(output.shape, generator=generator)
            self.upstream = torch.empty_like(output).copy_(values)  # in the output's own layout
        output.backward(self.upstream)
        return output

    def clear(self) -> None:
        for tensor in (self.x, *self.model.parameters()):
            tensor.grad = None


def block(name: str, layers: int, channels: int, growth: int, batch: int, size: int) -> Case:
    """A dense block of bottleneck layers on ``(batch, channels, size, size)``."""
    label = f"{name}: {layers} layers, c0={channels}, k={growth}, batch {batch}, {size}²"

    def make(kind: Kind) -> nn.Module:
        return make_block(kind, layers, channels, growth)

    return Case(label, (batch, channels, size, size), make)


def make_block(kind: Kind, layers: int, channels: int, growth: int) -> nn.Module:
    if kind == "naive":
        return DenseBlock(layers, channels, BN_SIZE, growth)
    if kind == "torchvision":
        return _DenseBlock(layers, channels, BN_SIZE, growth, 0.0, memory_efficient=True)
    return EfficientDenseBlock(layers, channels, BN_SIZE, growth, recompute=kind)


def make_densenet121(kind: Kind) -> nn.Module:
    if kind in ("naive", "torchvision"):
        return torchvision.models.densenet121(memory_efficient=kind == "torchvision")
    return densenet121(recompute=kind)


CASES = (
    block("few wide maps", 24, 256, 32, 8, 14),
    block("many narrow maps", 12, 24, 12, 32, 32),
    block("more narrow maps", 32, 24, 12, 16, 32),
    block("large maps", 6, 64, 32, 8, 56),
    block("deep", 48, 24, 12, 8, 32),
    Case("DenseNet-121, batch 8, 224²", (8, 3, 224, 224), make_densenet121),
)
