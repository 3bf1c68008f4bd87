"""Batch statistics over the processes of a group, as ``nn.SyncBatchNorm`` takes them.

Every function is a collective: all processes of the group call it in the same order. Without a
group (``None``) each returns what it was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def joined_statistics(statistics: Statistics, x: Tensor, group: ProcessGroup | None) -> Statistics:
    """The statistics over all processes, from those of this process's map ``x``.

    By Chan's formula: ``mean = Σ n_p m_p / n``, ``var = Σ n_p (v_p + (m_p - mean)²) / n``.
    """
    if group is None:
        return statistics
    mean, var = statistics
    count = x.numel() // x.shape[1]
    mine = torch.cat([mean, var, mean.new_full((1,), count)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    means, variances, counts = torch.stack(everyone).split([len(mean), len(mean), 1], 1)
    shares = counts / counts.sum()
    joined = (shares * means).sum(0)
    spread = (shares * (variances + (means - joined).square())).sum(0)
    return Statistics(joined, spread)


def joined_means(means: list[Tensor], count: int, group: ProcessGroup | None) -> list[Tensor]:
    """Means over the values of all processes, from those over this process's ``count`` values."""
    if group is None:
        return means
    sums = torch.cat([*(mean * count for mean in means), means[0].new_full((1,), count)])
    dist.all_reduce(sums, group=group)
    *totals, total = sums.split([*(len(mean) for mean in means), 1])
    return [t / total for t in totals]


def joined_count(count: int, group: ProcessGroup | None, device: torch.device) -> int | Tensor:
    """The values per channel of all processes together."""
    if group is None:
        return count
    total = torch.full((), count, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total
