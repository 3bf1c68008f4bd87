"""What is benchmarked: one registered case, one builder, for every instrument."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock

from benchmarks.floor import ConvolutionsAlone
from efficient_densenet import EfficientDenseBlock
from efficient_densenet.models import DenseNet
from efficient_densenet.modules.naive import DenseBlock

Kind = Literal["naive", "torchvision", "norm", "bottleneck"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES = {
    "torchvision": "torchvision memory_efficient",
    "floor": "(its convolutions alone, channels_last)",
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BN_SIZE = 4
GRAPHS = "CUDA graphs"


@dataclass(frozen=True)
class Competitor:
    """A kind of model, the memory format of its weights and input, and how it is run.

    ``kernels`` names the implementation of our operations, which is chosen for us unless given;
    ``backend`` is the compiler's. With ``graphs`` a GPU replays CUDA graphs: those of the compiler
    (its mode ``"reduce-overhead"``), or of the whole model.
    """

    kind: Kind | Literal["floor"]
    channels_last: bool = False
    compiled: bool = False
    kernels: str | None = None
    backend: str = "inductor"
    graphs: bool = False

    def __str__(self) -> str:
        name = NAMES.get(self.kind, self.kind)
        name = f"{name}, {self.kernels}" if self.kernels else name
        name = f"{name}, torch.compile" if self.compiled else name
        name = f"{name}, {GRAPHS}" if self.graphs else name
        return f"{name}, channels_last" if self.channels_last else name

    @property
    def ours(self) -> bool:
        return self.kind in ("norm", "bottleneck")

    def uncompiled(self) -> Competitor:
        """The same, run operator by operator."""
        return replace(self, compiled=False, graphs=False)


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
BRIEF = tuple(c for c in COMPETITORS if not c.compiled and not (c.ours and c.channels_last))
"""Those whom a user wants to see first: a compiled model takes minutes to compile."""

FLOOR = Competitor("floor")
"""No competitor: the time below which none can go."""


@dataclass(frozen=True)
class Case:
    """A model in all its kinds, equal in parameters, and the shape of its input.

    Parameters are float32; the step runs under autocast to ``autocast`` where that is given. An
    ``inner`` model is a part of a network: its input comes in autocast's type and wants a gradient.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[..., nn.Module]
    autocast: torch.dtype | None = None
    inner: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def precision(self) -> torch.dtype:
        """The least precise type that the step computes in."""
        return self.autocast or torch.float32

    def subject(self, competitor: Competitor) -> Subject:
        """The case as ``competitor``: same weights, input and upstream gradient for all."""
        return self._subject(competitor, self.shape)

    def small_subject(
        self, competitor: Competitor, batch: int = 2, dtype: torch.dtype | None = torch.float64
    ) -> Subject:
        """The same with a smaller batch, to be checked; in float64, where rounding hides no error.

        With no ``dtype`` it is in the precision of the case. Not compiled: another dtype and shape
        would be another compilation.
        """
        return self._subject(competitor.uncompiled(), (batch, *self.shape[1:]), dtype)

    def floor(self) -> ConvolutionsAlone:
        """The convolutions of the case and nothing else."""
        subject = self._subject(NAIVE, self.shape, self.precision)
        return ConvolutionsAlone(subject.model, subject.x)

    def _subject(
        self, competitor: Competitor, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Subject:
        torch.manual_seed(0)
        options = {"kernels": competitor.kernels} if competitor.kernels else {}
        with DEVICE:
            weights = self.make("naive").state_dict()
            x = torch.randn(shape)
            model = self.make(competitor.kind, **options)
        model.load_state_dict(weights)
        layout = torch.channels_last if competitor.channels_last else torch.contiguous_format
        model = model.to(dtype or torch.float32, memory_format=layout)
        if competitor.compiled:
            mode = "reduce-overhead" if competitor.graphs and DEVICE.type == "cuda" else None
            model = torch.compile(model, backend=competitor.backend, mode=mode)
        x = x.to(dtype or (self.precision if self.inner else torch.float32), memory_format=layout)
        autocast = self.autocast if dtype is None else None
        subject = Subject(model, x.requires_grad_(self.inner), autocast)
        if competitor.graphs and not competitor.compiled:
            subject.capture()
        return subject


@dataclass
class Subject:
    """A model with the input of its training step, which starts backward from a random gradient."""

    model: nn.Module
    x: Tensor
    autocast: torch.dtype | None = None
    upstream: Tensor | None = field(default=None)

    def forward(self) -> Tensor:
        enabled = self.autocast is not None
        with torch.autocast(DEVICE.type, self.autocast) if enabled else nullcontext():
            return self.model(self.x)

    def capture(self) -> None:
        """From now on replay CUDA graphs of both passes; elsewhere than on CUDA do nothing."""
        if DEVICE.type != "cuda":
            return
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.autocast(
            "cuda", self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            self.model = torch.cuda.make_graphed_callables(self.model, (self.x,))
        self.model.load_state_dict(state)  # norms have learnt from the batches that warmed up

    def step(self) -> Tensor:
        """Forward and backward; returns the output."""
        output = self.forward()
        if self.upstream is None:
            generator = torch.Generator().manual_seed(1)
            values = torch.randn(output.shape, generator=generator)
            self.upstream = torch.empty_like(output).copy_(values)  # in the output's own layout
        output.backward(self.upstream)
        return output

    def clear(self) -> None:
        for tensor in (self.x, *self.model.parameters()):
            tensor.grad = None


def block(
    name: str, layers: int, channels: int, growth: int, batch: int, size: int, **options: object
) -> Case:
    """A dense block of bottleneck layers on ``(batch, channels, size, size)``."""
    label = f"{name}: {layers} layers, c0={channels}, k={growth}, batch {batch}, {size}²"
    make = partial(make_block, layers=layers, channels=channels, growth=growth)
    return Case(label, (batch, channels, size, size), make, **options)


def make_block(kind: Kind, layers: int, channels: int, growth: int, **options: object) -> nn.Module:
    if kind == "naive":
        return DenseBlock(layers, channels, BN_SIZE, growth)
    if kind == "torchvision":
        return _DenseBlock(layers, channels, BN_SIZE, growth, 0.0, memory_efficient=True)
    return EfficientDenseBlock(layers, channels, BN_SIZE, growth, recompute=kind, **options)


def make_network(
    kind: Kind, growth: int, layers: tuple[int, ...], features: int, **options: object
) -> nn.Module:
    """A DenseNet for images, torchvision's or ours."""
    if kind in ("naive", "torchvision"):
        flag = kind == "torchvision"
        return torchvision.models.DenseNet(growth, layers, features, memory_efficient=flag)
    return DenseNet(growth, layers, features, recompute=kind, **options)


DENSENET_121 = partial(make_network, growth=32, layers=(6, 12, 24, 16), features=64)

CASES = (
    block("few wide maps", 24, 256, 32, 8, 14),
    block("many narrow maps", 12, 24, 12, 32, 32),
    block("more narrow maps", 32, 24, 12, 16, 32),
    block("large maps", 6, 64, 32, 8, 56),
    block("deep", 48, 24, 12, 8, 32),
    Case("DenseNet-121, batch 8, 224²", (8, 3, 224, 224), DENSENET_121),
)
