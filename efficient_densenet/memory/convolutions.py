"""Which library convolves on a CPU, and in which memory format the result lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from efficient_densenet.kernels.layout import device_of


def is_pointwise(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether a convolution reads single positions, all of them."""
    return set(weight.shape[2:]) == set(stride) == {1}


def is_by_onednn(x: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> bool:
    """Whether oneDNN convolves on a CPU, or PyTorch itself.

    Not oneDNN in 64 bits, and in 32 bits neither small ones of a single sample, nor with one thread
    1x1 convolutions of less than 16.

    Source: ``ConvParams::use_mkldnn`` in PyTorch's ``aten/src/ATen/native/Convolution.cpp``.
    """
    narrow = groups == 1 and not all(size > 3 for size in weight.shape[-2:])
    single = len(x) == 1 and x.shape[:4].numel() <= 20480 and narrow
    alone = is_pointwise(weight, stride) and torch.get_num_threads() == 1 and len(x) < 16
    return x.itemsize < 4 or (x.itemsize == 4 and not (single or alone))


def result_format(
    x: Tensor, weight: Tensor, bias: object, stride: Sequence[int], *rest: object
) -> torch.memory_format:
    """The memory format of the result of ``aten.convolution``, by its arguments.

    Channels last if map or weight are, as PyTorch reads strides: of one channel they may be either.
    PyTorch's own convolution of volumes leaves contiguous ones.

    Source: ``determine_backend_memory_format`` in the same file.
    """
    groups = rest[-1]
    assert isinstance(groups, int)
    formats = {suggest_memory_format(x), suggest_memory_format(weight)}
    by_torch = device_of(x).type == "cpu" and not is_by_onednn(x, weight, stride, groups)
    if x.dim() == 5 and by_torch:
        return torch.contiguous_format
    return max(formats, key=lambda found: found != torch.contiguous_format)
