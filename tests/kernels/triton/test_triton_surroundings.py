"""Where and how a step by the Triton kernels may run: threads, streams, devices, scaled losses."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from efficient_densenet import DenseNet
from support.compare import assert_all_close, assert_same_training, block_pair, training_results
from support.marks import either_mode

RTOL = 2e-4


@pytest.fixture
def gpus(device):
    """How many there are, without the interpreter's CPU."""
    return torch.cuda.device_count() if device == "cuda" else 0


def network(recompute="bottleneck"):
    return DenseNet(12, (2, 2), 20, 4, num_classes=5, recompute=recompute)


@either_mode
def test_growth_rate_of_12_on_odd_maps_matches_naive_block(recompute):
    """Channels are no multiple of 16, and positions of no power of two."""
    efficient, naive = block_pair(2, 20, 2, 12, recompute=recompute, dtype=torch.float32)
    assert_same_training(efficient, naive, torch.randn(2, 20, 5, 7), rtol=RTOL)


def test_step_in_another_thread_is_the_same():
    block, naive = block_pair(dtype=torch.float32)
    x = torch.randn(3, 5, 7, 5)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(training_results, block, x.clone().requires_grad_()).result()
    expected = training_results(naive, x.clone().requires_grad_())
    assert_all_close(found, expected, RTOL)


def test_scaler_skips_step_whose_float16_gradients_overflow(device):
    """The overflow is not lost on the way through the kernels."""
    model = DenseNet(4, (2,), 8, 2, num_classes=5, stem="cifar")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    with torch.autocast(device, torch.float16):
        loss = model(torch.randn(3, 3, 8, 8)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_step_on_side_stream_is_the_same(gpus):
    if not gpus:
        pytest.skip("no CUDA device")
    model, x = network(), torch.randn(8, 3, 64, 64)
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = training_results(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_all_close(found, training_results(twin, x), RTOL)


def test_step_on_second_device_is_the_same(gpus):
    """While the first one is the current one."""
    if gpus < 2:
        pytest.skip("no second CUDA device")
    model, x = network(), torch.randn(8, 3, 32, 32)
    twin = copy.deepcopy(model).to("cuda:1")
    expected, found = training_results(model, x), training_results(twin, x.to("cuda:1"))
    assert_all_close(
        {k: None if v is None else v.to("cuda:0") for k, v in found.items()}, expected, RTOL
    )


def test_data_parallel_step_matches_naive_network(gpus):
    if not gpus:
        pytest.skip("no CUDA device")
    results = []
    for mode in ("bottleneck", "none"):
        torch.manual_seed(0)
        model = nn.DataParallel(network(mode), list(range(gpus)))
        results.append(training_results(model, torch.randn(8, 3, 64, 64)))
    assert_all_close(*results, rtol=1e-3)
