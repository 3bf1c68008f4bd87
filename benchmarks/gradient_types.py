"""How far gradients are from float64 if those of a block's features are summed in 16 bits.

    python -m benchmarks.gradient_types    # into docs/results/gradient_types.json

The same block and input by autocast: naive, and ours with a float32 buffer and with one of the
features' type. By the eager operations on a CPU: what a layer adds is added in float32 and rounded
when it is stored, as the kernels for CUDA do it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.cases import make_block
from benchmarks.provenance import Json, publish
from efficient_densenet.kernels import eager

DEPTHS = (10, 24, 64)
DTYPES = (torch.bfloat16, torch.float16)
CHANNELS, GROWTH = 24, 12
SHAPE = (8, CHANNELS, 8, 8)
POSITIONS = ("different", "alike")
DRAWS = 5


def draw(layers: int, dtype: torch.dtype, positions: str) -> dict[str, tuple[float, float]]:
    """Errors of one random block: of the input's gradient, and of all parameters' together.

    The gradient of its result is of the same size at all ``positions``, or differs.
    """
    naive = make_block("naive", layers, CHANNELS, GROWTH)
    for norm in (module for module in naive.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    ours = make_block("norm", layers, CHANNELS, GROWTH)
    ours.load_state_dict(naive.state_dict())
    x = torch.randn(SHAPE).to(dtype)
    upstream = torch.randn(SHAPE[0], CHANNELS + layers * GROWTH, *SHAPE[2:]).to(dtype)
    if positions == "alike":  # as an average over all positions hands it down
        upstream = upstream[:, :, :1, :1].expand_as(upstream)
    exact = gradients(copy.deepcopy(naive).double(), x.double(), upstream.double(), None)
    found = {"naive": gradients(naive, x, upstream, dtype)}
    for name, summed in (("float32", torch.float32), ("features", dtype)):
        with patch.object(eager, "summed_dtype", lambda *_, summed=summed: summed):
            found[name] = gradients(ours, x, upstream, dtype)
    return {name: errors(of, exact) for name, of in found.items()}


def gradients(
    model: nn.Module, x: Tensor, upstream: Tensor, autocast: torch.dtype | None
) -> list[Tensor]:
    """Of the input, then of the parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = model(x)
    return list(torch.autograd.grad(out, [x, *model.parameters()], upstream))


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Relative to the size of each gradient; the root of the mean square of the parameters'."""
    pairs = zip(found, exact, strict=True)
    of_input, *of_parameters = ((a.double() - b).norm() / b.norm() for a, b in pairs)
    return of_input.item(), torch.stack(of_parameters).square().mean().sqrt().item()


def rows() -> Iterator[Json]:
    """For each type and depth, median errors over random blocks."""
    for dtype, positions in product(DTYPES, POSITIONS):
        for layers in DEPTHS:
            draws = [draw(layers, dtype, positions) for _ in range(DRAWS)]
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "positions": positions,
                "layers": layers,
                "errors": {
                    name: [median(column) for column in zip(*(d[name] for d in draws), strict=True)]
                    for name in draws[0]
                },
            }


def main() -> None:
    torch.manual_seed(0)
    block = {"channels": CHANNELS, "growth": GROWTH, "shape": SHAPE, "draws": DRAWS}
    publish("gradient_types", {"block": block, "rows": list(rows())})


if __name__ == "__main__":
    main()
