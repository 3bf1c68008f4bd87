"""The table of implementations: which of them runs, and the reasons against the others."""

import copy
import inspect
import pickle
from typing import Literal, get_args

import pytest
import torch

from efficient_densenet import DenseNet, EfficientDenseBlock
from efficient_densenet.kernels import eager, implementations
from efficient_densenet.kernels.implementations import (
    IMPLEMENTATIONS,
    VARIABLE,
    Implementation,
    Kernels,
    choose,
    explain_choice,
    load,
)
from efficient_densenet.kernels.interface import RELU, Activation, Operations
from efficient_densenet.kernels.triton import support
from efficient_densenet.modules.recomputing import Settings

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda:0", "meta"))
SINGLE, DOUBLE, ONLY_RELU = (torch.float32,), (torch.float64,), (RELU,)


@pytest.fixture(autouse=True)
def gpu_with_triton(monkeypatch):
    """As on a machine with a recent GPU, Triton, and nothing asked for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support, "find_spec", lambda name: object())
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def three(monkeypatch):
    """The table with one implementation more in its middle: for CPUs, in float32 only."""

    def why_not(device, dtypes, activations, small):
        if device.type != "cpu":
            return f"this one never runs on {device.type}"
        return None if set(dtypes) == set(SINGLE) else "this one computes in float32"

    first, _, last = IMPLEMENTATIONS
    table = (first, Implementation("native", "eager", why_not), last)
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", table)
    monkeypatch.setattr(implementations, "Kernels", Literal["auto", "triton", "native", "eager"])


NAMES = ("auto", *(implementation.name for implementation in IMPLEMENTATIONS))


LARGE = "whole does not: its maps are not small"


def explain(name="auto", device=CUDA, dtypes=SINGLE, activations=ONLY_RELU, small=False):
    return explain_choice(name, device, dtypes, activations, small)


def test_argument_takes_every_name_of_table():
    assert get_args(Kernels) == NAMES


@pytest.mark.parametrize("name", NAMES[1:])
def test_implementation_has_every_operation(name):
    """With the same arguments and types."""
    if name == "triton":
        pytest.importorskip("triton")
    module = load(name)
    operations = [n for n in vars(Operations) if not n.startswith("_") and n != "Workspace"]
    assert len(operations) > 7
    for operation in operations:
        expected = inspect.signature(getattr(Operations, operation))
        expected = list(expected.parameters.values())[1:]  # but for self
        found = inspect.signature(getattr(module, operation)).parameters.values()
        assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in expected], operation


def test_last_implementation_runs_everything():
    everything = (META, (torch.complex64,), (Activation("unheard of"),), False)
    assert IMPLEMENTATIONS[-1].why_not(*everything) is None


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_triton_runs_on_cuda(name):
    assert explain(name) == "triton runs"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"name": "eager"}, "kernels='eager'"),
        ({"device": CPU}, "the input is on 'cpu', and Triton kernels are for CUDA"),
        ({"device": META}, "the input is on 'meta', and Triton kernels are for CUDA"),
        ({"dtypes": DOUBLE}, "there are no Triton kernels for torch.float64"),
        (
            {"activations": (RELU, Activation("silu"))},
            "there are no Triton kernels with the activation 'silu'",
        ),
    ],
    ids=["request", "cpu", "meta", "float64", "activation"],
)
def test_reason_against_triton_is_given(case, reason):
    assert explain(**case).startswith(f"eager runs; triton does not: {reason}; whole does not: ")
    arguments = {"name": "auto", "device": CUDA, "dtypes": SINGLE, "activations": ONLY_RELU} | case
    assert choose(**arguments) is eager


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"small": False}, "its maps are not small"),
        ({"dtypes": (torch.bfloat16, torch.bfloat16)}, "it computes in one type"),
        ({"dtypes": (torch.bfloat16, torch.float32)}, "it computes in one type"),
        ({"name": "eager"}, "kernels='eager'"),
    ],
    ids=["size", "bfloat16", "autocast", "request"],
)
def test_small_maps_run_whole_on_cpu(case, reason):
    assert explain("whole", CPU, SINGLE, small=True).startswith("whole runs")
    arguments = {"name": "auto", "device": CPU, "small": True} | case
    assert f"whole does not: {reason}" in explain(**arguments)


def test_old_gpu_runs_eager(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "the GPU has compute capability (7, 5), below (8, 0)"
    assert explain() == f"eager runs; triton does not: {reason}; {LARGE}"


def test_without_triton_eager_runs(monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert explain("triton") == f"eager runs; triton does not: Triton is not installed; {LARGE}"


def test_environment_decides_what_arguments_leave_open(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    asked = f"{VARIABLE}=eager"
    assert explain("auto") == f"eager runs; triton does not: {asked}; whole does not: {asked}"
    assert explain("triton") == "triton runs"


def test_third_implementation_is_tried_in_its_turn(three):
    assert explain() == "triton runs"
    on_cpu = "the input is on 'cpu', and Triton kernels are for CUDA"
    assert explain(device=CPU) == f"native runs; triton does not: {on_cpu}"
    assert explain("native") == (
        "eager runs; triton does not: kernels='native'; "
        "native does not: this one never runs on cuda"
    )
    assert explain("triton", CPU, DOUBLE) == (
        f"eager runs; triton does not: {on_cpu}; native does not: this one computes in float32"
    )


def test_choice_is_made_once(monkeypatch):
    """No pass looks for Triton, or into the environment, a second time; a CPU's never does."""
    looked = []
    monkeypatch.setattr(support, "find_spec", lambda name: looked.append(name))
    for _ in range(3):
        assert choose("auto", CUDA, SINGLE, ONLY_RELU) is eager
        assert choose("auto", CPU, SINGLE, ONLY_RELU) is eager
    assert looked == ["triton"]
    monkeypatch.setenv(VARIABLE, "nonsense")
    assert choose("auto", CPU, SINGLE, ONLY_RELU) is eager
    choose.cache_clear()
    with pytest.raises(ValueError, match="nonsense"):
        choose("auto", CPU, SINGLE, ONLY_RELU)


