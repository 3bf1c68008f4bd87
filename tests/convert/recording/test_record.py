"""Recording a forward pass reads no value and leaves no trace."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.convert.recording.record import record
from efficient_densenet.convert.recording.twin import Unrecordable, plain_attributes
from support.traps import TRAPS
from support.wild import BLOCKS, C0

ALL = {name: wild.make for name, wild in BLOCKS.items()}
ALL |= {name: make for name, (make, _) in TRAPS.items()}
INPUT = torch.randn(3, C0, 8, 6)


def random_states():
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("name", ALL)
def test_recording_leaves_no_trace(name, training):
    module, wild = ALL[name](), BLOCKS.get(name)
    x, *rest = (wild.input(), *wild.extra) if wild else (INPUT,)
    before, state = plain_attributes(module), copy.deepcopy(module.state_dict())
    objects = {key: id(value) for key, value in vars(module).items()}
    versions = [t._version for t in (*module.parameters(), *module.buffers(), x)]
    values = x.clone()
    torch_state, python_state, numpy_state = random_states()
    try:
        record(module, (x, *rest), training=training)
    except Unrecordable:
        assert name in TRAPS
    assert plain_attributes(module) == before
    assert {key: id(value) for key, value in vars(module).items()} == objects
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert [t._version for t in (*module.parameters(), *module.buffers(), x)] == versions
    assert torch.equal(x, values)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert (numpy.random.get_state()[1] == numpy_state).all()
    assert all(p.grad is None for p in module.parameters())


class Values(TorchDispatchMode):
    """Counts operations on tensors with values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if not all(t.is_meta for t in tensors):
            self.seen.append(func)
        return result


def test_recording_is_hidden_from_modes_that_are_on():
    module = BLOCKS["C-dropout"].make()
    with Values() as values:
        record(module, (INPUT,))
    assert not values.seen


@pytest.mark.parametrize("name", ["A-dropout", "C-plain", "D-loop"])
def test_recording_is_as_long_on_any_size(name):
    """Recorded on maps of one size, it holds for all: nothing in it depends on the size."""
    module = BLOCKS[name].make()
    names = [
        [node.name for node in record(module, (torch.randn(n, C0, h, w),)).nodes]
        for n, h, w in ((1, 40, 3), (7, 5, 5))
    ]
    assert names[0] == names[1]


def test_hooks_do_not_run():
    module, ran = BLOCKS["C-plain"].make(), []
    for part in module.modules():
        part.register_forward_pre_hook(lambda *args: ran.append(args))
        part.register_forward_hook(lambda *args: ran.append(args))
        part.register_full_backward_hook(lambda *args: ran.append(args))
    recording = record(module, (INPUT,))
    assert not ran
    assert set(recording.patched) == {path for path, _ in module.named_modules()}


def test_operations_know_their_call_and_parameters():
    recording = record(BLOCKS["D-loop"].make(), (INPUT,))
    names = ["add", "empty", "native_batch_norm", "relu", "convolution"]
    layer = recording.root.children[1]
    assert layer.path == "denselayers.1"
    assert [node.name for node in recording.nodes_in(layer)] == names
    norm, conv = (recording.nodes_in(layer)[i] for i in (2, 4))
    assert norm.call.path == "denselayers.1.0"
    assert norm.inputs["weight"].path == "denselayers.1.0.weight"
    assert conv.inputs["bias"].path == "denselayers.1.2.bias"
    assert conv.inputs["padding"] == (1, 1)


def test_failure_is_recorded_up_to_where_it_happens():
    model = nn.Sequential(nn.Conv2d(C0, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))
    recording = record(model, (INPUT,))
    assert recording.error is not None
    assert recording.error[0] == "3"
    assert [call.stop is not None for call in recording.calls()] == [False, True, True, True, False]


CHANGES = {
    "number": lambda module: setattr(module, "p", 0.5),
    "string": lambda module: setattr(module.block[0], "padding_mode", "reflect"),
    "flag": lambda module: module.block[1].eval(),
    "list": lambda module: module.rates.append(1),
    "inside a dictionary": lambda module: module.options.update(deep=[1, 3]),
    "class": lambda module: setattr(module.block[2], "__class__", nn.ReLU6),
    "child": lambda module: module.block.append(nn.Identity()),
    "another child": lambda module: module.block.__setitem__(2, nn.ReLU(inplace=True)),
    "tied parameter": lambda module: setattr(module.block[0], "weight", module.twin.weight),
    "removed parameter": lambda module: setattr(module.block[1], "weight", None),
    "hook": lambda module: module.block[0].register_forward_hook(lambda *args: None),
    "forward": lambda module: setattr(module, "forward", lambda x: x),
    "object": lambda module: setattr(module.config, "depth", 7),
}


class Config:
    depth = 3

    def __init__(self):
        self.depth = 4


def with_attributes():
    module = nn.Module()
    module.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    module.twin = nn.Conv2d(4, 4, 1)
    module.p, module.rates, module.options = 0.0, [0.1], {"deep": [1, 2]}
    module.config = Config()
    return module


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_that_python_could_decide_by_is_seen(change):
    module = with_attributes()
    before = plain_attributes(module)
    assert plain_attributes(module) == before
    change(module)
    assert plain_attributes(module) != before


def test_step_of_training_is_no_change():
    module = BLOCKS["C-plain"].make()
    before = plain_attributes(module)
    module(INPUT).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    assert plain_attributes(module) == before
