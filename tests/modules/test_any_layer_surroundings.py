"""Layers of any kind in training scripts: modes that change, AMP, hooks, saved tensors."""

import copy
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from efficient_densenet import EfficientDenseBlock, estimate, meter, recompute_dense_block
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.calls import BlockCall
from efficient_densenet.modules.naive import DenseBlock, Transition
from efficient_densenet.modules.sequence import EfficientSequential, EfficientTransition
from support.compare import (
    FORMATS,
    assert_all_close,
    assert_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    norms,
    randomise_,
    training_results,
    upstream_for,
)
from support.layers import (
    dropout_inside,
    each,
    every_second,
    group_norm,
    lora,
    other_activation,
    spectral_norm,
    squeeze,
    weight_norm,
)


def changed_pair(*changes, second=False, **options):
    def alike(block):
        torch.manual_seed(7)
        for change in changes:
            (every_second if second else each)(change)(block)
        block.double()

    return block_pair(change=alike, **options)


SWITCHED = {
    "spectral-norm": (spectral_norm,),
    "dropout": (dropout_inside,),
    "batch-norm-beside": (other_activation,),
}


@pytest.mark.parametrize("starts", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", SWITCHED.values(), ids=SWITCHED)
def test_mode_changed_before_backward_is_not_seen(change, starts):
    efficient, naive = changed_pair(*change, second=True)
    found = []
    for block in (efficient, naive):
        torch.manual_seed(2)
        block.train(starts)
        x = image_like(5).requires_grad_()
        out = block(x)
        block.train(not starts)
        out.backward(upstream_for(out))
        assert all(m.training is not starts for m in block.modules())
        found.append({"input": x.grad} | {n: p.grad for n, p in block.named_parameters()})
    for name, expected in found[1].items():
        assert_close(name, found[0][name], expected, 1e-9)
    assert_same_state(efficient, naive)


def image_like(channels, dims=2):
    generator = torch.Generator().manual_seed(4)
    size = {2: (7, 5), 3: (5, 3, 4)}[dims]
    return torch.randn(3, channels, *size, dtype=torch.float64, generator=generator)


def test_backward_pass_leaves_random_generator_alone():
    block, _ = changed_pair(dropout_inside)
    out = block(image())
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("second", [False, True], ids=["all", "second"])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_trains_as_naive(dims, second):
    efficient, naive = changed_pair(group_norm, squeeze, second=second, dims=dims)
    x = image_like(5, dims).to(memory_format=FORMATS[dims])
    assert_same_training(efficient, naive, x, rtol=1e-9)
    assert efficient(x).is_contiguous(memory_format=FORMATS[dims])


def test_block_of_layers_without_units_computes_bit_for_bit():
    efficient, naive = changed_pair(group_norm)
    assert_same_training(efficient, naive, image(), steps=3, rtol=0.0)


@pytest.mark.parametrize("frozen", ["denselayer1", "denselayer2", "denselayer3", "norm", ""])
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_parameters_get_no_gradient(frozen, input_grad):
    efficient, naive = changed_pair(group_norm, weight_norm, second=True)
    for block in (efficient, naive):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(frozen not in name)
    assert_same_training_unless_frozen(efficient, naive, input_grad)
    for name, parameter in efficient.named_parameters():
        assert (parameter.grad is None) == (frozen in name), name


def assert_same_training_unless_frozen(efficient, naive, input_grad):
    found = []
    for block in (efficient, naive):
        x = image_like(5).requires_grad_(input_grad)
        out = block(x)
        if out.requires_grad:
            out.backward(upstream_for(out))
        grads = {n: p.grad for n, p in block.named_parameters()}
        found.append({"output": out.detach(), "input": x.grad} | grads)
    for name, expected in found[1].items():
        assert_close(name, found[0][name], expected, 1e-9)


def test_layers_that_share_parameters_add_their_gradients():
    def share(block):
        group_norm(block["denselayer1"])
        group_norm(block["denselayer3"])
        block["denselayer3"].conv2.weight = block["denselayer1"].conv2.weight
        block["denselayer2"].conv2 = block["denselayer1"].conv2
        block.double()

    efficient, naive = block_pair(change=share)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-9)


@pytest.mark.parametrize("second", [False, True], ids=["all", "second"])
@pytest.mark.parametrize("change", [group_norm, squeeze, lora], ids=lambda c: c.__name__)
def test_autocast_is_as_close_to_float64_as_naive(change, second):
    efficient, naive = changed_pair(change, second=second)
    truth = copy.deepcopy(naive)
    efficient.float(), naive.float()
    x = image_like(5)
    expected, close, other = (
        run_autocast(block, x.to(dtype), enabled)
        for block, dtype, enabled in (
            (truth, torch.float64, False),
            (naive, torch.float32, True),
            (efficient, torch.float32, True),
        )
    )
    for name, value in expected.items():
        allowed = 1.5 * error(close[name], value) + 2**-8 * value.abs().max()
        assert error(other[name], value) <= allowed, name
        assert other[name].dtype == close[name].dtype


