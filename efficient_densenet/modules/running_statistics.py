"""Running statistics of batch norms: the only place where they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.kernels.interface import Statistics


class Seen(NamedTuple):
    """What a norm saw in a forward pass.

    ``statistics`` are those of the map that it read, of as many channels as the norm has or more;
    ``None`` if the norm normalised with its running statistics.
    """

    norm: _BatchNorm
    statistics: Statistics | None


class _Update(NamedTuple):
    """One norm's buffers, and the batch statistics ``(channels,)`` that they follow."""

    norm: _BatchNorm
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor | None
    mean: Tensor
    var: Tensor

    def share(self) -> float | Tensor:
        """The share of this batch in the running statistics; no device is waited for."""
        momentum = self.norm.momentum
        if momentum is not None:
            return momentum
        return 0.0 if self.batches is None else self.batches.to(self.mean.dtype).reciprocal()


@torch.no_grad()
def update_running_statistics(seen: Iterable[Seen], values: int | Tensor) -> None:
    """What ``nn.BatchNorm`` does to its buffers in training, for all norms together.

    ``values`` is the number of values per channel. A norm that was used twice learns twice, and so
    do buffers that several norms share.
    """
    learning = [(norm, found) for norm, found in seen if norm.training and norm.track_running_stats]
    for norm, _ in learning:
        if norm.running_mean is None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    waiting = list(_updates(learning))
    unbiasing = values / (values - 1) if waiting else 1.0
    while waiting:
        now, later = _first_of_each(waiting)
        batches = [update.batches for update in now if update.batches is not None]
        if batches:
            torch._foreach_add_(batches, 1)
        groups: dict[tuple[float | int, torch.dtype], list[_Update]] = {}
        for number, update in enumerate(now):
            momentum = update.norm.momentum
            key = (-1 - number if momentum is None else momentum, update.running_mean.dtype)
            groups.setdefault(key, []).append(update)
        for group in groups.values():
            share = group[0].share()
            unbiased = torch._foreach_mul([update.var for update in group], unbiasing)
            _follow([u.running_mean for u in group], [u.mean for u in group], share)
            _follow([u.running_var for u in group], unbiased, share)
        waiting = later


def _first_of_each(updates: list[_Update]) -> tuple[list[_Update], list[_Update]]:
    """The updates that touch no buffer of an earlier one, and the others."""
    touched: set[int] = set()
    first: list[_Update] = []
    others: list[_Update] = []
    for update in updates:
        buffers = {id(buffer) for buffer in update[1:4] if buffer is not None}
        (others if buffers & touched else first).append(update)
        touched |= buffers
    return first, others


def _updates(learning: Iterable[tuple[_BatchNorm, Statistics | None]]) -> Iterator[_Update]:
    """Those of the norms that have running statistics."""
    for norm, statistics in learning:
        running_mean, running_var = norm.running_mean, norm.running_var
        if running_mean is None:
            continue
        assert running_var is not None and statistics is not None
        mean, var = statistics.first(norm.num_features)
        yield _Update(norm, running_mean, running_var, norm.num_batches_tracked, mean, var)


def _follow(
    running: list[Tensor], new: list[Tensor] | tuple[Tensor, ...], share: float | Tensor
) -> None:
    """``running = (1 - share) * running + share * new``.

    As in batch norm the version of the buffers stays: in training no backward pass reads them.
    """
    with torch.autograd._unsafe_preserve_version_counter(tuple(running)):
        _blend(running, new, share)


def _blend(
    running: list[Tensor], new: list[Tensor] | tuple[Tensor, ...], share: float | Tensor
) -> None:
    if running[0].dtype == new[0].dtype and not isinstance(share, Tensor):
        torch._foreach_mul_(running, 1.0 - share)
        torch._foreach_add_(running, new, alpha=share)
    else:
        for old, vector in zip(running, new, strict=True):
            old.copy_(old.to(vector.dtype) * (1.0 - share) + vector * share)
