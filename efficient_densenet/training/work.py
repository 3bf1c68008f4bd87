"""What is planned for: named networks, in every mode, and their training steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from efficient_densenet.functional.modes import MODES, Mode
from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.memory.plan import Fit, find_largest, largest_batch
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.step import estimate
from efficient_densenet.modules.checkpointed import CHECKPOINTED, checkpointed_
from efficient_densenet.training.config import (
    AUTOCAST,
    SMALLEST_BATCH,
    ConfigError,
    TrainConfig,
    build_network,
    make_optimizer,
)

COMPETITORS: dict[str, Mode] = {
    mode.label: mode for mode in (MODES["none"], CHECKPOINTED, MODES["norm"], MODES["bottleneck"])
}
"""What is planned for, by what tables call it."""

BATCHES, DEPTHS = range(SMALLEST_BATCH, 2**20 + 1), range(10, 3004 + 1, 6)
"""Where a search begins, and where it ends whatever would still fit."""


@dataclass(frozen=True)
class Work:
    """A training step to plan: network, images and precision.

    Attributes:
        model: a name of ``config.RECIPES``.
        image_size: pixels, height and width.
        batch_size: images of a step.
        depth: layers, of ``cifar-bc`` alone.
        growth_rate: channels ``k``, of ``cifar-bc`` alone.
        in_channels: channels of an image.
        num_classes: number of logits.
        drop_rate: dropout.
        precision: as in training.
    """

    model: str
    image_size: int
    batch_size: int = SMALLEST_BATCH
    depth: int | None = None
    growth_rate: int | None = None
    in_channels: int = 3
    num_classes: int = 10
    drop_rate: float = 0.0
    precision: str = "32-true"

    @classmethod
    def of(cls, config: TrainConfig) -> Work:
        """The step of a training run."""
        return cls(
            config.model,
            config.image_size,
            config.batch_size,
            config.depth,
            config.growth_rate,
            in_channels=1,
            drop_rate=config.drop_rate,
            precision=config.precision,
        )

    def subject(self, by_depth: bool = False) -> str:
        """What is trained, in one line; without the depth if it is what is planned."""
        parts = [self.model if self.depth is None or by_depth else f"{self.model}-{self.depth}"]
        if self.growth_rate:
            parts.append(f"k={self.growth_rate}")
        parts.append(f"{self.image_size}x{self.image_size}x{self.in_channels}")
        if by_depth:
            parts.append(f"batch {self.batch_size}")
        return ", ".join([*parts, f"precision {self.precision}"])

    @property
    def step(self) -> dict[str, Any]:
        """The step's arguments of :func:`estimate`, other than network and batch."""
        return {
            "make_optimizer": partial(make_optimizer, lr=0.1),
            "autocast_dtype": AUTOCAST.get(self.precision),
        }

    @property
    def images(self) -> tuple[int, ...]:
        """The shape of a batch."""
        return (self.batch_size, self.in_channels, self.image_size, self.image_size)

    @property
    def labels(self) -> tuple[int, ...]:
        """The shape of its labels."""
        return (self.batch_size,)

    def build(self, mode: str) -> nn.Module:
        """The network, with the parameters on torch's default device.

        Raises:
            ConfigError: if no such network has this depth.
        """
        network = build_network(
            self.model,
            self.depth,
            self.growth_rate,
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            drop_rate=self.drop_rate,
            recompute=COMPETITORS[mode].name,
        )
        if mode == CHECKPOINTED.label:
            checkpointed_(network)
        return network.double() if self.precision == "64-true" else network

    def estimate(self, mode: str, device: str) -> StepReport:
        """Memory of a training step on a kind of device, with training's optimizer.

        Raises:
            ConfigError: if the network does not exist, or has more bytes than torch can count.
        """
        with _countable(self.model):
            network = self._build_hollow(mode)
            return estimate(network, self.images, target=self.labels, device=device, **self.step)

    def largest_batch(self, mode: str, budget: int, device: str) -> Fit:
        """The largest batch whose step fits, whatever ``batch_size`` says. Errors as above."""
        images = (None, self.in_channels, self.image_size, self.image_size)
        options = {"target": (None,), "device": device, "sizes": BATCHES, **self.step}
        with _countable(self.model):
            return largest_batch(self._build_hollow(mode), images, budget, **options)

    def greatest_depth(self, mode: str, budget: int, device: str) -> Fit:
        """The deepest network whose step fits, whatever ``depth`` says. Errors as above."""

        def peak(depth: int) -> int:
            return replace(self, depth=depth).estimate(mode, device).peak.total

        return find_largest(peak, budget - DEVICES[device].reserve, DEPTHS)

    def check(self) -> None:
        """Raise :class:`ConfigError` unless there is such a network."""
        with _countable(self.model):
            self._build_hollow("naive")

    def _build_hollow(self, mode: str) -> nn.Module:
        with torch.device("meta"):
            return self.build(mode)


@contextmanager
def _countable(model: str) -> Iterator[None]:
    """Turns torch's error about a size beyond 2**63 into a :class:`ConfigError`."""
    try:
        yield
    except (OverflowError, RuntimeError, TypeError) as error:
        message = str(error).splitlines()[0]
        if "overflow" not in message.lower():
            raise
        raise ConfigError("model", f"{model}: no memory can hold it: {message}") from error