def run_autocast(block, x, enabled):
    x = image_copy(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = block(x)
    out.backward(upstream_for(out))
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad} | grads


def error(actual, expected):
    return (actual.double() - expected).abs().max()


def test_weights_cast_inside_still_learn_outside():
    """Autocast's cache must not hand on a weight that was cast where nothing was recorded."""
    conv = nn.Conv2d(3, 4, 1)
    layer = nn.Sequential(nn.Mish(), conv)
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = recompute_dense_block([layer], x, 4)
        again = conv(x)
    again.float().sum().backward()
    assert conv.weight.grad is not None
    before = conv.weight.grad.clone()
    out.float().sum().backward()
    assert not torch.equal(conv.weight.grad, before)


def test_transition_after_any_layer_reads_inside():
    torch.manual_seed(0)
    efficient = EfficientSequential(
        EfficientDenseBlock(3, 5, 2, 3), EfficientTransition(14, 7)
    ).double()
    naive = nn.Sequential(DenseBlock(3, 5, 2, 3), Transition(14, 7)).double()
    for model in (efficient, naive):
        group_norm(model[0]["denselayer2"])
        model.double()
    randomise_(naive)
    efficient.load_state_dict(naive.state_dict())
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-9)


def test_exit_runs_in_block(monkeypatch):
    calls = []
    run = BlockCall.run
    monkeypatch.setattr(BlockCall, "run", lambda self: calls.append(self) or run(self))
    model = EfficientSequential(EfficientDenseBlock(3, 5, 2, 3), EfficientTransition(14, 7))
    each(group_norm)(model[0])
    model(torch.randn(2, 5, 8, 8))
    assert [(len(call.layers), call.exit is not None) for call in calls] == [(3, True)]


def test_parameter_changed_before_backward_is_refused():
    block, _ = changed_pair(group_norm)
    out = block(image())
    with torch.no_grad():
        block["denselayer2"].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative_is_refused():
    block, _ = changed_pair(group_norm)
    x = image().requires_grad_()
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_saved_tensor_hooks_see_all_that_is_kept():
    block, naive = changed_pair(group_norm, spectral_norm)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    x = image().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    seen = {id(tensor) for tensor in packed}
    assert {id(p) for p in block.parameters()} <= seen
    features = [t for t in packed if t.shape == out.shape]
    assert len(features) == 1
    out.backward(upstream_for(out))
    leaf = image_copy(x)
    naive(leaf).backward(upstream_for(out))
    assert_close("input", x.grad, leaf.grad, 1e-9)


def image_copy(x):
    return x.detach().clone().requires_grad_()


def test_save_on_cpu_moves_what_is_kept():
    block, naive = changed_pair(squeeze)
    x = image().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        out = block(x)
    out.backward(upstream_for(out))
    leaf = image_copy(x)
    naive(leaf).backward(upstream_for(out))
    assert_close("input", x.grad, leaf.grad, 1e-9)


def test_layer_that_did_not_fit_is_not_tried_again_until_it_changes():
    block, _ = block_pair()
    kept = []
    handle = block["denselayer2"].conv1.register_forward_hook(lambda m, a, out: kept.append(out))
    assert_efficient(block, image())
    with pytest.warns(UserWarning, match="perhaps through a hook"):
        block(image())
    assert len(kept) == 2
    assert "perhaps through a hook" in block.why_naive(image())
    block(image())
    assert len(kept) == 3
    handle.remove()
    assert_efficient(block, image())
    block["denselayer2"].conv1.register_forward_hook(lambda m, a, out: None)
    assert_efficient(block, image())


class Counting(nn.Module):
    """Computes something else at every call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


def test_layer_that_computes_something_else_again_is_refused():
    def change(block):
        block["denselayer2"].relu2 = Counting()

    efficient, _ = block_pair(change=change)
    out = efficient(image())
    with pytest.raises(RuntimeError, match="denselayer2 computes something else when it is run"):
        out.sum().backward()


class Decaying(nn.PReLU):
    """Changes its own weight at every call."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.999)
        return super().forward(x)


def test_layer_that_changes_its_parameters_is_refused():
    def change(block):
        block["denselayer2"].relu2 = Decaying(dtype=torch.float64)

    efficient, naive = block_pair(change=change)
    with pytest.raises(RuntimeError, match="denselayer2 changes its parameters in place"):
        efficient(image())
    with torch.no_grad():
        assert efficient(image()).shape == naive(image()).shape


