"""An efficient block trains exactly as the naive block does, whatever its configuration."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.densenet import _DenseBlock

from efficient_densenet import EfficientDenseBlock
from support.compare import (
    FORMATS,
    KINDS,
    MODES,
    SPATIAL,
    assert_efficient,
    assert_same_training,
    block_pair,
    image,
    randomise_,
)
from support.marks import slabs_and_whole

pytestmark = slabs_and_whole

LAYOUTS = [
    pytest.param(dims, memory_format, id=f"{dims}d-{memory_format}".replace("torch.", ""))
    for dims in SPATIAL
    for memory_format in (torch.contiguous_format, *FORMATS.values())
    if memory_format in (torch.contiguous_format, FORMATS.get(dims))
]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dims", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recompute", MODES)
def test_training_step_matches_naive(recompute, bn_size, dims, memory_format, bias):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, bias=bias, recompute=recompute)
    x = image(dims=dims).to(memory_format=memory_format)
    assert_efficient(efficient, x)
    assert_same_training(efficient, naive, x)


@pytest.mark.parametrize(("dims", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recompute", MODES)
def test_output_has_layout_of_input(recompute, bn_size, dims, memory_format):
    efficient, _ = block_pair(bn_size=bn_size, dims=dims, recompute=recompute)
    x = image(dims=dims).to(memory_format=memory_format)
    assert efficient(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recompute", (*MODES, "none"))
def test_three_training_steps_match_torchvision(recompute, memory_format):
    theirs = _DenseBlock(4, 7, 3, 5, 0.0).double()
    randomise_(theirs)
    ours = EfficientDenseBlock(4, 7, 3, 5, 0.0, recompute=recompute).double()
    ours.load_state_dict(theirs.state_dict())
    x = image(4, 7).to(memory_format=memory_format)
    assert_same_training(ours, theirs, x, steps=3)


@pytest.mark.parametrize("recompute", MODES)
def test_state_dict_loads_both_ways_with_torchvision(recompute):
    theirs = _DenseBlock(3, 5, 2, 3, 0.0)
    ours = EfficientDenseBlock(3, 5, 2, 3, 0.0, recompute=recompute)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@dataclass
class NormCase:
    """How one norm differs from a plain one."""

    training: bool
    affine: bool
    track: bool
    momentum: float | None
    eps: float


@dataclass
class Case:
    """A block, its norms, what is frozen, and its input."""

    dims: int
    bn_size: int | None
    bias: bool
    recompute: str
    num_layers: int
    channels: int
    growth_rate: int
    batch: int
    spatial: list[int]
    norms: list[NormCase]
    frozen: list[bool]
    input_grad: bool
    channels_last: bool
    offset: float
    seed: int


norm_cases = st.builds(
    NormCase,
    training=st.booleans(),
    affine=st.booleans(),
    track=st.booleans(),
    momentum=st.sampled_from([0.1, None, 0.0, 1.0]),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
)
cases = st.builds(
    Case,
    dims=st.sampled_from([1, 2, 3]),
    bn_size=st.sampled_from([None, 1, 3]),
    bias=st.booleans(),
    recompute=st.sampled_from(MODES),
    num_layers=st.integers(1, 4),
    channels=st.integers(1, 6),
    growth_rate=st.integers(1, 4),
    batch=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    norms=st.lists(norm_cases, min_size=1, max_size=8),
    frozen=st.lists(st.booleans(), min_size=1, max_size=7),
    input_grad=st.booleans(),
    channels_last=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**16),
)


def configure(case, block):
    """Replace every norm and freeze parameters as the case says, repeating its lists."""
    slots = [
        (layer, n) for layer in block.values() for n in ("norm1", "norm2") if hasattr(layer, n)
    ]
    for i, (layer, name) in enumerate(slots):
        chosen = case.norms[i % len(case.norms)]
        old = getattr(layer, name)
        options = (chosen.eps, chosen.momentum, chosen.affine, chosen.track)
        new = type(old)(old.num_features, *options).double().train(chosen.training)
        setattr(layer, name, new)
    for i, parameter in enumerate(block.parameters()):
        parameter.requires_grad_(not case.frozen[i % len(case.frozen)])


def case_input(case):
    spatial = case.spatial[: case.dims]
    spatial[0] += 3  # enough values for well-conditioned batch statistics
    x = torch.randn(case.batch, case.channels, *spatial, dtype=torch.float64) + case.offset
    if case.channels_last and case.dims in FORMATS:
        x = x.to(memory_format=FORMATS[case.dims])
    return x


@settings(max_examples=150)
@given(cases)
def test_any_configuration_matches_naive(case):
    torch.manual_seed(case.seed)
    efficient, naive = block_pair(
        case.num_layers,
        case.channels,
        case.bn_size,
        case.growth_rate,
        recompute=case.recompute,
        dims=case.dims,
        bias=case.bias,
        change=lambda block: configure(case, block),
    )
    x = case_input(case)
    assert_efficient(efficient, x)
    assert_same_training(efficient, naive, x, steps=2, input_grad=case.input_grad)
