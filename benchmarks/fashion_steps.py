"""A hundred steps on Fashion-MNIST, naive and efficient: the same losses, the same accuracy.

    make data
    python -m benchmarks.fashion_steps    # into docs/results/fashion_steps.json

Networks that are compared start from the same weights and see the same images in the same order.
The naive network in another memory format shows what rounding alone does. Ends with status 1 if a
loss or the accuracy differs by more than it may.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.provenance import publish
from efficient_densenet import densenet_cifar
from efficient_densenet.models import DenseNet
from efficient_densenet.training import fashion_mnist
from efficient_densenet.training.config import make_optimizer
from efficient_densenet.training.fashion_mnist import Images

DEPTH, GROWTH, BATCH, TEST_BATCH = 16, 8, 64, 500
STEPS, WARM_UP = 100, 20
WARM_UP_RATE, PEAK_RATE = 1e-3, 0.05


class Recipe(NamedTuple):
    """How a network is run: the mode of its blocks, and the memory format."""

    recompute: str
    memory_format: torch.memory_format = torch.contiguous_format


class Kind(NamedTuple):
    """A type, the seeds to run, and the largest relative difference over the first ``steps``."""

    dtype: torch.dtype
    seeds: range
    steps: int
    allowed: float


RECIPES = {
    "naive": Recipe("none"),
    "naive, channels_last": Recipe("none", torch.channels_last),
    "norm": Recipe("norm"),
    "bottleneck": Recipe("bottleneck"),
}
KINDS = (
    Kind(torch.float32, range(5), WARM_UP, 1e-5),
    Kind(torch.float64, range(1), STEPS, 1e-9),
)


class Run(NamedTuple):
    """The loss of every step, and the share of the test images that is then recognised."""

    losses: Tensor
    accuracy: float


class Comparison(NamedTuple):
    """The runs of a network from every seed, beside those of the naive one."""

    name: str
    kind: Kind
    runs: list[Run]
    naive: list[Run]

    def difference(self, steps: int) -> float:
        """The largest relative difference of a loss over the first ``steps``."""
        pairs = zip(self.runs, self.naive, strict=True)
        return max(
            ((run.losses - naive.losses) / naive.losses)[:steps].abs().max().item()
            for run, naive in pairs
        )

    def accuracies(self) -> tuple[list[float], list[float]]:
        return [run.accuracy for run in self.runs], [run.accuracy for run in self.naive]

    def failures(self) -> list[str]:
        """What differs more than it may."""
        where = f"{_name(self.kind.dtype)}, {self.name}"
        found, allowed = self.difference(self.kind.steps), self.kind.allowed
        lines = []
        if not found <= allowed:
            lines.append(f"{where}: a loss differs by {found:.1e}, allowed are {allowed:.0e}")
        mine, naive = self.accuracies()
        if abs(mean(mine) - mean(naive)) > 2 * _noise(mine, naive):
            lines.append(f"{where}: accuracy {mean(mine):.2%}, of the naive one {mean(naive):.2%}")
        return lines


def _noise(mine: list[float], naive: list[float]) -> float:
    """The standard error of the difference of two means; of one run each, of the test images."""
    if len(mine) > 1:
        return math.hypot(stdev(mine), stdev(naive)) / math.sqrt(len(mine))
    (share,) = naive
    return math.sqrt(2 * share * (1 - share) / 10_000)


def train(images: Images, recipe: Recipe, dtype: torch.dtype, seed: int, steps: int = STEPS) -> Run:
    """Train a small DenseNet-BC, at a low learning rate first, then from a high one down to 0."""
    torch.manual_seed(seed)
    model = densenet_cifar(DEPTH, GROWTH, in_channels=1, recompute=recipe.recompute)
    model = model.to(dtype, memory_format=recipe.memory_format)
    optimizer = make_optimizer(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    losses = []
    for pixels, labels in batches(images, seed, steps):
        optimizer.zero_grad()
        x = normalised(pixels, dtype).contiguous(memory_format=recipe.memory_format)
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach().double())
    return Run(torch.stack(losses), accuracy(model, images, dtype))


def learning_rate(step: int) -> float:
    """Low at first, so that rounding is not yet amplified; then half a cosine."""
    if step < WARM_UP:
        return WARM_UP_RATE
    share = (step - WARM_UP) / (STEPS - WARM_UP)
    return PEAK_RATE * (1 + math.cos(math.pi * share)) / 2


def batches(images: Images, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of ``steps`` batches, in the order that belongs to ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.train_images), generator=generator)
    for chosen in order[: steps * BATCH].split(BATCH):
        yield images.train_images[chosen], images.train_labels[chosen]


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Images ``(N, 1, 28, 28)`` from bytes ``(N, 28, 28)``."""
    return (pixels.unsqueeze(1).to(dtype) / 255 - fashion_mnist.MEAN) / fashion_mnist.STD


@torch.no_grad()
def accuracy(model: DenseNet, images: Images, dtype: torch.dtype) -> float:
    """The share of the test images that the network recognises."""
    model.eval()
    right = sum(
        (model(normalised(pixels, dtype)).argmax(1) == labels).sum().item()
        for pixels, labels in zip(
            images.test_images.split(TEST_BATCH),
            images.test_labels.split(TEST_BATCH),
            strict=True,
        )
    )
    return right / len(images.test_labels)


def compare(images: Images, kind: Kind, steps: int = STEPS) -> list[Comparison]:
    """Every recipe's runs, those of the naive one first."""
    runs = {
        name: [train(images, recipe, kind.dtype, seed, steps) for seed in kind.seeds]
        for name, recipe in RECIPES.items()
    }
    return [Comparison(name, kind, of, runs["naive"]) for name, of in runs.items()]


def row(of: Comparison) -> dict[str, object]:
    """The largest relative difference of a loss from the naive network's, and the accuracy."""
    mine, _ = of.accuracies()
    return {
        "dtype": _name(of.kind.dtype),
        "seeds": len(mine),
        "network": of.name,
        "early": of.difference(WARM_UP),
        "whole": of.difference(STEPS),
        "accuracy": mean(mine),
        "deviation": stdev(mine) if len(mine) > 1 else None,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    images = fashion_mnist.load(parser.parse_args().data_dir)
    comparisons = [comparison for kind in KINDS for comparison in compare(images, kind)]
    recipe = {"depth": DEPTH, "growth": GROWTH, "batch": BATCH, "steps": STEPS, "early": WARM_UP}
    rates = {"early_rate": WARM_UP_RATE, "peak_rate": PEAK_RATE}
    publish("fashion_steps", {**recipe, **rates, "rows": [row(of) for of in comparisons]})
    lines = [line for of in comparisons for line in of.failures() if "naive" not in of.name]
    sys.exit("\n".join(lines) or 0)


if __name__ == "__main__":
    main()
