"""What a part of a layer hands to the next is that one's own, forwards and backwards."""

import pytest
import torch
from torch import nn

from efficient_densenet import recompute_dense_block
from efficient_densenet.modules.recomputing import read_call
from support.compare import (
    FORMATS,
    MODES,
    assert_all_close,
    assert_close,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    randomise_,
    training_results,
)
from support.layers import CHANGES, Loop, LoRA, each, lora, no_norm, weight_norm
from support.marks import slabs_and_whole


def pair(change, **options):
    def alike(block):
        torch.manual_seed(7)
        each(change)(block)
        block.to(options.get("dtype", torch.float64))

    return block_pair(change=alike, **options)


class Overwriting(nn.Module):
    """A convolution after an activation in place."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(nn.functional.hardtanh(x, -0.5, 0.7, inplace=True))


def overwriting(layer):
    layer.relu1, layer.relu2 = nn.Identity(), nn.Identity()
    layer.conv1, layer.conv2 = Overwriting(layer.conv1), Overwriting(layer.conv2)


def frozen(layer):
    lora(layer)
    layer.conv1.requires_grad_(False)
    layer.norm2.requires_grad_(False)


def evaluating(layer):
    lora(layer)
    layer.norm1.eval()


def activations(layer):
    lora(layer)
    layer.relu1, layer.relu2 = nn.SiLU(), nn.LeakyReLU(0.2)


CHAINS = {
    "four": lora,
    "weight-norm": weight_norm,
    "overwriting": overwriting,
    "frozen": frozen,
    "evaluating": evaluating,
    "activations": activations,
    "dropout": CHANGES["dropout"],
}


@slabs_and_whole
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("change", CHAINS.values(), ids=CHAINS)
def test_chain_trains_as_naive(change, recompute, layout, recwarn):
    efficient, naive = pair(change, recompute=recompute)
    x = image(batch=4).contiguous(memory_format=layout)
    results = []
    for block in (efficient, naive):
        torch.manual_seed(3)
        results.append(training_results(block, x.clone().requires_grad_()))
    assert_all_close(*results, 1e-9)
    assert_same_state(efficient, naive, rtol=1e-9)
    assert not recwarn.list


@slabs_and_whole
def test_chain_of_many_slabs_trains_as_naive(monkeypatch):
    monkeypatch.setattr("efficient_densenet.kernels.workspace.WORKSPACE_BYTES", 2 << 10)
    efficient, naive = pair(lora)
    assert_same_training(efficient, naive, image(batch=5), steps=2, rtol=1e-9)


def evaluated(block, x):
    """What hooks on convolutions keep of what they read and return."""
    kept = []
    for module in block.modules():
        if isinstance(module, (LoRA, Overwriting)):
            module.register_forward_hook(lambda m, args, out: kept.extend((*args, out)))
    with torch.no_grad():
        kept.append(block(x))
    return kept


@slabs_and_whole
@pytest.mark.parametrize("layout", [torch.contiguous_format, FORMATS[2]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [lora, overwriting])
def test_map_that_a_hook_keeps_stays_as_it_was(change, training, layout, recwarn):
    blocks = pair(change)
    x = image().contiguous(memory_format=layout)
    found, expected = (evaluated(block.train(training), x) for block in blocks)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close("kept", ours, theirs, 1e-9)
    assert not recwarn.list


def test_result_that_a_hook_keeps_is_not_dropped_from():
    efficient, naive = pair(lora, drop_rate=0.5)
    kept = []
    for block in (efficient, naive):
        block["denselayer1"].conv2.register_forward_hook(
            lambda m, args, out: kept.append(out.detach())
        )
        block(image_of(2))
    assert_close("kept", *kept, 1e-9)


@slabs_and_whole
@pytest.mark.parametrize("change", [lora, weight_norm], ids=["four", "weight-norm"])
def test_gradient_that_a_hook_keeps_stays_as_it_was(change):
    found = []
    for block in pair(change):
        kept = []
        for layer in block.values():
            for conv in (layer.conv1, layer.conv2):
                conv.register_full_backward_hook(
                    lambda m, into, out, kept=kept: kept.extend((*into, *out))
                )
        block(image_of(1).requires_grad_()).square().sum().backward()
        found.append(kept)
    assert len(found[1]) == 12
    for ours, theirs in zip(*found, strict=True):
        assert_close("kept", ours, theirs, 1e-9)


def image_of(batch):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 5, 7, 5, dtype=torch.float64, generator=generator)


class Adding(nn.Module):
    """Adds a learnt map, whose gradient is that of the result."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.map = nn.Parameter(torch.zeros(1, conv.out_channels, 7, 5))

    def forward(self, x):
        return self.conv(x) + self.map


