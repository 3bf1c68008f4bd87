"""What a training run is: its options, their defaults for each model, and the network they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from efficient_densenet import models
from efficient_densenet.block import Recompute


class ConfigError(ValueError):
    """A run was asked for that cannot be; the one-line message quotes the option and says why."""


RECOMPUTE = ("bottleneck", "norm", "none")
RECIPE_OPTIONS = ("resize", "batch_size", "epochs", "lr")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


class Recipe(NamedTuple):
    """Defaults of a model, and the smallest image it can halve often enough."""

    build: Callable[..., models.DenseNet]
    resize: int = 32
    batch_size: int = 64
    epochs: int = 40
    lr: float = 0.1
    min_size: int = 29


RECIPES = {
    "fashion": Recipe(models.fashion_densenet, resize=96, batch_size=256, epochs=10),
    "cifar-bc": Recipe(models.densenet_cifar, min_size=4),
    "densenet121": Recipe(models.densenet121),
    "densenet161": Recipe(models.densenet161),
    "densenet169": Recipe(models.densenet169),
    "densenet201": Recipe(models.densenet201),
    "densenet264": Recipe(models.densenet264),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's weights; :meth:`of` fills in the model's defaults.

    ``batch_size`` is each device's; images are ``resize`` pixels high and wide; ``train_size`` is
    the number of training images used, ``None`` for all; ``depth`` and ``growth_rate`` belong to
    ``cifar-bc`` alone.

    Raises:
        ConfigError: if an option is out of its range; the message spells the option as the command
            line does.
    """

    model: str
    resize: int
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

    @classmethod
    def of(cls, model: str, **options: Any) -> TrainConfig:
        """The configuration of ``model`` with its own default where an option is ``None``."""
        _check_choice("model", model, tuple(RECIPES))
        recipe = RECIPES[model]
        defaults = {name: getattr(recipe, name) for name in RECIPE_OPTIONS}
        if model == "cifar-bc":
            defaults |= {"depth": 100, "growth_rate": 12}
        given = {name: value for name, value in options.items() if value is not None}
        return cls(model, **(defaults | given))

    def __post_init__(self) -> None:
        _check_choice("model", self.model, tuple(RECIPES))
        _check_choice("recompute", self.recompute, RECOMPUTE)
        _check_choice("precision", self.precision, PRECISIONS)
        if self.model != "cifar-bc" and (self.depth, self.growth_rate) != (None, None):
            raise ConfigError(
                f"--depth and --growth-rate belong to --model cifar-bc, got --model {self.model!r}"
            )
        # A batch of one has no batch statistics where a map has shrunk to one pixel.
        _check_at_least("batch_size", self.batch_size, 2)
        _check_at_least("resize", self.resize, RECIPES[self.model].min_size)
        for name in ("epochs", "train_size", "growth_rate", "devices", "num_nodes"):
            _check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be at least 0 and below 2**32, got {self.seed!r}")
        if not 0.0 <= self.drop_rate < 1.0:
            raise ConfigError(f"--drop-rate must be at least 0 and below 1, got {self.drop_rate!r}")
        if not 0.0 < self.lr < math.inf:
            raise ConfigError(f"--lr must be a positive number, got {self.lr!r}")

    def build_model(self, recompute: Recompute | None = None) -> models.DenseNet:
        """The 1-channel, 10-class network, with another ``recompute`` if one is given.

        Raises:
            ConfigError: if no such network has this depth.
        """
        options: dict[str, Any] = {
            "in_channels": 1,
            "num_classes": 10,
            "drop_rate": self.drop_rate,
            "recompute": recompute or self.recompute,
        }
        if self.model == "cifar-bc":
            options |= {"depth": self.depth, "growth_rate": self.growth_rate}
        try:
            return RECIPES[self.model].build(**options)
        except ValueError as error:
            raise ConfigError(f"--model {self.model}: {error}") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{_option(name)} must be one of {', '.join(choices)}, got {value!r}")


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{_option(name)} must be at least {least}, got {value!r}")
