"""What a forward function asks of parameters and of PyTorch may be answered otherwise later."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import is_grad_enabled, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from efficient_densenet import convert_, explain
from support.compare import assert_all_close, randomise_, training_results
from support.wild import C0, BasicSequence, LoopBlock

INPUT = torch.randn(3, C0, 8, 6)
no_grad = torch.no_grad


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def asking(question):
    """A block whose layers compute something else if the answer is false."""

    class Asks(BasicSequence):
        def forward(self, x):
            x = super().forward(x)
            return x if question(self, x) else F.leaky_relu(x, 0.3)

    return LoopBlock(Asks)


def freeze(model):
    for layer in model.denselayers:
        next(layer.parameters()).requires_grad_(False)


def weight(layer):
    return next(layer.parameters())


QUESTIONS = {
    "is_grad_enabled": (lambda layer, x: torch.is_grad_enabled(), no_grad, None),
    "its own name": (lambda layer, x: is_grad_enabled(), no_grad, None),
    "is_autocast_enabled": (lambda layer, x: torch.is_autocast_enabled("cpu"), bfloat16, None),
    "device": (lambda layer, x: weight(layer).device.type == "cpu", nullcontext, None),
    "is_meta": (lambda layer, x: not weight(layer).is_meta, nullcontext, None),
    "requires_grad": (lambda layer, x: weight(layer).requires_grad, nullcontext, freeze),
    "requires_grad of a map": (lambda layer, x: x.requires_grad, no_grad, None),
    "dtype": (lambda layer, x: weight(layer).dtype == torch.float32, bfloat16, nn.Module.double),
    "grad": (lambda layer, x: weight(layer).grad is None, nullcontext, None),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_other_answer_gives_other_result(name):
    question, mode, change = QUESTIONS[name]
    original = asking(question)
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted)
    for model in (converted, original) if change else ():
        change(model)
    x = INPUT.to(next(original.parameters()).dtype)
    for _ in range(2):  # after which there are gradients
        found, expected = (
            training_results(model, x.clone().requires_grad_()) for model in (converted, original)
        )
        assert_all_close(found, expected, 1e-3)
    for model in (converted, original):
        model.eval()
    with mode():
        assert_all_close({"": converted(x)}, {"": original(x)}, 2e-2 if mode is bfloat16 else 1e-4)


class AsksForNothing(BasicSequence):
    """Whatever the answers are, it computes the same."""

    def forward(self, x):
        run = super().forward
        if torch.is_grad_enabled() and x.requires_grad and not torch.is_autocast_enabled("cpu"):
            return checkpoint(run, x, use_reentrant=False)
        return run(x)


def test_answer_that_changes_nothing_may_be_any():
    (found,) = explain(LoopBlock(AsksForNothing))
    assert found.reason is None
    assert not found.run_again


class AsksForBoth(BasicSequence):
    """Computes something else after one answer, the same after the other."""

    def forward(self, x):
        run = super().forward
        x = checkpoint(run, x, use_reentrant=False) if x.requires_grad else run(x)
        return x if torch.is_grad_enabled() else F.relu(x)


def test_only_answers_that_change_something_count():
    (found,) = explain(LoopBlock(AsksForBoth))
    assert found.run_again[0] == "denselayers.0 asks PyTorch is_grad_enabled"


class HooksItsWeight(BasicSequence):
    def forward(self, x):
        if weight(self).requires_grad:
            weight(self).register_hook(lambda grad: 2 * grad)
        return super().forward(x)


class FreezesItself(BasicSequence):
    def forward(self, x):
        self.requires_grad_(self.training)
        return super().forward(x)


class FreezesWeight(BasicSequence):
    def forward(self, x):
        weight(self).requires_grad = self.training
        return super().forward(x)


class WantsInputGradient(LoopBlock):
    def forward(self, x, scratch=None):
        return super().forward(x.requires_grad_())


class Reads(LoopBlock):
    """Reads a value if it can, which it cannot without one."""

    def forward(self, x, scratch=None):
        try:
            scale = 2 if x.sum().item() == x.sum().item() else 1
        except RuntimeError:
            scale = 1
        return scale * super().forward(x)


class WithoutAutocast(LoopBlock):
    def forward(self, x, scratch=None):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class LayerWithoutAutocast(BasicSequence):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return super().forward(x)


class SetsAutocast(LoopBlock):
    def forward(self, x, scratch=None):
        torch.set_autocast_enabled("cpu", False)
        return super().forward(x)


class LeavesNoGradients(LoopBlock):
    """Its last layers run as before it, what comes after it does not."""

    def forward(self, x, scratch=None):
        x = super().forward(x)
        torch.set_grad_enabled(False)
        return x


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = LeavesNoGradients()

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return 2 * self.block(x)


class WithGradients(LoopBlock):
    @torch.enable_grad()
    def forward(self, x, scratch=None):
        return super().forward(x)


def test_layers_without_autocast_run_again():
    (found,) = explain(LoopBlock(LayerWithoutAutocast))
    assert found.reason is None
    assert found.run_again[0] == "denselayers.0 enters an autocast of its own"


DOES = {
    "a hook on a weight": (lambda: LoopBlock(HooksItsWeight), nullcontext),
    "freezes its weights": (lambda: LoopBlock(FreezesItself), nullcontext),
    "freezes a weight": (lambda: LoopBlock(FreezesWeight), nullcontext),
    "a gradient for its input": (WantsInputGradient, nullcontext),
    "reads a value": (Reads, nullcontext),
    "no autocast": (WithoutAutocast, bfloat16),
    "no autocast in layers": (lambda: LoopBlock(LayerWithoutAutocast), bfloat16),
    "sets autocast": (SetsAutocast, bfloat16),
    "no gradients after it": (Doubled, nullcontext),
    "gradients": (WithGradients, no_grad),
}


@pytest.mark.parametrize(("make", "mode"), DOES.values(), ids=DOES)
@pytest.mark.filterwarnings("ignore:.*is naive")
def test_what_forward_does_is_done(make, mode):
    original = make()
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted)
    results = []
    for model in (converted, original):
        x = INPUT.clone()
        with mode():
            out = model(x)
        if out.requires_grad:
            out.float().square().sum().backward()
        results.append(
            {"out": out.detach(), "x": x.grad}
            | {name: p.grad for name, p in model.named_parameters()}
        )
        assert out.requires_grad == (make is not Doubled)
    assert results[0]["out"].dtype == results[1]["out"].dtype
    assert_all_close(*results, 1e-3)


def test_functions_of_pytorch_are_put_back():
    before = (torch.is_grad_enabled, torch.autocast.__enter__, torch.get_autocast_dtype)
    explain(LoopBlock(AsksForNothing))
    assert (torch.is_grad_enabled, torch.autocast.__enter__, torch.get_autocast_dtype) == before


class UnderAutocast(nn.Module):
    """Enters autocast itself, before it calls a block."""

    def __init__(self):
        super().__init__()
        self.block = LoopBlock()

    def forward(self, x):
        with bfloat16():
            return self.block(x).float()


def test_block_in_network_that_enters_autocast_is_converted():
    original = UnderAutocast()
    randomise_(original)
    converted = copy.deepcopy(original)
    (found,) = convert_(converted, strict=True)
    assert not found.run_again
    assert converted.block.why_naive(INPUT) is None
    results = [training_results(m, INPUT.clone().requires_grad_()) for m in (converted, original)]
    exact = training_results(copy.deepcopy(original).block, INPUT.clone().requires_grad_())
    assert_all_close({"": results[0]["output"]}, {"": results[1]["output"]}, 3e-2)
    assert not torch.allclose(results[0]["output"], exact["output"], rtol=1e-5)
