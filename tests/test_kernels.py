"""Which implementation of the operations runs, and why."""

import copy
import pickle

import pytest
import torch

from efficient_densenet import DenseNet, EfficientDenseBlock, kernels
from efficient_densenet.kernels import eager
from efficient_densenet.modules.calls import ChoosesKernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SINGLE, DOUBLE = (torch.float32,), (torch.float64,)


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())


def test_cuda_runs_on_triton_by_itself():
    for name in ("auto", "triton"):
        assert kernels.why_eager(name, CUDA, SINGLE) is None


def test_reason_is_stated():
    assert kernels.why_eager("eager", CUDA, SINGLE) == 'kernels="eager"'
    assert "float64" in kernels.why_eager("auto", CUDA, DOUBLE)
    assert "'cpu'" in kernels.why_eager("auto", CPU, SINGLE)
    assert "'meta'" in kernels.why_eager("triton", torch.device("meta"), SINGLE)


def test_old_gpu_runs_eagerly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5)" in kernels.why_eager("auto", CUDA, SINGLE)


def test_without_triton_all_runs_eagerly(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.why_eager("triton", CUDA, SINGLE) == "Triton is not installed"


def test_environment_decides_what_arguments_leave_open(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    assert kernels.why_eager("auto", CUDA, SINGLE) == 'kernels="eager"'
    assert kernels.why_eager("triton", CUDA, SINGLE) is None


def test_bad_names_are_quoted(monkeypatch):
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cudnn'"):
        EfficientDenseBlock(1, 2, 2, 2, kernels="cudnn")
    monkeypatch.setenv(kernels.VARIABLE, "tritn")
    with pytest.raises(ValueError, match=rf"{kernels.VARIABLE} must be one of .*, got 'tritn'"):
        EfficientDenseBlock(1, 2, 2, 2)(torch.randn(2, 2, 4, 4))


def test_block_says_why_and_remembers_through_copies():
    block = EfficientDenseBlock(1, 2, 2, 2, kernels="triton")
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.kernels == "triton"
        assert "'cpu'" in twin.why_eager(torch.randn(2, 2, 4, 4))
    assert kernels.chosen(block.kernels, CPU, SINGLE) is eager


def test_network_hands_its_choice_to_all_parts():
    network = DenseNet(2, (1, 1), 4, 2, kernels="eager")
    parts = [m for m in network.modules() if isinstance(m, ChoosesKernels)]
    assert len(parts) == 4  # two blocks, a transition, and the sequence with the stem
    assert {part.kernels for part in parts} == {"eager"}


@pytest.mark.parametrize("request_", ["eager", "triton"])
def test_spec_carries_the_request(request_, monkeypatch):
    asked = []
    chosen = kernels.chosen
    monkeypatch.setattr(kernels, "chosen", lambda *args: asked.append(args[0]) or chosen(*args))
    network = DenseNet(2, (1, 1), 4, 2, num_classes=3, kernels=request_)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(asked) == 2 * 3  # stem, block with transition, block with head; forward and backward
    assert set(asked) == {request_}
