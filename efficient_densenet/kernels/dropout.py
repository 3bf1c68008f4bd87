"""Dropout by PyTorch's own operators: masks that a seed decides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_densenet.kernels.layout import device_of, empty_map, is_hollow


def drop(
    y: Tensor, seed: Tensor, rate: float, whole_maps: bool, memory_format: torch.memory_format
) -> None:
    if device_of(y).type == "cpu":
        y.mul_(_drawn_on_cpu(y, seed, rate, whole_maps, memory_format))
        return
    numbers = random_numbers(seed, y.shape[:2] if whole_maps else y.shape)
    kept = (numbers >= round(rate * 2**31)).to(y.dtype)
    kept = kept.mul_(1 / (1 - rate)) if rate < 1 else kept.zero_()
    y.mul_(kept.view(*kept.shape, *(1,) * (y.dim() - kept.dim())))


def _drawn_on_cpu(
    y: Tensor, seed: Tensor, rate: float, whole_maps: bool, memory_format: torch.memory_format
) -> Tensor:
    """The mask by a ``torch.Generator`` whose seed is read here: on a CPU faster than counting."""
    if whole_maps:
        mask = y.new_empty((*y.shape[:2], *(1,) * (y.dim() - 2)))
    else:
        mask = empty_map(y, y.shape[1], memory_format)
    if rate == 1.0:
        return mask.zero_()
    generator = None if is_hollow(y) else torch.Generator().manual_seed(int(seed))
    return mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)


def random_numbers(seed: Tensor, shape: torch.Size) -> Tensor:
    """Numbers from 0 to 2³¹ - 1 that a seed and a place in ``shape`` decide, int32.

    The seed may be on any device, and is not read by the host. Mixed are: a half of it with the
    sample's number; the place within the sample; both together; the other half with that. Source
    of the mixing: the last step of MurmurHash3 (Appleby).
    """
    first, second = (_mixed(half.to(torch.int32)) for half in (seed & 0xFFFFFFFF, seed >> 32))
    samples, places = (
        torch.arange(size, dtype=torch.int32, device=seed.device)
        for size in (shape[0], math.prod(shape[1:]))
    )
    keys = _mixed(samples.add_(first))[:, None]
    numbers = _mixed(keys ^ _mixed(places))
    numbers = _mixed(numbers.bitwise_xor_(second))
    return numbers.bitwise_and_(0x7FFFFFFF).view(shape)


def _mixed(numbers: Tensor) -> Tensor:
    """Every bit of an int32 number made to depend on all, in place; products wrap around."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        unsigned = (numbers >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        numbers.bitwise_xor_(unsigned).mul_(factor)
    return numbers
