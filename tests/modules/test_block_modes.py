"""Batch norm's modes, dropout, and calls without gradients."""

import copy

import pytest
import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock
from support.compare import (
    MODES,
    SPATIAL,
    assert_all_close,
    assert_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    norms,
    training_results,
)
from support.marks import both_kinds, slabs_and_whole

pytestmark = [slabs_and_whole, pytest.mark.parametrize("recompute", MODES)]


def set_all(**values):
    def change(block):
        for norm in norms(block):
            vars(norm).update(values)

    return change


def without_affine(block):
    for layer in block.values():
        layer.norm1 = type(layer.norm1)(layer.norm1.num_features, affine=False).double()


def without_running_statistics(block):
    for layer in block.values():
        size = layer.norm1.num_features
        layer.norm1 = type(layer.norm1)(size, track_running_stats=False).double()


def second_layer_eval(block):
    block["denselayer2"].eval()


def first_norms_eval(block):
    for layer in block.values():
        layer.norm1.eval()


def second_norms_eval(block):
    for norm in norms(block)[1::2]:
        norm.eval()


def different_eps(block):
    for i, norm in enumerate(norms(block)):
        norm.eps = 10.0**-i


CHANGES = {
    "eval": nn.Module.eval,
    "second-layer-eval": second_layer_eval,
    "first-norms-eval": first_norms_eval,
    "second-norms-eval": second_norms_eval,
    "affine-false": without_affine,
    "no-running-statistics": without_running_statistics,
    "no-running-statistics-eval": lambda b: (without_running_statistics(b), b.eval()),
    "cumulative-average": set_all(momentum=None),
    "momentum-0": set_all(momentum=0.0),
    "momentum-1": set_all(momentum=1.0),
    "different-eps": different_eps,
}


@both_kinds
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_three_steps_match_naive(recompute, bn_size, change):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, change=change)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image(), steps=3)


