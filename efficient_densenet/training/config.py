"""What a training run is: its options, their defaults for each model, and the network they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from efficient_densenet import models
from efficient_densenet.fit.groups import set_modes
from efficient_densenet.functional.modes import MODES, Recompute
from efficient_densenet.memory.devices import available_bytes


class ConfigError(ValueError):
    """An argument of a run or plan is invalid.

    Attributes:
        argument: name of the argument.
        problem: what is wrong with it. The message is the name and the problem, in one line.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument, self.problem = argument, problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


RECIPE_OPTIONS = ("image_size", "batch_size", "epochs", "lr")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

SMALLEST_BATCH = 2  # one image has no batch statistics where a map has shrunk to one pixel

make_optimizer = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=1e-4)


class Recipe(NamedTuple):
    """Defaults of a model, and the smallest image that its poolings can halve."""

    build: Callable[..., models.DenseNet]
    image_size: int = 32
    batch_size: int = 64
    epochs: int = 40
    lr: float = 0.1
    min_size: int = 29


RECIPES = {
    "fashion": Recipe(models.fashion_densenet, image_size=96, batch_size=256, epochs=10),
    "cifar-bc": Recipe(models.densenet_cifar, min_size=4),
    "densenet121": Recipe(models.densenet121),
    "densenet161": Recipe(models.densenet161),
    "densenet169": Recipe(models.densenet169),
    "densenet201": Recipe(models.densenet201),
    "densenet264": Recipe(models.densenet264),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run's weights; :meth:`of` fills in the model's defaults.

    ``batch_size`` is that of each device; images are ``image_size`` pixels high and wide;
    ``train_size`` is the number of training images used, ``None`` for all; ``depth`` and
    ``growth_rate`` belong to ``cifar-bc`` alone; ``budget`` is the most bytes that a training step
    may take, ``None`` for no limit; ``mix`` has the modes, by path, of those modules of
    the network whose mode is not ``recompute``; with ``graphs`` the passes in training are replayed
    from CUDA graphs.

    Raises:
        ConfigError: if an option is out of its range.
    """

    model: str
    image_size: int
    batch_size: int
    epochs: int
    lr: float
    depth: int | None = None
    growth_rate: int | None = None
    recompute: Recompute = "bottleneck"
    drop_rate: float = 0.0
    train_size: int | None = None
    seed: int = 0
    precision: str = "32-true"
    devices: int = 1
    num_nodes: int = 1
    budget: int | None = None
    mix: dict[str, Recompute] = field(default_factory=dict)
    graphs: bool = False

    @classmethod
    def of(cls, model: str, **options: Any) -> TrainConfig:
        """The configuration of ``model`` with its own default where an option is ``None``."""
        check_choice("model", model, RECIPES)
        recipe = RECIPES[model]
        defaults = {name: getattr(recipe, name) for name in RECIPE_OPTIONS}
        if model == "cifar-bc":
            defaults |= {"depth": 100, "growth_rate": 12}
        given = {name: value for name, value in options.items() if value is not None}
        return cls(model, **(defaults | given))

    def __post_init__(self) -> None:
        check_network(self.model, self.depth, self.growth_rate, self.image_size)
        check_choice("recompute", self.recompute, MODES)
        check_choice("precision", self.precision, PRECISIONS)
        check_at_least("batch_size", self.batch_size, SMALLEST_BATCH)
        for name in ("epochs", "train_size", "devices", "num_nodes"):
            check_at_least(name, getattr(self, name), 1)
        if self.budget is not None and self.devices * self.num_nodes > 1:
            raise ConfigError(
                "budget", f"is for one device, got {self.devices} on each of {self.num_nodes} nodes"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be at least 0 and below 2**32, got {self.seed!r}")
        if not 0.0 <= self.drop_rate < 1.0:
            raise ConfigError("drop_rate", f"must be at least 0 and below 1, got {self.drop_rate}")
        if not 0.0 < self.lr < math.inf:
            raise ConfigError("lr", f"must be a positive number, got {self.lr!r}")

    def build_model(self) -> models.DenseNet:
        """The 1-channel, 10-class network.

        Raises:
            ConfigError: if no such network has this depth.
        """
        network = build_network(
            self.model,
            self.depth,
            self.growth_rate,
            in_channels=1,
            num_classes=10,
            drop_rate=self.drop_rate,
            recompute=self.recompute,
        )
        set_modes(network, self.mix)
        return network


def build_network(
    model: str, depth: int | None, growth_rate: int | None, **options: Any
) -> models.DenseNet:
    """The network of that name; ``depth`` and ``growth_rate`` are for ``cifar-bc`` alone.

    Raises:
        ConfigError: if no such network has this depth.
    """
    if model == "cifar-bc":
        options |= {"depth": depth, "growth_rate": growth_rate}
    try:
        return RECIPES[model].build(**options)
    except ValueError as error:
        raise ConfigError("model", f"{model}: {error}") from error


def check_network(model: str, depth: int | None, growth_rate: int | None, image_size: int) -> None:
    """Raise :class:`ConfigError` unless there is such a network for images of that size."""
    check_choice("model", model, RECIPES)
    for name, value in (("depth", depth), ("growth_rate", growth_rate)):
        if model != "cifar-bc" and value is not None:
            raise ConfigError(name, f"belongs to model 'cifar-bc', got {value} for {model!r}")
    check_at_least("growth_rate", growth_rate, 1)
    check_at_least("image_size", image_size, RECIPES[model].min_size)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(name, f"must be one of {', '.join(choices)}, got {value!r}")


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Raise :class:`ConfigError` if ``value`` is below ``least``."""
    if value is not None and value < least:
        raise ConfigError(name, f"must be at least {least}, got {value!r}")


def check_budget(budget: int | str | None) -> int:
    """Bytes of a budget such as ``8GiB``; for ``None`` the free memory of the current GPU.

    Raises:
        ConfigError: if it is not a size, or there is no GPU.
    """
    try:
        return available_bytes(budget)
    except ValueError as error:
        raise ConfigError("budget", str(error)) from error
