"""Optimizers in a step: made by a factory, and run on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import LBFGS, Adafactor, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.kernels.layout import is_hollow
from efficient_densenet.memory.hollow import empty_like, hollow_parameter
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.shapes import Arguments, Keywords, Result, tensors_of

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""An optimizer's class, or a function that makes one of a model's parameters."""

_ITEM = torch.ops.aten._local_scalar_dense.default


def build_optimizer(make_optimizer: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that ``make_optimizer`` makes of ``parameters``.

    Raises:
        TypeError: if it is not an optimizer, or its step needs a closure.
    """
    if not callable(make_optimizer):
        raise TypeError(
            "make_optimizer must make an optimizer of parameters, as torch.optim.AdamW or "
            f"functools.partial(torch.optim.SGD, lr=0.1) do, got {_named(make_optimizer)}"
        )
    parameters = list(parameters)
    optimizer = make_optimizer(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"make_optimizer must make an optimizer, and made {_named(optimizer)}")
    if isinstance(optimizer, LBFGS):
        raise TypeError("make_optimizer made an LBFGS, whose step runs the model by itself")
    given = {id(parameter) for parameter in parameters}
    if any(id(p) not in given for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("make_optimizer must use only the parameters that it is called with")
    return optimizer


def _named(value: object) -> str:
    return f"an instance of {type(value).__name__}"


def create_state(optimizer: Optimizer) -> None:
    """Let an optimizer allocate its state, in a step with zero gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Update:
    """An optimizer's step, metered.

    Args:
        optimizer: its parameters have gradients.
        place: what is entered around the step.
    """

    def __init__(
        self, optimizer: Optimizer, place: AbstractContextManager[object] | None = None
    ) -> None:
        self.optimizer, self._place = optimizer, place or nullcontext()

    @classmethod
    def on_shapes(
        cls, make_optimizer: MakeOptimizer, parameters: Iterable[nn.Parameter], device: str
    ) -> Update:
        """The update of parameters without values, as on a kind of device.

        The parameters are on ``meta``; for an optimizer that asks for the device they are fake
        tensors on it.
        """
        parameters = list(parameters)
        try:
            optimizer = build_optimizer(make_optimizer, _stand_ins(parameters, "meta"))
        except RuntimeError:  # most fused ones refuse the device at once
            optimizer = None
        if optimizer is None or _asks_for_device(optimizer):
            with (fakes := FakeTensorMode()):
                optimizer = build_optimizer(make_optimizer, _stand_ins(parameters, device))
            return cls(optimizer, fakes)
        if device == "cuda":
            _default_to_foreach(optimizer)
        return cls(optimizer)

    def run(self, meter: LiveMeter) -> None:
        """Take a step inside ``meter``."""
        with self._place, meter, meter.enter("optimizer"), _Valueless():
            self.optimizer.step()


def state_of(optimizer: Optimizer, device: str) -> list[Tensor]:
    """The tensors of an optimizer's state; on a GPU, without those that stay on the CPU."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = list(tensors_of(values))
    if device == "cpu":
        return tensors
    return [tensor for tensor in tensors if tensor.device.type != "cpu"]


def _stand_ins(parameters: Iterable[nn.Parameter], device: str) -> list[nn.Parameter]:
    made = []
    for parameter in parameters:
        stand_in = hollow_parameter(parameter, device)
        if parameter.grad is not None:
            stand_in.grad = empty_like(parameter.grad, device)
        made.append(stand_in)
    return made


def _asks_for_device(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    return any(group.get("fused") or group.get("capturable") for group in groups)


def _default_to_foreach(optimizer: Optimizer) -> None:
    """Choose ``foreach`` as optimizers do on CUDA by default, but not on ``meta``."""
    if isinstance(optimizer, Adafactor):
        return
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("differentiable"):
            group["foreach"] = True


class _Valueless(TorchDispatchMode):
    """Context manager in which an optimizer may read numbers from tensors without values.

    Each reads as 1. Fused updates, which allocate nothing, are skipped.
    """

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Result:
        if func is _ITEM and is_hollow(args[0]):
            return 1.0
        if func.name().startswith("aten::_fused_") and is_hollow(next(tensors_of(args))):
            return None
        return func(*args, **(kwargs or {}))
