"""The slabs that a workspace cuts a batch into, on a CPU and on a GPU that is not there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from efficient_densenet.kernels import eager, workspace
from efficient_densenet.kernels.workspace import Workspace

SAMPLES, CHANNELS, SIDE = 50, 16, 8
SAMPLE = CHANNELS * SIDE * SIDE


def rows(device, dtype, most, monkeypatch):
    """How many samples each slab has, if ``most`` of that type fit."""
    for size in ("WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(workspace, size, most * SAMPLE * dtype.itemsize)
    with FakeTensorMode():
        x = torch.empty(SAMPLES, CHANNELS, SIDE, SIDE, device=device)
        scratch = Workspace(x, CHANNELS, dtype, torch.channels_last)
        return [slab.stop - slab.start for slab in scratch.slabs(x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_slabs_are_as_few_as_fit(device, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert rows(device, dtype, 50, monkeypatch) == [50]
    assert rows(device, dtype, 49, monkeypatch) == [25, 25]
    assert rows(device, dtype, 17, monkeypatch) == [17, 17, 16]
    assert rows(device, dtype, 1, monkeypatch) == [1] * 50


def test_only_cpu_has_threads_to_keep_busy(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert rows("cpu", torch.float32, 20, monkeypatch) == [16, 16, 16, 2]
    assert rows("cuda", torch.float32, 20, monkeypatch) == [17, 17, 16]


def test_scratch_holds_what_is_stored_in_it():
    """Triton's kernels store maps; the eager operations sum them in the statistics' type, too."""
    triton = pytest.importorskip("efficient_densenet.kernels.triton.operations")
    for stored in (torch.bfloat16, torch.float32):
        assert triton.scratch_dtype(stored, torch.float32) == stored
        assert eager.scratch_dtype(stored, torch.float32) == torch.float32


def test_slab_is_as_large_as_what_is_stored_allows():
    """Where features are wider than what a convolution reads, as under autocast."""
    x = torch.empty(SAMPLES, CHANNELS, SIDE, SIDE, device="meta")
    scratch = Workspace(x, CHANNELS, torch.float32, torch.channels_last)
    scratch._bytes = 16 * SAMPLE * 4
    wide, narrow = ([s.stop - s.start for s in scratch.slabs(x, d)] for d in (None, torch.bfloat16))
    assert max(wide) <= 16 < max(narrow) <= 32


def test_what_was_left_is_taken_once_and_only_by_whom_it_was_left_for():
    x, norm = torch.randn(2, CHANNELS, SIDE, SIDE), object()
    scratch = Workspace(x, CHANNELS, x.dtype, torch.channels_last)

    def left():
        activated = scratch.scratch(x, x.dtype)
        scratch.leave(activated, x, norm)
        return activated

    activated = left()
    assert scratch.take(x, norm) is activated
    assert scratch.take(x, norm) is None
    left()
    assert scratch.take(x, object()) is None
    left()
    assert scratch.take(x.clone(), norm) is None
    left()
    scratch.scratch(x, x.dtype)  # overwrites it
    assert scratch.take(x, norm) is None
    left()
    scratch.narrow(CHANNELS // 2)
    assert scratch.take(x, norm) is None
