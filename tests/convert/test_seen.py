"""What a forward function does beside the known operations is seen, and done as before."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from efficient_densenet import convert_, explain
from support.compare import assert_same_training, randomise_
from support.wild import C0, BasicSequence, K, LoopBlock

INPUT = torch.randn(3, C0, 8, 6, dtype=torch.float64)


def pair(model, change=None):
    """A model that was changed and then converted, one that was converted first, the original."""
    original = model.double()
    randomise_(original)
    late = copy.deepcopy(original)
    convert_(late)
    for changed in (original, late) if change else ():
        change(changed)
    early = copy.deepcopy(original)
    convert_(early)
    return early, late, original


def assert_trains_alike(model, change=None, x=INPUT):
    early, late, original = pair(model, change)
    for converted in (early, late):
        assert_same_training(converted, copy.deepcopy(original), x, steps=2, rtol=1e-8)


class Tapped(BasicSequence):
    """What computes nothing, before and after the convolution."""

    def __init__(self, channels):
        super().__init__(channels)
        self.tap, self.drop = nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        return self.tap(self.drop(super().forward(x)))


class TappedInside(Tapped):
    """The same between units and a part that is not known."""

    def __init__(self, channels):
        super().__init__(channels)
        self.last = nn.PReLU(K, dtype=torch.float64)

    def forward(self, x):
        return self.last(super().forward(x))


class Joins(nn.Module):
    def forward(self, maps):
        return torch.cat(maps, 1)


class JoinedByModule(LoopBlock):
    def __init__(self):
        super().__init__()
        self.join = Joins()

    def forward(self, x, scratch=None):
        for layer in self.denselayers:
            x = self.join([x, layer(x)])
        return x


class Transition(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.tap = nn.BatchNorm2d(C0), nn.ReLU(), nn.Identity()
        self.conv, self.pool = nn.Conv2d(C0, 4, 1), nn.AvgPool2d(2)


class Stem(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.conv, self.tap = nn.Conv2d(C0, 4, 3), nn.Identity()
        self.norm, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)


MODELS = {
    "identity": (lambda: LoopBlock(Tapped), "denselayers.1.tap"),
    "dropout of nothing": (lambda: LoopBlock(Tapped), "denselayers.1.drop"),
    "in a layer that runs again": (lambda: LoopBlock(TappedInside), "denselayers.1.tap"),
    "concatenation": (JoinedByModule, "join"),
    "transition": (Transition, "tap"),
    "stem": (Stem, "tap"),
}


def hook(module):
    module.register_forward_hook(lambda module, args, result: 2 * result)


def backward_hook(module):
    module.register_full_backward_hook(lambda module, given, got: (2 * given[0],))


def own_forward(module):
    usual = module.forward
    module.forward = lambda x: 2 * usual(x)


@pytest.mark.parametrize("patch", [hook, backward_hook, own_forward])
@pytest.mark.parametrize(("make", "path"), MODELS.values(), ids=MODELS)
def test_patch_of_module_that_computes_nothing_acts(make, path, patch):
    if make is JoinedByModule and patch is backward_hook:
        pytest.skip("a backward hook sees no tensors in a list")
    assert_trains_alike(make(), lambda model: patch(model.get_submodule(path)))


class CallsForward(Tapped):
    """Passes over what calling a module does beside its forward function."""

    def forward(self, x):
        return self.tap.forward(BasicSequence.forward(self, x))


def test_forward_that_is_called_by_name_acts():
    assert_trains_alike(
        LoopBlock(CallsForward), lambda model: own_forward(model.denselayers[1].tap)
    )


class AfterStem(LoopBlock):
    """Its first module makes the map that enters."""

    def __init__(self, mode):
        super().__init__()
        self.stem, self.mode = nn.Conv2d(C0, C0, 3, padding=1), mode

    def forward(self, x, scratch=None):
        with self.mode():
            x = self.stem(x)
        return super().forward(x)


def test_frozen_stem_gets_no_gradients():
    model = AfterStem(torch.no_grad)
    (found,) = explain(model)
    assert found.reason == "stem runs in a mode of autograd or autocast of its own"
    assert_trains_alike(model, x=INPUT)


def test_stem_runs_under_autocast_of_its_own():
    model = AfterStem(lambda: torch.autocast("cpu", torch.bfloat16))
    (found,) = explain(model)
    assert found.reason == "stem runs in a mode of autograd or autocast of its own"


class Decaying(BasicSequence):
    """Changes its weights when it runs; its last part is not known, so that it would run again."""

    def __init__(self, channels):
        super().__init__(channels)
        self.last = nn.PReLU(K)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.last.weight.mul_(1 - 1e-4)
        return self.last(super().forward(x))


def test_weights_changed_by_forward_change_once():
    model = LoopBlock(Decaying)
    (found,) = explain(model)
    assert found.reason == "denselayers.0 changes denselayers.0.last.weight in place"
    assert_trains_alike(model)


class CheckpointFunction(torch.autograd.Function):
    """Only named like a checkpoint."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Halves(BasicSequence):
    """Its gradient is halved, before a checkpoint or without one."""

    checkpoints = False

    def forward(self, x):
        x = CheckpointFunction.apply(x)
        return (
            checkpoint(super().forward, x, use_reentrant=True)
            if self.checkpoints
            else super().forward(x)
        )