@slabs_and_whole
@pytest.mark.parametrize("place", ["conv1", "conv2"])
def test_gradient_of_a_parameter_is_not_that_of_a_map_in_turn(place):
    def change(layer):
        setattr(layer, place, Adding(getattr(layer, place)))

    efficient, naive = pair(change)
    assert_same_training(efficient, naive, image_of(1), rtol=1e-9)


def test_first_part_may_overwrite_the_concatenation(recwarn):
    """Which the naive layer makes for itself."""
    efficient, naive = pair(no_norm)
    assert_same_training(efficient, naive, image(), steps=2, rtol=1e-9)
    assert not recwarn.list


def without_norms(layer):
    layer.norm1 = layer.norm2 = nn.Identity()


def test_layer_without_norms_may_overwrite_it_too(recwarn):
    efficient, naive = pair(without_norms)
    assert_same_training(efficient, naive, image(), steps=2, rtol=1e-9)
    assert not recwarn.list


def test_layer_that_overwrites_what_the_loop_reads_is_naive():
    layers = [nn.Sequential(nn.Hardswish(inplace=True), nn.BatchNorm2d(3), nn.ReLU())]
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="layer 0 overwrites maps that others read"):
        recompute_dense_block(layers, x.clone(), 3)


def sharing(layer):
    """A convolution runs twice."""
    twice = nn.Conv2d(6, 6, 1)
    layer.conv1 = nn.Sequential(nn.Conv2d(layer.norm1.num_features, 6, 1), twice)
    layer.conv2 = nn.Sequential(twice, nn.Conv2d(6, 3, 1))


def sharing_a_buffer(layer):
    sharing(layer)
    nn.utils.parametrizations.spectral_norm(layer.conv1[1])


def sharing_without_units(layer):
    sharing_a_buffer(layer)
    layer.norm1, layer.norm2 = nn.Identity(), nn.Identity()


def tied(layer):
    """Two convolutions have one weight, in one part."""
    layer.conv1 = nn.Sequential(layer.conv1, nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    layer.conv1[2].weight = layer.conv1[1].weight


SHARED = {
    "parts": (sharing, 4),
    "buffer": (sharing_a_buffer, 1),
    "one-part": (sharing_without_units, 1),
    "tied": (tied, 3),
}


@pytest.mark.parametrize(("change", "parts"), SHARED.values(), ids=SHARED)
def test_modules_and_tensors_of_two_places(change, parts):
    """Parts that share a buffer, in which each finds what the other left, run as one."""
    efficient, naive = pair(change)
    before = list(efficient.parameters())
    assert [len(layer.parts) for layer in read_call(efficient, image()).layers] == [parts] * 3
    assert_same_training(efficient, naive, image(), steps=2, rtol=1e-9)
    assert all(a is b for a, b in zip(before, efficient.parameters(), strict=True))


def post(c):
    return nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def three(c):
    first = (nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 6, 1))
    second = (nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 5, 3, padding=1))
    return nn.Sequential(*first, *second, nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1))


def unlike(c):
    """Nothing stands where it does in a dense layer."""
    middle = (nn.Mish(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.ELU())
    return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 6, 1), *middle, LoRA(last()))


def last():
    return nn.Conv2d(6, 4, 3, padding=1)


@slabs_and_whole
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [post, three, unlike])
def test_units_anywhere_in_a_row_train_as_the_loop(make, training, recwarn):
    recomputed, plain = Loop(make, naive=False).double(), Loop(make, naive=True).double()
    randomise_(plain)
    recomputed.load_state_dict(plain.state_dict())
    for model in (recomputed, plain):
        model.train(training)
    assert_same_training(recomputed, plain, image(), steps=2, rtol=1e-9)
    with torch.no_grad():
        assert_close("without gradients", recomputed(image_of(2)), plain(image_of(2)), 1e-9)
    assert not recwarn.list


def test_map_of_other_dimensions_raises_what_the_norm_raises():
    layer = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Mish())
    with (
        pytest.warns(UserWarning, match="a norm refuses the input: expected 4D input"),
        pytest.raises(ValueError, match="expected 4D input"),
    ):
        recompute_dense_block([layer], torch.randn(2, 3, 8), 3)


def test_chain_of_a_block_that_is_compiled_is_naive():
    efficient, naive = pair(lora)
    compiled = torch.compile(efficient, backend="eager", fullgraph=True)
    assert_close("output", compiled(image_of(2)).detach(), naive(image_of(2)).detach(), 1e-9)