def test_bad_names_are_quoted(monkeypatch):
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got 'cudnn'"):
        EfficientDenseBlock(1, 2, 2, 2, kernels="cudnn")
    monkeypatch.setenv(VARIABLE, "tritn")
    with pytest.raises(ValueError, match=rf"{VARIABLE} must be one of .*, got 'tritn'"):
        EfficientDenseBlock(1, 2, 2, 2)(torch.randn(2, 2, 4, 4))


def test_block_explains_its_choice_and_keeps_it_in_copies():
    block = EfficientDenseBlock(1, 2, 2, 2, kernels="triton")
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.kernels == "triton"
        assert "'cpu'" in twin.why_kernels(torch.randn(2, 2, 4, 4))


def test_network_hands_its_choice_to_all_parts():
    network = DenseNet(2, (1, 1), 4, 2, kernels="eager")
    parts = [m for m in network.modules() if isinstance(m, Settings)]
    assert len(parts) == 4  # two blocks, a transition, and the sequence with the stem
    assert {part.kernels for part in parts} == {"eager"}


@pytest.mark.parametrize("request_", ["eager", "triton"])
def test_spec_carries_request(request_, monkeypatch):
    asked = []

    def noted(name, *case):
        asked.append(name)
        return choose(name, *case)

    monkeypatch.setattr(implementations, "choose", noted)
    network = DenseNet(2, (1, 1), 4, 2, num_classes=3, kernels=request_)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    # Stem, block with transition, block with head, forward and backward: layout and operations.
    assert len(asked) == 2 * 2 * 3
    assert set(asked) == {request_}


def test_gradients_are_summed_in_type_of_features_unless_named(monkeypatch):
    """By the Triton kernels; the eager operations add what they have computed in float32."""
    triton = pytest.importorskip("efficient_densenet.kernels.triton.operations")
    assert triton.summed_dtype(torch.bfloat16, torch.float32) == torch.bfloat16
    assert eager.summed_dtype(torch.bfloat16, torch.float32) == torch.float32
    monkeypatch.setenv(triton.GRADIENTS, "float32")
    assert triton.summed_dtype(torch.bfloat16, torch.float32) == torch.float32
    monkeypatch.setenv(triton.GRADIENTS, "bfloat16")
    with pytest.raises(ValueError, match="must be 'features' or 'float32', got 'bfloat16'"):
        triton.summed_dtype(torch.bfloat16, torch.float32)
