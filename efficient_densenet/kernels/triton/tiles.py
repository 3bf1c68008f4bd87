"""Which tile a product runs with: measured on the device, once for each size, and kept on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from efficient_densenet.kernels.triton import launch as launching
from efficient_densenet.kernels.triton.launch import Matrix


class Tile(NamedTuple):
    """What a program of a product works on at a time, and how it is built.

    ``m`` rows of the maps, ``n`` channels that the convolution leaves, ``k`` that it reads: two of
    them are the tile that the program computes, the third is the step of its loop.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        m, n, k, warps, stages = self
        return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "warps": warps, "stages": stages}


# Launches that are measured together, and how much less than the first tile's time another one's
# must be: what differs less is noise, and every tile rounds differently.
REPEATS = 20
GAIN = 0.95

_found: dict[str, Tile] = {}


def tiles_for(dtype: torch.dtype, tiles: Sequence[Tile], exact: Tile) -> Sequence[Tile]:
    """The tiles to choose from for a product that computes in ``dtype``.

    ``exact`` is for float32 that may not be rounded to TF32: no tensor core does that, and larger
    tiles would spill.
    """
    return (exact,) if dtype == torch.float32 and not launching.rounds_to_tf32() else tiles


def fastest(
    tiles: Sequence[Tile], x: Matrix, key: tuple[Any, ...], launch: Callable[[Tile], object]
) -> Tile:
    """The first tile, or the one with which ``launch`` takes least time if that is 5% less.

    Measured once for each ``key``, size, layout and kind of GPU; ``launch`` must be repeatable.
    Always the first where algorithms must be deterministic, and while a graph is captured.
    """
    if torch.are_deterministic_algorithms_enabled() or len(tiles) == 1 or not x.data.is_cuda:
        return tiles[0]
    name = torch.cuda.get_device_name(x.data.device)
    layout = "channels last" if x.channel == 1 else "planes"
    sizes = (x.samples, x.positions, x.channels)
    place = ", ".join(map(str, (name, *key, *sizes, x.data.dtype, layout)))
    known = _found.get(place) or kept().get(place)
    if known is None or known not in tiles:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        with torch.cuda.device_of(x.data):
            known = preferred(tiles, [milliseconds(partial(launch, tile)) for tile in tiles])
        keep({place: known})
    _found[place] = known
    return known


def preferred(tiles: Sequence[Tile], times: Sequence[float]) -> Tile:
    """The fastest tile, the first unless another one gains enough."""
    best = min(times)
    return tiles[0] if times[0] * GAIN <= best else tiles[times.index(best)]


def tuned() -> dict[str, dict[str, int]]:
    """The tiles that products have run with so far, by what they were measured for."""
    return {place: tile._asdict() for place, tile in _found.items()}


def milliseconds(launch: Callable[[], object]) -> float:
    """Device time of a launch, its build and its first run aside; forever if it does not fit.

    Launches are replayed from a graph: one by one, a small map would show how long the host takes.
    """
    try:
        launch()
    except triton.OutOfResources:
        return math.inf
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(REPEATS):
            launch()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def store() -> Path:
    """Where tiles are kept between runs: beside the kernels that this Triton has built."""
    folder = Path(triton.knobs.cache.dir) / "efficient_densenet"
    return folder / f"tiles-{triton.__version__}.json"


@cache
def kept() -> dict[str, Tile]:
    """The tiles of earlier runs; none if there is no such file, or it is damaged."""
    try:
        found = json.loads(store().read_text(encoding="utf-8"))
        return {place: Tile(*sizes) for place, sizes in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(tiles: dict[str, Tile]) -> None:
    """Add tiles to those of earlier runs, if the file can be written; as a whole or not at all."""
    kept().update(tiles)
    try:
        store().parent.mkdir(parents=True, exist_ok=True)
        part = store().with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(kept(), indent=1), encoding="utf-8")
        part.replace(store())
    except OSError:
        return
