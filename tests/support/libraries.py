"""Small networks of other libraries, by their own constructors, and blocks that no library has.

Every entry of :data:`NETWORKS` makes a network and says what image it reads. A network whose
library is not installed is skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torchvision
from torch import nn

from efficient_densenet.modules.block import RecomputingBlock


def torchreid_densenet() -> ModuleType:
    """torchreid's module of DenseNets alone: the package imports what it does not require."""
    name = "torchreid.reid.models.densenet"
    if name not in sys.modules:
        try:
            files = importlib.metadata.files("torchreid") or ()
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("torchreid is not installed")
        path = next(file for file in files if str(file).endswith("reid/models/densenet.py"))
        spec = importlib.util.spec_from_file_location(name, path.locate())
        module = importlib.util.module_from_spec(spec)
        for parent in ("torchreid", "torchreid.reid", "torchreid.reid.models"):
            sys.modules[parent] = ModuleType(parent)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class TiramisuLayer(nn.Sequential):
    """Basic layer of a fully-convolutional DenseNet: with bias, and dropout of whole maps."""

    def __init__(self, channels, growth_rate, drop_rate=0.0):
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(channels, growth_rate, kernel_size=3, padding=1))
        self.add_module("drop", nn.Dropout2d(drop_rate))

    def forward(self, x):
        return super().forward(x)


class TiramisuBlock(nn.Module):
    """Dense block that with ``upsample`` returns the new maps only."""

    def __init__(self, channels, growth_rate, num_layers, upsample=False, drop_rate=0.0):
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList(
            TiramisuLayer(channels + i * growth_rate, growth_rate, drop_rate)
            for i in range(num_layers)
        )

    def forward(self, x):
        new = []
        for layer in self.layers:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return torch.cat(new, 1) if self.upsample else x


class Tiramisu(nn.Module):
    """A fully-convolutional DenseNet of one step down and one up."""

    def __init__(self, growth_rate=4, num_layers=3):
        super().__init__()
        self.first = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.down = TiramisuBlock(8, growth_rate, num_layers)
        skip = 8 + growth_rate * num_layers
        self.pool = nn.MaxPool2d(2)
        self.middle = TiramisuBlock(skip, growth_rate, num_layers, upsample=True)
        new = growth_rate * num_layers
        self.up = nn.ConvTranspose2d(new, new, kernel_size=2, stride=2)
        self.last = TiramisuBlock(new + skip, growth_rate, num_layers)
        self.classify = nn.Conv2d(new + skip + new, 5, kernel_size=1)

    def forward(self, x):
        skip = self.down(self.first(x))
        x = self.up(self.middle(self.pool(skip)))
        return self.classify(self.last(torch.cat([x, skip], 1)))


@dataclass(frozen=True)
class Network:
    """A network: whose it is, how it is made, the shape of an image, and how many blocks it has."""

    library: str
    make: Callable[[], nn.Module]
    image: tuple[int, ...]
    blocks: int = 2


def _torchvision(**options):
    return torchvision.models.DenseNet(6, (2, 3), 8, 2, num_classes=5, **options)


def _timm(**options):
    timm = pytest.importorskip("timm.models.densenet")
    return timm.DenseNet(6, (2, 3), 5, bn_size=2, **options)


def _timm_aa(**options):
    layers = pytest.importorskip("timm.layers")
    return _timm(aa_layer=layers.BlurPool2d, **options)


def _monai(dims, **options):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.DenseNet(dims, 1, 5, 8, 6, (2, 3), 2, **options)


def _torchxrayvision(**options):
    models = pytest.importorskip("torchxrayvision").models
    return models.DenseNet(6, (2, 3), 8, 2, num_classes=18, **options)


def _torchreid(**options):
    return torchreid_densenet().DenseNet(5, "softmax", 6, (2, 3), 8, 2, **options)


class AllFeatures(nn.Module):
    """An encoder whose features, the image left out, are one tensor."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return torch.cat([map.flatten(1) for map in self.encoder(x)[1:]], 1)


def _segmentation_encoder():
    name = "segmentation_models_pytorch.encoders.densenet"
    encoder = pytest.importorskip(name).DenseNetEncoder
    options = {"growth_rate": 6, "block_config": (2, 3, 2, 2), "num_init_features": 8}
    return AllFeatures(encoder([3, 8, 20, 28, 26, 25], bn_size=2, **options))


def _pytorchcv(**options):
    densenet = pytest.importorskip("pytorchcv.models.densenet")
    return densenet.DenseNet([[16, 22, 28], [20, 26]], 8, num_classes=5, **options)


def _pytorchcv_cifar(bottleneck):
    cifar = pytest.importorskip("pytorchcv.models.densenet_cifar")
    return cifar.CIFARDenseNet([[14, 20], [16, 22]], 8, bottleneck, num_classes=5)


NETWORKS = {
    "torchvision": Network("torchvision", _torchvision, (3, 3, 36, 32)),
    "torchvision-one-layer-blocks": Network(
        "torchvision", lambda: torchvision.models.DenseNet(4, (1, 1, 1), 6, 3), (3, 3, 40, 33), 3
    ),
    "timm": Network("timm", _timm, (3, 3, 36, 32)),
    "timm-deep-stem": Network("timm", lambda: _timm(stem_type="deep"), (3, 3, 36, 32)),
    "timm-blur-pool": Network("timm", _timm_aa, (3, 3, 36, 32)),
    "monai-1d": Network("MONAI", lambda: _monai(1), (3, 1, 67)),
    "monai-2d": Network("MONAI", lambda: _monai(2), (3, 1, 36, 32)),
    "monai-3d": Network("MONAI", lambda: _monai(3), (2, 1, 20, 17, 16)),
    "torchxrayvision": Network("torchxrayvision", _torchxrayvision, (3, 1, 36, 32)),
    "torchreid": Network("torchreid", _torchreid, (3, 3, 36, 32)),
    "segmentation-encoder": Network(
        "segmentation_models_pytorch", _segmentation_encoder, (3, 3, 64, 64), 4
    ),
    "tiramisu": Network("Tiramisu-style", Tiramisu, (3, 3, 18, 16), 3),
    "pytorchcv": Network("pytorchcv", _pytorchcv, (3, 3, 56, 56)),
    "pytorchcv-cifar-bottleneck": Network(
        "pytorchcv", lambda: _pytorchcv_cifar(True), (3, 3, 16, 16)
    ),
    "pytorchcv-cifar-basic": Network("pytorchcv", lambda: _pytorchcv_cifar(False), (3, 3, 16, 16)),
}


def small() -> nn.Module:
    """A small network of torchvision's."""
    return torchvision.models.DenseNet(6, (2, 3), 8, 2, num_classes=5).double()


def blocks(model: nn.Module) -> list[RecomputingBlock]:
    return [m for m in model.modules() if isinstance(m, RecomputingBlock)]
