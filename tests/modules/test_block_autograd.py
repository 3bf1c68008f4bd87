"""What autograd allows with the naive block works with the efficient one, or is refused aloud."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from efficient_densenet import EfficientDenseBlock
from support.compare import (
    KINDS,
    MODES,
    SPATIAL,
    assert_all_close,
    assert_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    gradients,
    image,
    training_results,
    upstream_for,
)

either_mode = pytest.mark.parametrize("recompute", MODES)
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)

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


def recorded(calls):
    def hook(*args):
        calls.append(1)

    return hook


HOOKS = {
    "forward": lambda m, calls: m.register_forward_hook(recorded(calls)),
    "forward-pre": lambda m, calls: m.register_forward_pre_hook(recorded(calls)),
    "backward": lambda m, calls: m.register_full_backward_hook(recorded(calls)),
    "backward-pre": lambda m, calls: m.register_full_backward_pre_hook(recorded(calls)),
}
# PyTorch refuses backward hooks on a norm whose output an in-place ReLU overwrites.
HOOKED = [
    pytest.param(path, hook, id=f"{path}-{name}")
    for path in ("denselayer2", "denselayer2.norm1", "denselayer3.conv2")
    for name, hook in HOOKS.items()
    if not ("norm1" in path and "backward" in name)
]


@either_mode
@pytest.mark.parametrize(("path", "hook"), HOOKED)
def test_hook_on_inner_module_fires(recompute, hook, path):
    efficient, naive = block_pair(recompute=recompute)
    calls = []
    handle = hook(efficient.get_submodule(path), calls)
    assert "hook" in efficient.why_naive(image())
    assert_same_training(efficient, naive, image())
    assert len(calls) == 1
    handle.remove()
    assert_efficient(efficient, image())


@either_mode
def test_inner_hook_may_change_features(recompute):
    def change(block):
        block["denselayer1"].relu1.register_forward_hook(lambda module, args, out: out * 2)

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_same_training(efficient, naive, image())


@either_mode
def test_global_module_hook_fires_for_inner_modules(recompute):
    efficient, _ = block_pair(recompute=recompute)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        efficient(image())
    finally:
        handle.remove()
    assert {id(m) for layer in efficient.values() for m in layer.modules()} <= {id(m) for m in seen}
    assert_efficient(efficient, image())


@either_mode
def test_hooks_on_block_and_on_parameters_keep_it_efficient(recompute):
    efficient, naive = block_pair(recompute=recompute)
    calls, ready = [], []
    efficient.register_forward_hook(recorded(calls))
    efficient.register_full_backward_hook(recorded(calls))
    for parameter in efficient.parameters():
        parameter.register_post_accumulate_grad_hook(ready.append)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())
    assert len(calls) == 2
    assert {id(p) for p in ready} == {id(p) for p in efficient.parameters()}


class ScaledConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


def weight_normed(block):
    parametrizations.weight_norm(block["denselayer2"].conv1)


def scaled_conv(block):
    block["denselayer1"].conv2 = ScaledConv(6, 3, 3, padding=1, bias=False).double()


def shifted_norm(block):
    block["denselayer3"].norm1 = ShiftedNorm(11).double()


def other_activation(block):
    block["denselayer2"].relu2 = nn.Hardswish()


def instance_norm(block):
    block["denselayer2"].norm2 = nn.InstanceNorm2d(6, affine=True).double()


def identity_norm(block):
    block["denselayer2"].norm1 = nn.Identity()


UNKNOWN = {
    "weight-norm": weight_normed,
    "convolution-subclass": scaled_conv,
    "norm-subclass": shifted_norm,
    "other-activation": other_activation,
    "instance-norm": instance_norm,
    "identity": identity_norm,
}


@either_mode
@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_inner_module_takes_naive_path(recompute, change):
    efficient, naive = block_pair(recompute=recompute, change=change)
    assert efficient.why_naive(image())
    assert_same_training(efficient, naive, image())


CONVOLUTIONS = {
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "padding-by-name": {"kernel_size": 3, "padding": "same"},
    "five-by-five": {"kernel_size": 5, "padding": 2},
}


@either_mode
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolution_matches_naive(recompute, options):
    def change(block):
        block["denselayer2"].conv2 = nn.Conv2d(6, 3, **options).double()

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_same_training(efficient, naive, image())


@either_mode
@pytest.mark.parametrize("options", [{"groups": 3}, {"bias": True}], ids=["grouped", "bias"])
def test_other_first_convolution_matches_naive(recompute, options):
    def change(block):
        block["denselayer1"].conv1 = nn.Conv2d(6, 6, 1, **options).double()

    efficient, naive = block_pair(2, 6, recompute=recompute, change=change)
    assert_same_training(efficient, naive, image(channels=6))


@either_mode
def test_replaced_layer_forward_is_used(recompute):
    efficient, naive = block_pair(recompute=recompute)
    for block in (efficient, naive):
        layer = block["denselayer2"]
        layer.forward = lambda features, plain=layer.forward: 2 * plain(features)
    assert efficient.why_naive(image())
    assert_same_training(efficient, naive, image())


@either_mode
def test_layer_of_subclass_is_used(recompute):
    def change(block):
        layer = block["denselayer2"]
        plain = type(layer)
        layer.__class__ = type(
            "Doubled", (plain,), {"forward": lambda self, x: 2 * plain.forward(self, x)}
        )

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert efficient.why_naive(image())
    assert_same_training(efficient, naive, image())


def test_naive_path_says_that_it_was_chosen():
    efficient, naive = block_pair(recompute="none")
    assert "none" in efficient.why_naive(image())
    assert_same_training(efficient, naive, image(), steps=3)


@either_mode
@both_kinds
def test_deepcopy_is_independent(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    efficient(image().requires_grad_()).sum().backward()
    efficient.load_state_dict(naive.state_dict())
    duplicate = copy.deepcopy(efficient)
    with torch.no_grad():
        for parameter in efficient.parameters():
            parameter.zero_()
    assert duplicate.recompute == recompute
    assert_efficient(duplicate, image())
    assert_same_training(duplicate, naive, image())


def through_pickle(block):
    return pickle.loads(pickle.dumps(block))


def through_torch_save(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@either_mode
@pytest.mark.parametrize("through", [through_pickle, through_torch_save])
def test_saved_block_comes_back(recompute, through):
    efficient, naive = block_pair(recompute=recompute)
    loaded = through(efficient)
    assert type(loaded) is EfficientDenseBlock
    assert loaded.recompute == recompute
    assert_efficient(loaded, image())
    assert_same_training(loaded, naive, image())


class TwoBlocks(nn.Module):
    """Calls the given blocks one after the other on the first five channels."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x)[:, 2:7])


