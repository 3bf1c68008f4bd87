"""Time and memory of blocks whose layers are of any kind, beside the naive block.

    python -m benchmarks.any_layer    # into docs/results/any_layer.json

24 bottleneck layers, c0=24, k=12, batch 8 at 32x32, changed in every layer. Training steps of both
blocks take turns; before that their gradients are compared. Ratios are ours over naive.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.provenance import publish
from efficient_densenet import EfficientDenseBlock, meter
from efficient_densenet.modules.naive import DenseBlock

SIZE, SHAPE = (24, 24, 4, 12), (8, 24, 32, 32)
WARM, STEPS = 2, 25


class SqueezeExcitation(nn.Module):
    """A convolution whose maps are scaled by what their means say."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.gate = conv, nn.Conv2d(conv.out_channels, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))


class LoRA(nn.Module):
    """A frozen convolution, and a learnt one of rank 4 beside it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        padding = conv.padding
        self.down = nn.Conv2d(conv.in_channels, 4, conv.kernel_size, 1, padding, bias=False)  # type: ignore[arg-type]
        self.up = nn.Conv2d(4, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.up(self.down(x))
        return y


def group_norm(layer: nn.Module) -> None:
    layer.norm1 = nn.GroupNorm(4, layer.norm1.num_features)  # type: ignore[union-attr, arg-type]
    layer.norm2 = nn.GroupNorm(4, layer.norm2.num_features)  # type: ignore[union-attr, arg-type]


def instance_norm(layer: nn.Module) -> None:
    layer.norm1 = nn.InstanceNorm2d(layer.norm1.num_features)  # type: ignore[union-attr, arg-type]


def squeeze(layer: nn.Module) -> None:
    assert isinstance(layer.conv2, nn.Conv2d)
    layer.conv2 = SqueezeExcitation(layer.conv2)


def weight_norm(layer: nn.Module) -> None:
    assert isinstance(layer.conv1, nn.Module)
    parametrizations.weight_norm(layer.conv1)


def lora(layer: nn.Module) -> None:
    assert isinstance(layer.conv1, nn.Conv2d)
    assert isinstance(layer.conv2, nn.Conv2d)
    layer.conv1, layer.conv2 = LoRA(layer.conv1), LoRA(layer.conv2)


def hook(layer: nn.Module) -> None:
    """One that only looks, as those that watch activations."""
    assert isinstance(layer.relu2, nn.Module)
    layer.relu2.register_forward_hook(lambda module, args, out: None)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
    "squeeze-and-excitation": squeeze,
    "weight norm": weight_norm,
    "LoRA": lora,
    "hook": hook,
}


@dataclass(frozen=True)
class Row:
    """One change: seconds of a step and bytes, of the naive block and of ours.

    ``ratio`` is the median of the ratios of neighbouring steps, ``lowest`` and ``highest`` the ends
    of their range.
    """

    change: str
    naive_seconds: float
    seconds: float
    ratio: float
    lowest: float
    highest: float
    naive_kept: int
    kept: int
    naive_peak: int
    peak: int


def main() -> int:
    rows = []
    for name, change in CHANGES.items():
        rows.append(row(name, change))
        print(rows[-1], flush=True)
    publish("any_layer", {"layers": SIZE, "shape": SHAPE, "rows": [asdict(row) for row in rows]})
    return 0


def row(name: str, change: Callable[[nn.Module], None]) -> Row:
    """A change of every layer, checked, timed and metered."""
    torch.manual_seed(0)
    naive, ours = DenseBlock(*SIZE), EfficientDenseBlock(*SIZE)
    for block in (naive, ours):
        for layer in block.values():
            change(layer)
    ours.load_state_dict(naive.state_dict())
    x = torch.randn(SHAPE)
    check(copy.deepcopy(naive).double(), copy.deepcopy(ours).double(), x[:2].double())
    times = [(step(naive, x), step(ours, x)) for _ in range(WARM + STEPS)][WARM:]
    ratios = sorted(found / expected for expected, found in times)
    reports = [meter(block, x) for block in (naive, ours)]
    return Row(
        name,
        *(median(column) for column in zip(*times, strict=True)),
        median(ratios),
        ratios[0],
        ratios[-1],
        *(report.kept for report in reports),
        *(report.peak.total for report in reports),
    )


def check(naive: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Raise unless both blocks have the same gradients."""
    assert isinstance(ours, EfficientDenseBlock)
    assert ours.why_naive(x) is None
    for block in (naive, ours):
        block(x).square().sum().backward()
    for expected, found in zip(naive.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-8)


def step(block: nn.Module, x: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    leaf = x.clone().requires_grad_()
    block.zero_grad()
    start = time.perf_counter()
    out = block(leaf)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
