"""Where the Triton kernels run: in the interpreter on a CPU, otherwise natively on a GPU.

Factory functions make their tensors there.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from efficient_densenet.kernels.triton import launch

DEVICE = (
    pytest.param("cpu", id="interpreted")
    if os.environ.get("TRITON_INTERPRET") == "1"
    else pytest.param("cuda", marks=pytest.mark.cuda)
)


@pytest.fixture(autouse=True, params=[DEVICE])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Nothing is rounded to TF32."""
    monkeypatch.setattr(launch, "rounds_to_tf32", lambda: False)
    if request.param == "cuda":
        for settings in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
            monkeypatch.setattr(settings, "fp32_precision", "ieee")
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)
