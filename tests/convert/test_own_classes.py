"""Converted modules whose classes do more than compute: they train as before."""

import copy
import gc
import types
import warnings
import weakref
from abc import ABC
from typing import Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet import convert_, explain, revert_
from efficient_densenet.convert import fronts
from efficient_densenet.convert.converted import Converted
from efficient_densenet.convert.fronts import DenseFront, NormFront, StemFront, TransitionFront
from support.compare import assert_close, assert_same_training, randomise_
from support.copies import pickled

C0, K = 4, 3
T = TypeVar("T")
INPUT = torch.randn(2, C0, 6, 5, dtype=torch.float64)


class Layer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, K, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.norm(x)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(C0 + i * K) for i in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class JoiningLayer(Layer):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Transition(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(C0 + 3 * K)
        self.conv = nn.Conv2d(C0 + 3 * K, C0, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x, embedding=None):
        return self.pool(self.conv(F.relu(self.norm(x))))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C0, C0, 3, padding=1)
        self.norm = nn.BatchNorm2d(C0)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x, embedding=None):
        return self.pool(F.relu(self.norm(self.conv(x))))


class MakesItself(Dense):
    """A class that is pickled as a call of itself."""

    def __init__(self, number, layers=None):
        super().__init__()
        self.number, self.layers = number, self.layers if layers is None else layers

    def __reduce__(self):
        return type(self), (self.number, self.layers)


class NeedsNumber(Dense):
    """A class whose instances cannot be made without an argument."""

    def __new__(cls, number):
        return super().__new__(cls)

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __getnewargs__(self):
        return (self.number,)


class Marked(Tensor):
    mark = 1


def pair(original):
    """A converted model, and the same as it was."""
    original = original.double()
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted)
    return converted, original


class TestNewInstances:
    """Modules that code makes of a converted class, which nobody has converted."""

    @pytest.fixture
    def blocks(self):
        return pair(nn.Sequential(*(JoiningLayer(C0 + i * K) for i in range(3))))

    def test_slice_of_block_recomputes(self, blocks):
        converted, original = blocks
        assert converted[:2].why_naive(INPUT) is None
        assert_same_training(converted[:2], original[:2], INPUT)

    def test_block_made_of_its_own_class_recomputes(self, blocks):
        converted, original = blocks
        made = type(converted)(*converted)
        assert made.why_naive(INPUT) is None
        assert_same_training(made, original, INPUT)

    def test_copy_by_state_function_of_its_own_recomputes(self):
        class Selective(Dense):
            def __getstate__(self):
                return {k: v for k, v in vars(self).items() if k in vars(nn.Module())}

        converted, original = pair(Selective())
        copied = copy.deepcopy(converted)
        assert copied.why_naive(INPUT) is None
        assert_same_training(copied, original, INPUT)

    @pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
    @pytest.mark.parametrize("base", [MakesItself, NeedsNumber])
    def test_copy_of_what_says_how_to_copy_it_is_converted(self, base, copied):
        converted, original = pair(base(3))
        converted.recompute = "norm"
        twin = copied(converted)
        assert type(twin) is type(converted) and (twin.number, twin.recompute) == (3, "norm")
        assert_same_training(twin, original, INPUT)


class TestConvertedClass:
    """The subclass that a conversion makes is of no concern to the class."""

    def test_no_registry_lists_it(self):
        made = []

        class Base(nn.Module):
            def __init_subclass__(cls, *, tag, **keywords):
                super().__init_subclass__(**keywords)
                made.append(cls)

        class Tagged(Base, Dense, tag="a"):
            pass

        converted, original = pair(Tagged())
        assert made == [Tagged]
        assert_same_training(converted, original, INPUT)

        class Further(type(converted), tag="b"):
            pass

        assert made == [Tagged, Further]

    def test_no_metaclass_sees_it(self):
        made = []

        class Meta(type(ABC)):
            def __init__(cls, *args):
                super().__init__(*args)
                made.append(cls)

        class Noted(Dense, metaclass=Meta):
            pass

        converted, original = pair(Noted())
        assert made == [Noted]
        assert not isinstance(original, type(converted)) and isinstance(converted, Noted)
        assert_same_training(converted, original, INPUT)


