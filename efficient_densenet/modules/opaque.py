"""Reads any module as a dense layer, or a part of one, that is run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from efficient_densenet.functional.opaque import ONE_AT_A_TIME, Opaque, Unfit, handed
from efficient_densenet.functional.precision import autocast_now
from efficient_densenet.kernels.layout import is_hollow, outer_format
from efficient_densenet.modules.hooks import Hooks
from efficient_densenet.modules.reading import Layer, OpaquePart, Unsupported, group_of


@dataclass(frozen=True)
class Form:
    """How a layer takes the maps before it, and what it returns.

    Attributes:
        takes: ``"tensor"``, their concatenation; ``"list"``, one list; ``"arguments"``, one
            argument each.
        channels: of each tensor that it takes, in its order.
        returns: ``"new"``, its own maps; ``"all"``, the concatenation with those before.
        new_first: whether it puts its own maps before those that it reads.
        taken: whose is what it takes? ``"others'"``, who read it too, so that it must not overwrite
            it; ``"copied"`` for it alone; or ``"handed"`` on to it, so that not even we have to
            copy it.
    """

    takes: Literal["tensor", "list", "arguments"] = "tensor"
    channels: tuple[int, ...] = ()
    returns: Literal["new", "all"] = "new"
    new_first: bool = False
    taken: Literal["others'", "copied", "handed"] = "others'"

    def parts(self, channels: int) -> tuple[int, ...]:
        """Channels of the parts of the features that are read apart."""
        return self.channels or (channels,)

    def arrange(self, maps: Sequence[Tensor], format: torch.memory_format | None) -> list[Tensor]:
        """What the layer takes, of these parts."""
        if self.taken == "handed":
            return [_in_format(handed(x), format) for x in maps]
        if self.takes == "tensor":
            return [_joined(maps, format)]
        return [_in_format(x, format) for x in maps]

    def call(self, layer: Callable[..., Any], taken: list[Tensor], growth: int) -> Any:
        """The new maps that ``layer`` makes of what it takes."""
        y = layer(taken) if self.takes == "list" else layer(*taken)
        channels = growth + sum(x.shape[1] for x in taken)
        if self.returns == "new" or not isinstance(y, Tensor) or y.shape[1:2] != (channels,):
            return y
        return y[:, :growth] if self.new_first else y[:, -growth:]


def _joined(maps: Sequence[Tensor], format: torch.memory_format | None) -> Tensor:
    """The concatenation, always in storage of its own."""
    if len(maps) == 1 and format is not None:
        return maps[0].clone(memory_format=format)
    return _in_format(torch.cat(list(maps), 1), format)


def _in_format(x: Tensor, format: torch.memory_format | None) -> Tensor:
    return x if format in (None, outer_format(x)) else x.contiguous(memory_format=format)


TENSOR = Form()
COPIED, HANDED = Form(taken="copied"), Form(taken="handed")


def read_opaque(
    layer: Callable[..., Any], path: str, channels: int, growth: int, form: Form = TENSOR
) -> Layer:
    """Any module as a dense layer that reads ``channels`` channels and adds ``growth``.

    It is run without keeping anything, and once more in the backward pass: by autograd, on copies
    of its buffers as they were, in the modes and with the hooks that it had, under the same
    autocast, drawing the same random numbers. Forward hooks that only look are called once, others
    twice. ``path`` is what it is called in a reason. A function that has no parameters may stand in
    for a module.

    Raises:
        Unsupported: if that cannot be the same training.
    """
    owner = layer if isinstance(layer, nn.Module) else nn.Module()
    part = read_part(layer, path, form.parts(channels), owner, form, growth)
    return Layer.of([part], path, channels, growth)


def read_part(
    part: Callable[..., Any],
    path: str,
    channels: tuple[int, ...],
    layer: nn.Module,
    form: Form = TENSOR,
    growth: int = 0,
) -> OpaquePart:
    """The same of a part of ``layer``, which reads parts of so many ``channels``.

    ``growth`` is what it leaves, if ``form`` has to know.
    """
    if torch.compiler.is_compiling():
        raise Unsupported(path, "is not of known parts, and is being compiled")
    with ONE_AT_A_TIME:
        _check_part(layer, path)
        return _read(part, path, channels, layer, form, growth)


def _read(
    part: Callable[..., Any],
    path: str,
    channels: tuple[int, ...],
    layer: nn.Module,
    form: Form,
    growth: int,
) -> OpaquePart:
    module = part if isinstance(part, nn.Module) else nn.Module()
    for name, child in module.named_modules():
        _check_part(child, f"{path}.{name}" if name else path)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) not in (nn.Parameter, Tensor) and not is_hollow(parameter):
            raise Unsupported(f"{path}.{name}", f"is a {type(parameter).__name__}")
    buffers = dict(module.named_buffers())
    places = _places(module, (*parameters.values(), *buffers.values()))
    modes = [(child, child.training) for child in module.modules()]
    hooks = Hooks(module)
    hooked = any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())

    def run(taken: list[Tensor], tensors: Sequence[Tensor] | None) -> Any:
        if module is not part:
            return form.call(part, taken, growth)
        if tensors is None:
            if not torch.is_grad_enabled():
                return form.call(part, taken, growth)
            may_change = [*parameters.values()] if hooked else []
            with hooks.watched(), _unchanged(may_change, path):
                return form.call(part, taken, growth)
        learnt, learning = tensors[: len(parameters)], tensors[len(parameters) :]
        values = [*learnt, *(t.clone() for t in learning)]  # another backward pass may follow
        own = {name: values[i] for name, i in places.items()}
        with _in_modes(modes), hooks.again():
            return form.call(lambda *args: _call_with(module, own, args), taken, growth)

    copies = [buffer.detach().clone() for buffer in buffers.values()]
    shares = form.taken == "others'"
    count = len(parameters) + len(buffers)
    opaque = Opaque(channels, form.arrange, run, count, path, shares)
    changed = tuple(zip(buffers.values(), copies, strict=True))
    return OpaquePart(opaque, (*parameters.values(), *copies), changed, layer)


def _places(module: nn.Module, tensors: Sequence[Tensor]) -> dict[str, int]:
    """Of each name below ``module`` the place of its tensor among these.

    Every module has one name here, but a tensor may have several.
    """
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    return {
        f"{path}.{name}".removeprefix("."): numbers[id(tensor)]
        for path, child in module.named_modules()
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None
    }


def _call_with(module: nn.Module, own: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a module with these tensors in the place of its own.

    PyTorch would look for further names of them, and not put back what it finds under two names of
    one module.
    """
    return functional_call(module, own, args, tie_weights=False)


