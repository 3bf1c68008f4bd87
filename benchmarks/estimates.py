"""Estimated peaks beside measured ones, and the edge of a budget: steps of any model on this CPU.

    python -m benchmarks.estimates    # into docs/results/estimates.json; some minutes

Twenty-four training steps: networks of our own and converted ones of other libraries, in one to
three dimensions, in float32 and bfloat16 autocast, with several optimizers. For four of them the
largest batch within a budget is then run, held to the budget by the meter, and one more sample,
which must run out of it. Exit status 1 if an estimate is out of its bounds or an edge not the real
one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.planned_peaks import BOUNDS
from benchmarks.provenance import Json, publish
from efficient_densenet import (
    DenseNet,
    convert_,
    densenet121,
    densenet_cifar,
    estimate,
    fashion_densenet,
    largest_batch,
    measure,
)

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
OPTIMIZERS = {
    "SGD": SGD,
    "AdamW": torch.optim.AdamW,
    "Adam, foreach": partial(torch.optim.Adam, foreach=True),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": torch.optim.RMSprop,
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CLASSES = 10


class Step(NamedTuple):
    """A training step: cross-entropy of a model's output.

    Attributes:
        name: of the model.
        make: the model, given the mode of what recomputes in it.
        mode: ``"library"`` for one of another library as it is.
        shape: of the images.
        optimizer: a name of :data:`OPTIMIZERS`.
        autocast: whether in bfloat16.
        last: whether with the channels last in memory.
    """

    name: str
    make: Callable[[str], nn.Module]
    mode: str
    shape: tuple[int, ...]
    optimizer: str = "SGD"
    autocast: bool = False
    last: bool = False

    def build(self) -> nn.Module:
        model = self.make(self.mode)
        if self.last:
            model = model.to(memory_format=LAST[len(self.shape)])
        return model

    @property
    def images(self) -> torch.Tensor:
        images = torch.randn(self.shape)
        return images.contiguous(memory_format=LAST[images.dim()]) if self.last else images

    @property
    def options(self) -> dict[str, object]:
        """Other arguments of the instruments."""
        return {
            "target": torch.arange(self.shape[0]) % CLASSES,
            "make_optimizer": OPTIMIZERS[self.optimizer],
            "autocast_dtype": torch.bfloat16 if self.autocast else None,
        }

    @property
    def description(self) -> Json:
        """All but what makes the model."""
        return {name: value for name, value in self._asdict().items() if name != "make"}


def own(
    build: Callable[..., nn.Module], *args: object, **options: object
) -> Callable[[str], nn.Module]:
    return lambda mode: build(*args, recompute=mode, num_classes=CLASSES, **options)


def other(module: str, name: str, *args: object, **options: object) -> Callable[[str], nn.Module]:
    """A model of another library, converted."""

    def make(mode: str) -> nn.Module:
        model = getattr(import_module(module), name)(*args, **options)
        if mode != "library":
            convert_(model, recompute=mode, strict=True)
        return model

    return make


BC100 = own(densenet_cifar, 100, 12)
D121 = own(densenet121)
FASHION = own(fashion_densenet)
VOLUME = own(DenseNet, 12, (4, 6, 4), 16, 4, in_channels=1, dims=3)
SIGNAL = own(DenseNet, 12, (4, 6, 4), 16, 4, in_channels=2, dims=1)
VISION = other("torchvision.models", "densenet121", num_classes=CLASSES)
FLAG = other("torchvision.models", "densenet121", memory_efficient=True, num_classes=CLASSES)
TIMM = other("timm", "create_model", "densenet121", num_classes=CLASSES)
XRAY = other("torchxrayvision.models", "DenseNet", num_classes=CLASSES, in_channels=1)
CV = other("pytorchcv.model_provider", "get_model", "densenet40_k12_bc_cifar10")
MONAI = other("monai.networks.nets", "DenseNet", 3, 1, CLASSES, 32, 16, (4, 8, 8))

STEPS = (
    Step("DenseNet-BC-100, k=12", BC100, "none", (4, 3, 32, 32), "AdamW", autocast=True),
    Step("DenseNet-BC-100, k=12", BC100, "norm", (8, 3, 32, 32), autocast=True),
    Step("DenseNet-BC-100, k=12", BC100, "bottleneck", (8, 3, 32, 32), "AdamW"),
    Step("DenseNet-BC-100, k=12", BC100, "bottleneck", (8, 3, 32, 32), autocast=True, last=True),
    Step("DenseNet-121", D121, "none", (2, 3, 96, 96), "Adam, foreach"),
    Step("DenseNet-121", D121, "norm", (4, 3, 96, 96), "AdamW", last=True),
    Step("DenseNet-121", D121, "bottleneck", (4, 3, 96, 96), autocast=True),
    Step("DenseNet-121", D121, "bottleneck", (2, 3, 96, 96), "Adafactor"),
    Step("fashion", FASHION, "bottleneck", (8, 1, 96, 96), "RMSprop"),
    Step("fashion", FASHION, "norm", (8, 1, 96, 96), "AdamW", autocast=True),
    Step("DenseNet in 3-D", VOLUME, "none", (2, 1, 32, 32, 32), "AdamW"),
    Step("DenseNet in 3-D", VOLUME, "bottleneck", (4, 1, 32, 32, 32), "AdamW", autocast=True),
    Step("DenseNet in 1-D", SIGNAL, "bottleneck", (16, 2, 2048), "AdamW"),
    Step("torchvision", VISION, "library", (2, 3, 96, 96), autocast=True),
    Step("torchvision, its flag", FLAG, "library", (2, 3, 96, 96), "AdamW"),
    Step("torchvision", VISION, "bottleneck", (4, 3, 96, 96), "AdamW"),
    Step("timm", TIMM, "library", (2, 3, 96, 96), "AdamW", autocast=True, last=True),
    Step("timm", TIMM, "bottleneck", (4, 3, 96, 96), "AdamW", autocast=True, last=True),
    Step("torchxrayvision", XRAY, "norm", (2, 1, 96, 96), "AdamW"),
    Step("pytorchcv, BC-40", CV, "bottleneck", (8, 3, 32, 32), autocast=True),
    Step("MONAI in 3-D", MONAI, "library", (2, 1, 32, 32, 32), "AdamW"),
    Step("MONAI in 3-D", MONAI, "norm", (4, 1, 32, 32, 32), "AdamW", last=True),
    Step("MONAI in 3-D", MONAI, "bottleneck", (4, 1, 32, 32, 32), "AdamW"),
    Step("MONAI in 3-D", MONAI, "bottleneck", (4, 1, 32, 32, 32), "AdamW", autocast=True),
)
"""A library's network is its DenseNet-121 unless its name says more; MONAI's has 4, 8, 8 layers."""

EDGES = ((STEPS[2], "48MiB"), (STEPS[15], "160MiB"), (STEPS[17], "160MiB"), (STEPS[23], "64MiB"))
"""Steps whose largest batch in a budget is run."""


def compare(step: Step) -> Json:
    """The measured and the estimated peak of a step, in bytes."""
    model, images = step.build(), step.images
    measured = measure(model, images, **step.options).peak.total
    estimated = estimate(model, images, device="cpu", **step.options).peak.total
    return {**step.description, "measured": measured, "estimated": estimated}


def edge(step: Step, budget: str) -> Json:
    """The largest batch within a budget, and what real steps on both its sides took."""
    fit = largest_batch(
        step.build(), step.images, budget, device="cpu", verify=True, **step.options
    )
    assert fit.next is not None
    return {
        **step.description,
        "budget": fit.room,
        "largest": fit.largest,
        "estimated": fit.peak,
        "peak": fit.tried[fit.largest],
        "next": fit.next,
        "next_estimated": fit.next_peak,
        "next_peak": fit.tried[fit.next],
    }


def main() -> int:
    low, high = BOUNDS
    found, edges = [], []
    right = True
    for step in STEPS:
        found.append(compare(step))
        ratio = found[-1]["estimated"] / found[-1]["measured"]
        print(f"{step.name}, {step.mode}: {ratio:.4f}", flush=True)
        right &= low <= ratio <= high
    for step, budget in EDGES:
        edges.append(edge(step, budget))
        print(edges[-1], flush=True)
        right &= edges[-1]["peak"] is not None and edges[-1]["next_peak"] is None
    publish("estimates", {"steps": found, "edges": edges})
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
