"""Tails by PyTorch's operators, slab by slab: each slab is activated into the workspace and read.

The caller says how a slab is normalised and activated, and takes the gradient of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from efficient_densenet.kernels.aten import convolve, convolve_backward, pooled, pooled_backward
from efficient_densenet.kernels.interface import Conv, Tail
from efficient_densenet.kernels.layout import empty_map, in_dtype, rows_of
from efficient_densenet.kernels.workspace import Workspace

# Normalises and activates a slab, into its place in the workspace.
Activate = Callable[[Tensor, Tensor], Tensor]


def tail_of_slabs(
    x: Tensor,
    tail: Tail,
    workspace: Workspace,
    activate: Activate,
    stored: torch.dtype | None = None,
) -> Tensor:
    """``tail(activate(x))``; ``stored`` as in :meth:`Workspace.slabs`."""
    if tail.is_empty:
        return _activated(x, tail.dtype, workspace, activate, stored)
    out: Tensor | None = None
    for rows in workspace.distinct_slabs(x, stored):
        slab = rows_of(x, rows)
        y = apply_tail(activate(slab, workspace.scratch(slab, tail.dtype)), tail)
        if y.shape[0] == x.shape[0]:
            return y
        if out is None:
            shape = (len(x), *y.shape[1:])
            out = torch.empty(
                shape, dtype=y.dtype, device=y.device, memory_format=workspace.memory_format
            )
        out[rows] = y
        del y  # or it would live beside the next slab's
    assert out is not None
    return out


def _activated(
    x: Tensor,
    dtype: torch.dtype,
    workspace: Workspace,
    activate: Activate,
    stored: torch.dtype | None,
) -> Tensor:
    out = empty_map(x, x.shape[1], workspace.memory_format, dtype)
    for rows in workspace.distinct_slabs(x, stored):
        activate(rows_of(x, rows), rows_of(out, rows))
    return out


def backward_of_slabs(
    grad: Tensor,
    x: Tensor,
    tail: Tail,
    workspace: Workspace,
    activate: Activate,
    needs: tuple[bool, bool, bool],
    receive: Callable[[slice, Tensor, Tensor], None],
    stored: torch.dtype | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`tail_of_slabs` with respect to weight and bias, as far as needed.

    ``receive`` gets each slab's rows, its activated map, and the gradient with respect to that; it
    may overwrite both. ``stored`` as in :meth:`Workspace.slabs`. A map that is one slab may be
    ``activated`` already.
    """
    weight = bias = None
    for rows in workspace.distinct_slabs(x, stored):
        slab = rows_of(x, rows)
        y = activated
        if y is None:
            y = activate(slab, workspace.scratch(slab, tail.dtype))
        d, slab_weight, slab_bias = tail_backward(
            in_dtype(rows_of(grad, rows), tail.dtype), y, tail, needs
        )
        weight, bias = add(weight, slab_weight), add(bias, slab_bias)
        if d is not None:
            receive(rows, y, d)
        del d  # or it would live beside the next slab's
    return weight, bias


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return part if total is None or part is None else total + part


def apply_tail(a: Tensor, tail: Tail) -> Tensor:
    """``tail(a)``."""
    a = pooled(a, tail.pool) if tail.pool else a
    return convolve(a, tail.conv) if tail.conv else a


def tail_backward(
    grad: Tensor, a: Tensor, tail: Tail, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``tail(a)`` with respect to ``a``, the weight and the bias, as far as needed.

    None of them is ``grad`` itself.
    """
    if tail.is_empty:
        return (torch.empty_like(a).copy_(grad) if needs[0] else None), None, None
    if tail.pool is None:
        return _convolution_backward(grad, a, tail.conv, needs)
    read = pooled(a, tail.pool) if tail.conv else a
    dread, weight, bias = _convolution_backward(grad, read, tail.conv, needs)
    return None if dread is None else pooled_backward(dread, a, tail.pool), weight, bias


def _convolution_backward(
    grad: Tensor, a: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if conv is None:
        return (grad if needs[0] else None), None, None
    return convolve_backward(grad, a, conv, needs)
