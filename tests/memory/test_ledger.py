"""What is kept between forward and backward equals the ledger, and grows linearly in depth."""

import pytest
import torch

from benchmarks import ledger
from efficient_densenet import EfficientDenseBlock, densenet121
from efficient_densenet.modules.naive import DenseBlock
from support.compare import KINDS, MODES
from support.storages import StorageLog, kept_bytes, live_bytes

MIB = 2**20


def ledger_channels(scheme, num_layers, channels, bn_size, growth_rate):
    """Channels that the design keeps, the output's included."""
    width = (bn_size or 0) * growth_rate
    out = channels + num_layers * growth_rate
    if scheme == "bottleneck":
        return out
    if scheme == "norm":
        return out + num_layers * width
    read = sum(channels + i * growth_rate for i in range(num_layers))
    return out + 2 * read + 2 * num_layers * width


def build(scheme, *size, **options):
    if scheme == "none":
        return DenseBlock(*size, **options)
    return EfficientDenseBlock(*size, recompute=scheme, **options)


SIZES = [(12, 8, 8), (5, 33, 7), (1, 6, 5)]


@pytest.mark.parametrize("num_layers, channels, growth_rate", SIZES)
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scheme", (*MODES, "none"))
@pytest.mark.parametrize("measure", [kept_bytes, live_bytes])
def test_kept_bytes_equal_ledger(measure, scheme, bn_size, num_layers, channels, growth_rate):
    size = (num_layers, channels, bn_size, growth_rate)
    x = torch.randn(4, channels, 31, 33).requires_grad_()
    expected = ledger_channels(scheme, *size) * 4 * 31 * 33 * x.element_size()
    assert measure(build(scheme, *size), x) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", MODES)
def test_kept_bytes_follow_dtype_in_either_layout(scheme, dtype, layout):
    size = (6, 16, 2, 8)
    x = torch.randn(4, 16, 31, 33).to(dtype=dtype, memory_format=layout).requires_grad_()
    expected = ledger_channels(scheme, *size) * 4 * 31 * 33 * x.element_size()
    assert live_bytes(build(scheme, *size).to(dtype), x) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scheme", MODES)
def test_dropout_keeps_at_most_one_byte_per_new_value(scheme):
    size = (12, 8, 2, 8)
    x = torch.randn(4, 8, 31, 33).requires_grad_()
    values = 4 * 31 * 33
    ledger = ledger_channels(scheme, *size) * values * 4
    assert live_bytes(build(scheme, *size, 0.3), x) <= 1.02 * ledger + 12 * 8 * values


@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scheme", MODES)
def test_frozen_block_keeps_no_more_than_ledger(scheme, bn_size):
    size = (6, 8, bn_size, 8)
    block = build(scheme, *size).eval().requires_grad_(False)
    x = torch.randn(4, 8, 31, 33).requires_grad_()
    assert live_bytes(block, x) <= 1.02 * ledger_channels(scheme, *size) * 4 * 31 * 33 * 4


@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scheme", MODES)
def test_call_without_grad_keeps_only_output(scheme, bn_size):
    x = torch.randn(4, 8, 31, 33)
    with torch.no_grad(), StorageLog() as log:
        out = build(scheme, 6, 8, bn_size, 8).eval()(x)
    assert [size for size in log.live() if size >= x.nbytes] == [out.nbytes]


@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scheme", (*MODES, "none"))
def test_doubled_depth_doubles_kept_bytes_except_naive(scheme, bn_size):
    x = torch.randn(4, 8, 15, 17).requires_grad_()
    once, twice = (kept_bytes(build(scheme, depth, 8, bn_size, 8), x) for depth in (16, 32))
    if scheme == "none":
        assert twice > 2.5 * once
    else:
        assert twice <= 2.1 * once


@pytest.mark.parametrize(("scheme", "most"), [("bottleneck", 19.2), ("norm", 92.6)])
def test_deep_block_stays_within_its_bytes(scheme, most):
    x = torch.randn(8, 24, 32, 32).requires_grad_()
    assert live_bytes(build(scheme, 48, 24, 4, 12), x) <= most * MIB


def test_naive_deep_block_needs_one_gibibyte():
    x = torch.randn(8, 24, 32, 32).requires_grad_()
    assert kept_bytes(build("none", 48, 24, 4, 12), x) > 1000 * MIB


def test_ledger_of_network_agrees_with_what_lives():
    """The table of docs/derivation.md, on a smaller image."""
    size = 128
    with torch.device("meta"):
        parts = ledger.kept_values(densenet121(), size)
    formulas = [sum(column) for column in zip(*parts.values(), strict=True)]
    for scheme, formula, live in zip(
        ledger.SCHEMES, formulas, ledger.live_values(size), strict=True
    ):
        assert formula == pytest.approx(live, rel=0.01), scheme
