"""Whole training steps that a CUDA graph can hold.

Without a GPU they are recorded on shapes alone, where the passes go as they would on one; whatever
needs a value, or another device, is refused. With one they are captured and replayed.
"""

import copy
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficient_densenet import DenseNet
from efficient_densenet.functional import autograd
from efficient_densenet.kernels.layout import imagined_on
from support.compare import norms
from support.marks import either_mode

# The value of a tensor on the host, or a shape that depends on values.
WAITING = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select"}
WAITING |= {"unique_consecutive", "_unique2", "unique_dim", "repeat_interleave"}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, capturable=True),
}


class Recorder(TorchDispatchMode):
    """Refuses what a graph cannot hold: tensors elsewhere, and values that the host would need."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{name} meets a tensor elsewhere"
        self.names.append(name)
        return out


def network(recompute, **options):
    """Small, with dropout in every layer; one norm keeps the cumulative average."""
    model = DenseNet(4, (2, 2), 8, 2, num_classes=5, recompute=recompute, **options)
    norms(model)[1].momentum = None
    return model


def train(model, optimizer, x, target):
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x).float(), target)
    loss.backward()
    optimizer.step()


@pytest.fixture
def on_shapes(monkeypatch):
    """PyTorch knows capturable optimizers on devices alone that can capture."""
    adam = import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["meta"])
    with imagined_on(torch.device("cuda")):
        yield


@pytest.mark.parametrize("kernels", ["triton", "eager"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@either_mode
def test_training_step_can_be_recorded(recompute, optimizer, kernels, on_shapes, monkeypatch):
    launched = []
    if kernels == "triton":
        launch = pytest.importorskip("efficient_densenet.kernels.triton.launch")
        monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: launched.append(kernel))
    model = network(recompute, drop_rate=0.3, kernels=kernels).to("meta")
    learning = OPTIMIZERS[optimizer](model.parameters())
    x, target = torch.empty(4, 3, 32, 32, device="meta"), torch.empty(4, device="meta").long()
    with Recorder("meta") as recorder:
        for _ in range(2):
            train(model, learning, x, target)
    assert "convolution_backward" in recorder.names
    assert "randint" in recorder.names
    assert bool(launched) == (kernels == "triton")


def test_seeds_drawn_on_host_are_refused(monkeypatch, on_shapes):
    """So that the test above can fail."""
    monkeypatch.setattr(autograd, "draw_seeds", lambda x, layers: torch.randint(9, (layers,)))
    model = network("norm", drop_rate=0.3).to("meta")
    with Recorder("meta"), pytest.raises(AssertionError, match="elsewhere"):
        model(torch.empty(4, 3, 32, 32, device="meta"))


def test_values_read_on_host_are_refused():
    with Recorder("cpu"), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()


@pytest.fixture
def native():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.use_deterministic_algorithms(False)  # it would fill memory that a graph has taken


def captured(model, x, dtype):
    """The model in a graph, with the state that it had before."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(model, (x,))
    model.load_state_dict(state)
    return graphed


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kernels", ["triton", "eager"])
@either_mode
def test_graphed_steps_match_steps_by_themselves(recompute, kernels, dtype, native):
    """Parameters, running statistics and counts after three batches."""
    model = network(recompute, kernels=kernels).cuda()
    batches = torch.randn(3, 8, 3, 32, 32, device="cuda")
    target = torch.arange(8, device="cuda") % 5
    states = []
    for own in (model, captured(copy.deepcopy(model), batches[0], dtype)):
        learning = OPTIMIZERS["adamw"](own.parameters())
        for x in batches:
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                train(own, learning, x, target)
        states.append(own.state_dict())
    for name, expected in states[0].items():
        slack = 1e-2 * max(1.0, expected.abs().max().item())
        assert torch.allclose(states[1][name].double(), expected.double(), atol=slack), name


@pytest.mark.cuda
@pytest.mark.parametrize("kernels", ["triton", "eager"])
def test_replays_draw_other_masks_and_backward_pass_draws_them_again(kernels, native):
    model = network("bottleneck", drop_rate=0.5, kernels=kernels).cuda()
    x = torch.randn(8, 3, 32, 32, device="cuda")
    graphed = captured(model, x, None)
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        out = graphed(x)
        out.square().sum().backward()
        grad = next(model.parameters()).grad
        found.append((out.detach().clone(), grad.clone()))
    for first, other, again in zip(*found, strict=True):
        assert not torch.allclose(first, other)
        assert torch.allclose(first, again, rtol=1e-3, atol=1e-4)
