"""The choices of the CPU path, each beside what else could have been chosen, timed.

    python -m benchmarks.choices    # into docs/results/choices.json

Two threads where there are two cores; nothing else should run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.provenance import publish
from efficient_densenet import EfficientDenseBlock
from efficient_densenet.kernels import eager, whole, workspace
from efficient_densenet.modules.naive import DenseBlock

ROUNDS = 15
MIB = 1 << 20
BATCH, SIZE, WIDE, BOTTLENECK, NEW = 16, 32, 216, 48, 12
UNEVEN = 132  # of a width that the kernels do not take in whole vectors


class Choice(NamedTuple):
    """Ways to do the same; the one chosen is among them."""

    question: str
    chosen: str
    ways: dict[str, Callable[[], object]]


def image(channels: int, last: bool = True, size: int = SIZE) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.randn(BATCH, channels, size, size).to(memory_format=memory_format)


def pointwise() -> Choice:
    """Forward and backward of a 1x1 convolution."""
    weight = torch.randn(BOTTLENECK, WIDE)

    def convolution(last: bool) -> Callable[[], object]:
        x, grad, kernel = image(WIDE, last), image(BOTTLENECK, last), weight[:, :, None, None]

        def step() -> object:
            F.conv2d(x, kernel)
            return torch.ops.aten.convolution_backward(
                grad, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
            )

        return step

    x, grad = (image(c).permute(0, 2, 3, 1).reshape(-1, c) for c in (WIDE, BOTTLENECK))
    return Choice(
        f"1×1 convolution, {WIDE} to {BOTTLENECK} channels, forward and backward",
        "convolution, channels last",
        {
            "convolution, channels first": convolution(last=False),
            "convolution, channels last": convolution(last=True),
            "matrix products": lambda: (x @ weight.T, grad @ weight, grad.T @ x),
        },
    )


def statistics(channels: int) -> Choice:
    """Mean and variance of every channel."""
    first, last = image(channels, last=False), image(channels)
    return Choice(
        f"batch statistics of {channels} channels",
        "batch_norm_update_stats, folded",
        {
            "var_mean, channels first": lambda: torch.var_mean(first, [0, 2, 3]),
            "var_mean, channels last": lambda: torch.var_mean(last, [0, 2, 3]),
            "batch_norm_update_stats, channels first": lambda: update_stats(first),
            "batch_norm_update_stats, channels last": lambda: update_stats(last),
            "batch_norm_update_stats, folded": lambda: eager.batch_statistics(last, last.dtype),
        },
    )


def update_stats(x: Tensor) -> object:
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def gradient_sums(channels: int) -> Choice:
    """What batch norm's gradients sum over a map: ``d``, and ``d * x``."""
    d, x = image(channels), image(channels)
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    norm = eager.Norm(zeros, ones, ones, zeros)
    scratch = workspace.Workspace(x, channels, x.dtype, torch.channels_last)

    def unfolded() -> object:
        return torch.ops.aten.native_batch_norm_backward(
            d, x, None, None, None, zeros, ones, True, 0.0, [False, True, True]
        )

    return Choice(
        f"batch norm's gradient sums of {channels} channels",
        "native_batch_norm_backward, folded",
        {
            "products, then sums": lambda: ((d * x).sum([0, 2, 3]), d.sum([0, 2, 3])),
            "native_batch_norm_backward": unfolded,
            "native_batch_norm_backward, folded": lambda: eager.channel_sums(d, x, norm, scratch),
        },
    )


