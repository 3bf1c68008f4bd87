"""Compares whole training steps of two modules, and builds the blocks that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from efficient_densenet.modules.block import EfficientDenseBlock
from efficient_densenet.modules.naive import DenseBlock

MODES = ("norm", "bottleneck")
KINDS = {"bottleneck-layer": 2, "basic-layer": None}
SPATIAL = {1: (13,), 2: (7, 5), 3: (5, 3, 4)}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
# Gradients that are zero in exact arithmetic (a bias before batch norm) are rounding noise.
SMALLEST_SCALE = 1e-2


def same(x: Tensor) -> Tensor:
    """The input as it is: the default ``view`` of a comparison."""
    return x


def randomise_(module: nn.Module) -> None:
    """Give every norm parameters and running statistics that differ from the neutral ones."""
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(norm.weight).sign())
                norm.bias.normal_()
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)


def block_pair(
    num_layers: int = 3,
    num_input_features: int = 5,
    bn_size: int | None = 2,
    growth_rate: int = 3,
    drop_rate: float = 0.0,
    *,
    recompute: str = "bottleneck",
    dtype: torch.dtype = torch.float64,
    change: Callable[[nn.Module], object] = same,
    **options: object,
) -> tuple[EfficientDenseBlock, DenseBlock]:
    """An efficient block and the naive block, equal in every parameter and buffer.

    ``change`` is applied to both in turn before they are made equal.
    """
    size = (num_layers, num_input_features, bn_size, growth_rate, drop_rate)
    efficient = EfficientDenseBlock(*size, recompute=recompute, **options).to(dtype)
    naive = DenseBlock(*size, **options).to(dtype)
    for block in (efficient, naive):
        change(block)
    randomise_(naive)
    efficient.load_state_dict(naive.state_dict())
    return efficient, naive


def image(
    batch: int = 3, channels: int = 5, dims: int = 2, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A random input of the odd size that belongs to ``dims``."""
    return torch.randn(batch, channels, *SPATIAL[dims], dtype=torch.float64).to(dtype)


def norms(block: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The block's norms in the order of their use."""
    return [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, rtol: float) -> None:
    """Fail unless the largest difference is within ``rtol`` of the largest expected value.

    The failure names the tensor, the worst index and both values there.
    """
    if expected is None or actual is None:
        assert actual is expected, f"{name}: got {actual}, expected {expected}"
        return
    assert actual.shape == expected.shape, f"{name}: got {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: got {actual.dtype}, expected {expected.dtype}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    allowed = rtol * max(expected.abs().max().item(), SMALLEST_SCALE)
    difference = (actual - expected).abs().nan_to_num(nan=torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    assert difference[index] <= allowed, (
        f"{name}: worst at {index}: got {actual[index].item()!r}, expected "
        f"{expected[index].item()!r}, off by {difference[index].item():.3g}, allowed {allowed:.3g}"
    )


def assert_all_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], rtol: float
) -> None:
    """``assert_close`` for every entry of two mappings with the same keys."""
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(name, actual[name], expected[name], rtol)


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Copies of the gradients that a backward pass has left in the input and the parameters."""
    found = {"gradient of the input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {name: None if g is None else g.clone() for name, g in found.items()}


def training_results(
    module: nn.Module,
    x: Tensor,
    upstream: Tensor | None = None,
    *,
    view: Callable[[Tensor], Tensor] = same,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor | None]:
    """Forward, backward from ``upstream`` (random unless given) and one optimizer step.

    Returns the output and every gradient, as they were before the step. The module reads
    ``view(x)``; neither ``x`` nor ``upstream`` may be modified.
    """
    before = x.detach().clone()
    module.zero_grad(set_to_none=True)
    x.grad = None
    out = module(view(x))
    results = {"output": out.detach().clone()}
    if out.requires_grad:
        upstream = upstream_for(out) if upstream is None else upstream
        upstream_before = upstream.clone()
        out.backward(upstream)
        assert torch.equal(upstream, upstream_before), "the upstream gradient was modified"
    results |= gradients(module, x)
    if optimizer is not None:
        optimizer.step()
    assert torch.equal(x, before), "the input was modified"
    return results


def upstream_for(out: Tensor) -> Tensor:
    """The random upstream gradient of an output: the same for every output of that shape."""
    generator = torch.Generator("cpu").manual_seed(1)
    values = torch.randn(out.shape, dtype=torch.float64, generator=generator, device="cpu")
    return values.to(out)


def assert_same_training(
    actual: nn.Module,
    reference: nn.Module,
    x: Tensor,
    upstream: Tensor | None = None,
    *,
    rtol: float = 1e-10,
    steps: int = 1,
    input_grad: bool = True,
    view: Callable[[Tensor], Tensor] = same,
) -> None:
    """Fail unless both modules train alike: outputs, every gradient, whole state dict.

    Each step takes one SGD step with momentum. ``x`` is copied for either module.
    """
    inputs = [x.detach().clone().requires_grad_(input_grad) for _ in range(2)]
    modules = (actual, reference)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in modules]
    for _ in range(steps):
        got, expected = (
            training_results(module, leaf, upstream, view=view, optimizer=optimizer)
            for module, leaf, optimizer in zip(modules, inputs, optimizers, strict=True)
        )
        assert_all_close(got, expected, rtol)
    assert_same_state(actual, reference, rtol=rtol)


def assert_same_state(actual: nn.Module, reference: nn.Module, *, rtol: float = 1e-10) -> None:
    """Fail unless both state dicts hold the same keys and values; integers must be equal."""
    assert_all_close(actual.state_dict(), reference.state_dict(), rtol)


def assert_efficient(block: EfficientDenseBlock, x: Tensor) -> None:
    """Fail if the block would take the naive path for this input."""
    assert block.why_naive(x) is None
