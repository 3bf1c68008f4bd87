"""The largest size whose peak is within a budget, found from a few peaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from efficient_densenet.kernels.layout import outer_format
from efficient_densenet.memory.batch import Tree
from efficient_densenet.memory.devices import check_device, room_within
from efficient_densenet.memory.optimizers import MakeOptimizer
from efficient_densenet.memory.running import Loss
from efficient_densenet.memory.sizes import format_size
from efficient_densenet.memory.step import estimate, run_within

BOLDNESS = 16
"""How many times the largest size that fits is the next one to look at, at most."""

PATIENCE = 2
"""Looks in which what is left to search must halve, or else is halved."""


@dataclass(frozen=True)
class Fit:
    """What fits a budget. ``print`` shows it in a sentence.

    Attributes:
        room: bytes that a step may use: the budget without the device's reserve.
        largest: the largest size that fits; 0 if not even the smallest does.
        peak: estimated bytes at the peak of a step of that size; 0 if ``largest`` is.
        next: the next size, which does not fit; ``None`` if the search ended before.
        next_peak: estimated bytes at the peak of that one.
        peaks: estimated bytes at the peak by size, of every size that was estimated.
        tried: measured bytes at the peak by size, of real steps limited to ``room``; ``None`` for a
            step that ran out of memory. Empty without ``verify``.
    """

    room: int
    largest: int
    peak: int
    next: int | None
    next_peak: int | None
    peaks: dict[int, int]
    tried: dict[int, int | None] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether the largest size ran within ``room``, and the next one ran out of memory."""
        ran = not self.largest or self.tried.get(self.largest) is not None
        ran_out = self.next is None or (self.next in self.tried and self.tried[self.next] is None)
        return bool(self.tried) and ran and ran_out

    def __str__(self) -> str:
        parts = [f"nothing fits {format_size(self.room)}"]
        if self.largest:
            peak, room = format_size(self.peak), format_size(self.room)
            parts = [f"{self.largest} fits {room} with a peak of {peak}"]
        if self.next is not None:
            parts.append(f"{self.next} would need {format_size(self.next_peak or 0)}")
        if self.tried:
            parts.append("real steps " + ("agree" if self.verified else "DISAGREE"))
        return "; ".join(parts)


def largest_batch(
    model: nn.Module,
    inputs: Tree,
    budget: int | str | None = None,
    *,
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    device: torch.device | str | None = None,
    sizes: range = range(2, 2**20 + 1),
    verify: bool = False,
) -> Fit:
    """The largest batch whose training step fits ``budget``, from about six estimates.

    A step fits if the peak by :func:`~efficient_densenet.estimate`, together with the device's
    reserve (on CUDA 256 MiB), is within the budget. ::

        largest_batch(model, (None, 3, 224, 224), "8GiB", target=(None,))
        largest_batch(model, (16, 3, None, None), "8GiB", target=(16,), sizes=range(32, 1025, 32))

    Args:
        model: left untouched; its parameters may be on any device, ``meta`` too.
        inputs: the model's argument, or a tuple of its arguments, as for
            :func:`~efficient_densenet.measure`. ``None`` marks the dimension to search in shapes;
            if no shape has one, it is dimension 0 of all tensors and shapes.
        budget: bytes, or a size such as ``"8GiB"``; by default the free memory of the current GPU.
        target: as for :func:`~efficient_densenet.measure`, with ``None`` as in ``inputs``.
        loss_fn: as for :func:`~efficient_densenet.measure`.
        make_optimizer: as for :func:`~efficient_densenet.measure`.
        autocast_dtype: as for :func:`~efficient_densenet.estimate`.
        accumulate: as for :func:`~efficient_densenet.measure`.
        device: as for :func:`~efficient_densenet.estimate`.
        sizes: the sizes to search. The default begins with 2, as one sample may have no batch
            statistics.
        verify: whether to run real steps of the largest size and of the next one too, on copies of
            the model and limited to the budget.

    Returns:
        The largest size and its peak, the next size and its peak.

    Raises:
        ValueError: if the budget is no size, or if ``verify`` is set and the model is not on
            ``device``; otherwise as :func:`~efficient_densenet.estimate`.
    """
    kind = check_device(device)
    room = room_within(budget, kind)
    arguments = inputs if isinstance(inputs, tuple) and not _is_shape(inputs) else (inputs,)
    marked = any(_is_shape(leaf) and None in leaf for leaf in _leaves((arguments, target)))
    options: dict[str, Any] = {
        "loss_fn": loss_fn,
        "make_optimizer": make_optimizer,
        "autocast_dtype": autocast_dtype,
        "accumulate": accumulate,
    }

    def at(size: int, resize: Callable[[Tensor, int], Tensor]) -> tuple[tuple[Tree, ...], Tree]:
        return _resize_all((arguments, target), size, resize, marked)

    def peak(size: int) -> int:
        sized, labels = at(size, _resize_hollow)
        return estimate(model, *sized, target=labels, device=kind, **options).peak.total

    fit = find_largest(peak, room, sizes)
    if not verify:
        return fit
    tried = {}
    for size in (fit.largest, fit.next):
        if size:
            sized, labels = at(size, _repeat)
            tried[size] = run_within(room, kind, model, sized, labels, **options)
    return replace(fit, tried=tried)