class HalvesThenCheckpoints(Halves):
    checkpoints = True


class FreezesThenCheckpoints(BasicSequence):
    def forward(self, x):
        with torch.no_grad():
            x = F.relu(x)
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize("layer", [Halves, HalvesThenCheckpoints, FreezesThenCheckpoints])
def test_gradient_beside_checkpoint_is_that_of_the_layer(layer):
    model = LoopBlock(layer)
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = 0.0  # else a checkpoint would have it learn twice
        norm.register_buffer("num_batches_tracked", None)
    assert_trains_alike(model)


class Caller(nn.Module):
    """Hands a list, a dict or an object to a block, and looks at it afterwards."""

    def __init__(self, block, make):
        super().__init__()
        self.block, self.make = block, make

    def forward(self, x):
        given = self.make(x)
        y = self.block(x, given)
        if isinstance(given, SimpleNamespace):
            return torch.cat([y, *vars(given).values()], 1)
        return torch.cat([y, *(given.values() if isinstance(given, dict) else given)], 1)


class Appends(LoopBlock):
    def forward(self, x, given):
        given.append(super().forward(x))
        return given[-1]


class SetsKey(LoopBlock):
    def forward(self, x, given):
        given["features"] = super().forward(x)
        return given["features"]


class SetsAttribute(LoopBlock):
    def forward(self, x, given):
        given.features = super().forward(x)
        return given.features


class UsesUp(LoopBlock):
    def forward(self, x, given):
        return super().forward(next(given))


KEEPS = {
    "list": (Appends, lambda x: []),
    "dict": (SetsKey, lambda x: {}),
    "object": (SetsAttribute, lambda x: SimpleNamespace()),
    "iterator": (UsesUp, lambda x: iter([x, 2 * x])),
}


@pytest.mark.parametrize(("block", "make"), KEEPS.values(), ids=KEEPS)
def test_what_block_changes_of_its_arguments_is_seen_by_its_caller(block, make):
    model = Caller(block(), make)
    (found,) = explain(model)
    assert found.reason == "the forward function changes a list or an object that it is given"
    assert_trains_alike(model)


class SetsAttributeIfGiven(LoopBlock):
    def forward(self, x, given=None):
        x = super().forward(x)
        if given is not None:
            given.count += 1
            given.features = x
        return x


def test_object_that_is_given_to_converted_block_holds_no_stand_in():
    block = SetsAttributeIfGiven().double()
    convert_(block, strict=True)
    given = SimpleNamespace(count=1)
    explain(block, INPUT, given)
    assert vars(given) == {"count": 1}
    with pytest.warns(UserWarning, match="changes a list or an object"):
        out = block(INPUT, given)
    assert given.features is out
    assert given.count == 2


class Grows(BasicSequence):
    """Takes the list of maps, and adds its own to it."""

    def forward(self, maps):
        maps.append(super().forward(torch.cat(maps, 1)))


class Lists(LoopBlock):
    """Its layers change a list that is its own."""

    def __init__(self):
        super().__init__(Grows)

    def forward(self, x):
        maps = [x]
        for layer in self.denselayers:
            layer(maps)
        return torch.cat(maps, 1)


def test_list_inside_block_may_grow():
    model = Lists()
    (found,) = explain(model)
    assert found.reason is None
    assert_trains_alike(model)
