"""Whole networks peak at a fraction of the naive ones: what README and docs promise, as law."""

import pytest
import torchvision
from torch import nn

from efficient_densenet import densenet121, densenet201, densenet_cifar, estimate, fashion_densenet

MIB = 2**20


def step(model, shape):
    """Kept bytes, and the peak above parameters, their gradients and the input, in MiB."""
    report = estimate(model, shape, target=shape[:1])
    return report.kept / MIB, (report.peak.step - report.peak.gradients) / MIB


def deep(recompute="bottleneck"):
    return densenet_cifar(250, 24, recompute=recompute)


def torchvisions_deep():
    model = torchvision.models.DenseNet(24, (41, 41, 41), 48, 4, 0.0, 10, memory_efficient=True)
    model.features.conv0 = nn.Conv2d(3, 48, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(model.features, name, nn.Identity())
    return model


def test_densenet121_peaks_near_its_features():
    kept, peak = step(densenet121(), (8, 3, 224, 224))
    assert kept <= 55
    assert peak <= 120


@pytest.mark.parametrize(
    ("build", "flagged", "shape"),
    [
        (densenet121, torchvision.models.densenet121, (8, 3, 224, 224)),
        (densenet201, torchvision.models.densenet201, (8, 3, 224, 224)),
        (deep, lambda memory_efficient: torchvisions_deep(), (8, 3, 32, 32)),
    ],
    ids=["densenet121", "densenet201", "cifar-bc-250-24"],
)
def test_peak_is_one_eighth_of_naive_and_one_quarter_of_torchvisions(build, flagged, shape):
    _, ours = step(build(), shape)
    _, naive = step(build(recompute="none"), shape)
    _, checkpointed = step(flagged(memory_efficient=True), shape)
    assert 8 * ours <= naive
    assert 4 * ours <= checkpointed


def test_fashion_densenet_peaks_at_one_fifth_of_naive():
    shape = (256, 1, 96, 96)
    _, ours = step(fashion_densenet(), shape)
    _, naive = step(fashion_densenet(recompute="none"), shape)
    assert 5 * ours <= naive
