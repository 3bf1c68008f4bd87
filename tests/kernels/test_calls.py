"""What a bottleneck layer asks of the host: launches of Triton's kernels, calls into PyTorch."""

import pytest

pytest.importorskip("triton")
from support.calls import calls_of_layer
from support.compare import MODES

# Forward and backward; docs/kernels.md says the same.
LAUNCHES = {"norm": (5, 8), "bottleneck": (5, 9)}
# Both passes together, views included; by autocast.
MOST_OPERATORS = {False: 33, True: 41}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", MODES)
def test_layer_launches_few_kernels_and_calls_few_operators(recompute, autocast):
    forward, backward = calls_of_layer(recompute, autocast)
    launched = (forward.kernels.total(), backward.kernels.total())
    assert launched == LAUNCHES[recompute], (forward.kernels, backward.kernels)
    operators = forward.operators + backward.operators
    assert operators["convolution_backward"] == 1
    assert operators.total() <= MOST_OPERATORS[autocast], operators