@both_kinds
def test_modes_may_alternate_between_steps(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    for training in (True, False, True):
        efficient.train(training), naive.train(training)
        assert_same_training(efficient, naive, image())


@both_kinds
@pytest.mark.parametrize("offset", [-1e3, 1e5])
def test_large_mean_matches_naive(recompute, bn_size, offset):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    rounding = abs(offset) * torch.finfo(torch.float64).eps * 100
    assert_same_training(efficient, naive, image() + offset, rtol=max(1e-10, rounding))


@both_kinds
def test_channels_of_very_different_scale_match_naive(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    scale = torch.tensor([1e-8, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64).view(1, 5, 1, 1)
    assert_same_training(efficient, naive, image() * scale)


@both_kinds
def test_constant_input_matches_naive(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    # A variance of zero multiplies rounding by 1 / sqrt(eps) at every norm.
    assert_same_training(efficient, naive, torch.zeros_like(image()), rtol=1e-7)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_kinds
def test_call_without_grad_matches_naive(recompute, bn_size, context, training):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    efficient.train(training), naive.train(training)
    x = image()
    with context():
        out, expected = efficient(x), naive(x)
    assert not out.requires_grad
    assert_close("output", out, expected, 1e-10)
    assert_same_state(efficient, naive)


@both_kinds
def test_inference_tensor_may_enter_no_grad_call(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    with torch.inference_mode():
        x = image() * 2
    with torch.no_grad():
        assert_close("output", efficient(x), naive(x), 1e-10)


def test_batches_are_counted_once(recompute):
    efficient, _ = block_pair(recompute=recompute)
    x = image().requires_grad_()
    for _ in range(2):
        efficient(x).sum().backward()
    assert [int(n.num_batches_tracked) for n in norms(efficient)] == [2] * 6


def test_eval_leaves_state_as_it_was(recompute):
    efficient, _ = block_pair(recompute=recompute)
    before = copy.deepcopy(efficient.eval().state_dict())
    efficient(image().requires_grad_()).sum().backward()
    assert_all_close(efficient.state_dict(), before, 0.0)


@both_kinds
@pytest.mark.parametrize("dims", SPATIAL)
def test_one_value_per_channel_is_refused_as_batch_norm_does(recompute, bn_size, dims):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, recompute=recompute)
    x = torch.randn(1, 5, *(1,) * dims, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel") as expected:
        naive(x)
    with pytest.raises(ValueError) as raised:
        efficient(x)
    assert str(raised.value) == str(expected.value)


@both_kinds
def test_one_value_per_channel_works_in_eval_mode(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, change=nn.Module.eval)
    x = torch.randn(1, 5, 1, 1, dtype=torch.float64)
    assert_efficient(efficient, x)
    assert_same_training(efficient, naive, x)


@both_kinds
def test_recompute_may_change_after_construction(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute="none")
    efficient.recompute = recompute
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())


def test_recompute_may_change_between_forward_and_backward(recompute):
    efficient, naive = block_pair(recompute=recompute)
    x, y = (image().requires_grad_() for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    out = efficient(x)
    efficient.recompute = "none"
    out.square().sum().backward()
    naive(y).square().sum().backward()
    assert_close("gradient of the input", x.grad, y.grad, 1e-10)


def test_unknown_recompute_is_refused(recompute):
    unknown = recompute + "s"
    with pytest.raises(ValueError, match=unknown):
        EfficientDenseBlock(2, 5, 2, 3, recompute=unknown)


def recovered_masks(out, naive, rate):
    """The dropout factors (0 or 1 / keep) that the output's zeros show, by layer name."""
    growth = (out.shape[1] - 5) // len(naive)
    features = out.detach()[:, 5:].split(growth, dim=1)
    return dict(zip(naive, [(f != 0).double() / (1 - rate) for f in features], strict=True))


def apply_masks(naive, masks):
    """Make each layer of the naive block, which itself drops nothing, use the given mask."""
    for name, layer in naive.items():
        layer.drop_rate = 0.0
        layer.register_forward_hook(lambda module, args, out, mask=masks[name]: out * mask)


@both_kinds
@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_dropout_uses_forward_mask_in_backward(recompute, bn_size, dims, rate):
    efficient, naive = block_pair(
        bn_size=bn_size, drop_rate=rate, dims=dims, bias=True, recompute=recompute
    )
    x = image(dims=dims).requires_grad_()
    assert_efficient(efficient, x)
    got = training_results(efficient, x)
    apply_masks(naive, recovered_masks(got["output"], naive, rate))
    assert_all_close(got, training_results(naive, x), 1e-10)
    assert_same_state(efficient, naive)


@both_kinds
def test_dropout_keeps_right_share_everywhere(recompute, bn_size):
    rate, size = 0.3, (4, 5, 31, 33)
    efficient, naive = block_pair(bn_size=bn_size, drop_rate=rate, recompute=recompute)
    out = efficient(torch.randn(size, dtype=torch.float64))
    for mask in recovered_masks(out, naive, rate).values():
        kept = mask * (1 - rate)
        for axis in range(4):
            share = kept.mean([a for a in range(4) if a != axis])
            deviation = (rate * (1 - rate) * share.numel() / kept.numel()) ** 0.5
            assert (share - (1 - rate)).abs().max() < 5 * deviation


def test_dropout_masks_differ_between_layers_and_calls(recompute):
    efficient, naive = block_pair(drop_rate=0.5, recompute=recompute)
    calls = [recovered_masks(efficient(image()), naive, 0.5) for _ in range(2)]
    masks = [mask for call in calls for mask in call.values()]
    for i, first in enumerate(masks):
        assert all(0.3 < (first != other).double().mean() < 0.7 for other in masks[:i])


@both_kinds
def test_dropout_is_reproducible_and_equal_in_both_modes(recompute, bn_size):
    efficient, _ = block_pair(bn_size=bn_size, drop_rate=0.4, recompute="bottleneck")
    other = copy.deepcopy(efficient)
    other.recompute = recompute
    x = image().requires_grad_()
    results = []
    for block in (efficient, other):
        torch.manual_seed(7)
        results.append(training_results(block, x))
    assert_all_close(results[0], results[1], 1e-12)


def test_dropout_changes_with_seed(recompute):
    efficient, _ = block_pair(drop_rate=0.4, recompute=recompute)
    torch.manual_seed(1)
    first = efficient(image())
    torch.manual_seed(2)
    assert not torch.equal(efficient(image()) == 0, first == 0)


def test_backward_neither_reads_nor_moves_random_state(recompute):
    efficient, _ = block_pair(drop_rate=0.4, recompute=recompute)
    x = image().requires_grad_()
    results = []
    for seed in (1, 2):
        torch.manual_seed(7)
        out = efficient(x)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(torch.autograd.grad(out.square().sum(), x)[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert_close("gradient of the input", results[1], results[0], 0.0)


@both_kinds
def test_dropping_everything_matches_naive(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, drop_rate=1.0, recompute=recompute)
    assert_same_training(efficient, naive, image())


@both_kinds
def test_dropout_follows_layers_own_mode(recompute, bn_size):
    def change(block):
        for layer in block.values():
            layer.training = False

    efficient, naive = block_pair(
        bn_size=bn_size, drop_rate=0.5, recompute=recompute, change=change
    )
    assert_same_training(efficient, naive, image())


def test_drop_rate_is_read_at_each_call(recompute):
    def change(block):
        for layer in block.values():
            layer.drop_rate = 0.0

    efficient, naive = block_pair(drop_rate=0.5, recompute=recompute, change=change)
    assert_same_training(efficient, naive, image())
