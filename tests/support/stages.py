"""Stems, transitions and stages, each beside the naive one."""

import copy
from collections import OrderedDict

import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock
from efficient_densenet.modules.naive import CONVS, MAX_POOLS, NORMS, DenseBlock, Transition
from efficient_densenet.modules.sequence import EfficientSequential, EfficientTransition
from support.compare import norms, randomise_


def no_change(module):
    pass


def pair(efficient, naive, change=no_change, dtype=torch.float64):
    """Both modules with ``change`` applied, equal in every parameter and buffer."""
    for module in (efficient.to(dtype), naive.to(dtype)):
        change(module)
    for norm in norms(naive):
        if norm.running_mean is not None:
            randomise_(norm)
    efficient.load_state_dict(naive.state_dict())
    return efficient, naive


def stem_modules(dims=2, bias=False, pool=None, channels=5):
    return OrderedDict(
        conv0=CONVS[dims](channels, 6, kernel_size=3, stride=2, padding=1, bias=bias),
        norm0=NORMS[dims](6),
        relu0=nn.ReLU(inplace=True),
        pool0=pool or MAX_POOLS[dims](kernel_size=3, stride=2, padding=1),
    )


def transitions(dims=2, bias=False, **options):
    arguments = {"dims": dims, "bias": bias}
    return pair(EfficientTransition(5, 3, **arguments), Transition(5, 3, **arguments), **options)


def stems(dims=2, bias=False, pool=None, **options):
    modules = stem_modules(dims, bias, pool)
    return pair(EfficientSequential(modules), nn.Sequential(copy.deepcopy(modules)), **options)


def stages(recompute, bn_size, dims=2, **options):
    """Two blocks around a transition, and one after the last."""

    def modules(block, transition, **mode):
        return OrderedDict(
            denseblock1=block(2, 5, bn_size, 3, dims=dims, **mode),
            transition1=transition(11, 4, dims=dims),
            denseblock2=block(2, 4, bn_size, 3, dims=dims, **mode),
            transition2=transition(10, 5, dims=dims),
        )

    efficient = modules(EfficientDenseBlock, EfficientTransition, recompute=recompute)
    naive = modules(DenseBlock, Transition)
    return pair(EfficientSequential(efficient), nn.Sequential(naive), **options)


def big(dims):
    """A random image large enough to be halved twice."""
    return torch.randn(3, 5, *(17, 14, 11)[:dims], dtype=torch.float64)