class Embedded(nn.Module):
    """Transitions and stems that are called with something that they do not read."""

    def __init__(self, last, *, embeds):
        super().__init__()
        self.first, self.last, self.embeds = nn.Conv2d(C0, C0, 1), last, embeds

    def forward(self, x):
        embedding = x.mean((2, 3)) if self.embeds else None
        return self.last(self.first(x) if isinstance(self.last, Stem) else self.wide(x), embedding)

    def wide(self, x):
        return torch.cat([x, x, x, self.first(x)[:, :1]], 1)


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("make", [Transition, Stem])
def test_argument_that_nothing_reads_is_no_hindrance(make, embeds):
    converted, original = pair(Embedded(make(), embeds=embeds))
    assert isinstance(converted.last, make) and type(converted.last) is not make
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_training(converted, original, INPUT, rtol=1e-9)


class TestSequences:
    """What an ``nn.Sequential`` calls, a converted one calls."""

    @pytest.mark.parametrize("base", [Dense, Transition])
    def test_call_function_of_its_own_is_called(self, base):
        class Doubling(base):
            def __call__(self, x):
                return 2 * super().__call__(x)

        children = {Dense: Dense, Transition: Transition} | {base: Doubling}
        model = nn.Sequential(nn.Conv2d(C0, C0, 1), *(make() for make in children.values()))
        converted, original = pair(model)
        assert type(converted) is not nn.Sequential
        assert_same_training(converted, original, INPUT, rtol=1e-9)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_children_that_iteration_leaves_out_are_not_called(self, when):
        class Chosen(nn.Sequential):
            pass

        def iterate(self):
            return iter(list(self._modules.values())[:2])

        if when == "before":
            Chosen.__iter__ = iterate
        converted, original = pair(Chosen(nn.Conv2d(C0, C0, 1), Dense(), nn.Conv2d(1, 1, 1)))
        Chosen.__iter__ = iterate
        assert (type(converted) is Chosen) == (when == "before")
        assert_same_training(converted, original, INPUT, rtol=1e-9)


def halving(name):
    """A transition of which the method ``name``, not the forward function, pools."""

    class Halving(Transition):
        def forward(self, x, embedding=None):
            return self.conv(F.relu(self.norm(x)))

    plain = getattr(nn.Module, name)
    setattr(Halving, name, lambda self, *args: self.pool(plain(self, *args)))
    return Halving()


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
class TestCalls:
    """What a class does around its forward function is done once."""

    def test_module_that_is_called_by_user(self, name):
        original = halving(name).double()
        x = torch.randn(2, C0 + 3 * K, 6, 4, dtype=torch.float64)
        converted = copy.deepcopy(original)
        assert convert_(converted).replaced == ()
        assert len(convert_(Transition()).replaced) == 1
        assert_same_training(converted, original, x, rtol=1e-9)

    def test_module_of_another_one(self, name):
        converted, original = pair(nn.Sequential(Dense(), halving(name)))
        assert_same_training(converted, original, INPUT, rtol=1e-9)
        for model in (converted, original):
            model[1].scale = 2  # an attribute more: it is recorded again
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is naive")
            assert_same_training(converted, original, INPUT, rtol=1e-9)


def test_class_that_lets_nobody_set_attributes():
    class Closed(Dense):
        def __setattr__(self, name, value):
            if "closed" in vars(self) and name != "training":
                raise AttributeError(f"{name} cannot be set")
            super().__setattr__(name, value)

    model = nn.Sequential(Closed())
    vars(model[0])["closed"] = True
    converted, original = pair(model)
    assert converted[0].why_naive(INPUT) is None
    assert_same_training(converted, original, INPUT, rtol=1e-9)
    revert_(converted)
    assert type(converted[0]) is Closed


