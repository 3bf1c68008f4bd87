"""Hooks that come and go around a call: the backward pass runs layers again with those of then."""

import pytest
import torch

from support.compare import assert_all_close, assert_same_state, block_pair, image
from support.layers import each, lora, squeeze


def doubled_gradient(module):
    return module.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda grad: 2 * grad) and None
    )


REGISTERED = {
    "on-tensor": doubled_gradient,
    "backward": lambda module: module.register_full_backward_hook(
        lambda m, grads, out: tuple(2 * grad for grad in grads)
    ),
    "backward-pre": lambda module: module.register_full_backward_pre_hook(
        lambda m, grads: tuple(2 * grad for grad in grads)
    ),
    "forward": lambda module: module.register_forward_hook(lambda m, args, out: 2 * out),
    "forward-with-kwargs": lambda module: module.register_forward_hook(
        lambda m, args, kwargs, out: 2 * out, with_kwargs=True
    ),
    "forward-pre": lambda module: module.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
}


def trained(block, x, around):
    """Output and gradients of a call inside which ``around`` is, and of the pass after it."""
    leaf = x.clone().requires_grad_()
    out = around(block, leaf)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return {"output": out.detach(), "input": leaf.grad, **gradients}


def assert_trains_as_naive(around, change=None):
    def alike(block):
        torch.manual_seed(7)
        if change:
            each(change)(block)
        block.double()

    efficient, naive = block_pair(change=alike)
    x = image()
    results = [trained(block, x, around) for block in (efficient, naive)]
    assert_all_close(*results, 1e-9)
    assert_same_state(efficient, naive, rtol=1e-9)


@pytest.mark.parametrize("change", [None, squeeze, lora], ids=["known", "squeeze", "lora"])
@pytest.mark.parametrize("register", REGISTERED.values(), ids=REGISTERED)
def test_hook_that_is_gone_before_the_backward_pass(register, change):
    def around(block, x):
        handle = register(block["denselayer2"].conv2)
        out = block(x)
        handle.remove()
        return out

    assert_trains_as_naive(around, change)


def test_hook_that_comes_before_the_backward_pass():
    def around(block, x):
        out = block(x)
        block["denselayer2"].conv2.register_forward_hook(lambda m, args, out: 2 * out)
        return out

    assert_trains_as_naive(around, squeeze)


def test_hook_that_removes_itself():
    def around(block, x):
        def once(module, args, out):
            handle.remove()
            return 2 * out

        handle = block["denselayer2"].conv2.register_forward_hook(once)
        return block(x)

    assert_trains_as_naive(around)


def test_hook_that_registers_another_one_leaves_it():
    block, _ = block_pair()
    conv = block["denselayer2"].conv2
    registered = []

    def first(module, args, out):
        if not registered:
            registered.append(conv.register_forward_hook(lambda m, a, o: None))

    conv.register_forward_hook(first)
    block(image()).sum().backward()
    assert len(conv._forward_hooks) == 2
    registered[0].remove()
    assert list(conv._forward_hooks.values()) == [first]


def learnt(*blocks):
    """After a step of each on the same batch."""
    x = image()
    for block in blocks:
        trained(block, x, lambda block, x: block(x))
    return blocks


def test_buffer_that_a_known_norm_and_an_unknown_part_share_is_refused():
    def change(block):
        block["denselayer2"].norm2 = block["denselayer1"].norm2
        block["denselayer2"].register_forward_hook(lambda m, args, out: None)

    efficient, naive = block_pair(change=change)
    assert "shares running statistics with another layer" in efficient.why_naive(image())
    with pytest.warns(UserWarning, match="shares running statistics"):
        learnt(efficient, naive)
    assert_same_state(efficient, naive)


def test_buffers_of_several_norms_learn_as_often():
    def change(block):
        first, second = (block[f"denselayer{i}"].norm2 for i in (1, 2))
        second.running_mean, second.running_var = first.running_mean, first.running_var

    assert_same_state(*learnt(*block_pair(change=change)))


def test_norm_without_running_statistics_counts_batches():
    blocks = block_pair()
    for block in blocks:
        norm = block["denselayer1"].norm2
        norm.running_mean = norm.running_var = None
    efficient, naive = learnt(*blocks)
    assert efficient["denselayer1"].norm2.num_batches_tracked == 1
    assert_same_state(efficient, naive)
