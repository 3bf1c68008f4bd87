"""Time and peak of evaluation without gradients: torchvision's network and the converted one.

python -m scripts.inference  # DenseNet-121, batch 8, 224²; writes docs/results/inference.md
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.models import densenet121

from benchmarks.provenance import provenance
from efficient_densenet import convert_
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.memory.profiler import AllocatorRecord

BATCH, SIZE, ROUNDS = 8, 224, 9
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "inference.md"
MIB = 2**20


def seconds(model: nn.Module, x: Tensor) -> float:
    """Time of one forward pass."""
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def peak(model: nn.Module, x: Tensor) -> int:
    """Most bytes that live in a forward pass, above parameters and input, by the allocator."""
    return max(live_bytes(AllocatorRecord(lambda: (model(x), None)[1], x.device).events))


@torch.no_grad()
def measured() -> dict[str, tuple[float, int]]:
    """Median time of interleaved runs, and peak, of either network, once they agree."""
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
    return {name: (median(times[name]), peak(model, x)) for name, model in models.items()}


def table(found: dict[str, tuple[float, int]]) -> str:
    """The figures, their ratios, and where they are from."""
    base = found["torchvision"]
    lines = ["| | ms | ratio | peak MiB | ratio |", "|---|---:|---:|---:|---:|"]
    for name, (took, most) in found.items():
        cells = [f"{took * 1e3:.0f}", f"{took / base[0]:.2f}"]
        cells += [f"{most / MIB:.0f}", f"{most / base[1]:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEAD = f"""# Inference

DenseNet-121 in evaluation mode without gradients, batch {BATCH}, {SIZE}², float32: torchvision's
network, and the same one after `convert_`. Medians of {ROUNDS} interleaved forward passes; bytes
above parameters and input, from the allocator. Made by `python -m scripts.inference`.
"""


if __name__ == "__main__":
    conditions = "; ".join(f"{key}: {value}" for key, value in provenance().items())
    text = f"{HEAD}\n{table(measured())}\n\n{conditions}\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(text)
