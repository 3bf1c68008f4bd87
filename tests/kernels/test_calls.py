"""What a bottleneck layer asks of the host: launches of Triton's kernels, calls into PyTorch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from efficient_densenet import DenseNet
from efficient_densenet.kernels import whole
from efficient_densenet.kernels.layout import imagined_on
from support.calls import Layouts, calls_of_layer, calls_on_cpu
from support.compare import MODES
from support.marks import slabs_and_whole

# Forward and backward; docs/kernels.md says the same.
LAUNCHES = {"norm": (5, 8), "bottleneck": (5, 8)}
# Both passes together, views included; by autocast.
MOST_OPERATORS = {False: 26, True: 33}
# The same of the eager operations on a CPU; a naive layer calls 42.
MOST_ON_CPU = {
    "slabs": {"norm": 103, "bottleneck": 110},
    "whole": {"norm": 56, "bottleneck": 62},
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", MODES)
def test_layer_launches_few_kernels_and_calls_few_operators(recompute, autocast):
    forward, backward = calls_of_layer(recompute, autocast)
    launched = (forward.kernels.total(), backward.kernels.total())
    assert launched == LAUNCHES[recompute], (forward.kernels, backward.kernels)
    operators = forward.operators + backward.operators
    assert operators["convolution_backward"] == 1
    assert operators.total() <= MOST_OPERATORS[autocast], operators


@pytest.mark.parametrize("kernels", ["triton", "eager"])
def test_planes_become_channels_last_once(kernels):
    """Where Triton runs no convolution but the stem's sees any other layout, nor is one changed."""
    with FakeTensorMode(), imagined_on(torch.device("cuda")), Layouts() as layouts:
        model = DenseNet(8, (2, 2), 8, 2, num_classes=5, kernels=kernels)
        model(torch.empty(4, 3, 32, 32)).sum().backward()
    assert layouts.count > 5
    if kernels == "triton":
        assert layouts.read == {torch.channels_last}
        assert layouts.changed <= 2
    else:
        assert torch.contiguous_format in layouts.read


@slabs_and_whole
@pytest.mark.parametrize("recompute", MODES)
def test_layer_on_cpu_calls_few_operators(recompute):
    deep, shallow = (calls_on_cpu(layers, recompute) for layers in (8, 4))
    most = MOST_ON_CPU["whole" if whole.MOST_BYTES else "slabs"]
    assert (deep - shallow) / 4 <= most[recompute]