class TestDerivedClasses:
    """Classes that are made from that of a converted module."""

    def converted_to(self, derive):
        converted, original = pair(nn.Sequential(Dense(), Transition()))
        converted[0].__class__ = derive(type(converted[0]))
        return converted, original

    def doubled(self, base):
        class Doubled(base):
            def forward(self, x):
                return 2 * super().forward(x)

        return Doubled

    @pytest.mark.filterwarnings("ignore:.*is naive")
    def test_forward_function_of_its_own_is_run(self):
        converted, original = self.converted_to(self.doubled)
        original[0].__class__ = self.doubled(Dense)
        assert "derived from that of a converted module" in converted[0].why_naive(INPUT)
        assert_same_training(converted, original, INPUT, rtol=1e-9)

    def test_class_that_pytorch_derives_recomputes(self):
        def derived(base):
            return type(base)(f"Derived{base.__name__}", (base,), {"__module__": "torch.nn"})

        converted, original = self.converted_to(derived)
        assert converted[0].why_naive(INPUT) is None
        assert_same_training(converted, original, INPUT, rtol=1e-9)

    def test_class_stays(self):
        converted, _ = self.converted_to(self.doubled)
        cls = type(converted[0])
        assert type(copy.deepcopy(converted)[0]) is cls
        convert_(converted, recompute="norm")
        assert type(converted[0]) is cls
        with pytest.raises(ValueError, match="0 is a Doubled, a class derived from"):
            revert_(converted)
        assert isinstance(converted[1], Converted)


class TestNames:
    """What converted modules have besides is in the way of no attribute."""

    PUBLIC = ("recompute", "kernels", "why_naive", "why_kernels")

    @pytest.mark.parametrize("front", [DenseFront, TransitionFront, StemFront, NormFront])
    def test_all_others_are_private(self, front):
        bases = (Converted, *front.__mro__[: front.__mro__.index(nn.Module)])
        found = {name for base in bases for name in vars(base)} - set(dir(nn.Module))
        public = {name for name in found if not name.startswith(("_recomputing_", "__"))}
        assert public <= set(self.PUBLIC)

    def test_method_of_any_other_name_is_called(self):
        class Own(Dense):
            kind, inputs, scale = "own", 3, 0

            def read(self, x):
                return super().forward(x)

            def run(self, x):
                return self.read(x) * (self.inputs if self.scale else 1)

            def forward(self, x):
                return self.run(x)

        converted, original = pair(Own())
        assert_same_training(converted, original, INPUT)
        for block in (converted, original):
            block.scale = 1
        assert_same_training(converted, original, INPUT)
        assert "recompute" not in vars(converted) and converted.kind == "own"

    def test_attributes_that_begin_with_one_underscore_survive_a_conversion(self):
        class Own(Dense):
            def __init__(self):
                super().__init__()
                self._kernels, self._known, self._recompute = [3, 5, 7], 1, 2

        converted, original = pair(Own())
        assert_same_training(converted, original, INPUT)
        revert_(converted)
        assert (converted._kernels, converted._known, converted._recompute) == ([3, 5, 7], 1, 2)
        assert vars(converted).keys() == vars(original).keys()

    @pytest.mark.parametrize("name", PUBLIC)
    @pytest.mark.parametrize(
        "give",
        [
            lambda block, name: setattr(type(block), name, "own"),
            lambda block, name: setattr(block, name, "own"),
            lambda block, name: setattr(block, name, nn.Conv2d(1, 1, 1)),
            lambda block, name: block.register_buffer(name, torch.zeros(())),
        ],
        ids=["class", "instance", "child", "buffer"],
    )
    def test_module_with_attribute_of_a_public_name_stays_as_it_is(self, give, name):
        class Own(Dense):
            pass

        block = Own().double()
        give(block, name)
        report = convert_(nn.Sequential(block))
        assert report["0"].reason == f"the module has {name}, and so do converted modules"
        assert type(block) is Own and len(report.findings) == 1
        with pytest.raises(ValueError, match="cannot be converted"):
            convert_(block, strict=True)
        assert not explain(nn.Sequential(block), INPUT)["0"].converted

    def test_class_that_takes_no_subclass_stays_as_it_is(self):
        class Meta(type):
            def mro(cls):
                if len(cls.__bases__) > 1:
                    raise TypeError("one base, please")
                return super().mro()

        class Single(Dense, metaclass=Meta):
            pass

        block = Single().double()
        report = convert_(block)
        assert report[""].reason == "the class has no place for what recomputes: one base, please"
        assert type(block) is Single

    @pytest.mark.parametrize("bases", [(Dense, Generic[T]), (Generic[T], Dense), (ABC, Dense)])
    def test_order_of_bases_is_kept(self, bases):
        converted, original = pair(types.new_class("Own", bases)())
        assert converted.why_naive(INPUT) is None
        assert_same_training(converted, original, INPUT)
        revert_(converted)
        assert type(converted) is type(original)


