"""What operators allocate inside themselves is what the allocator sees there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from efficient_densenet.kernels.layout import CHANNELS_LAST
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.memory.scratch import cast_scratch, cpu_scratch
from support.marks import slabs_and_whole
from support.operators import NETWORKS, network, operators_of

aten = torch.ops.aten


def inside(call) -> tuple[int, object]:
    """Bytes that ``call`` allocates and frees, and what it returns."""
    results = [call()]  # the first call compiles
    record = AllocatorRecord(lambda: results.append(call()), torch.device("cpu"))
    live = live_bytes(record.events) or [0]
    return max(live) - live[-1], results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("samples", [8, 16])
def test_scratch_of_convolution(samples, kernel, layout, dtype) -> None:
    x = torch.randn(samples, 256, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(256, 256, kernel, kernel, dtype=dtype)
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    y = aten.convolution(x, weight, None, *geometry)
    calls = (
        (aten.convolution.default, (x, weight, None, *geometry)),
        (aten.convolution_backward.default, (y, x, weight, None, *geometry, [True, True, False])),
    )
    for func, args in calls:
        seen, result = inside(lambda func=func, args=args: func(*args))
        told = cpu_scratch(func, args, result)
        # Several threads may have a sum of the weight's gradient each.
        sums = (torch.get_num_threads() - 1) * 4 * weight.numel()
        assert 0.95 * seen - 1024 - sums <= told <= 2.2 * seen


# Samples, channels read and left, sizes, kernel, stride.
CONVOLUTIONS = {
    "image": (2, 3, 32, (32, 32), 7, 2, {}),
    "volume of one channel": (2, 1, 32, (16, 16, 16), 7, 2, {}),
    "one sample": (1, 64, 16, (8, 8), 3, 1, {}),
    "one volume": (1, 64, 16, (8, 8, 8), 3, 1, {}),
    "one volume, strided": (1, 64, 16, (8, 8, 8), 3, 2, {}),
    "one large volume": (1, 16, 16, (16, 40, 16), 3, 1, {}),
    "one signal": (1, 64, 16, (64,), 3, 1, {}),
    "float64": (4, 64, 16, (8, 8), 3, 1, {"dtype": torch.float64}),
    "float64 volumes": (4, 64, 16, (8, 8, 8), 3, 1, {"dtype": torch.float64}),
    "shallow volumes": (2, 64, 16, (2, 4, 4), 3, 1, {}),
    "small volumes": (4, 128, 32, (2, 2, 2), 3, 1, {}),
    "volumes, 1x1": (4, 64, 16, (8, 8, 8), 1, 1, {}),
    "volumes": (4, 64, 16, (8, 8, 8), 3, 1, {}),
}


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("sizes", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_scratch_of_backward_convolution(sizes, last, threads) -> None:
    samples, reads, leaves, size, kernel, stride, options = sizes
    dims = len(size)
    if last and dims + 2 not in CHANNELS_LAST:
        pytest.skip("there is no such format")
    x = torch.randn(samples, reads, *size, **options)
    x = x.contiguous(memory_format=CHANNELS_LAST[dims + 2]) if last else x
    weight = torch.randn(leaves, reads, *[kernel] * dims, **options)
    geometry = ([stride] * dims, [kernel // 2] * dims, [1] * dims, False, [0] * dims, 1)
    grad = torch.ones_like(aten.convolution(x, weight, None, *geometry))
    func = aten.convolution_backward.default
    args = (grad, x, weight, None, *geometry, [reads > 3, True, False])
    seen, result = inside(lambda: func(*args))
    # Several threads may have a sum of the weight's gradient each.
    sums = (threads - 1) * 4 * weight.numel()
    assert 0.98 * seen - 1024 - sums <= cpu_scratch(func, args, result) <= 2.2 * seen + 1024


@pytest.mark.parametrize("wanted", [True, False], ids=["all", "vectors"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layouts", ["same", "same, last", "different", "part of a map"])
@pytest.mark.parametrize("shape", [(4, 32, 16, 16), (4, 32, 64), (2, 32, 4, 8, 8)], ids=str)
def test_scratch_of_backward_batch_norm(shape, layouts, training, wanted) -> None:
    x, grad, vector = torch.randn(shape), torch.randn(shape), torch.ones(shape[1])
    if "same" not in layouts or "last" in layouts:
        if len(shape) not in CHANNELS_LAST:
            pytest.skip("there is no such format")
        last = CHANNELS_LAST[len(shape)]
        x = x.contiguous(memory_format=last)
        grad = grad if layouts == "different" else grad.contiguous(memory_format=last)
    if layouts == "part of a map":
        x, grad, vector = x[:, :16], grad[:, :16], vector[:16]
    args = (grad, x, *[vector] * 5, training, 1e-5, [wanted, True, True])
    func = aten.native_batch_norm_backward.default
    seen, result = inside(lambda: func(*args))
    assert cpu_scratch(func, args, result) == pytest.approx(seen, abs=20 * len(vector))


MAPS = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
SHORT, OTHER = MAPS.bfloat16(), torch.empty_like(MAPS, dtype=torch.bfloat16)
VECTOR = torch.randn(1, 16, 1, 1)
CALLS = {
    "promoted": (aten.mul.Tensor, (SHORT, VECTOR), {}),
    "into short": (aten.addcmul.out, (VECTOR, SHORT, VECTOR), {"out": OTHER}),
    "into long": (aten.addcmul.out, (VECTOR, SHORT, VECTOR), {"out": MAPS.clone()}),
    "in place": (aten.addcmul_.default, (OTHER, SHORT, VECTOR), {}),
    "in place, long": (aten.add_.Tensor, (MAPS.clone(), SHORT), {}),
    "by mask": (aten.mul.Tensor, (SHORT, SHORT > 0), {}),
    "by number": (aten.mul.Tensor, (SHORT, 2.5), {}),
    "by tensor without dimensions": (aten.mul.Tensor, (SHORT, torch.tensor(2.5)), {}),
    "of one type": (aten.addcmul.out, (VECTOR, MAPS, VECTOR), {"out": MAPS.clone()}),
    "compared": (aten.gt.Tensor, (SHORT, MAPS), {}),
    "copied": (aten.copy_.default, (MAPS.clone(), SHORT), {}),
    "cast": (aten._to_copy.default, (SHORT,), {"dtype": torch.float32}),
    "no element-wise operator": (aten.cat.default, ([SHORT, SHORT], 1), {}),
}


@pytest.mark.parametrize(("func", "args", "kwargs"), CALLS.values(), ids=CALLS)
def test_scratch_of_operator_on_several_types(func, args, kwargs) -> None:
    seen, result = inside(lambda: func(*args, **kwargs))
    assert cast_scratch(func, args, result) == pytest.approx(seen, abs=16)  # a number


@slabs_and_whole
@pytest.mark.parametrize("name", NETWORKS)
def test_no_operator_of_a_step_allocates_more_than_is_told(name: str) -> None:
    """Within itself, and but for vectors and padded weights: ``cpu_scratch`` lacks no operator."""
    model, x = network(name)
    sums = (torch.get_num_threads() - 1) * 4 * sum(p.numel() for p in model.parameters())
    checked = set()
    for func, args, kwargs in operators_of(model, x):
        seen, result = inside(lambda func=func, args=args, kwargs=kwargs: func(*args, **kwargs))
        assert seen <= 1.05 * cpu_scratch(func, args, result) + 16384 + sums, func
        checked.add(func)
    assert aten.convolution_backward.default in checked
