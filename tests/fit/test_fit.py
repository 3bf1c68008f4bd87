"""Each module gets the mode in which the whole step fits, and is fastest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from efficient_densenet import DenseNet, convert_, densenet_cifar, estimate, fit_
from efficient_densenet.fit import times
from efficient_densenet.fit.composition import Composition
from efficient_densenet.fit.estimates import Estimates
from efficient_densenet.fit.fitting import AROUND_BLOCKS
from efficient_densenet.fit.groups import modes_of, set_modes
from efficient_densenet.memory.devices import DEVICES
from support.libraries import NETWORKS, small

IMAGES, LABELS = (3, 3, 64, 64), (3,)
CHANNELS_LAST = torch.zeros(IMAGES).to(memory_format=torch.channels_last)
"""An image of which every mode of a module makes maps in the same memory format."""
OPTIONS = {"target": LABELS, "device": "cpu"}
MODES = ("none", "norm", "bottleneck")


def network(**options) -> nn.Module:
    return DenseNet(6, (2, 3), 8, 2, num_classes=5, **options)


def seconds_of(groups) -> dict:
    """Times in which naive is slowest in the first block, and fastest in all else."""
    made = {}
    for i, group in enumerate(groups):
        rank = {modes: n for n, modes in enumerate(group.choices)}
        made[group.paths] = {m: (5.0 - n if i == 1 else 1.0 + n) for m, n in rank.items()}
    return made


@pytest.fixture(scope="module")
def composition() -> Composition:
    estimates = Estimates(network(), (CHANNELS_LAST,), OPTIONS)
    return Composition.of(estimates, estimates.find_groups()), estimates


@pytest.fixture(scope="module")
def given(composition) -> dict:
    return seconds_of(composition[0].groups)


def test_parts_are_stem_blocks_with_their_transitions_and_last_block(composition) -> None:
    groups = composition[0].groups
    assert [group.paths for group in groups] == [
        ("features",),
        ("features.denseblock1", "features.transition1"),
        ("features.denseblock2",),
    ]
    assert [len(group.choices) for group in groups] == [2, 6, 3]
    assert groups[0].runs == tuple(f"features.{n}" for n in ("conv0", "norm0", "relu0", "pool0"))


def test_peak_of_every_mix_is_put_together_to_byte(composition, given) -> None:
    found, estimates = composition
    chain = found.chain(given)
    every = list(product(*(range(len(part.choices)) for part in chain.parts)))
    assert len(every) == 36
    for picks in every:
        assert chain.peak(picks) == estimates.timeline(found.mix(picks)).peak


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_fastest_of_all_mixes_that_fit_is_set(composition, given, share) -> None:
    found, estimates = composition
    chain = found.chain(given)
    every = list(product(*(range(len(part.choices)) for part in chain.parts)))
    peaks = {picks: estimates.timeline(found.mix(picks)).peak for picks in every}
    budget = int(min(peaks.values()) * (1 - share) + max(peaks.values()) * share)
    model = network()
    mix = fit_(model, CHANNELS_LAST, budget, times=given, **OPTIONS)
    assert mix.seconds == min(chain.seconds(picks) for picks in every if peaks[picks] <= budget)
    assert mix.peak == estimate(model, CHANNELS_LAST, **OPTIONS).peak.total <= mix.room == budget
    assert mix.least == min(peaks.values())
    assert {part.path: part.mode for part in mix.chosen}.items() <= modes_of(model).items()


def test_beside_it_are_uniform_modes(given) -> None:
    mix = fit_(network(), IMAGES, "1GiB", times=given, **OPTIONS)
    for mode in MODES:
        report = estimate(network(recompute=mode), IMAGES, **OPTIONS)
        assert mix.uniform[mode].peak == report.peak.total
        assert mix.seconds <= mix.uniform[mode].seconds


def test_mix_trains_as_naive_network(given) -> None:
    mixed, naive = network().double(), network(recompute="none").double()
    naive.load_state_dict(mixed.state_dict())
    budget = fit_(mixed, IMAGES, "1GiB", times=given, **OPTIONS).least * 5 // 4
    fit_(mixed, IMAGES, budget, times=given, **OPTIONS)
    assert len(set(modes_of(mixed).values())) > 1
    x = torch.randn(IMAGES, dtype=torch.float64)
    for model in (mixed, naive):
        model(x).square().sum().backward()
    for ours, theirs in zip(mixed.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_composition_that_is_off_is_corrected_by_estimates() -> None:
    """Where a gradient passes between blocks, two changes may add up to more than each alone."""
    options = {"target": (4,), "device": "cpu"}
    estimates = Estimates(densenet_cifar(16, 6), ((4, 3, 16, 16),), options)
    found = Composition.of(estimates, estimates.find_groups())
    chain = found.chain(seconds := seconds_of(found.groups))
    every = product(*(range(len(part.choices)) for part in chain.parts))
    off = (p for p in every if chain.peak(p) < estimates.timeline(found.mix(p)).peak)
    budget = chain.peak(next(off))
    model = densenet_cifar(16, 6)
    mix = fit_(model, (4, 3, 16, 16), budget, times=seconds, **options)
    assert mix.peak == estimate(model, (4, 3, 16, 16), **options).peak.total <= budget


def test_only_modes_that_differ_are_looked_at() -> None:
    """Without bottlenecks ``"norm"`` recomputes what ``"bottleneck"`` does."""
    options = {"target": (4,), "device": "cpu"}
    model = densenet_cifar(10, 6, bottleneck=False)
    estimates = Estimates(model, ((4, 3, 8, 8),), options)
    groups = Composition.of(estimates, estimates.find_groups()).groups
    assert groups[-1].choices == (("none",), ("bottleneck",))


@pytest.mark.parametrize("name", ["torchvision", "monai-3d", "timm", "pytorchcv", "tiramisu"])
def test_models_of_other_libraries_are_fitted(name) -> None:
    net = NETWORKS[name]
    model = net.make()
    convert_(model)
    estimates = Estimates(model, (net.image,), {"device": "cpu"})
    composition = Composition.of(estimates, estimates.find_groups())
    seconds = seconds_of(composition.groups)
    naive = estimates.timeline(dict.fromkeys(modes_of(model), "none")).peak
    mix = fit_(model, net.image, naive - 1, device="cpu", times=seconds)
    assert mix.peak == estimate(model, net.image, device="cpu").peak.total < naive
    assert mix.uniform["none"].peak == naive


# Times


def test_modules_are_timed_where_they_are() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mix = fit_(model, IMAGES, "1GiB", **OPTIONS)
    assert mix.clock == "measured"
    assert all(s > 0 for choices in mix.times.values() for s in choices.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_times_are_modelled_where_device_is_not(autocast_dtype) -> None:
    with torch.device("meta"):
        model = DenseNet(6, (1,), 8, 2, num_classes=5, stem="cifar")
    options = {"target": (2,), "autocast_dtype": autocast_dtype, "device": "cuda"}
    mix = fit_(model, (2, 3, 32, 32), "1GiB", **options)
    assert mix.clock == "modelled"
    assert mix.room == 2**30 - DEVICES["cuda"].reserve
    block = mix.times["features.denseblock1",]
    # What convolves again computes more.
    assert block["bottleneck",] > block["norm",] > 0


def test_modelled_time_is_that_of_bytes_or_operations() -> None:
    rates = times.RATES["cpu"]
    x, w = torch.empty(64, 64, device="meta"), torch.empty(64, 64, device="meta")
    with times._Clock(rates) as clock:
        x + w
    assert clock.seconds == pytest.approx(3 * 64 * 64 * 4 / rates.bytes)
    big = torch.empty(1024, 1024, device="meta")
    with times._Clock(rates) as clock:
        big @ big
    assert clock.seconds == pytest.approx(2 * 1024**3 / rates.operations)


# The report


def test_report_is_table_of_modules_and_uniform_modes(given) -> None:
    mix = fit_(network(), IMAGES, "1GiB", times=given, **OPTIONS)
    lines = str(mix).splitlines()
    assert len(lines) <= 15
    assert lines[1].startswith("features ")
    assert [line.split()[1] for line in lines if line.startswith("everywhere")] == [*MODES]
    assert len(repr(mix)) < 120
    assert mix._repr_html_().count("<tr>") == len(lines)
    found = json.loads(json.dumps(mix.to_dict()))
    assert found["peak"] == mix.peak and found["chosen"][0]["path"] == "features"


def test_report_of_many_modules_is_short(given) -> None:
    mix = fit_(network(), IMAGES, "1GiB", times=given, **OPTIONS)
    many = replace(mix, chosen=mix.chosen * 40)
    assert len(str(many).splitlines()) <= 18
    assert f"{40 * len(mix.chosen) - 10} more" in str(many)


# Wrong calls


def test_wrong_calls_are_answered_in_sentence(given) -> None:
    with pytest.raises(ValueError, match=r"budget must be a size .* got '8GBB'"):
        fit_(network(), IMAGES, "8GBB", **OPTIONS)
    with pytest.raises(ValueError, match=r"model must have modules that recompute, got a DenseNet"):
        fit_(small().float(), (2, 3, 64, 64), "1GiB", device="cpu")
    with pytest.raises(ValueError, match=r"times must have \('none',\) for \('features',\)"):
        fit_(network(), IMAGES, "1GiB", times={}, **OPTIONS)
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        fit_(network(), IMAGES, "1GiB", device="tpu")


def test_what_fits_in_no_mix_is_not_timed(given) -> None:
    model = network()
    least = fit_(model, CHANNELS_LAST, "1GiB", times=given, **OPTIONS).least
    mix = fit_(model, CHANNELS_LAST, least, **OPTIONS)
    assert mix.uniform["none"].seconds == math.inf
    assert "not timed" in str(mix)
    assert mix.to_dict()["uniform"]["none"]["seconds"] is None
    assert any(set(taken) < set(given[paths]) for paths, taken in mix.times.items())
    with pytest.raises(ValueError, match="times must have"):
        fit_(model, CHANNELS_LAST, "1GiB", times=mix.times, **OPTIONS)


def test_budget_that_nothing_fits_is_told_what_is_needed(given) -> None:
    model = network(recompute="norm")
    modes = modes_of(model)
    said = r"budget must be at least [\d.]+ MiB, the peak of the mix that needs least, got '100KiB'"
    with pytest.raises(ValueError, match=said):
        fit_(model, IMAGES, "100KiB", times=given, **OPTIONS)
    assert modes_of(model) == modes


def test_modes_are_set_by_path() -> None:
    model = network()
    set_modes(model, {"features": AROUND_BLOCKS[0], "features.denseblock1": "norm"})
    assert model.features.recompute == "none"
    assert model.features.denseblock1.recompute == "norm"
