"""Time and peak of evaluation without gradients: torchvision's network and the converted one.

python -m benchmarks.inference    # DenseNet-121, batch 8, 224², into docs/results/inference.json
"""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.models import densenet121

from benchmarks.provenance import publish
from efficient_densenet import convert_
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.memory.profiler import AllocatorRecord

BATCH, SIZE, ROUNDS = 8, 224, 9


def seconds(model: nn.Module, x: Tensor) -> float:
    """Time of one forward pass."""
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def peak(model: nn.Module, x: Tensor) -> int:
    """Most bytes that live in a forward pass, above parameters and input, by the allocator."""
    return max(live_bytes(AllocatorRecord(lambda: (model(x), None)[1], x.device).events))


@torch.no_grad()
def measured() -> dict[str, dict[str, float]]:
    """Median seconds of interleaved runs, and peak in bytes, of both networks, which agree."""
    naive = densenet121().eval()
    converted = copy.deepcopy(naive)
    convert_(converted, strict=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    torch.testing.assert_close(converted(x), naive(x), rtol=1e-4, atol=1e-4)
    models = {"torchvision": naive, "converted": converted}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(seconds(model, x))
    return {
        name: {"seconds": median(times[name]), "peak": peak(model, x)}
        for name, model in models.items()
    }


if __name__ == "__main__":
    publish("inference", {"batch": BATCH, "size": SIZE, "rounds": ROUNDS, "models": measured()})
