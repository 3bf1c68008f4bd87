"""Function transforms, TorchScript and CUDA graphs: rows of the matrix in docs/interop.md."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet import densenet_cifar
from support.compare import (
    assert_all_close,
    assert_close,
    block_pair,
    image,
    norms,
    training_results,
    upstream_for,
)
from support.marks import both_kinds, clause, every_mode, recomputing, slabs_and_whole

pytestmark = slabs_and_whole


@clause("5 · torch.func.functional_call")
@every_mode
def test_functional_call_uses_given_parameters(mode, took):
    efficient, naive = block_pair(recompute=mode)
    took(efficient.why_naive(image()))
    stranger, _ = block_pair(recompute=mode)
    given = {k: v.detach().clone().requires_grad_() for k, v in naive.named_parameters()}
    buffers = {k: v.clone() for k, v in naive.named_buffers()}
    x = image().requires_grad_()
    out = functional_call(stranger, (given, buffers), (x,))
    found = torch.autograd.grad(out, (x, *given.values()), upstream_for(out))
    expected = training_results(naive, x)
    assert_close("output", out, expected.pop("output"), 1e-10)
    assert_all_close(dict(zip(expected, found, strict=True)), expected, 1e-10)
    assert_all_close(buffers, dict(naive.named_buffers()), 1e-10)
    assert all(p.grad is None for p in stranger.parameters())


@clause("5 · torch.func.grad (evaluation mode)")
@every_mode
def test_functional_gradient_matches_naive(mode, took):
    efficient, naive = block_pair(recompute=mode, change=nn.Module.eval)
    x = image()
    took(efficient.why_naive(x))

    def loss(parameters, x):
        return functional_call(efficient, parameters, (x,)).square().sum()

    parameters = dict(efficient.named_parameters())
    found, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    naive(leaf).square().sum().backward()
    assert_close("gradient of the input", dx, leaf.grad, 1e-10)
    assert_all_close(found, {k: p.grad for k, p in naive.named_parameters()}, 1e-10)


@clause("5 · vmap (evaluation mode)")
@recomputing
def test_vmap_is_refused_in_one_sentence(mode, took):
    efficient, _ = block_pair(recompute=mode, change=nn.Module.eval)
    with pytest.raises(RuntimeError, match=r'^vmap cannot .*recompute="none"$') as refusal:
        torch.func.vmap(efficient)(torch.stack([image(), image()]))
    took(f"refused: {refusal.value}")


@clause("5 · vmap (evaluation mode)")
@pytest.mark.parametrize("mode", ["none"])
def test_vmap_over_naive_path_works(mode, took):
    efficient, naive = block_pair(recompute=mode, change=nn.Module.eval)
    images = torch.stack([image(), image()])
    took(efficient.why_naive(images[0]))
    expected = torch.stack([naive(x) for x in images])
    assert_close("output", torch.func.vmap(efficient)(images), expected, 1e-10)


@clause("5 · TorchScript")
@every_mode
def test_scripting_is_refused_in_one_sentence(mode, took):
    efficient, naive = block_pair(recompute=mode, change=nn.Module.eval)
    sentence = r"^TorchScript cannot .*naive\.DenseBlock"
    for model in (efficient, densenet_cifar(10, 4, recompute=mode)):
        with pytest.raises(RuntimeError, match=sentence) as refusal:
            torch.jit.script(model)
    took(f"refused: {refusal.value}")
    x = image()
    assert_close("the way out", torch.jit.script(naive)(x), efficient(x), 1e-10)


@clause("5 · torch.jit.trace of the eval model")
@every_mode
@both_kinds
def test_tracing_takes_naive_path(mode, bn_size, took):
    efficient, naive = block_pair(bn_size=bn_size, recompute=mode, change=nn.Module.eval)
    x = image()
    took("traced: nothing is kept for a backward pass")
    traced = torch.jit.trace(efficient, x)
    assert all("PythonOp" not in node.kind() for node in traced.inlined_graph.nodes())
    assert_close("output", traced(x), naive(x), 1e-10)


class NoValueIsRead(TorchDispatchMode):
    """Fails where a value of a tensor would come to Python, for which a device must be waited."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@clause("5 · CUDA graphs: no value is read on the way")
@recomputing
@both_kinds
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_step_reads_no_value(mode, bn_size, momentum, took):
    def change(block):
        for norm in norms(block):
            norm.momentum = momentum

    efficient, _ = block_pair(bn_size=bn_size, recompute=mode, change=change)
    x = image().requires_grad_()
    took(efficient.why_naive(x))
    upstream = upstream_for(efficient(x))
    with NoValueIsRead():
        efficient(x).backward(upstream)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoValueIsRead():
        float(x.detach().sum())