@either_mode
@both_kinds
def test_block_called_twice_in_one_graph_matches_naive(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    twice = TwoBlocks(efficient, efficient), TwoBlocks(naive, naive)
    assert_same_training(*twice, image(), steps=2)


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


@pytest.mark.parametrize("kinds", [("norm", "norm"), ("bottleneck", "norm")], ids="-".join)
def test_concurrent_threads_get_their_own_results(kinds):
    sizes = [(5, 3), (7, 4)]
    pairs = [block_pair(6, c, 2, k, recompute=r) for (c, k), r in zip(sizes, kinds, strict=True)]
    images = [torch.randn(8, c, 16, 15, dtype=torch.float64) for c, _ in sizes]
    failures = []

    def train(pair, x):
        try:
            for _ in range(4):
                assert_same_training(*pair, x, steps=2, rtol=1e-9)
        except Exception as error:  # a thread's failure does not reach pytest by itself
            failures.append(error)

    threads = [threading.Thread(target=train, args=job) for job in zip(pairs, images, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@either_mode
def test_one_block_may_serve_several_threads(recompute):
    efficient, naive = block_pair(6, recompute=recompute, change=nn.Module.eval)
    images = [torch.randn(4, 5, 16, 15, dtype=torch.float64) for _ in range(4)]
    expected = [naive(x) for x in images]
    outs = {}

    def serve(i):
        outs[i] = efficient(images[i])

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_close(f"output {i}", outs[i], expected[i], 1e-10)