def rectification() -> Choice:
    """Normalise and rectify a prefix of the features, and convolve it 1x1."""
    x = image(2 * WIDE)[:, :WIDE]
    scale, shift = torch.rand(2, WIDE, 1, 1)
    kernel = torch.randn(BOTTLENECK, WIDE, 1, 1)
    whole, out = torch.empty_like(image(WIDE)), torch.empty_like(image(BOTTLENECK))
    slab = whole[:4]

    def slabs() -> None:
        for start in range(0, BATCH, len(slab)):
            rows = slice(start, start + len(slab))
            a = torch.addcmul(shift, x[rows], scale, out=slab).relu_()
            out[rows] = F.conv2d(a, kernel)

    return Choice(
        f"normalise and rectify {WIDE} channels, convolve them 1×1",
        "slab by slab",
        {
            "all of it in new memory": lambda: F.conv2d(
                torch.addcmul(shift, x, scale).relu_(), kernel
            ),
            "all of it in one scratch": lambda: F.conv2d(
                torch.addcmul(shift, x, scale, out=whole).relu_(), kernel
            ),
            "slab by slab": slabs,
        },
    )


def workspaces() -> Choice:
    """A step of a block with scratch of different sizes."""
    step = training_step(EfficientDenseBlock(32, 24, 4, NEW, recompute="norm"), image(24))
    chosen = workspace.WORKSPACE_BYTES

    def with_bytes(size: int) -> Callable[[], object]:
        def run() -> None:
            workspace.WORKSPACE_BYTES = size
            try:
                step()
            finally:
                workspace.WORKSPACE_BYTES = chosen

        return run

    return Choice(
        f"workspace of a block of 32 layers, k={NEW}",
        f"{chosen // MIB} MiB",
        {f"{size} MiB": with_bytes(size * MIB) for size in (1, 2, 4, 8, 16, 64)},
    )


def small_operators() -> Choice:
    """Maps so small that only the number of operators counts."""
    blocks = {
        "naive": DenseBlock(32, 24, 4, NEW),
        "norm": EfficientDenseBlock(32, 24, 4, NEW, recompute="norm"),
        "bottleneck": EfficientDenseBlock(32, 24, 4, NEW, recompute="bottleneck"),
    }
    return Choice(
        f"32 layers, k={NEW}, on maps of 2²: the operators' own cost",
        "norm",
        {name: training_step(block, image(24, size=2)) for name, block in blocks.items()},
    )


def whole_or_slabs(batch: int, size: int) -> Choice:
    """Maps whole, whatever their size, and slab by slab, beside the naive block."""
    most = whole.MOST_BYTES

    def whole_step(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            whole.MOST_BYTES = 1 << 40
            try:
                step()
            finally:
                whole.MOST_BYTES = most

        return run

    x = image(24, size=size)[:batch]
    slabs = EfficientDenseBlock(24, 24, 4, NEW, recompute="norm", kernels="eager")
    wholes = EfficientDenseBlock(24, 24, 4, NEW, recompute="norm", kernels="whole")
    small = slabs(x).nbytes <= most
    return Choice(
        f"24 layers, k={NEW}, {batch} maps of {size}²",
        "whole" if small else "slab by slab",
        {
            "naive": training_step(DenseBlock(24, 24, 4, NEW), x),
            "whole": whole_step(training_step(wholes, x)),
            "slab by slab": training_step(slabs, x),
        },
    )


def training_step(block: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, with the channels last."""
    block.to(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn_like(block(x))

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(grad)

    return step


def choices() -> Iterator[Choice]:
    yield pointwise()
    yield statistics(NEW)
    yield statistics(BOTTLENECK)
    yield gradient_sums(UNEVEN)
    yield rectification()
    yield workspaces()
    yield small_operators()
    for batch, size in ((2, 16), (8, 16), (16, 16)):
        yield whole_or_slabs(batch, size)


def timed(choice: Choice) -> dict[str, float]:
    """Median milliseconds of every way, in rounds in shuffled order after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in choice.ways}
    for _ in range(ROUNDS + 1):
        for name in random.sample(list(choice.ways), len(choice.ways)):
            start = time.perf_counter()
            choice.ways[name]()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(times[1:]) for name, times in taken.items()}


def main() -> None:
    torch.manual_seed(0)
    found = [
        {"question": of.question, "chosen": of.chosen, "milliseconds": timed(of)}
        for of in choices()
    ]
    publish("choices", {"batch": BATCH, "size": SIZE, "rounds": ROUNDS, "choices": found})


if __name__ == "__main__":
    main()
