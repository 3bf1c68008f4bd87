"""The Triton kernels without a GPU: run in Triton's interpreter, and built for absent GPUs.

The interpreter replaces Triton's functions when they are defined, so that it needs a process of its
own: each file of ``tests/kernels/triton`` is run in one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import kernel_builds
from benchmarks.kernel_builds import LAYOUTS, TARGETS, TENSOR_CORES
from efficient_densenet import EfficientDenseBlock
from efficient_densenet.kernels.triton import launch

# One of each kind of tensor cores is built always.
OFTEN = (80, 90, 100)
every_target = pytest.mark.parametrize(
    "capability", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in TARGETS]
)
INTERPRETED = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
PRODUCTS = ("product", "weight_gradient", "input_gradient")
RECTIFIERS = ("rectify", "rectify_backward", "pool", "pool_backward")
MOST_REGISTERS = 134


@pytest.mark.parametrize("file", INTERPRETED, ids=lambda file: file.stem)
def test_kernels_compute_what_they_should(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32])
def launches(request):
    return request.param, kernel_builds.launches(request.param)


@every_target
def test_kernels_are_built_without_spilling(launches, capability):
    dtype, found = launches
    assert set(PRODUCTS) < {one.name for one in found}
    for one in found:
        built = kernel_builds.build(one, capability)
        assert not built.spilled, one.name
        assert built.shared <= TARGETS[capability], one.name
        if one.name in PRODUCTS:
            assert TENSOR_CORES[capability] in built.instructions, one.name
            assert built.registers <= MOST_REGISTERS or dtype != torch.bfloat16, one.name


@pytest.mark.parametrize(
    "capability", [c if c == 90 else pytest.param(c, marks=pytest.mark.slow) for c in TARGETS]
)
def test_built_kernels_keep_nan_and_denormal_numbers(launches, capability):
    """In the code that they are built to, ``max.f32`` would drop the one, ``.ftz`` the others.

    Only ``var + eps`` may be flushed, which no eps lets be so small.
    """
    rectifies = []
    for one in launches[1]:
        ptx = kernel_builds.build(one, capability).ptx
        maxima = re.findall(r"\bmax\.\S*[fb]\d+\S*", ptx)
        assert all(maximum.startswith("max.NaN.") for maximum in maxima), (one.name, maxima)
        assert ".ftz" not in ptx.replace("rsqrt.approx.ftz", ""), one.name
        rectifies += [one.name] if maxima else []
    assert set(rectifies) == {*PRODUCTS, *RECTIFIERS}


@pytest.mark.parametrize(
    ("layout", "widest"),
    [
        ("channels last, 256", 16),
        ("channels last, 264", 8),  # a growth rate of 12: a multiple of 4 values
        pytest.param("planes, 56²", 16, marks=pytest.mark.slow),
    ],
)
def test_maps_are_read_and_written_many_values_at_once(layout, widest, monkeypatch):
    """As many as all that a launch is told of its maps is a multiple of."""
    layer, last = LAYOUTS[layout]
    monkeypatch.setattr(kernel_builds, "LAYER", layer)
    for one in kernel_builds.launches(torch.bfloat16, last):
        built = kernel_builds.build(one, 90)
        widths = built.widths
        assert not built.spilled, one.name
        assert 2 not in widths, one.name
        if one.name not in ("fold_moments", "collect"):  # vectors only
            assert max(widths) >= widest, one.name


def test_values_that_lie_apart_are_read_one_by_one(monkeypatch):
    """So that the test above can fail."""
    layer, last = LAYOUTS["planes, 14²"]
    monkeypatch.setattr(kernel_builds, "LAYER", layer)
    rectify = next(k for k in kernel_builds.launches(torch.bfloat16, last) if k.name == "rectify")
    assert kernel_builds.build(rectify, 90).widths[2] > 0


def test_products_for_older_gpus_use_no_tensor_cores():
    """Of compute capability 7.5, and spill: there the eager operations run."""
    launched = {one.name: one for one in kernel_builds.launches(torch.float16)}
    built = kernel_builds.build(launched["product"], 75)
    assert built.spilled
    assert not any("MMA" in instruction for instruction in built.instructions)


@every_target
def test_float32_without_tf32_is_built_without_spilling(capability, monkeypatch):
    monkeypatch.setattr(launch, "rounds_to_tf32", lambda: False)
    products = [found for found in kernel_builds.launches(torch.float32) if found.name in PRODUCTS]
    assert {found.arguments["PRECISION"] for found in products} == {"ieee"}
    assert not any(kernel_builds.build(found, capability).spilled for found in products)


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
def test_every_tile_to_choose_from_is_built_without_spilling(last, capability):
    for dtype in (torch.bfloat16, torch.float16):
        for one in kernel_builds.launches(dtype, last, every_tile=True):
            built = kernel_builds.build(one, capability)
            assert not built.spilled, (one.name, one.tile, dtype)
            assert built.shared <= TARGETS[capability], (one.name, one.tile, dtype)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["norm", "bottleneck"])
def test_block_is_captured_in_graph(recompute):
    """A replayed graph of forward and backward pass gives what they gave by themselves."""
    torch.use_deterministic_algorithms(False)
    block = EfficientDenseBlock(4, 32, 4, 16, recompute=recompute).cuda()
    block = block.to(memory_format=torch.channels_last)
    x = torch.randn(8, 32, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    x.requires_grad_()
    assert block.why_kernels(x) == "triton runs"

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = block(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for found, before in zip(captured, expected, strict=True):
        assert torch.allclose(found, before, rtol=1e-2, atol=1e-2 * before.abs().max().item())
