"""Rounding errors against the float64 truth, beside those of the naive block."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from support.compare import training_results

DRAWS = 9
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Results = Mapping[str, Tensor]


def truth_of(naive: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Results, nn.Module]:
    """The results of one training step in double precision, and the module that took it."""
    exact = copy.deepcopy(naive).double()
    return training_results(exact, x.detach().double().requires_grad_(), upstream.double()), exact


def relative_error(actual: Tensor, truth: Tensor) -> float:
    difference, size = (actual.double() - truth).norm(), truth.norm()
    return (difference / size).item() if size else difference.item()


def root_mean_square_error(results: Results, truth: Results) -> float:
    """Of the tensors' relative errors; what is no floating point must be equal."""
    assert list(results) == list(truth)
    errors = []
    for name, exact in truth.items():
        if exact.dtype.is_floating_point:
            errors.append(relative_error(results[name], exact))
        else:
            assert torch.equal(results[name], exact), name
    return torch.tensor(errors).square().mean().sqrt().item()


def assert_as_precise(
    draws: Sequence[tuple[Results, Results, Results]], dtype: torch.dtype
) -> None:
    """The median error is at most 1.5 times the naive block's plus the dtype's epsilon.

    Of several draws, since a single value that rounding lifts over a rectifier's threshold changes
    a small gradient by percents. A draw is ``(ours, naive, truth)``.
    """
    for ours, naive, _ in draws:
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in naive.items()}
    error, naive_error = (
        statistics.median(root_mean_square_error(draw[i], draw[2]) for draw in draws)
        for i in (0, 1)
    )
    allowed = 1.5 * naive_error + torch.finfo(dtype).eps
    assert error <= allowed, f"error {error:.3g}, naive {naive_error:.3g}, allowed {allowed:.3g}"


def assert_training_as_precise(
    efficient: nn.Module,
    naive: nn.Module,
    draw_input: Callable[[], Tensor],
    dtype: torch.dtype,
    draws: int = DRAWS,
) -> None:
    """Compares the errors of outputs, gradients and state dicts after one training step."""
    shape = copy.deepcopy(naive)(draw_input()).shape[1:]
    results, states = [], []
    for _ in range(draws):
        x = draw_input().requires_grad_()
        blocks = copy.deepcopy((efficient, naive))
        upstream = torch.randn(len(x), *shape).to(dtype)
        truth, exact = truth_of(naive, x, upstream)
        results.append((*(training_results(block, x, upstream) for block in blocks), truth))
        states.append([block.state_dict() for block in (*blocks, exact)])
    assert_as_precise(results, dtype)
    assert_as_precise(states, dtype)
