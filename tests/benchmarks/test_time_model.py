"""The model of a step's time on a GPU: what it counts, and what it makes of that."""

from __future__ import annotations

import pytest
import torch

from benchmarks.time_model import FLOOR, Card, Kernel, kernels_of
from benchmarks.traffic import NAIVE_BACKWARD, NAIVE_FORWARD, Widths
from efficient_densenet.models import DenseNet

CARD = Card("some", 1e12, 1e14, "triton", "a document")
BATCH, SIZE = 8, 32


def step(recompute: str, layers: tuple[int, ...] = (2,)) -> list[Kernel]:
    with torch.device("meta"):
        model = DenseNet(8, layers, 128, stem="cifar", recompute=recompute)
    return kernels_of(model, (BATCH, 3, SIZE, SIZE))


def bytes_of(kernels: list[Kernel]) -> float:
    return sum(kernel.bytes for kernel in kernels)


@pytest.mark.parametrize(
    ("kernel", "seconds"),
    [
        (Kernel("moves", 1e9, 1e9), 1e-3),
        (Kernel("computes", 1e6, 1e12), 1e-2),
        (Kernel("small", 1e3, 1e3), FLOOR),
    ],
    ids=lambda value: value.name if isinstance(value, Kernel) else "",
)
def test_kernel_takes_longest_of_three(kernel: Kernel, seconds: float) -> None:
    assert kernel.seconds(CARD) == pytest.approx(seconds)


def test_layer_of_naive_network_moves_what_traffic_says() -> None:
    layer = Widths(wide=128 + 2 * 8, bottleneck=4 * 8, new=8)
    # Batch norm reads its input twice, and backward its gradient too.
    norms = Widths(1 + 2, 1 + 2, 0)
    expected = NAIVE_FORWARD.plus(NAIVE_BACKWARD).plus(norms)
    values = expected.channels(layer) * BATCH * SIZE**2
    found = bytes_of(step("none", (3,))) - bytes_of(step("none"))
    assert found == pytest.approx(2 * values, rel=0.1)


def test_triton_kernels_are_counted_and_move_less() -> None:
    ours, naive = step("norm"), step("none")
    assert {"product", "weight_gradient", "input_gradient"} <= {kernel.name for kernel in ours}
    assert bytes_of(ours) < bytes_of(naive)
    arithmetic = [sum(kernel.operations for kernel in kernels) for kernels in (ours, naive)]
    assert arithmetic[0] == pytest.approx(arithmetic[1])


def test_recomputed_bottlenecks_are_products_too() -> None:
    products = [sum(k.name == "product" for k in step(mode)) for mode in ("norm", "bottleneck")]
    assert products[1] == products[0] + 2