def decays(module, args):
    with torch.no_grad():
        module.weight.mul_(0.999)


def decays_data(module, args):
    module.weight.data.mul_(0.999)


@pytest.mark.parametrize("hook", [decays, decays_data])
def test_hook_that_changes_parameters_changes_them_once(hook):
    blocks = block_pair(
        change=lambda block: block["denselayer2"].conv1.register_forward_pre_hook(hook)
    )
    x = image()
    for _ in range(2):
        found = [training_results(block, x.clone().requires_grad_()) for block in blocks]
        assert_all_close(*found, 1e-9)
    assert_same_state(*blocks)


def test_same_not_a_number_again_is_no_difference():
    efficient, naive = changed_pair(group_norm)
    x = image()
    x[0, 0, 0, 0] = float("nan")
    results = []
    for block in (efficient, naive):
        leaf = image_copy(x)
        block(leaf).sum().backward()
        results.append(leaf.grad)
    assert torch.equal(results[0].isnan(), results[1].isnan())


def test_backward_pass_may_be_repeated():
    efficient, _ = changed_pair(dropout_inside, spectral_norm, second=True)
    x = image().requires_grad_()
    out = efficient(x)
    first, second = (
        torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_kept_map_gets_naive_gradients():
    kept = {}

    def change(block):
        block["denselayer2"].conv1.register_forward_hook(
            lambda m, args, out: kept.__setitem__("map", out)
        )

    efficient, naive = block_pair(change=change)
    x, results = image(), []
    for block in (efficient, naive):
        leaf = image_copy(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = block(leaf)
        (out.square().sum() + kept["map"].square().sum()).backward()
        results.append({"input": leaf.grad} | {n: p.grad for n, p in block.named_parameters()})
    for name, expected in results[1].items():
        assert_close(name, results[0][name], expected, 1e-9)
    assert_same_state(efficient, naive)


def test_tensor_of_first_run_is_not_silently_without_gradient():
    """A hook that lets go of what it kept has it still: to differentiate it is refused."""
    kept = []

    def change(block):
        block["denselayer2"].conv1.register_forward_hook(lambda m, args, out: kept.append(out))

    efficient, _ = block_pair(change=change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        efficient(image())
    assert len(kept) == 2
    with pytest.raises(RuntimeError, match="not connected to the network"):
        kept[0].square().sum().backward()


def test_forward_hooks_that_only_look_are_called_once():
    seen = []

    def change(block):
        block["denselayer2"].norm1.register_forward_hook(
            lambda m, args, out: seen.append(out.detach().mean().item())
        )

    efficient, naive = block_pair(change=change)
    x = image()
    for block in (efficient, naive):
        block(image_copy(x)).sum().backward()
    assert len(seen) == 2
    assert seen[0] == pytest.approx(seen[1])


def test_gradient_hook_on_tensor_inside_is_called_once():
    seen = []

    def change(block):
        block["denselayer2"].conv1.register_forward_hook(
            lambda m, args, out: out.register_hook(lambda grad: seen.append(grad.clone())) and None
        )

    efficient, naive = block_pair(change=change)
    x = image()
    for block in (efficient, naive):
        block(image_copy(x)).square().sum().backward()
    assert len(seen) == 2
    assert_close("gradient inside", seen[0], seen[1], 1e-9)


def test_cached_parametrisations_take_naive_path():
    efficient, naive = changed_pair(weight_norm)
    with parametrize.cached():
        assert "being cached" in efficient.why_naive(image())
        assert_same_training(efficient, naive, image(), rtol=1e-9)
    assert_efficient(efficient, image())


def test_compiled_layer_takes_naive_path():
    efficient, _ = block_pair()
    other_activation(efficient["denselayer2"])
    efficient["denselayer2"].compile(backend="eager")
    assert efficient.why_naive(image()) == "denselayer2 is compiled"


def test_block_with_any_layer_compiles_as_naive():
    efficient, naive = changed_pair(group_norm, second=True)
    compiled = torch.compile(efficient, backend="eager", fullgraph=True)
    x = image()
    assert_close("output", compiled(x).detach(), naive(x).detach(), 1e-9)


def test_functional_call_gives_gradients_to_given_parameters():
    efficient, naive = changed_pair(group_norm, second=True)
    x, given = image(), {n: p.detach() * 1.1 for n, p in efficient.named_parameters()}
    results = []
    for block in (efficient, naive):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        parameters = {name: leaf * 1 for name, leaf in leaves.items()}
        torch.func.functional_call(block, parameters, (x,)).square().sum().backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, expected in results[1].items():
        assert_close(name, results[0][name], expected, 1e-9)


def test_transformed_block_is_naive():
    efficient, naive = changed_pair(group_norm)
    x = image()
    found, expected = (
        torch.func.grad(lambda x, block=block: block(x).square().sum())(x)
        for block in (efficient, naive)
    )
    assert_close("gradient", found, expected, 1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient_layers_run_once(context):
    efficient, naive = changed_pair(spectral_norm, second=True)
    seen = []
    efficient["denselayer2"].conv1.register_forward_hook(lambda m, a, out: seen.append(out))
    x = image()
    with context():
        assert_close("output", efficient(x), naive(x), 1e-9)
    assert len(seen) == 1
    assert_same_state(efficient, naive)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_layer_that_overwrites_older_maps_takes_naive_path(context):
    class Overwriting(nn.Conv2d):
        def forward(self, maps):
            maps[-1].mul_(2)
            return super().forward(torch.cat(maps, 1))

    def change(block):
        block["denselayer3"] = Overwriting(11, 3, 1).double()

    efficient, naive = block_pair(change=change)
    x = image()
    with context():
        with pytest.warns(UserWarning, match="denselayer3 overwrites maps that others read"):
            found = efficient(x)
        assert torch.equal(found, naive(x))
    assert_same_state(efficient, naive)


def test_naive_norm_of_same_module_survives_efficient_call():
    """Updates of running statistics do not invalidate what PyTorch's norm saved of them."""
    efficient, _ = block_pair()
    x = image().requires_grad_()
    efficient.recompute = "none"
    naive = efficient(x)
    efficient.recompute = "bottleneck"
    (naive.sum() + efficient(x).square().sum()).backward()


def test_norm_shared_with_naive_part_learns_twice():
    efficient, naive = changed_pair(group_norm, second=True)
    results = []
    for block in (efficient, naive):
        norm = next(m for m in norms(block))
        x = image_like(5).requires_grad_()
        (norm(x[:, : norm.num_features]).square().sum() + block(x).square().sum()).backward()
        results.append(x.grad)
    assert_close("input", *results, 1e-9)
    assert_same_state(efficient, naive)


def test_deep_copies_and_pickles_are_their_own():
    efficient, naive = changed_pair(group_norm, second=True)
    twin = copy.deepcopy(efficient)
    assert twin.growth_rate == 3
    assert_same_training(twin, naive, image(), rtol=1e-9)
    assert isinstance(twin, RecomputingBlock)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_estimate_is_what_the_meter_finds(dtype):
    block = EfficientDenseBlock(6, 8, 2, 8)
    every_second(group_norm)(block)
    each(squeeze)(block)
    options = {"autocast_dtype": dtype}
    found, expected = (count(block, (3, 8, 16, 16), **options) for count in (estimate, meter))
    assert found.kept == pytest.approx(expected.kept, rel=0.01)
    assert found.peak.total == pytest.approx(expected.peak.total, rel=0.1)


def test_tensors_with_metadata_come_out_as_from_naive_block():
    data = pytest.importorskip("monai.data")
    efficient, naive = changed_pair(group_norm, second=True)
    x = data.MetaTensor(image(), meta={"a": 1})
    found, expected = efficient(x), naive(x)
    assert type(found) is type(expected)
    assert found.meta == expected.meta
    assert_close("output", found.as_tensor().detach(), expected.as_tensor().detach(), 1e-9)


def test_empty_and_meta_inputs():
    efficient, naive = changed_pair(group_norm)
    assert efficient(image()[:0]).shape == naive(image()[:0]).shape
    meta = copy.deepcopy(efficient).to("meta")
    assert meta(image().to("meta")).shape == naive(image()).shape


def test_quantisation_aware_training_is_naive_training():
    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")

    def prepare(block):
        for layer in list(block.values())[1:]:
            layer.qconfig = config
            torch.ao.quantization.prepare_qat(layer, inplace=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        efficient, naive = block_pair(change=prepare, dtype=torch.float32)
        assert_efficient(efficient, image(dtype=torch.float32))
        assert_same_training(efficient, naive, image(dtype=torch.float32), steps=3, rtol=1e-4)


def test_parametrisation_with_state_learns_once():
    efficient, naive = changed_pair(spectral_norm)
    x = image()
    for block in (efficient, naive):
        for _ in range(2):
            block(image_copy(x)).square().sum().backward()
    assert_same_state(efficient, naive)


def test_threads_train_one_block():
    efficient, naive = changed_pair(group_norm)
    inputs = [torch.randn(2, 5, 7, 5, dtype=torch.float64) for _ in range(4)]

    def train(block, x):
        for _ in range(5):
            out = block(x)
            out.backward(upstream_for(out))

    threads = [threading.Thread(target=train, args=(efficient, x)) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for x in inputs:
        train(naive, x)
    for (name, found), expected in zip(
        efficient.named_parameters(), naive.parameters(), strict=True
    ):
        assert_close(name, found.grad, expected.grad, 1e-9)
