"""What an estimate for CUDA says of a step is what the step allocates on Triton's kernels."""

import gc

import pytest
import torch

from efficient_densenet import DenseNet
from efficient_densenet.kernels import workspace
from efficient_densenet.kernels.triton import launch
from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.memory.step import estimate, meter
from support.marks import either_mode


@pytest.fixture(autouse=True)
def as_on_cuda(device, monkeypatch):
    """Scratch, and what is counted, are a GPU's in the interpreter too, which holds no map."""
    if device == "cuda":
        return
    monkeypatch.setattr(workspace, "device_of", lambda x: torch.device("cuda"))
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cuda"])
    run = launch.run

    def run_and_forget(*args, **options):
        run(*args, **options)
        gc.collect(1)  # of each launch the interpreter leaves a cycle that holds its arguments

    monkeypatch.setattr(launch, "run", run_and_forget)


# Not in 16 bits: the interpreter widens maps.
@either_mode
def test_estimate_for_cuda_is_what_step_allocates(recompute, monkeypatch):
    monkeypatch.setattr(workspace, "GPU_WORKSPACE_BYTES", 1 << 16)  # several slabs
    model = DenseNet(8, (3,), 32, num_classes=5, stem="cifar", recompute=recompute)
    x, options = torch.randn(8, 3, 8, 8), {"target": torch.arange(8) % 5}
    estimated, real = estimate(model, x, device="cuda", **options), meter(model, x, **options)
    assert estimated.peak.total == pytest.approx(real.peak.total, rel=0.01)
