"""The implementations of the operations, and which of them runs a pass.

One implementation runs a whole pass: its units share a workspace and a gradient buffer, whose
types and layout are the implementation's. So a pass with one unit that an implementation cannot
run goes to the next one as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Literal, NamedTuple, cast, get_args

import torch

from efficient_densenet.kernels import whole
from efficient_densenet.kernels.interface import Activation, Operations
from efficient_densenet.kernels.triton import support as triton_support

Kernels = Literal["auto", "triton", "whole", "eager"]
"""The argument ``kernels``: the implementation to try first, ``"auto"`` for the fastest."""

VARIABLE = "EFFICIENT_DENSENET_KERNELS"
"""The environment variable that stands for ``kernels="auto"``; read when a pass first asks."""

WhyNot = Callable[[torch.device, tuple[torch.dtype, ...], tuple[Activation, ...], bool], str | None]


class Implementation(NamedTuple):
    """A module of this package that computes the operations of ``interface.py``.

    It is imported when it is first chosen.

    ``why_not(device, dtypes, activations, small)`` is the reason why it cannot run a pass on maps
    on ``device``, all of them ``small`` or not, that computes and stores in ``dtypes`` and applies
    ``activations``, or ``None``.
    """

    name: str
    module: str
    why_not: WhyNot


IMPLEMENTATIONS = (
    Implementation("triton", "triton.operations", triton_support.why_not),
    Implementation("whole", "whole", whole.why_not),
    Implementation("eager", "eager", lambda *_: None),
)
"""In order of preference. The last one runs everything."""


def check_kernels(name: str, source: str = "kernels") -> None:
    """Raise ``ValueError`` unless ``name`` is one of ``Kernels``."""
    if name not in get_args(Kernels):
        raise ValueError(f"{source} must be one of {get_args(Kernels)}, got {name!r}")


@cache
def choose(
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    activations: tuple[Activation, ...],
    small: bool = False,
) -> Operations:
    """The first implementation, from the one called ``name`` on, that can run such a pass.

    Decided once in a process for each case: ``choose.cache_clear()`` forgets.
    """
    implementation, _ = _decide(name, device, dtypes, activations, small)
    return load(implementation.name)


def explain_choice(
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    activations: tuple[Activation, ...],
    small: bool = False,
) -> str:
    """Which implementation :func:`choose` returns, and why none that is preferred to it.

    Such as ``"eager runs; triton does not: Triton is not installed"``.
    """
    chosen, declined = _decide(name, device, dtypes, activations, small)
    reasons = (f"{other} does not: {reason}" for other, reason in declined.items())
    return "; ".join([f"{chosen.name} runs", *reasons])


def load(name: str) -> Operations:
    """The implementation of that name."""
    module = next(i.module for i in IMPLEMENTATIONS if i.name == name)
    return cast(Operations, import_module(f"efficient_densenet.kernels.{module}"))


def _decide(
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    activations: tuple[Activation, ...],
    small: bool,
) -> tuple[Implementation, dict[str, str]]:
    """The implementation to take, and the reason against each one before it."""
    check_kernels(name)
    wanted, source = name, f"kernels={name!r}"
    if name == "auto":
        wanted = os.environ.get(VARIABLE, "auto")
        check_kernels(wanted, VARIABLE)
        source = f"{VARIABLE}={wanted}"
    asked = wanted == "auto"
    declined: dict[str, str] = {}
    for implementation in IMPLEMENTATIONS:
        asked = asked or implementation.name == wanted
        reason = implementation.why_not(device, dtypes, activations, small) if asked else source
        if reason is None:
            return implementation, declined
        declined[implementation.name] = reason
    raise AssertionError(f"no implementation runs everything: {declined}")
