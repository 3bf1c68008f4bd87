"""What a step reads: tensors, or shapes that stand for them, in any structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from efficient_densenet.memory.hollow import empty_like

Tree = Any
"""Tensors, shapes and other values, alone or in dicts, lists and tuples of any depth."""


class Batch(NamedTuple):
    """The arguments of a model, and what its output is compared with.

    Attributes:
        inputs: positional arguments.
        indices: the target, its shapes read as those of class indices.
        values: the same, its shapes read as those of values.
    """

    inputs: tuple[Tree, ...]
    indices: Tree
    values: Tree

    def target_for(self, output: Tree) -> Tree:
        """The target, with values where the output has a tensor of the same shape."""
        shapes = {tensor.shape for tensor in tensors_in(output)}

        def choose(index: object, value: object) -> object:
            return value if isinstance(value, Tensor) and value.shape in shapes else index

        return tree_map(choose, self.indices, self.values)


def make_batch(
    inputs: tuple[Tree, ...], target: Tree, device: torch.device, dtype: torch.dtype
) -> Batch:
    """A batch for a real step: random values, and class 0, where there are shapes.

    Raises:
        TypeError: if an input is neither tensor nor shape, nor a structure of them.
        ValueError: if there is no input.
    """

    def fill(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return torch.rand(shape, device=device, dtype=dtype)
        return torch.zeros(shape, device=device, dtype=dtype)

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    return _build(inputs, target, dtype, own, fill)


def make_hollow_batch(
    inputs: tuple[Tree, ...], target: Tree, device: torch.device, dtype: torch.dtype
) -> Batch:
    """A batch of tensors without values. Errors as of :func:`make_batch`."""

    def fill(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), device=device, dtype=dtype)

    def own(tensor: Tensor) -> Tensor:
        return empty_like(tensor, device).requires_grad_(tensor.requires_grad)

    return _build(inputs, target, dtype, own, fill)


def arguments_of(inputs: Tree) -> tuple[Tree, ...]:
    """A model's arguments: ``inputs`` if it is a tuple of them, and no shape."""
    return inputs if isinstance(inputs, tuple) and not is_shape(inputs) else (inputs,)


def is_shape(value: object) -> bool:
    """Whether ``value`` is a sequence of whole numbers."""
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(size, int) and not isinstance(size, bool) for size in value)
    )


def tensors_in(tree: Tree) -> list[Tensor]:
    """All tensors of ``tree``, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _build(
    inputs: tuple[Tree, ...],
    target: Tree,
    dtype: torch.dtype,
    own: Callable[[Tensor], Tensor],
    fill: Callable[[Sequence[int], torch.dtype], Tensor],
) -> Batch:
    def read(tree: Tree, dtype: torch.dtype) -> Tree:
        def leaf(value: Tree) -> Tree:
            if is_shape(value):
                return fill(value, dtype)
            return own(value) if isinstance(value, Tensor) else value

        return tree_map(leaf, tree, is_leaf=is_shape)

    if not inputs:
        raise ValueError("inputs must hold at least one tensor or shape, got none")
    for value in inputs:
        if not isinstance(value, (Tensor, tuple, list, dict)):
            hint = f": is {inputs} one shape?" if is_shape(inputs) else ""
            raise TypeError(
                f"inputs must be tensors, shapes such as (8, 3, 224, 224), or dicts, lists and "
                f"tuples of them, got {value!r}{hint}"
            )
    return Batch(read(inputs, dtype), read(target, torch.int64), read(target, dtype))