def find_largest(peak: Callable[[int], int], room: int, sizes: range) -> Fit:
    """The largest of ``sizes`` whose ``peak`` is within ``room`` bytes.

    The peak must not fall with the size. Sizes are guessed along the straight line through the two
    peaks nearest to ``room``, which is right at once where the peak is affine, as it is between two
    kinks in the batch.
    """
    known: dict[int, int] = {}  # by position in sizes, from 1
    low, high, guess = 0, len(sizes) + 1, 1
    widths: list[int] = []
    while high - low > 1:
        known[guess] = peak(sizes[guess - 1])
        if known[guess] <= room:
            low = guess
        else:
            high = guess
        line = _extrapolate(known, room)
        if high in known:
            widths.append(high - low)
            slow = len(widths) > PATIENCE and 2 * widths[-1] > widths[-1 - PATIENCE]
            if line is None or slow:
                line, widths = (low + high) // 2, []
        farthest = min(BOLDNESS * max(low, 1), high - 1)
        guess = max(low + 1, farthest if line is None else min(line, farthest))
    return Fit(
        room=room,
        largest=sizes[low - 1] if low else 0,
        peak=known.get(low, 0),
        next=sizes[high - 1] if high in known else None,
        next_peak=known.get(high),
        peaks={sizes[n - 1]: known[n] for n in sorted(known)},
    )


def _extrapolate(known: dict[int, int], room: int) -> int | None:
    """Where the line through the two peaks nearest to ``room`` reaches it, if it rises."""
    nearest = sorted(known, key=lambda n: (abs(known[n] - room), -n))[:2]
    first, second = min(nearest), max(nearest)
    rise = known[second] - known[first]
    if rise <= 0:
        return None
    return math.floor(first + (room - known[first]) * (second - first) / rise)


def _is_shape(value: object) -> bool:
    """Whether ``value`` is a shape, perhaps with ``None`` for what is searched."""
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(size is None or type(size) is int for size in value)
    )


def _leaves(tree: Tree) -> list[Tree]:
    return tree_leaves(tree, is_leaf=_is_shape)


def _resize_all(
    tree: Tree, size: int, resize: Callable[[Tensor, int], Tensor], marked: bool
) -> Tree:
    def leaf(value: Tree) -> Tree:
        if _is_shape(value):
            return tuple(
                size if n is None else n for n in (value if marked else (None, *value[1:]))
            )
        if isinstance(value, Tensor) and value.dim() and not marked:
            return resize(value, size)
        return value

    return tree_map(leaf, tree, is_leaf=_is_shape)


def _resize_hollow(tensor: Tensor, size: int) -> Tensor:
    shape, form = (size, *tensor.shape[1:]), outer_format(tensor)
    made = torch.empty(shape, dtype=tensor.dtype, device="meta", memory_format=form)
    return made.requires_grad_(tensor.requires_grad)


def _repeat(tensor: Tensor, size: int) -> Tensor:
    samples = torch.arange(size, device=tensor.device) % len(tensor)
    made = tensor.detach()[samples].contiguous(memory_format=outer_format(tensor))
    return made.requires_grad_(tensor.requires_grad)
