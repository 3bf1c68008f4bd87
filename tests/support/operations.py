"""Cases of the operations: maps in odd shapes, and everything that reads an activated map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.interface import (
    RELU,
    Activation,
    Conv,
    Geometry,
    Operations,
    Pool,
    Statistics,
    Tail,
    Unit,
    per_channel,
)
from efficient_densenet.kernels.workspace import Workspace
from support.compare import FORMATS

# Samples, channels read, channels left, spatial size: odd, single, several tiles.
Shape = tuple[int, int, int, tuple[int, ...]]
SHAPES: dict[str, Shape] = {
    "odd": (3, 5, 3, (7, 5)),
    "one-channel": (2, 1, 1, (3, 3)),
    "one-position": (5, 7, 4, (1, 1)),
    "many-channels": (2, 131, 130, (5, 3)),
    "many-rows": (3, 6, 20, (13, 13)),
    "line": (2, 9, 5, (11,)),
    "volume": (2, 6, 5, (3, 2, 5)),
}
LAYOUTS = {"planes": False, "channels_last": True}
POOLS = {
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "maximum": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
}
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def layout(dims: int, last: bool) -> torch.memory_format:
    return FORMATS[dims] if last and dims in FORMATS else torch.contiguous_format


def a_map(shape: Shape, channels: int, dtype: torch.dtype, last: bool, room: int = 3) -> Tensor:
    """A prefix of a wider buffer, so that its rows are not dense."""
    samples, spatial = shape[0], shape[-1]
    buffer = torch.randn(samples, channels + room, *spatial) + 0.5
    buffer = buffer.to(dtype, memory_format=layout(len(spatial), last))
    return buffer[:, :channels]


def vectors(count: int, channels: int) -> list[Tensor]:
    return [torch.randn(channels) for _ in range(count)]


def tails(shape: Shape, dtype: torch.dtype) -> dict[str, Tail]:
    """Everything that can read an activated map, by name."""
    _, reads, leaves, spatial = shape
    dims, wide = len(spatial), torch.promote_types(dtype, torch.float32)
    bias = torch.randn(leaves, dtype=wide)
    one, three = (torch.randn(leaves, reads, *(size,) * dims, dtype=wide) for size in (1, 3))
    one, three = Conv(one, bias, _geometry(dims, 0)), Conv(three, bias, _geometry(dims, 1))
    found = {
        "1x1": Tail(None, one, dtype),
        "1x1-without-bias": Tail(None, one._replace(bias=None), dtype),
        "3x3": Tail(None, three, dtype),
        "mean": Tail(Pool("all"), None, dtype),
    }
    if min(spatial) > 1:
        window = ((2,) * dims, (2,) * dims, (0,) * dims, (1,) * dims)
        if dims < 3 or dtype.itemsize > 2:  # CPUs have no other average over volumes
            found["average-1x1"] = Tail(Pool("average", *window), one, dtype)
        found["maximum"] = Tail(Pool("maximum", *window), None, dtype)
        overlapping = ((3,) * dims, (2,) * dims, (1,) * dims, (1,) * dims)
        found["maximum-3"] = Tail(Pool("maximum", *overlapping), None, dtype)
    return found


def _geometry(dims: int, padding: int) -> Geometry:
    return Geometry((1,) * dims, (padding,) * dims, (1,) * dims, 1)


def a_unit(
    ops: Operations,
    vectors: Sequence[Tensor | None],
    tail: Tail,
    activation: Activation = RELU,
    eps: float = 1e-3,
) -> Unit:
    """A unit by mean, variance (its absolute value), γ and β."""
    mean, var, gamma, beta = vectors
    assert mean is not None and var is not None
    affine = (None if v is None else v.flatten() for v in (gamma, beta))
    norm = ops.make_norm(Statistics(mean, var.abs()), len(mean), *affine, eps)
    return Unit(norm, activation, ops.make_tail(tail), len(mean))


def naive_unit(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    function: Callable[[Tensor], Tensor],
    tail: Tail,
) -> Tensor:
    """``tail(function((x - mean) * scale + bias))`` by PyTorch's own functions."""
    mean, scale, bias = (per_channel(vector, x.dim()) for vector in (mean, scale, bias))
    y, dims = function((x - mean) * scale + bias), x.dim() - 2
    if tail.pool and tail.pool.kind == "all":
        y = y.mean(tuple(range(2, x.dim())), keepdim=True)
    elif tail.pool:
        windows = tail.pool.kernel, tail.pool.stride, tail.pool.padding
        y = POOLS[tail.pool.kind][dims - 1](y, *windows)
    if tail.conv:
        conv = tail.conv
        y = CONVOLUTIONS[dims - 1](y, conv.weight, conv.bias, padding=conv.geometry.padding)
    return y


def finished_gradient(
    ops: Operations,
    grad: Tensor,
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
) -> list[Tensor]:
    """The gradient of a map that a unit alone reads, in its type, and dβ and dγ.

    Where it waits, the first sample is made by itself, as a stem makes its slabs.
    """
    waits = ops.can_wait(x, unit, workspace)
    dx = torch.empty_like(x, dtype=ops.corrected_dtype(unit.tail.dtype, mean.dtype))
    through = ops.backward_unit(
        grad,
        x,
        unit,
        workspace,
        need_weight=False,
        need_bias=False,
        need_sums=True,
        target=None if waits else dx,
        accumulate=False,
    )
    assert (through.waiting is not None) == waits
    of_norm = [vector.flatten() for vector in ops.collect(through.sums, unit, 0.1, None, False)]
    if through.waiting is None:
        ops.correct(dx, x, slice(0, x.shape[1]), mean, a, b, dx)
    else:
        for rows in (slice(0, 1), slice(1, len(x))):
            dx[rows] = through.waiting(rows, a, b)
    return [dx.to(unit.tail.dtype), *of_norm]


def doubled(value: object) -> object:
    """The same in float64: a tensor, a type, or a tuple of any of them."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        fields = [doubled(field) for field in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return torch.float64 if isinstance(value, torch.dtype) else value


def assert_as_precise_as_eager(
    ops: Operations,
    compute: Callable[..., Sequence[Tensor]],
    dtype: torch.dtype,
    *inputs: object,
) -> None:
    """The error against float64 is at most 1.5 times that of eager operations, plus some slack.

    ``compute(ops, *inputs)`` returns tensors; what it writes to it has to copy first.
    """
    truth = compute(eager, *map(doubled, inputs))
    ours, twin = (compute(o, *inputs) for o in (ops, eager))
    assert len(ours) == len(twin) == len(truth)
    slack = (32 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    for i, (found, expected, exact) in enumerate(zip(ours, twin, truth, strict=True)):
        assert found.shape == expected.shape, i
        assert found.dtype == expected.dtype, i
        errors = [(t.double() - exact).norm() for t in (found, expected)]
        assert errors[0] <= 1.5 * errors[1] + slack * max(1.0, exact.norm()), (
            i,
            errors,
            exact.norm(),
        )


class noted:
    """Names the case in what is raised."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> noted:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and hasattr(error, "add_note"):
            error.add_note(self.name)
