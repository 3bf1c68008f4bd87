"""Callbacks of a run: one holds steps to a budget, one replays passes from CUDA graphs."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from efficient_densenet.memory.budget import enforce
from efficient_densenet.training.config import AUTOCAST, ConfigError, TrainConfig


class BudgetCallback(L.Callback):
    """Holds every training step to the budget, from its batch to its optimizer's update.

    Parameters, buffers and optimizer state count; so do the images of the batch, resized as the
    network reads them.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._step = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        # Lightning lets go of the last step's gradients after the forward pass only.
        module.zero_grad(set_to_none=True)
        state = (tensors.values() for tensors in trainer.optimizers[0].state.values())
        values = chain(module.parameters(), module.buffers(), *state)
        resident = [value for value in values if isinstance(value, Tensor)]
        self._step.enter_context(enforce(self.limit, module.device, resident))

    def on_train_batch_end(self, *args: object) -> None:
        self._step.close()

    def on_exception(self, *args: object) -> None:
        self._step.close()


def check_graphs(config: TrainConfig) -> None:
    """Raise :class:`ConfigError` if this run asks for CUDA graphs and cannot be captured."""
    reasons = (
        (not torch.cuda.is_available(), "needs a GPU, and there is none"),
        (config.devices * config.num_nodes > 1, "is for a single device"),
        (config.budget is not None, "cannot be held to --budget: a graph keeps its own memory"),
    )
    for applies, reason in reasons:
        if config.graphs and applies:
            raise ConfigError("graphs", reason)


class GraphsCallback(L.Callback):
    """Replays the network's training passes from CUDA graphs.

    Their shapes are fixed: an incomplete batch is dropped.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        images = torch.zeros(self.config.batch_size, 28, 28, device=module.device)
        capture_(module.model, module.prepared(images), AUTOCAST.get(self.config.precision))


def capture_(model: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None) -> None:
    """Let ``model`` replay its training passes, captured on batches like ``images``.

    Capturing runs the model a few times; running statistics are then restored.
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    enabled = autocast_dtype is not None
    # What autocast's cache keeps would be the weights as they are now.
    with torch.autocast("cuda", dtype=autocast_dtype, enabled=enabled, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (images,))
    model.load_state_dict(state)