_refused: WeakKeyDictionary[nn.Module, tuple[object, tuple[str, ...]]] = WeakKeyDictionary()
"""Layers that turned out not to fit: how they were then, and why."""


def refuse(part: OpaquePart, x: Tensor, reason: Unfit) -> None:
    """Remember that a part did not fit in a call on ``x``, so that it does not run twice again."""
    _refused[part.layer] = _state(part.layer, x), reason.args


def check_not_refused(part: OpaquePart, x: Tensor) -> None:
    """Raise :class:`Unsupported` if a part did not fit before, and nothing has changed since."""
    state, reason = _refused.get(part.layer, (None, ()))
    if state is not None and state == _state(part.layer, x):
        raise Unsupported(*reason)


def _state(module: nn.Module, x: Tensor) -> object:
    """What a layer's fitting may depend on, apart from values."""
    parts = [
        (part.training, type(part), *part._forward_hooks, *part._forward_pre_hooks)
        for part in module.modules()
    ]
    return x.dtype, x.shape[2:], torch.is_grad_enabled(), autocast_now(x.device), parts


def _check_part(part: nn.Module, path: str) -> None:
    """Raise :class:`Unsupported` if a module cannot run again on other tensors than its own."""
    if isinstance(part, torch.jit.ScriptModule):
        raise Unsupported(path, "is a ScriptModule")
    if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
        raise Unsupported(path, "is compiled")
    if getattr(part, "_is_replica", False):
        raise Unsupported(path, "is a replica of DataParallel")
    if isinstance(part, nn.SyncBatchNorm) and group_of(part) is not None:
        raise Unsupported(path, "synchronises, and would have to again in the backward pass")
    if parametrize._cache_enabled and parametrize.is_parametrized(part):
        raise Unsupported(path, "has parametrisations that are being cached")


@contextmanager
def _unchanged(parameters: Sequence[Tensor], path: str) -> Iterator[None]:
    """A context that puts parameters back if hooks change them: the naive path will do it again.

    Raises:
        Unfit: if they do.
    """
    before = [(p, p._version, p.detach().clone()) for p in parameters]
    yield
    if not all(p._version == version and _is_equal(p, value) for p, version, value in before):
        with torch.no_grad():
            for p, _, value in before:
                p.copy_(value)
        raise Unfit(path, "changes its parameters in place, perhaps through a hook")


def _is_equal(x: Tensor, y: Tensor) -> bool:
    """Whether values are equal, if that can be told without waiting for a device."""
    return not x.is_cpu or is_hollow(x) or torch.equal(x, y)


@contextmanager
def _in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """A context in which modules train or evaluate as they did."""
    now = [(module, module.training) for module, _ in modes]
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for module, training in now:
            module.training = training
