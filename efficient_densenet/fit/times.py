"""How long a group takes in each of its modes: measured, or by a model of bytes and operations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from efficient_densenet.fit.groups import Alone, Group, Modes
from efficient_densenet.memory.hollow import copy_hollow
from efficient_densenet.memory.running import uncollected
from efficient_densenet.memory.shapes import Arguments, Keywords, Result, tensors_of

ROUNDS = 5

Times = Mapping[tuple[str, ...], Mapping[Modes, float]]
"""Seconds of a group's forward and backward pass, by the paths of its modules and their modes."""


class Rates(NamedTuple):
    """What a device does in a second: bytes that it moves, operations that it computes."""

    bytes: float
    operations: float


RATES = {"cpu": Rates(10e9, 200e9), "cuda": Rates(2e12, 50e12)}
"""Assumed, not measured. Only their ratio matters."""


def check_times(times: Times, groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` unless ``times`` has every choice of ``groups``."""
    for group in groups:
        lacking = set(group.choices) - set(times.get(group.paths, {}))
        if lacking:
            raise ValueError(f"times must have {sorted(lacking)[0]} for {group.paths}")


def measured(
    groups: Sequence[Group], model: nn.Module, autocast_dtype: torch.dtype | None
) -> dict[tuple[str, ...], dict[Modes, float]]:
    """Medians of a few interleaved runs of each group in each mode, on the model's device."""
    return {group.paths: _measured(group, group.cut_out(model), autocast_dtype) for group in groups}


def modelled(
    groups: Sequence[Group], hollow: nn.Module, kind: str, autocast_dtype: torch.dtype | None
) -> dict[tuple[str, ...], dict[Modes, float]]:
    """What each group would take on a device of :data:`RATES`, of a model without values.

    An operator takes as long as its bytes or its operations do, whichever is more.
    """
    return {group.paths: _modelled(group, hollow, RATES[kind], autocast_dtype) for group in groups}


def _measured(group: Group, alone: Alone, autocast_dtype: torch.dtype | None) -> dict[Modes, float]:
    device = next((p.device for m in alone.modules for p in m.parameters()), torch.device("cpu"))
    x = torch.rand_like(group.input.empty(device)).requires_grad_(group.input.requires_grad)
    devices = [device] if device.type == "cuda" else []
    with uncollected(), torch.random.fork_rng(devices=devices):
        taken: dict[Modes, list[float]] = {modes: [] for modes in group.choices}
        for count in range(ROUNDS + 1):
            for modes, seconds in taken.items():
                found = _seconds(alone, x, modes, autocast_dtype)
                if count:  # the first ones compile
                    seconds.append(found)
    return {modes: median(seconds) for modes, seconds in taken.items()}


def _seconds(
    alone: Alone, x: torch.Tensor, modes: Modes, autocast_dtype: torch.dtype | None
) -> float:
    _synchronize(x.device)
    start = time.perf_counter()
    _step(alone, x, modes, autocast_dtype)
    _synchronize(x.device)
    return time.perf_counter() - start


def _step(alone: Alone, x: torch.Tensor, modes: Modes, autocast_dtype: torch.dtype | None) -> None:
    x.grad = None
    for module in alone.modules:
        module.zero_grad(set_to_none=True)
    with _autocast(x.device, autocast_dtype):
        y = alone.run(x, modes)
    if y.requires_grad:
        y.backward(torch.ones_like(y))


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _modelled(
    group: Group, hollow: nn.Module, rates: Rates, autocast_dtype: torch.dtype | None
) -> dict[Modes, float]:
    found = {}
    # Autocast does not know meta tensors.
    place = torch.device("meta" if autocast_dtype is None else "cpu")
    with nullcontext() if autocast_dtype is None else FakeTensorMode():
        alone = group.cut_out(hollow, partial(copy_hollow, device=place))
        for modes in group.choices:
            with _Clock(rates) as clock:
                _step(alone, group.input.empty(place), modes, autocast_dtype)
            found[modes] = clock.seconds
    return found


class _Clock(TorchDispatchMode):
    """Context manager that adds up what the operators in it would take."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.seconds, self._rates = 0.0, rates

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Result:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            moved = (args, tuple(kwargs.values()), (result,))
            count = sum(tensor.nbytes for part in moved for tensor in tensors_of(part))
            flops = flop_registry.get(func._overloadpacket)
            operations = flops(*args, **kwargs, out_val=result) if flops else 0
            self.seconds += max(count / self._rates.bytes, operations / self._rates.operations)
        return result
