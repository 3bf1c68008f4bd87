"""The scratch of one pass, which every unit overwrites slab by slab."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from efficient_densenet.kernels.layout import device_of, is_hollow

# Scratch that a slab may fill before the next one starts. With 2 MiB a step takes 1.11 times as
# long; with 8 to 64 about as long (`benchmarks/choices.py`), and its peak grows by twice the
# difference.
WORKSPACE_BYTES = 4 << 20

# On a GPU small slabs would leave it idle between launches, and a slab should fill it for longer
# than the next one takes to launch. Not measured.
GPU_WORKSPACE_BYTES = 64 << 20


class Workspace:
    """One scratch buffer, allocated once a pass, overwritten by every layer slab by slab.

    Args:
        like: ``(N, channels, *spatial)``: all maps that are read have its samples and size.
        widest: channels of the widest of them.
        dtype: the widest type that is stored.
        memory_format: of slabs, and of results made of them.
    """

    def __init__(
        self, like: Tensor, widest: int, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        samples, _, *spatial = like.shape
        self.memory_format, self.dtype = memory_format, dtype
        on_gpu = device_of(like).type == "cuda"
        self._threads = 1 if on_gpu else torch.get_num_threads()
        self._positions = math.prod(spatial)
        self._spatial_strides = [math.prod(spatial[i + 1 :]) for i in range(len(spatial))]
        most = GPU_WORKSPACE_BYTES if on_gpu else WORKSPACE_BYTES
        self._bytes = most
        self._samples = samples
        self._storage = torch.empty(self._size(widest), dtype=dtype, device=like.device)
        self._vectors = self._storage.new_empty(0, dtype=torch.float32)
        self._left: tuple[Tensor, object, Tensor] | None = None

    def _size(self, widest: int) -> int:
        sample = widest * self._positions
        return min(self._samples * sample, max(self._bytes // self.dtype.itemsize, sample))

    def narrow(self, widest: int) -> None:
        """Shrink to maps of at most ``widest`` channels: no wider ones follow."""
        size, device = self._size(widest), self._storage.device
        self._left = None
        if size < len(self._storage):
            self._storage = self._storage.new_empty(0)  # the old one dies before the new one lives
            self._storage = torch.empty(size, dtype=self.dtype, device=device)

    def vectors(self, values: int) -> Tensor:
        """At least ``values`` numbers ``(values,)`` in float32: whatever they held is lost."""
        if len(self._vectors) < values:
            self._vectors = self._vectors.new_empty(values)
        return self._vectors

    def slabs(self, x: Tensor, dtype: torch.dtype | None = None) -> Iterator[slice]:
        """The rows of ``x`` that make up each slab: as few slabs as fit, of equal size.

        Nothing wider than ``dtype`` will be stored, by default than the type of the workspace.

        On a CPU they are a multiple of the threads, or some threads would wait.
        """
        samples, channels = x.shape[:2]
        sample = channels * self._positions * (dtype or self.dtype).itemsize
        most = max(1, self._bytes // sample)
        step = -(-samples // -(-samples // most))
        if most >= self._threads:
            step = min(-(-step // self._threads), most // self._threads) * self._threads
        for start in range(0, samples, step):
            yield slice(start, min(start + step, samples))

    def holds(self, x: Tensor, dtype: torch.dtype | None = None) -> bool:
        """Whether ``x`` is a single slab."""
        return len(list(self.slabs(x, dtype))) == 1

    def distinct_slabs(self, x: Tensor, dtype: torch.dtype | None = None) -> Iterable[slice]:
        """The rows of each slab; of a map without values, of the slabs that differ in memory.

        From the third on all slabs but a shorter last one allocate and free the same, and some
        hundred layers have tens of thousands of them: an estimate would take a minute.
        """
        slabs = list(self.slabs(x, dtype))
        if len(slabs) <= 3 or not is_hollow(x):
            return slabs
        last_is_shorter = len(x) % slabs[0].stop
        return [*slabs[:3], slabs[-1]] if last_is_shorter else slabs[:3]

    def scratch(self, slab: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer in the shape of ``slab`` and in ``dtype``: whatever it held is lost."""
        self._left = None
        channels = slab.shape[1]
        last = self.memory_format is not torch.contiguous_format
        across_channels, step = (1, channels) if last else (self._positions, 1)
        spatial = [step * stride for stride in self._spatial_strides]
        storage = self._storage if dtype == self.dtype else self._storage.view(dtype)
        return storage.as_strided(
            slab.shape, (channels * self._positions, across_channels, *spatial)
        )

    def leave(self, activated: Tensor, x: Tensor, norm: object) -> None:
        """Note that the scratch holds ``x`` as this norm, and what follows it, activates it."""
        self._left = x, norm, activated

    def take(self, x: Tensor, norm: object) -> Tensor | None:
        """What was left of just these two, if nothing has asked for scratch since; once."""
        left, self._left = self._left, None
        return left[2] if left and left[0] is x and left[1] is norm else None