class TestArguments:
    """What a call is given besides maps, or in another form."""

    class Taking(Dense):
        def forward(self, given, *others):
            if isinstance(given, Tensor):
                return super().forward(F.relu(given) if isinstance(given, nn.Parameter) else given)
            return super().forward(given["x"] if isinstance(given, dict) else given())

    @pytest.mark.parametrize(
        "given",
        [
            lambda x: ({"x": x},),
            lambda x: (x, {"others": [x.exp()]}),
            lambda x: (x, lambda: x),
            lambda x: (x, types.SimpleNamespace(x=x)),
        ],
        ids=["dict", "nested", "closure", "object"],
    )
    def test_none_of_them_outlives_its_call(self, given):
        block, alive = self.Taking().double(), []
        convert_(block)
        for _ in range(3):
            x = INPUT * 2
            alive.append(weakref.ref(x))
            block(*given(x)).sum().backward()
            del x
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3

    @pytest.mark.parametrize(
        "given",
        [lambda x: ({"x": x},), lambda x: (x, types.SimpleNamespace(x=x))],
        ids=["dict", "object"],
    )
    def test_tensors_in_containers_are_no_reason_to_look_again(self, given, monkeypatch):
        block, looks = self.Taking().double(), []
        convert_(block)
        record = fronts.record
        monkeypatch.setattr(fronts, "record", lambda *args: looks.append(args) or record(*args))
        for _ in range(3):
            block(*given(INPUT.clone()))
        assert len(looks) == 1

    @pytest.mark.parametrize(
        "decides",
        [
            lambda x, y: type(x) is Marked,
            lambda x, y: hasattr(x, "mark"),
            lambda x, y: isinstance(y, Marked),
            lambda x, y: not isinstance(x, Marked) or isinstance(y, Marked),
        ],
        ids=["class", "attribute", "inside", "both"],
    )
    @pytest.mark.parametrize("keeps", [True, False])
    def test_what_class_of_tensors_decides_is_done(self, decides, keeps, monkeypatch):
        class Deciding(Layer):
            def forward(self, x):
                y = self.norm(x)
                return self.conv(y.exp() if decides(x, y) else F.relu(y))

        class Block(Dense):
            def __init__(self):
                super().__init__()
                self.layers[0] = Deciding(C0)

        if not keeps:
            plain = torch._C._disabled_torch_function_impl
            monkeypatch.setattr(Marked, "__torch_function__", plain)
        converted, original = pair(Block())
        for x in (INPUT, INPUT.as_subclass(Marked)):
            outputs = [block(x).as_subclass(Tensor) for block in (converted, original)]
            assert_close("output", *outputs, 1e-10)

    def test_subclass_of_tensor_that_decides_nothing_recomputes(self, monkeypatch):
        block, looks = Dense().double(), []
        convert_(block)
        record = fronts.record
        monkeypatch.setattr(fronts, "record", lambda *args: looks.append(args) or record(*args))
        for _ in range(3):
            assert block.why_naive(INPUT.as_subclass(Marked)) is None
        assert len(looks) == 1

    def test_parameter_as_input_is_told_from_tensor(self):
        converted, original = pair(self.Taking())
        for x in (INPUT, nn.Parameter(INPUT.clone()), INPUT):
            assert_close("output", converted(x), original(x), 1e-10)


def test_block_beside_lazy_modules_recomputes():
    model = nn.Sequential(nn.LazyConv2d(C0, 3, padding=1), Dense()).double()
    report = convert_(model)
    assert report["1"].converted
    original = copy.deepcopy(model)
    revert_(original)
    for network in (model, original):
        torch.manual_seed(1)
        network(INPUT)  # which makes the lazy parameters
    assert_same_training(model, original, INPUT, rtol=1e-9)


@pytest.mark.parametrize(
    "x", [INPUT.long(), INPUT[0, 0, 0], INPUT[0, 0, 0, 0]], ids=["integers", "vector", "number"]
)
def test_input_that_is_no_map_raises_error_of_naive_block(x):
    class Other(Layer):
        def forward(self, x):
            y = super().forward(x)
            return y * y.mean((2, 3), keepdim=True)

    class Block(Dense):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Other(C0 + i * K) for i in range(2))

    converted, original = pair(Block())
    errors = []
    for block in (converted, original):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
            block(x)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
