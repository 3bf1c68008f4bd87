"""Each operation in Triton against its eager twin and float64."""

from functools import partial

import pytest
import torch

from efficient_densenet.kernels import eager, workspace
from efficient_densenet.kernels.interface import Conv, Geometry, Statistics, Tail
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton import operations as triton
from efficient_densenet.kernels.triton import tiles as tiling
from efficient_densenet.kernels.triton.gradients import launch_weight_gradient
from efficient_densenet.kernels.workspace import Workspace
from support.operations import (
    LAYOUTS,
    SHAPES,
    a_map,
    a_unit,
    assert_as_precise_as_eager,
    finished_gradient,
    layout,
    noted,
    tails,
    vectors,
)
from support.precision import relative_error

POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
HALVES = [torch.bfloat16, torch.float16]
# Of the first shape every type in every layout; of the others two that have all of it between them.
CASES = {
    f"{name}-{dtype}-{layout}": (shape, dtype, last)
    for name, shape in SHAPES.items()
    for dtype in (torch.float32, *HALVES)
    for layout, last in LAYOUTS.items()
    if name == "odd" or (dtype, last) in ((torch.float32, False), (torch.bfloat16, True))
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_case = pytest.mark.parametrize(("shape", "dtype", "last"), CASES.values(), ids=CASES)


assert_precise = partial(assert_as_precise_as_eager, triton)


@every_case
def test_appended_map_and_its_statistics(shape, dtype, last):
    """In the middle of the place and of its statistics."""
    y = a_map(shape, shape[1], torch.float32, not last)
    target = a_map(shape, shape[1] + 3, dtype, last)

    def compute(ops, y, target):
        place = target.clone(memory_format=torch.preserve_format)
        exact = torch.promote_types(target.dtype, torch.float32)
        mean, var = torch.ones(2, shape[1] + 3, dtype=exact)
        ops.append(y, place, 2, None)
        plain = place.clone()
        ops.append(y.to(target.dtype), place, 2, Statistics(mean, var))
        return plain, place, mean, var, *ops.batch_statistics(place, exact)

    assert_precise(compute, dtype, y.to(dtype), target)


def test_statistics_of_large_mean_keep_their_digits():
    y = (torch.randn(4, 3, 15, 15, dtype=torch.float64) + 1000).float()
    expected = y.double().var((0, 2, 3), correction=0)
    found = triton.batch_statistics(y, torch.float32).var.flatten().double()
    assert ((found - expected).abs() / expected).max() < 1e-4


@every_case
def test_units_forward(shape, dtype, last):
    check_forward(shape, dtype, last, vectors(4, shape[1]))


@pytest.mark.parametrize("absent", [(2,), (3,), (2, 3)], ids=["weight", "bias", "both"])
def test_units_forward_without_weight_or_bias(absent):
    given = vectors(4, SHAPES["odd"][1])
    given = [None if i in absent else vector for i, vector in enumerate(given)]
    check_forward(SHAPES["odd"], torch.float32, True, given)


def check_forward(shape, dtype, last, norm_vectors):
    x = a_map(shape, shape[1] + 2, dtype, last)  # units read the first channels only

    def compute(ops, x, tail, *norm_vectors):
        unit = a_unit(ops, norm_vectors, tail)
        workspace = Workspace(x, shape[1], norm_vectors[0].dtype, layout(x.dim() - 2, last))
        y, statistics = ops.forward_unit(x, unit, workspace, need_statistics=True)
        return y, *statistics

    for name, tail in tails(shape, dtype).items():
        with noted(name):
            assert_precise(compute, dtype, x, tail, *norm_vectors)


@every_case
def test_units_backward(shape, dtype, last):
    check_backward(shape, dtype, last, accumulate=True)


def test_units_backward_may_overwrite():
    check_backward(SHAPES["odd"], torch.float32, True, accumulate=False)


def check_backward(shape, dtype, last, accumulate):
    dims = len(shape[-1])
    x = a_map(shape, shape[1] + 2, dtype, last)
    norm_vectors = vectors(6, shape[1])
    target = a_map(shape, shape[1] + 1, torch.float32, last)

    def compute(ops, x, mean, var, gamma, beta, a, b, target, grad, tail):
        target = target.clone(memory_format=torch.preserve_format)
        unit = a_unit(ops, (mean, var, gamma, beta), tail)
        workspace = Workspace(x, shape[1], mean.dtype, layout(dims, last))
        weight, bias, sums, _ = ops.backward_unit(
            grad,
            x,
            unit,
            workspace,
            need_weight=tail.conv is not None,
            need_bias=tail.conv is not None and tail.conv.bias is not None,
            need_sums=True,
            target=target,
            accumulate=accumulate,
        )
        totals = a.clone(), b.clone()
        gradients = ops.collect(sums, unit, 0.1, totals, accumulate)
        found = [target, *(gradient.flatten() for gradient in gradients), *totals]
        if weight is not None:
            found.append(weight.to(mean.dtype))
        return [*found, bias.to(mean.dtype)] if bias is not None else found

    for name, tail in tails(shape, dtype).items():
        workspace = Workspace(x, shape[1], torch.float32, layout(dims, last))
        unit = a_unit(eager, norm_vectors[:4], tail)
        y, _ = eager.forward_unit(x, unit, workspace, need_statistics=False)
        with noted(name):
            grad = torch.randn_like(y)
            assert_precise(compute, dtype, x, *norm_vectors, target, grad, tail)


@every_case
def test_gradient_of_map_with_one_reader_waits_for_its_batch_terms(shape, dtype, last):
    x = a_map(shape, shape[1], dtype, last)

    def compute(ops, x, mean, var, gamma, beta, a, b, grad, tail):
        unit = a_unit(ops, (mean, var, gamma, beta), tail)
        workspace = Workspace(x, shape[1], mean.dtype, layout(x.dim() - 2, last))
        waits = ops.can_wait(x, unit, workspace)
        assert waits == (ops is triton and not triton.is_product(tail))
        return finished_gradient(ops, grad, x, unit, workspace, mean, a, b)

    for name, tail in tails(shape, dtype).items():
        workspace = Workspace(x, shape[1], torch.float32, layout(x.dim() - 2, last))
        norm_vectors = vectors(6, shape[1])
        unit = a_unit(eager, norm_vectors[:4], tail)
        y, _ = eager.forward_unit(x, unit, workspace, need_statistics=False)
        with noted(name):
            assert_precise(compute, dtype, x, *norm_vectors, torch.randn_like(y), tail)


@every_case
def test_product_is_left_activated_for_its_reader(shape, dtype, last):
    x = a_map(shape, shape[1] + 2, dtype, last)
    some, leaves, dims = tails(shape, dtype), shape[2], len(shape[-1])
    weight = torch.randn(4, leaves, *(3,) * dims)
    reads = Tail(None, Conv(weight, None, some["3x3"].conv.geometry), dtype)
    grad = a_map(shape, 4, dtype, last)

    def compute(ops, x, tail, reads, grad, *given):
        unit = a_unit(ops, [vector[: shape[1]] for vector in given[:4]], tail)
        reader = a_unit(ops, [vector[:leaves] for vector in given[4:]], reads)
        scratch = Workspace(x, max(shape[1:3]), given[0].dtype, layout(dims, last))
        z, _ = ops.forward_unit(x, unit, scratch, need_statistics=False, reader=reader)
        left = scratch.take(z, reader.norm)
        assert (left is not None) == (ops is triton)
        if left is not None:
            scratch.leave(left, z, reader.norm)
        found = ops.backward_unit(
            grad,
            z,
            reader,
            scratch,
            need_weight=True,
            need_bias=False,
            need_sums=True,
            target=torch.empty_like(z),
            accumulate=False,
        )
        return z, found.conv_weight.to(given[0].dtype)

    given = vectors(8, max(shape[1:3]))
    assert_precise(compute, dtype, x, some["1x1"], reads, grad, *given)


@every_case
def test_finished_map_is_corrected(shape, dtype, last):
    """Some channels of it."""
    grad, x = (a_map(shape, shape[1] + 3, t, last) for t in (torch.float32, dtype))
    channels = slice(2, 2 + shape[1])

    def compute(ops, grad, x, mean, a, b):
        out = torch.empty_like(grad[:, channels])
        return [ops.correct(grad, x, channels, mean, a, b, out)]

    assert_precise(compute, dtype, grad, x, *vectors(3, shape[1] + 3))


@pytest.mark.parametrize("dtype", HALVES)
def test_corrected_gradient_is_rounded_to_type_of_its_readers(dtype):
    shape = SHAPES["odd"]
    grad, x = (a_map(shape, shape[1], t, True) for t in (torch.float32, dtype))
    inputs = (grad, x, slice(0, shape[1]), *vectors(3, shape[1]))
    out = torch.empty_like(x, dtype=triton.corrected_dtype(dtype, torch.float32))
    expected = eager.correct(*inputs, torch.empty_like(grad)).to(dtype)
    assert out.dtype == dtype
    assert relative_error(triton.correct(*inputs, out), expected) <= torch.finfo(dtype).eps


def test_slabs_add_up(monkeypatch):
    for size in ("WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(workspace, size, 1)
    shape = SHAPES["many-rows"]
    check_backward(shape, torch.float32, True, accumulate=True)
    x, some = a_map(shape, shape[1], torch.float32, True), tails(shape, torch.float32)
    scratch = Workspace(x, shape[1], torch.float32, torch.channels_last)
    reader = a_unit(triton, vectors(4, shape[1]), some["3x3"])
    assert not triton.can_wait(x, reader, scratch)
    unit = a_unit(triton, vectors(4, shape[1]), some["1x1"])
    y, _ = triton.forward_unit(x, unit, scratch, need_statistics=False, reader=reader)
    assert scratch.take(y, reader.norm) is None


def test_map_beyond_32_bits_has_64_bit_offsets():
    """By an index that 32 bits do not hold, on a map whose memory is mostly not there."""
    far = torch.empty_strided((2, 4, 3, 3), (2**31, 9, 3, 1), device="meta")
    near = torch.empty_strided((2, 4, 3, 3), (36, 9, 3, 1), device="meta")
    offsets = [launch.shared(launch.matrix(x))["INDEX"] for x in (far, near)]
    assert offsets == [launch.tl.int64, launch.tl.int32]


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
def test_64_bit_offsets_lead_to_same_places(last, monkeypatch):
    monkeypatch.setattr(launch, "FAR", 0)
    x = a_map(SHAPES["odd"], 5, torch.float32, last)
    assert launch.shared(launch.matrix(x))["INDEX"] == launch.tl.int64
    test_units_forward(SHAPES["odd"], torch.float32, last)
    test_units_backward(SHAPES["odd"], torch.float32, last)


@pytest.mark.parametrize("name", ["product", "weight", "input"])
def test_measuring_tiles_changes_no_result(name, monkeypatch):
    """Every tile is launched, in place over a gradient that accumulates."""
    measured = []

    def every(tiles, x, key, launch):
        if key[0] == name:
            for tile in tiles:
                measured.append(tile)
                launch(tile)
        return tiles[-1]

    monkeypatch.setattr(tiling, "fastest", every)
    test_units_forward(SHAPES["odd"], torch.bfloat16, True)
    check_backward(SHAPES["odd"], torch.bfloat16, True, accumulate=True)
    assert len(set(measured)) > 1


@pytest.mark.parametrize("multiprocessors", [1, 16, 108, 128, 132])
@pytest.mark.parametrize("sizes", [(64, 64), (252, 128), (1024, 128), (1664, 832)], ids=str)
def test_weight_gradient_fills_device_once(sizes, multiprocessors, monkeypatch):
    """Eight warps of them, of each tile, run on a multiprocessor, or about so many."""
    launched = []

    def every(tiles, x, key, run):
        for tile in tiles:
            run(tile)
        return tiles[0]

    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(
        launch, "run", lambda kernel, grid, *_, warps, **__: launched.append((*grid, warps))
    )
    monkeypatch.setattr(tiling, "fastest", every)
    reads, leaves = sizes
    weight = torch.empty(leaves, reads, 1, 1, device="meta")
    tail = Tail(None, Conv(weight, None, POINTWISE), torch.bfloat16)
    unit = a_unit(triton, torch.empty(4, reads, 1, 1, device="meta"), tail)
    x, grad = (torch.empty(32, c, 28, 28, device="meta", dtype=torch.bfloat16) for c in sizes)
    launch_weight_gradient(grad, x, unit)
    assert len(launched) == 3
    for tiles, parts, warps in launched:
        programs = multiprocessors * 8 // warps
        assert tiles * parts <= programs + tiles // 2 or parts == 1
        assert 3 * tiles * parts >= 2 * programs


@every_shape
@pytest.mark.parametrize("whole_maps", [False, True], ids=["values", "maps"])
def test_dropout_is_decided_by_seed_whatever_the_layout(shape, whole_maps):
    seeds = torch.tensor([5, 5, 2**61 + 5])
    found = []
    for seed, last in zip(seeds, (True, False, False), strict=True):
        y = a_map(shape, shape[1], torch.float32, last).fill_(3.0)
        triton.drop(y, seed, 0.4, whole_maps, layout(len(shape[-1]), last))
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert set(found[0].unique().tolist()) <= {0.0, 5.0}
    if whole_maps:
        assert torch.equal(found[0], found[0][(..., *(slice(1),) * len(shape[-1]))].expand_as(y))
    elif y.numel() > 50:
        assert not torch.equal(found[0], found[2])
        assert abs((found[0] == 0).double().mean() - 0.4) < 2.5 / y.numel() ** 0.5


def test_dropout_keeps_nan_and_may_drop_everything():
    y = torch.full((2, 3, 4, 4), 2.0)
    y[0, 0] = torch.nan
    triton.drop(y, torch.tensor(1), 1.0, False, torch.contiguous_format)
    assert y[0, 0].isnan().all()
    assert not y[1].any()
