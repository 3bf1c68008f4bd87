"""Each operation by itself, by every implementation: time, bytes, arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import DEVICE
from benchmarks.gpu.parts import fill_rows
from benchmarks.gpu.runner import Job, PartFailed
from benchmarks.instruments import relative_error, synchronize
from benchmarks.provenance import Json
from efficient_densenet.kernels.implementations import load
from efficient_densenet.kernels.interface import (
    RELU,
    Conv,
    Geometry,
    Operations,
    Statistics,
    Tail,
    Unit,
    UnitGradients,
)
from efficient_densenet.kernels.workspace import Workspace

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
"""Relative difference (2-norm) allowed from the eager operation; in float32 products are TF32."""
REPEATS, COPIES = 20, 20
EPS = 1e-5
POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
THREE = Geometry((1, 1), (1, 1), (1, 1), 1)

Run = Callable[[], Sequence[Tensor]]


class Site(NamedTuple):
    """A bottleneck layer that reads ``channels`` of a block's ``features`` and adds ``growth``."""

    batch: int
    size: int
    channels: int
    features: int
    width: int
    growth: int
    dtype: torch.dtype

    def __str__(self) -> str:
        read = f"{self.channels} of {self.features}"
        return f"{self.size}², {read} channels, {str(self.dtype).removeprefix('torch.')}"


class Call(NamedTuple):
    """An operation at a site, with what it cannot do without: bytes moved, and arithmetic.

    ``prepare`` makes from an implementation what runs it, and returns what is to be compared.
    """

    operation: str
    site: Site
    bytes: int
    flops: int
    prepare: Callable[[Operations], Run]

    def __str__(self) -> str:
        return f"{self.operation}, {self.site}"


def operations(
    job: Job, sites: Sequence[Site], implementations: Sequence[str], ceiling: tuple[int, int]
) -> Json:
    """Seconds of every operation at every site, by each implementation; the first is the truth.

    ``ceiling`` is the bytes of a copy, and the rows of a square product in bfloat16, that show what
    the device can do. ``tiles`` are those that Triton's kernels were found to be fastest with.

    Raises:
        PartFailed: if an implementation fails, or differs from the first.
    """
    copied, multiplied = ceilings(*ceiling)
    rows: list[Json] = []
    result = {"kind": "operations", "copied": copied, "multiplied": multiplied, "rows": rows}

    def fill(call: Call, row: Json) -> None:
        row |= {"bytes": call.bytes, "flops": call.flops, "seconds": {}, "differences": {}}
        truth: Sequence[Tensor] = ()
        for name in implementations:
            run = call.prepare(load(name))
            found = [tensor.clone() for tensor in run()]
            truth = truth or found
            difference = max(map(relative_error, found, truth))
            row["differences"][name] = difference
            row["seconds"][name] = seconds(run)
            if not difference <= TOLERANCE[call.site.dtype]:
                row["failure"] = f"{name} differs by {difference:.1e}"

    fill_rows(job, result, [call for site in sites for call in calls(site)], fill)
    if "triton" in implementations:
        from efficient_densenet.kernels.triton.tiles import tuned

        result["tiles"] = tuned()
    if wrong := [row["name"] for row in rows if row["failure"]]:
        raise PartFailed(f"wrong, or failed: {'; '.join(wrong)}")
    return result


def calls(site: Site) -> list[Call]:
    """The operations of one layer, forward and backward, on maps of the same random values."""
    features, gradients = (_map(site, site.features) for _ in range(2))
    added = slice(site.channels, site.channels + site.growth)
    slot = features[:, added]
    z, dz = (_map(site, site.width) for _ in range(2))
    new, dnew = (_map(site, site.growth) for _ in range(2))
    first = Conv(_weight(site.width, site.channels, 1), None, POINTWISE)
    second = Conv(_weight(site.growth, site.width, 3), None, THREE)
    vectors = torch.randn(3, site.features, device=DEVICE)
    c, b, k, positions = site.channels, site.width, site.growth, site.batch * site.size**2
    value = positions * site.dtype.itemsize

    def append(ops: Operations) -> Run:
        statistics = Statistics(*torch.zeros(2, site.features, device=DEVICE))

        def run() -> Sequence[Tensor]:
            ops.append(new, features, c, statistics)
            return [slot, *statistics]

        return run

    def correct(ops: Operations) -> Run:
        return lambda: [ops.correct(gradients, features, added, *vectors, dnew)]

    return [
        Call("append", site, 2 * k * value, 0, append),
        Call("1×1", site, (c + b) * value, 2 * c * b * positions, _forward(features, first, True)),
        Call("3×3", site, (b + k) * value, 18 * b * k * positions, _forward(z, second, False)),
        Call(
            "3×3 backward, corrected",
            site,
            (k + 2 * b) * value,
            36 * b * k * positions,
            _backward_of_only_reader(dnew, z, second),
        ),
        Call(
            "1×1 backward",
            site,
            (b + 3 * c) * value,
            4 * c * b * positions,
            _backward(dz, features, first, gradients),
        ),
        Call("correct", site, 3 * k * value, 0, correct),
    ]


