"""What surrounds a block in people's training scripts: AMP, layouts, hooks, checkpoints, adapters.

Each test marked with a clause is a row of the matrix in docs/interop.md, in three modes; "none" is
the naive path. Several processes are in ``test_distributed.py``, compiling and exporting in
``functional/test_compile.py`` and ``test_export.py``.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from efficient_densenet import densenet_cifar
from support.compare import (
    FORMATS,
    KINDS,
    MODES,
    SPATIAL,
    assert_all_close,
    assert_close,
    assert_same_state,
    assert_same_training,
    block_pair,
    gradients,
    image,
    norms,
    training_results,
    upstream_for,
)
from support.precision import DRAWS, assert_as_precise, truth_of

every_mode = pytest.mark.parametrize("mode", ("none", *MODES))
recomputing = pytest.mark.parametrize("mode", MODES)
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
clause = pytest.mark.clause


def scaled_step(block, x, upstream, dtype, scale):
    """One step under autocast with a GradScaler: output, unscaled gradients, and what it found."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    scaler.scale((out.float() * upstream).sum()).backward()
    scaler.unscale_(optimizer)
    found = {"output": out.detach(), "gradient of the input": x.grad / scale}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    return found, scaler.get_scale()


@clause("1 · AMP: autocast with GradScaler")
@every_mode
@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_step_is_as_precise_as_naive_step(mode, bn_size, dtype, took):
    """The error against float64 is at most 1.5 times the naive block's; types are its own."""
    efficient, naive = block_pair(bn_size=bn_size, recompute=mode, dtype=torch.float32)
    took(efficient.why_naive(image(dtype=torch.float32)))
    results, states = [], []
    for _ in range(DRAWS):
        x = image(dtype=torch.float32).requires_grad_()
        upstream = torch.randn(3, 14, *x.shape[2:])
        exact = copy.deepcopy(naive).double()
        truth, _ = truth_of(naive, x, upstream)
        exact.load_state_dict(naive.state_dict())
        exact_x = x.detach().double().requires_grad_()
        training_results(
            exact,
            exact_x,
            upstream.double(),
            optimizer=torch.optim.SGD(exact.parameters(), lr=0.05),
        )
        blocks = copy.deepcopy((efficient, naive))
        found = [scaled_step(block, x, upstream, dtype, scale=64.0)[0] for block in blocks]
        results.append((*found, truth))
        states.append([block.state_dict() for block in (*blocks, exact)])
    assert_as_precise(results, dtype)
    assert_as_precise(states, dtype)


