"""The base in front of a class whose forward is naive: reads, runs, or falls back to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar

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
    ``"none"``. ``kernels`` says which implementation of the operations to try first; if it cannot
    run the input, the next slower one does. ``"auto"`` leaves it to the environment variable
    ``EFFICIENT_DENSENET_KERNELS``; if that is not set, it is the fastest one.

    This class stands before others that may have any attributes. So all that it and its subclasses
    add has a name that begins with ``_recomputing_``, except what is for whoever uses a module.
    """

    _recomputing_mode: Recompute = "bottleneck"
    _recomputing_kernels: Kernels = "auto"
    _recomputing_is_generated: ClassVar[bool] = False
    """Whether the class was made by the conversion, so that its forward is the recomputing one.

    That of a class which is derived from it need not be.
    """

    @property
    def recompute(self) -> Recompute:
        """``"bottleneck"``, ``"norm"`` or ``"none"``."""
        return self._recomputing_mode

    @recompute.setter
    def recompute(self, name: Recompute) -> None:
        check_recompute(name)
        self._recomputing_mode = name

    @property
    def kernels(self) -> Kernels:
        """``"auto"``, ``"triton"``, ``"whole"`` or ``"eager"``."""
        return self._recomputing_kernels

    @kernels.setter
    def kernels(self, name: Kernels) -> None:
        check_kernels(name)
        self._recomputing_kernels = name


def set_(model: nn.Module, recompute: Recompute, kernels: Kernels) -> None:
    """Choose for every module below ``model`` that has :class:`Settings`, in place."""
    for module in model.modules():
        if isinstance(module, Settings):
            module.recompute, module.kernels = recompute, kernels


class Recomputing(Settings):
    """Base in front of a class whose forward is naive: takes the efficient path where it can.

    A subclass says what it is when it is read; the modules are read once a call.
    """

    def _recomputing_read(self, *args: Any, **kwargs: Any) -> Call:
        """What a call would run; raises :class:`Unsupported` where it would be naive."""
        raise NotImplementedError

    def _recomputing_maps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
        """The maps among the arguments of a call."""
        return (*args, *kwargs.values())

    def why_naive(self, *args: Any, **kwargs: Any) -> str | None:
        """Why a call with these arguments would take the naive path; ``None`` if it would not."""
        try:
            read_call(self, *args, **kwargs)
        except Unsupported as reason:
            return str(reason)
        return None

    def why_kernels(self, x: Tensor) -> str:
        """Which implementation the efficient path would run ``x`` on, and why no faster one.

        Such as ``"eager runs; triton does not: Triton is not installed; whole does not: its maps
        are not small"``.
        """
        call = supported(lambda x: read_call(self, x), x)
        types, spec = types_of(x), None if call is None else call.spec
        return explain_choice(
            self.kernels,
            x.device,
            (types.compute, types.features),
            (RELU,) if spec is None else spec.activations,
            small=spec is not None and spec.small,
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = run(self, x)
        return result


def read_call(module: Recomputing, *args: Any, **kwargs: Any) -> Call:
    """What a call of ``module`` would run.

    Raises:
        Unsupported: if it would be naive, by its mode, by the call itself, or as it is read.
    """
    if module.recompute == "none":
        raise Declined("the module", 'has recompute="none"')
    for x in module._recomputing_maps(args, kwargs):
        check_input(x)
    return module._recomputing_read(*args, **kwargs)


def read_or_none(module: Recomputing, *args: Any, **kwargs: Any) -> Call | None:
    """What a call would run; ``None``, and a warning, if that is the naive path.

    Nobody is warned of what the caller has asked for.
    """
    try:
        return read_call(module, *args, **kwargs)
    except Declined:
        return None
    except Unsupported as reason:
        warn(module, reason)
        return None


def warn(module: Recomputing, reason: Unsupported) -> None:
    """Say why a call takes the naive path."""
    if not torch.compiler.is_compiling():
        # Python shows a warning once for each text.
        warnings.warn(f"{type(module).__name__} is naive, since {reason}", stacklevel=5)


def run_naive(module: Recomputing, *args: Any, **kwargs: Any) -> Any:
    """The forward function of the class behind."""
    return super(Recomputing, module).forward(*args, **kwargs)


def run(module: Recomputing, *args: Any, **kwargs: Any) -> Any:
    """The forward pass, on the efficient path or the naive one."""
    call = read_or_none(module, *args, **kwargs)
    out = None if call is None else run_or_none(module, call)
    return run_naive(module, *args, **kwargs) if out is None else out


def run_or_none(module: Recomputing, call: Call) -> Tensor | None:
    """The result of a call; ``None``, and a warning, if that turns out to be naive."""
    try:
        return call.run()
    except Unsupported as reason:
        warn(module, reason)
        return None


def check_is_map(x: Tensor) -> None:
    """Raise :class:`Unsupported` if no layer at all could read ``x``."""
    if x.dim() < 2:
        raise Unsupported("the input", f"has {x.dim()} dimensions")
    if not x.is_floating_point():
        raise Unsupported("the input", f"is {x.dtype}")


def supported(read: Callable[[Tensor], T], x: Tensor) -> T | None:
    """What ``read(x)`` returns, ``None`` if it is not supported."""
    try:
        return read(x)
    except Unsupported:
        return None
