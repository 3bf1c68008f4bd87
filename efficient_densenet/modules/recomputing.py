"""The base in front of a class whose forward is naive: the one place that falls back to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from efficient_densenet.functional.modes import Recompute, check_recompute
from efficient_densenet.functional.precision import types_of
from efficient_densenet.functional.spec import BlockSpec, StemSpec
from efficient_densenet.kernels.implementations import Kernels, check_kernels, explain_choice
from efficient_densenet.kernels.interface import RELU
from efficient_densenet.modules.calls import check_input
from efficient_densenet.modules.reading import Declined, Unsupported

T = TypeVar("T")


class Call(Protocol):
    """What has been read and can be run."""

    @property
    def spec(self) -> BlockSpec | StemSpec:
        """What is computed, without modules."""

    def run(self) -> Tensor:
        """The result; running statistics are updated once."""


class Settings(nn.Module):
    """What can be chosen of a module that recomputes, at any time.

    ``recompute`` says what the backward pass recomputes: ``"bottleneck"``, ``"norm"`` or
    ``"none"``. ``kernels`` says which implementation of the operations to run on: that one if it
    can run the input, otherwise the next slower one. ``"auto"`` leaves it to the environment
    variable ``EFFICIENT_DENSENET_KERNELS``; if that is not set, it is the fastest one.
    """

    _recompute: Recompute = "bottleneck"
    _kernels: Kernels = "auto"

    @property
    def recompute(self) -> Recompute:
        """``"bottleneck"``, ``"norm"`` or ``"none"``."""
        return self._recompute

    @recompute.setter
    def recompute(self, name: Recompute) -> None:
        check_recompute(name)
        self._recompute = name

    @property
    def kernels(self) -> Kernels:
        """``"auto"``, ``"triton"`` or ``"eager"``."""
        return self._kernels

    @kernels.setter
    def kernels(self, name: Kernels) -> None:
        check_kernels(name)
        self._kernels = name


def set_(model: nn.Module, recompute: Recompute, kernels: Kernels) -> None:
    """Choose for every module below ``model`` that has :class:`Settings`, in place."""
    for module in model.modules():
        if isinstance(module, Settings):
            module.recompute, module.kernels = recompute, kernels


class Recomputing(Settings):
    """Base in front of a class whose forward is naive: takes the efficient path where it can.

    A subclass says in :meth:`read` what it is; the modules are read once a call.
    """

    def read(self, x: Tensor) -> Call:
        """What a call on ``x`` would run; raises :class:`Unsupported` where it would be naive."""
        raise NotImplementedError

    def read_call(self, x: Tensor) -> Call:
        """:meth:`read`, unless the mode or the call itself decides already."""
        if self._recompute == "none":
            raise Declined("the module", 'has recompute="none"')
        check_input(x)
        return self.read(x)

    def read_or_none(self, x: Tensor) -> Call | None:
        """What a call on ``x`` would run; ``None``, and a warning, if that is the naive path.

        Nobody is warned of what the caller has asked for.
        """
        try:
            return self.read_call(x)
        except Declined:
            return None
        except Unsupported as reason:
            if not torch.compiler.is_compiling():
                # Python shows a warning once for each text.
                warnings.warn(f"{type(self).__name__} is naive, since {reason}", stacklevel=3)
            return None

    def why_naive(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        try:
            self.read_call(x)
        except Unsupported as reason:
            return str(reason)
        return None

    def why_kernels(self, x: Tensor) -> str:
        """Which kernels the efficient path would run ``x`` on, and why not on faster ones."""
        call = supported(self.read_call, x)
        types, activations = types_of(x), (RELU,) if call is None else call.spec.activations
        return explain_choice(self.kernels, x.device, (types.compute, types.features), activations)

    def run_naive(self, x: Tensor) -> Tensor:
        """The forward function of the class behind."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        call = self.read_or_none(x)
        return self.run_naive(x) if call is None else call.run()


def supported(read: Callable[[Tensor], T], x: Tensor) -> T | None:
    """What ``read(x)`` returns, ``None`` if it is not supported."""
    try:
        return read(x)
    except Unsupported:
        return None
