"""Maps with one reader through the Triton kernels: what waits, what is left, what is joined."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from efficient_densenet import DenseNet, recompute_dense_block
from efficient_densenet.functional import forward, gradients, stem
from efficient_densenet.kernels import workspace
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.modules import calls
from support.compare import assert_all_close, assert_same_training, randomise_, training_results
from support.marks import either_mode

GROWTH = 3
# The kernel sizes of a layer's convolutions, and the width of the maps between them.
LAYERS = {
    "1-3": [((1, 3), 5), ((1, 3), 8)],
    "1-3-3": [((1, 3, 3), 5)],
    "1-1-3": [((1, 1, 3), 5)],
    "3-1": [((3, 1), 5)],
    "3-1-3": [((3, 1, 3), 5)],
    "waits-and-not": [((1, 3), 5), ((3, 1), 5), ((1, 3), 4), ((3, 1), 4)],
}


class Block(nn.Module):
    """Dense layers of any units; naive, or by ``recompute_dense_block``."""

    def __init__(self, layers: list[tuple[tuple[int, ...], int]], recomputes: bool) -> None:
        super().__init__()
        self.layers, self.recomputes = nn.ModuleList(), recomputes
        for i, (sizes, width) in enumerate(layers):
            channels = [4 + i * GROWTH, *[width] * (len(sizes) - 1), GROWTH]
            units: list[nn.Module] = []
            for size, (reads, leaves) in zip(sizes, pairwise(channels), strict=True):
                conv = nn.Conv2d(reads, leaves, size, padding=size // 2, bias=False)
                units += [nn.BatchNorm2d(reads), nn.ReLU(), conv]
            self.layers.append(nn.Sequential(*units))

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes:
            return recompute_dense_block(self.layers, x, GROWTH)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@pytest.mark.parametrize("slabs", ["one", "several"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_layer_of_any_units_matches_naive_one(layers, slabs, monkeypatch, recwarn):
    if slabs == "several":
        for size in ("WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
            monkeypatch.setattr(workspace, size, 2 << 10)
    ours, naive = (Block(layers, recomputes) for recomputes in (True, False))
    randomise_(naive)
    ours.load_state_dict(naive.state_dict())
    assert_same_training(ours, naive, torch.randn(5, 4, 7, 6), rtol=2e-4)
    assert not recwarn.list


@either_mode
def test_sums_of_all_processes_are_joined(recompute, monkeypatch):
    """Here by what changes them, whoever computes."""

    def other_statistics(statistics, x, group):
        return Statistics(statistics.mean + 0.1, statistics.var * 1.3)

    def other_means(means, count, group):
        return [mean * 0.5 for mean in means]

    monkeypatch.setattr(calls, "group_of", lambda norm: "all" if norm.training else None)
    monkeypatch.setattr(calls, "joined_count", lambda count, *_: 2 * count)
    for module in (forward, stem):
        monkeypatch.setattr(module, "joined_statistics", other_statistics)
    for module in (gradients, stem):
        monkeypatch.setattr(module, "joined_means", other_means)
    ours, eager = (
        DenseNet(3, (2, 2), 6, 2, num_classes=3, recompute=recompute, kernels=kernels)
        for kernels in ("triton", "eager")
    )
    randomise_(ours)
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(3, 3, 32, 32)
    results = [training_results(model, x.clone().requires_grad_()) for model in (ours, eager)]
    assert_all_close(*results, 1e-3)
