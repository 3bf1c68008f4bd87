"""Dense blocks that checkpoint each layer's first convolution, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet.functional.modes import Mode
from efficient_densenet.modules.naive import BasicLayer, BottleneckLayer, DenseBlock

CHECKPOINTED = Mode(
    "none",
    "checkpointed",
    "#b08900",
    "the features, and each bottleneck map before and after its norm",
)
"""A naive network whose blocks are checkpointed: no mode of our blocks, but a competitor."""


class CheckpointedBlock(nn.Module):
    """A naive dense block that runs each layer's first convolution, and what is before, twice.

    That is torchvision's ``memory_efficient=True``, for basic layers too. Shapes as in
    :class:`~efficient_densenet.modules.naive.DenseBlock`.
    """

    def __init__(self, block: DenseBlock) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block.values())

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(_run_layer(layer, features))
        return torch.cat(features, 1)


def checkpointed_(network: nn.Module) -> nn.Module:
    """Replace the dense blocks of a naive network by checkpointed ones, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DenseBlock):
                setattr(parent, name, CheckpointedBlock(child))
    return network


def _run_layer(layer: nn.Module, features: Sequence[Tensor]) -> Tensor:
    assert isinstance(layer, (BasicLayer, BottleneckLayer))

    def first(*maps: Tensor) -> Tensor:
        return layer.conv1(layer.relu1(layer.norm1(torch.cat(maps, 1))))

    y = checkpoint(first, *features, use_reentrant=False)
    if isinstance(layer, BottleneckLayer):
        y = layer.conv2(layer.relu2(layer.norm2(y)))
    return F.dropout(y, layer.drop_rate, layer.training)