def _forward(x: Tensor, conv: Conv, need_statistics: bool) -> Callable[[Operations], Run]:
    def prepare(ops: Operations) -> Run:
        unit, workspace = _unit(ops, x, conv)

        def run() -> Sequence[Tensor]:
            y, statistics = ops.forward_unit(x, unit, workspace, need_statistics=need_statistics)
            return [y, *(statistics or ())]

        return run

    return prepare


def _backward(grad: Tensor, x: Tensor, conv: Conv, target: Tensor) -> Callable[[Operations], Run]:
    """Adds to what other readers have left in ``target``."""

    def prepare(ops: Operations) -> Run:
        unit, workspace = _unit(ops, x, conv)
        target.fill_(1.0)

        def run() -> Sequence[Tensor]:
            weight, _, sums, _ = _gradients(ops, grad, x, unit, workspace, target, True)
            assert weight is not None and sums is not None
            return [weight.flatten(), target, *_flat(ops.collect(sums, unit, 1.0, None, False))]

        return run

    return prepare


def _backward_of_only_reader(grad: Tensor, x: Tensor, conv: Conv) -> Callable[[Operations], Run]:
    """The gradient of ``x`` is finished: batch norm's terms are subtracted."""
    samples, channels = x.shape[:2]
    share = channels / x.numel()

    def prepare(ops: Operations) -> Run:
        unit, workspace = _unit(ops, x, conv)
        mean = x.mean((0, 2, 3), dtype=torch.float32)
        waits = ops.can_wait(x, unit, workspace)
        target = (
            None if waits else torch.empty_like(x, dtype=ops.corrected_dtype(x.dtype, mean.dtype))
        )

        def run() -> Sequence[Tensor]:
            weight, _, sums, waiting = _gradients(ops, grad, x, unit, workspace, target, False)
            totals = torch.empty_like(mean), torch.empty_like(mean)
            of_norm = ops.collect(sums, unit, share, totals, False)
            if target is not None:
                dx = ops.correct(target, x, slice(0, channels), mean, *totals, target)
            else:
                assert waiting is not None
                dx = waiting(slice(0, samples), *totals)
            assert weight is not None
            return [weight.flatten(), dx, *_flat(of_norm)]

        return run

    return prepare


def _gradients(
    ops: Operations,
    grad: Tensor,
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    target: Tensor | None,
    accumulate: bool,
) -> UnitGradients:
    return ops.backward_unit(
        grad,
        x,
        unit,
        workspace,
        need_weight=True,
        need_bias=False,
        need_sums=True,
        target=target,
        accumulate=accumulate,
    )


def _unit(ops: Operations, x: Tensor, conv: Conv) -> tuple[Unit, Workspace]:
    channels = conv.weight.shape[1]
    var, mean = torch.var_mean(x[:, :channels].float(), [0, 2, 3], correction=0)
    gamma, beta = torch.ones_like(mean), torch.full_like(mean, 0.1)
    norm = ops.make_norm(Statistics(mean, var), channels, gamma, beta, EPS)
    scratch = ops.scratch_dtype(x.dtype, torch.float32)
    workspace = Workspace(x, channels, scratch, torch.channels_last)
    tail = ops.make_tail(Tail(None, conv, x.dtype))
    return Unit(norm, RELU, tail, channels), workspace


def _flat(vectors: Sequence[Tensor]) -> list[Tensor]:
    return [vector.flatten() for vector in vectors]


def _map(site: Site, channels: int) -> Tensor:
    values = torch.randn(site.batch, channels, site.size, site.size, device=DEVICE)
    return values.to(site.dtype, memory_format=torch.channels_last)


def _weight(leaves: int, reads: int, kernel: int) -> Tensor:
    values = torch.randn(leaves, reads, kernel, kernel, device=DEVICE) / (reads * kernel**2) ** 0.5
    return values.to(memory_format=torch.channels_last)


def ceilings(copied: int, rows: int) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes, operations a second of a large product."""
    source = torch.randn(copied // 4, device=DEVICE)
    target = torch.empty_like(source)
    factor = torch.randn(rows, rows, device=DEVICE, dtype=torch.bfloat16)
    copy = min(seconds(lambda: [target.copy_(source)]))
    product = min(seconds(lambda: [factor @ factor]))
    return 2 * copied / copy, 2 * rows**3 / product


def seconds(run: Run) -> list[float]:
    """Of each of some runs that follow each other, after one to warm up.

    On a GPU copies of it are replayed from a graph: one by one, what takes the device less time
    than the host would show the host's.
    """
    run()
    if DEVICE.type != "cuda":
        return [_on_cpu(run) for _ in range(REPEATS)]
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(COPIES):
            run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    synchronize()
    return [a.elapsed_time(b) / 1000 / COPIES for a, b in pairwise(events)]


def _on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
