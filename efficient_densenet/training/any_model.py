"""What is planned for: any model that a function makes, naive and converted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from efficient_densenet.convert import convert_
from efficient_densenet.fit.groups import modes_of, set_modes
from efficient_densenet.functional.modes import MODES
from efficient_densenet.memory.plan import Fit, largest_batch
from efficient_densenet.training.config import (
    AUTOCAST,
    SMALLEST_BATCH,
    ConfigError,
    make_optimizer,
)

MODEL_MODES = {mode.label: mode for mode in MODES.values()}
"""What is planned for, by what tables call it."""


@dataclass(frozen=True)
class ModelWork:
    """A training step of a model that is not ours, from random gradients of its output.

    Attributes:
        model: ``package.module:function``; the function takes no argument.
        shape: of one image, its channels first.
        precision: as in training.
    """

    model: str
    shape: tuple[int, ...]
    precision: str = "32-true"

    def subject(self, by_depth: bool = False) -> str:
        """What is trained, in one line."""
        return f"{self.model}, {'x'.join(map(str, self.shape))}, precision {self.precision}"

    def build(self, mode: str) -> nn.Module:
        """The model without weights: as it is, or converted.

        Raises:
            ConfigError: if there is no such function, or it makes no model.
        """
        make = self._function()
        with torch.device("meta"):
            model = make()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                "model", f"{self.model!r} makes no model, but a {type(model).__name__}"
            )
        name = MODEL_MODES[mode].name
        if name != "none":
            convert_(model)
        set_modes(model, dict.fromkeys(modes_of(model), name))
        return model.double() if self.precision == "64-true" else model

    def largest_batch(self, mode: str, budget: int, device: str) -> Fit:
        """The largest batch whose step fits. Errors as above, and those of the model itself."""
        try:
            return largest_batch(
                self.build(mode),
                (None, *self.shape),
                budget,
                make_optimizer=lambda parameters: make_optimizer(parameters, lr=0.1),
                autocast_dtype=AUTOCAST.get(self.precision),
                device=device,
                sizes=range(SMALLEST_BATCH, 2**20 + 1),
            )
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            told = str(error).splitlines()[0]
            raise ConfigError(
                "shape", f"{self.shape} is not what {self.model} takes: {told}"
            ) from error

    def _function(self) -> Callable[[], object]:
        module, _, function = self.model.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            made = getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError("model", f"{self.model!r} cannot be imported: {error}") from error
        if not callable(made):
            raise ConfigError("model", f"{self.model!r} is no function, but {made!r}")
        return made


def parse_shape(shape: str | None) -> tuple[int, ...]:
    """The shape of an image, such as ``1,96,96,96``.

    Raises:
        ConfigError: if it is none.
    """
    parts = (shape or "").split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts) or len(parts) < 2:
        raise ConfigError("shape", f"must be that of one image, such as 3,224,224, got {shape!r}")
    return tuple(map(int, parts))
