"""What autograd allows with the naive block works with the efficient one, or is refused aloud."""

import copy

import pytest
import torch
from torch import nn

from support.compare import (
    SPATIAL,
    assert_all_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    gradients,
    image,
    training_results,
    upstream_for,
)
from support.marks import both_kinds, either_mode, slabs_and_whole

pytestmark = slabs_and_whole

VIEWS = {
    "transposed": lambda t: t.transpose(2, 3),
    "batch-last": lambda t: t.permute(3, 1, 2, 0),
    "channel-expanded": lambda t: t[:, :1].expand(-1, 5, -1, -1),
    "batch-expanded": lambda t: t[:1].expand(4, -1, -1, -1),
    "every-second-row": lambda t: t[:, :, ::2],
    "offset-slice": lambda t: t[1:, :, 1:, 2:],
    "flipped": lambda t: t.flip(2),
}


@either_mode
@both_kinds
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_non_contiguous_input_matches_naive(recompute, bn_size, view):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    assert_efficient(efficient, view(image()))
    assert_same_training(efficient, naive, image(), view=view)


@either_mode
@both_kinds
@pytest.mark.parametrize("dims", SPATIAL)
def test_upstream_gradient_without_strides_matches_naive(recompute, bn_size, dims):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, recompute=recompute)
    upstream = torch.ones(1, dtype=torch.float64).expand(3, 14, *SPATIAL[dims])
    assert_same_training(efficient, naive, image(dims=dims), upstream)


@either_mode
@both_kinds
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upstream_gradient_of_other_layout_matches_naive(recompute, bn_size, layout):
    other = {
        torch.contiguous_format: torch.channels_last,
        torch.channels_last: torch.contiguous_format,
    }[layout]
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    x = image().to(memory_format=layout)
    upstream = upstream_for(naive(x)).to(memory_format=other)
    naive.load_state_dict(efficient.state_dict())
    assert_same_training(efficient, naive, x, upstream)


@either_mode
@both_kinds
def test_graph_may_be_retained(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, drop_rate=0.0, recompute=recompute)
    x = image().requires_grad_()
    found = []
    for block in (efficient, naive):
        inputs = (x, *block.parameters())
        out = block(x)
        upstream = upstream_for(out)
        first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(out, inputs, 2 * upstream)
        found.append(dict(enumerate((*first, *second))))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, inputs, upstream)
    assert_all_close(*found, 1e-10)


@either_mode
@both_kinds
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "last-first"])
def test_two_forwards_before_backward_match_naive(recompute, bn_size, order):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    images = [image(), image(4)]
    found = []
    for block in (efficient, naive):
        inputs = [x.clone().requires_grad_() for x in images]
        outs = [block(x) for x in inputs]
        for i in order:
            outs[i].backward(upstream_for(outs[i]))
        found.append(gradients(block, inputs[0]) | {"second input": inputs[1].grad})
    assert_all_close(*found, 1e-10)
    assert_same_state(efficient, naive)


@either_mode
def test_gradients_accumulate(recompute):
    efficient, naive = block_pair(recompute=recompute)
    x = image().requires_grad_()
    found = []
    for block in (efficient, naive):
        x.grad = None
        for factor in (1, 2, 3):
            out = block(x)
            out.backward(factor * upstream_for(out))
        found.append(gradients(block, x))
    assert_all_close(*found, 1e-10)


@either_mode
@both_kinds
def test_later_training_forward_does_not_disturb_eval_gradients(recompute, bn_size):
    efficient, _ = block_pair(bn_size=bn_size, recompute=recompute, change=nn.Module.eval)
    alone = copy.deepcopy(efficient)
    x = image().requires_grad_()
    expected = training_results(alone, x)
    x.grad = None
    out = efficient(x)
    efficient.train()(image())
    out.backward(upstream_for(out))
    assert_all_close({"output": out} | gradients(efficient, x), expected, 1e-12)


@either_mode
@both_kinds
def test_input_may_be_overwritten_before_backward(recompute, bn_size):
    efficient, _ = block_pair(bn_size=bn_size, recompute=recompute)
    untouched = copy.deepcopy(efficient)
    x = image()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    between = leaf * 1
    out = efficient(between)
    with torch.no_grad():
        between.zero_()
    out.backward(upstream_for(out))
    untouched(other).backward(upstream_for(out))
    assert_all_close(gradients(efficient, leaf), gradients(untouched, other), 1e-12)


OVERWRITES = {
    "in-place": lambda out: out.add_(1),
    "detached": lambda out: out.detach().add_(1),
    "slice": lambda out: out.detach()[:, 3:4].zero_(),
}


@either_mode
@both_kinds
@pytest.mark.parametrize("overwrite", OVERWRITES.values(), ids=OVERWRITES)
def test_output_overwritten_before_backward_is_caught(recompute, bn_size, overwrite):
    efficient, _ = block_pair(bn_size=bn_size, recompute=recompute)
    out = efficient(image().requires_grad_())
    overwrite(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


WEIGHTS = ["norm1.weight", "conv1.weight", "norm2.weight", "conv2.weight"]


@either_mode
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_overwritten_before_backward_is_caught(recompute, name):
    efficient, _ = block_pair(recompute=recompute)
    out = efficient(image().requires_grad_())
    with torch.no_grad():
        efficient["denselayer2"].get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@either_mode
@both_kinds
@pytest.mark.parametrize("input_grad", [True, False], ids=["input-grad", "no-input-grad"])
@pytest.mark.parametrize("trained", ["nothing", "last-layer", "first-norm", "convolutions"])
def test_frozen_parameters_match_naive(recompute, bn_size, trained, input_grad):
    prefix = {
        "nothing": "none",
        "last-layer": "denselayer3",
        "first-norm": "denselayer1.norm1",
        "convolutions": "conv",
    }[trained]

    def freeze(block):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(prefix in name)

    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, change=freeze)
    assert_same_training(efficient, naive, image(), steps=2, input_grad=input_grad)
    frozen = [p for p in efficient.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


@either_mode
@both_kinds
def test_only_asked_gradients_are_returned(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    x = image().requires_grad_()
    found = []
    for block in (efficient, naive):
        out = block(x)
        weight = block["denselayer2"].conv1.weight
        found.append({"weight": torch.autograd.grad(out, weight, upstream_for(out))[0]})
    assert_all_close(*found, 1e-10)
    assert x.grad is None


@either_mode
@both_kinds
def test_double_backward_is_refused_and_error_names_mode_that_allows_it(recompute, bn_size):
    efficient, _ = block_pair(bn_size=bn_size, recompute=recompute)
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match='recompute="none"'):
        (grad,) = torch.autograd.grad(efficient(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


def tiny(bn_size, recompute, **options):
    efficient, _ = block_pair(2, 2, bn_size and 1, 2, recompute=recompute, bias=True, **options)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    return efficient, x


@both_kinds
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
def test_double_backward_without_recomputing_is_right(bn_size, change):
    block, x = tiny(bn_size, "none", change=change)
    inputs = (x, *block.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: block(x), inputs, fast_mode=True)


@either_mode
@both_kinds
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.4], ids=["no-dropout", "dropout"])
def test_gradients_pass_gradcheck(recompute, bn_size, change, drop_rate):
    block, x = tiny(bn_size, recompute, drop_rate=drop_rate, change=change)
    assert_efficient(block, x)

    def seeded(x, *_):
        torch.manual_seed(3)
        return block(x)

    assert torch.autograd.gradcheck(seeded, (x, *block.parameters()))
