"""What a step asks of the device: how many launches, and never to wait for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet import EfficientDenseBlock
from efficient_densenet.kernels.triton import launch
from support.compare import MODES

MOST_FORWARD, MOST_BACKWARD = 12, 20
# Forward and backward with everything recomputed, as docs/kernels.md says; by autocast.
DOCUMENTED = {False: (8, 15), True: (10, 18)}
# What launches nothing besides views: memory without values, and questions about types.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
# A convolution's gradients are a launch for the input and one for the weight.
SEVERAL = {"convolution_backward": 2}
# The value of a tensor as a number, or a shape that depends on values.
WAITING = {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select"}


class Launches(TorchDispatchMode):
    """Counts launches of operators; refuses those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        if name not in FREE and not func.is_view:
            self.names += [name] * SEVERAL.get(name, 1)
        return out


def launches(layers, recompute, monkeypatch, autocast, device):
    """The names of all that a block's forward and backward pass launch; nothing is computed."""
    block = EfficientDenseBlock(layers, 8, 2, 4, recompute=recompute)
    block = block.to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    with Launches() as counter, monkeypatch.context() as patch:
        patch.setattr(launch, "run", lambda kernel, *_, **__: counter.names.append(kernel.__name__))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = block(x)
        forward = list(counter.names)
        out.backward(torch.ones_like(out))
    assert "product" in forward
    return forward, counter.names[len(forward) :]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", MODES)
def test_bottleneck_layer_launches_few_kernels(recompute, autocast, monkeypatch, device):
    torch.use_deterministic_algorithms(False)  # it would fill memory, which is a launch
    deep, shallow = (launches(n, recompute, monkeypatch, autocast, device) for n in (4, 3))
    forward, backward = (len(a) - len(b) for a, b in zip(deep, shallow, strict=True))
    assert 0 < forward < MOST_FORWARD, deep[0]
    assert 0 < backward < MOST_BACKWARD, deep[1]
    if recompute == "bottleneck":
        assert (forward, backward) == DOCUMENTED[autocast]
