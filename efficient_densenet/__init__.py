"""DenseNets trained in O(kL) memory: only the features themselves are kept."""

from efficient_densenet.convert import convert_, explain, revert_
from efficient_densenet.fit.fitting import fit_
from efficient_densenet.memory.plan import largest_batch
from efficient_densenet.memory.step import estimate, measure, meter
from efficient_densenet.models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
    fashion_densenet,
)
from efficient_densenet.modules.block import EfficientDenseBlock
from efficient_densenet.modules.connections import recompute_connection
from efficient_densenet.modules.own_layers import recompute_dense_block
from efficient_densenet.training.plan import plan

__version__ = "0.1.0"

__all__ = [
    "DenseNet",
    "EfficientDenseBlock",
    "convert_",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "estimate",
    "explain",
    "fashion_densenet",
    "fit_",
    "largest_batch",
    "measure",
    "meter",
    "plan",
    "recompute_connection",
    "recompute_dense_block",
    "revert_",
]