@clause("1 · AMP: a step that overflows is skipped")
@every_mode
def test_overflowing_step_is_skipped(mode, took):
    efficient, _ = block_pair(recompute=mode, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    took(efficient.why_naive(x))
    before = {name: p.detach().clone() for name, p in efficient.named_parameters()}
    upstream = torch.full((3, 14, *SPATIAL[2]), 1e3)
    _, scale = scaled_step(efficient, x, upstream, torch.float16, scale=2.0**15)
    assert scale == 2.0**14
    for name, parameter in efficient.named_parameters():
        assert torch.equal(parameter, before[name]), name


@clause("1 · AMP: recomputing under the forward pass's autocast")
@recomputing
def test_autocast_around_backward_changes_nothing(mode, took):
    efficient, _ = block_pair(recompute=mode, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    took(efficient.why_naive(x))
    found = []
    for backward in (None, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = efficient(x).float().square().sum()
        with torch.autocast("cpu", dtype=backward, enabled=backward is not None):
            found.append(torch.autograd.grad(loss, (x, *efficient.parameters())))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def is_in_convolution(event):
    while event is not None and "convolution" not in event.name and "slow_conv3d" not in event.name:
        event = event.cpu_parent
    return event is not None


def copied_maps(step, size):
    """How many copies of maps of this ``size`` a step makes, by their channels.

    In three dimensions PyTorch's own 1x1 convolution copies on a CPU; these are left out.
    """
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    copies = [e for e in profile.events() if e.name == "aten::copy_"]
    maps = [e for e in copies if tuple(e.input_shapes[0][2:]) == size]
    return Counter(e.input_shapes[0][1] for e in maps if len(size) < 3 or not is_in_convolution(e))


@clause("2 · channels_last in and out, no hidden copy")
@recomputing
@pytest.mark.parametrize("dims", FORMATS)
def test_channels_last_is_copied_only_into_buffers(mode, dims, took):
    """Input and new maps into the feature buffer, the arriving gradient into the gradient buffer.

    The last map has no reader, so that its gradient is one more copy.
    """
    size, layers, channels, growth = (11, 9, 10)[:dims], 3, 8, 5
    efficient, _ = block_pair(
        layers, channels, 2, growth, dims=dims, recompute=mode, dtype=torch.float32
    )
    x = torch.randn(4, channels, *size).to(memory_format=FORMATS[dims]).requires_grad_()
    took(efficient.why_naive(x))
    out = efficient(x)
    upstream = torch.randn_like(out)
    assert out.is_contiguous(memory_format=FORMATS[dims])

    def step():
        efficient(x).backward(upstream)

    whole = channels + layers * growth
    assert copied_maps(step, size) == {channels: 1, growth: layers + 1, whole: 1}
    assert x.grad.is_contiguous(memory_format=FORMATS[dims])
    # The count can fail: a contiguous input is converted.
    plain, upstream = x.detach().contiguous(), upstream.contiguous()
    x = plain.requires_grad_()
    assert copied_maps(step, size)[whole] > 1


@clause("2 · channels_last: the naive block's result")
@every_mode
@pytest.mark.parametrize("dims", FORMATS)
def test_channels_last_matches_naive(mode, dims, took):
    efficient, naive = block_pair(dims=dims, recompute=mode)
    x = image(dims=dims).to(memory_format=FORMATS[dims])
    took(efficient.why_naive(x))
    assert_same_training(efficient, naive, x, steps=2)


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


@clause("6 · saved_tensors_hooks")
@every_mode
@both_kinds
def test_everything_kept_goes_through_saved_tensors_hooks(mode, bn_size, took):
    efficient, naive = block_pair(bn_size=bn_size, recompute=mode, drop_rate=0.0)
    x = image().requires_grad_()
    took(efficient.why_naive(x))
    packed = []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor.detach().numpy().copy(), tensor.requires_grad

    def unpack(saved):
        array, requires_grad = saved
        return torch.from_numpy(array.copy()).requires_grad_(requires_grad)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        got = training_results(efficient, x)
    assert packed
    assert_all_close(got, training_results(naive, x), 1e-10)
    assert_same_state(efficient, naive)


@clause("6 · save_on_cpu")
@every_mode
def test_saved_tensors_may_be_moved_away(mode, took):
    efficient, naive = block_pair(recompute=mode)
    x = image().requires_grad_()
    took(efficient.why_naive(x))
    with torch.autograd.graph.save_on_cpu():
        got = training_results(efficient, x)
    assert_all_close(got, training_results(naive, x), 1e-10)
    assert_same_state(efficient, naive)


class Checkpointed(nn.Module):
    def __init__(self, block, **options):
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


class Direct(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


@clause("6 · an outer checkpoint")
@every_mode
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
def test_block_may_be_checkpointed(mode, reentrant, change, took):
    """Running statistics may then be updated twice, as they are with the naive block.

    A checkpoint that is not reentrant stops as soon as it has what was kept: before the efficient
    block would update them again. It is compared with the block without a checkpoint.
    """
    efficient, naive = block_pair(recompute=mode, change=change)
    took(efficient.why_naive(image()))
    efficient = Checkpointed(efficient, use_reentrant=reentrant)
    if reentrant or mode == "none":
        naive = Checkpointed(naive, use_reentrant=reentrant)
    else:
        naive = Direct(naive)
    assert_same_training(efficient, naive, image(), steps=2)


@clause("6 · an outer checkpoint: dropout")
@every_mode
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_dropout_draws_same_masks_again(mode, reentrant, took):
    plain, _ = block_pair(recompute=mode, drop_rate=0.4)
    took(plain.why_naive(image()))
    again = Checkpointed(copy.deepcopy(plain), use_reentrant=reentrant)
    x, found = image(), []
    for module in (plain, again):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        found.append(list(training_results(module, leaf).values()))
    assert_all_close(*(dict(enumerate(values)) for values in found), 1e-12)


def weight_normed(block):
    parametrizations.weight_norm(block["denselayer2"].conv1)


def spectral_normed(block):
    # Equal starting vectors of the power iteration in both blocks.
    torch.manual_seed(7)
    parametrizations.spectral_norm(block["denselayer2"].conv2)


PARAMETRISED = {"weight norm": weight_normed, "spectral norm": spectral_normed}


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        pytest.param(
            change, mode, marks=clause(f"6 · parametrisation: {name}"), id=f"{name}-{mode}"
        )
        for name, change in PARAMETRISED.items()
        for mode in ("none", *MODES)
    ],
)
def test_parametrised_convolution_takes_naive_path(change, mode, took):
    efficient, naive = block_pair(recompute=mode, change=change)
    reason = efficient.why_naive(image())
    took(reason)
    assert mode == "none" or "Parametrized" in reason
    assert_same_training(efficient, naive, image(), steps=3)


def share_weight(block):
    block["denselayer2"].conv2.weight = block["denselayer1"].conv2.weight


def share_convolution(block):
    block["denselayer3"].conv2 = block["denselayer1"].conv2


def share_norm(block):
    block["denselayer2"].norm2 = block["denselayer1"].norm2


def share_norm_with_cumulative_average(block):
    share_norm(block)
    block["denselayer2"].norm2.momentum = None


SHARING = [share_weight, share_convolution, share_norm, share_norm_with_cumulative_average]


@clause("6 · weight sharing")
@every_mode
@pytest.mark.parametrize("share", SHARING)
def test_shared_parameters_match_naive(mode, share, took):
    efficient, naive = block_pair(recompute=mode, change=share)
    took(efficient.why_naive(image()))
    assert_same_training(efficient, naive, image(), steps=3)


class LoRA(nn.Module):
    """A frozen convolution and a low-rank correction beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(
            base.in_channels, rank, base.kernel_size, padding=base.padding, bias=False
        )
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_lora(block):
    block.requires_grad_(False)
    for layer in block.values():
        layer.conv1, layer.conv2 = LoRA(layer.conv1), LoRA(layer.conv2)


@clause("6 · LoRA: replaced convolutions")
@every_mode
def test_replaced_convolutions_take_naive_path(mode, took):
    efficient, naive = block_pair(recompute=mode, change=with_lora)
    reason = efficient.why_naive(image())
    took(reason)
    assert mode == "none" or reason == "denselayer1.conv1 is a LoRA"
    assert_same_training(efficient, naive, image(), steps=3)
    trained = [name for name, p in efficient.named_parameters() if p.grad is not None]
    assert trained
    assert all("down" in name or "up" in name for name in trained)


@clause("6 · merged LoRA: the convolution again")
@every_mode
def test_merged_convolutions_are_efficient_again(mode, took):
    efficient, naive = block_pair(recompute=mode, change=with_lora)
    for block in (efficient, naive):
        for layer in block.values():
            layer.conv1, layer.conv2 = layer.conv1.base, layer.conv2.base
        block.requires_grad_(True)
    took(efficient.why_naive(image()))
    assert_same_training(efficient, naive, image())


def test_hooked_step_has_gradients_of_plain_step():
    """A tensor hook on the block's output sees the arriving gradient, and may change it."""
    efficient, naive = block_pair()
    images, found = image(), []
    for block in (efficient, naive):
        x = images.clone().requires_grad_()
        out = block(x)
        out.register_hook(lambda grad: 2 * grad)
        out.backward(upstream_for(out))
        found.append(gradients(block, x))
    assert_all_close(*found, 1e-10)
