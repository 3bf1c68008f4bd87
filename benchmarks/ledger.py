"""The memory ledger of a whole network, part by part, against what a step really keeps.

    python -m benchmarks.ledger    # DenseNet-121 at 224x224, into docs/results/ledger.json

The formulas are those of docs/derivation.md, in values per image; ``live`` are the values in live
storages after the forward pass of a step on shapes alone (``estimate``).
"""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from benchmarks.provenance import publish
from efficient_densenet import DenseNet, densenet121
from efficient_densenet.memory.step import estimate

SCHEMES = ("naive", "torchvision's flag", "norm", "bottleneck")
ITEMSIZE, BATCH, SIZE = 4, 8, 224


def kept_values(model: DenseNet, size: int) -> dict[str, tuple[int, ...]]:
    """Values kept per image by each part of ``model``, in the order of :data:`SCHEMES`.

    A block's output counts as the block's. A network with the CIFAR stem keeps nothing in it.
    """
    rows: dict[str, tuple[int, ...]] = {}
    children = dict(model.features.named_children())
    if "pool0" in children:
        width, size = children["conv0"].out_channels, size // 2
        rows["stem"] = (_stem(width, size),) * 2 + (0, 0)
        size //= 2
    for name, module in children.items():
        positions = size * size
        if name.startswith("denseblock"):
            rows[name] = tuple(positions * channels for channels in _block(module))
        elif name.startswith("transition"):
            read, left = module.conv.in_channels, module.conv.out_channels
            rows[name] = (positions * (read + left),) * 2 + (0, 0)
            size //= 2
        elif name == "norm5":
            rows["head"] = (positions * module.num_features,) * 2 + (0, 0)
    return rows


def _stem(width: int, size: int) -> int:
    # The convolution's map, the rectified one, and the pooling's indices, which are 64 bits wide.
    return 2 * width * size**2 + 2 * width * (size // 2) ** 2


def _block(block: nn.Module) -> tuple[int, ...]:
    layers = list(block.values())
    read = [layer.norm1.num_features for layer in layers]
    width, growth = layers[0].conv1.out_channels, layers[0].conv2.out_channels
    out = read[-1] + growth
    naive = sum(2 * channels + 2 * width for channels in read) + out
    # The block's input, what each layer hands its checkpoint, and the output.
    flag = read[0] + len(layers) * 2 * width + (len(layers) - 1) * growth + out
    return naive, flag, out + len(layers) * width, out


def live_values(size: int, batch: int = BATCH) -> tuple[float, ...]:
    """Values per image that are alive after the forward pass of DenseNet-121, by scheme."""
    models = (
        torchvision.models.densenet121(),
        torchvision.models.densenet121(memory_efficient=True),
        densenet121(recompute="norm"),
        densenet121(recompute="bottleneck"),
    )
    shape = (batch, 3, size, size)
    return tuple(
        estimate(model, shape, target=(batch,)).kept / ITEMSIZE / batch for model in models
    )


def main() -> None:
    with torch.device("meta"):
        parts = kept_values(densenet121(), SIZE)
    live = live_values(SIZE)
    publish(
        "ledger", {"schemes": SCHEMES, "batch": BATCH, "size": SIZE, "parts": parts, "live": live}
    )


if __name__ == "__main__":
    main()
