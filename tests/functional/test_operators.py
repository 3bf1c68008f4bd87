"""The operators of compiled passes keep PyTorch's rules, and compute what eager functions do."""

import pytest
import torch
from torch import nn

from efficient_densenet import DenseNet, EfficientDenseBlock
from efficient_densenet.functional import operators
from efficient_densenet.functional.encoding import decode, encode
from efficient_densenet.kernels.interface import RELU, Pool
from efficient_densenet.modules.reading import unit_of
from support.compare import block_pair, image, upstream_for
from support.marks import clause, recomputing


def calls_of(module, x, monkeypatch):
    """The arguments of every forward operator while a module is compiled and called."""
    calls = []
    for name in ("block_forward", "stem_forward"):
        operator = getattr(operators, name)

        def recorded(*args, operator=operator):
            calls.append((operator, args))
            return operator(*args)

        monkeypatch.setattr(operators, name, recorded)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module(x)
    monkeypatch.undo()
    return calls


OPCHECKED = {
    "bottleneck layers": lambda mode: EfficientDenseBlock(2, 3, 2, 2, recompute=mode),
    "basic layers": lambda mode: EfficientDenseBlock(2, 3, None, 2, recompute=mode, bias=True),
    "dropout": lambda mode: EfficientDenseBlock(2, 3, 2, 2, 0.3, recompute=mode),
    "evaluation": lambda mode: EfficientDenseBlock(2, 3, 2, 2, recompute=mode).eval(),
    "network": lambda mode: DenseNet(2, (2, 1), 3, 2, num_classes=2, recompute=mode),
}


@pytest.mark.slow
@clause("4 · operators pass torch.library.opcheck")
@recomputing
@pytest.mark.parametrize("build", OPCHECKED.values(), ids=OPCHECKED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operators_pass_opcheck(mode, build, layout, took, monkeypatch):
    """Schema, autograd registration, fake results, and tracing with dynamic shapes."""
    module = build(mode).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    calls = calls_of(module, x, monkeypatch)
    assert calls
    took(None)
    for operator, arguments in calls:
        detached = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), arguments
        )
        torch.library.opcheck(operator, detached)


def test_seeds_are_drawn_from_default_generator():
    torch.library.opcheck(
        operators.draw_seeds, (image(), 3), test_utils=("test_schema", "test_faketensor")
    )
    x = image()
    torch.manual_seed(1)
    first = operators.draw_seeds(x, 3)
    torch.manual_seed(1)
    assert torch.equal(first, torch.randint(2**62, (3,)))


@pytest.mark.parametrize("eps", [1e-5, 0.1 + 0.2, 1e-300])
def test_specifications_come_back_from_text(eps):
    block, _ = block_pair(drop_rate=0.3)
    block["denselayer1"].norm1.eps = eps
    head = unit_of(nn.BatchNorm2d(14).double(), RELU, pool=Pool("all"))
    spec = block._recomputing_read(image()).with_exit(head).spec
    assert decode(encode(spec)) == spec
    assert hash(decode(encode(spec))) == hash(spec)


def test_operators_agree_with_eager_functions():
    """Called outside of a compiler, to the last bit: they are the same passes."""
    efficient, _ = block_pair()
    x = image()
    results = []
    for compiling in (False, True):
        leaf = x.clone().requires_grad_()
        efficient.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
            out = efficient(leaf)
        out.backward(upstream_for(out))
        results.append([out, leaf.grad, *(p.grad for p in efficient.parameters())])
    for eager, operator in zip(*results, strict=True):
        assert torch.equal(eager, operator)
