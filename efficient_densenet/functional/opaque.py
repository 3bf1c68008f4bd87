"""Parts of which nothing is known: run without keeping anything, and run again by autograd.

A part is a layer, or what is between its units. The forward pass drops the graph that it makes; the
backward pass runs it again on a copy of what it read, and differentiates that.
``docs/derivation.md`` says what that costs.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from efficient_densenet.functional.precision import Autocast, as_autocast, autocast_now
from efficient_densenet.kernels.layout import is_hollow

Format = torch.memory_format
ONE_AT_A_TIME = threading.RLock()
"""Held while a layer that learns runs or is read.

Another thread neither finds it with other tensors than its own, nor draws from a random state that
is set for a while.
"""


@dataclass(frozen=True, eq=False)
class Opaque:
    """What makes maps of those before it, in a way that only running it tells.

    That is a dense layer, or a part of one.

    Attributes:
        channels: of each part of the features that it reads apart from the others.
        arrange: makes of these parts, the oldest first, the tensors that the layer takes, in a
            memory format, or in that of ``torch.cat``.
        run: ``run(taken, None)`` is the call; the result is what it makes. ``run(taken, tensors)``
            is the same with ``tensors`` in the place of its own, and in the modes that it had.
        tensors: how many tensors it has: parameters, and copies of buffers as they were.
        name: what it is called in a reason.
        shares: whether others read what it takes, so that it must not overwrite that.
    """

    channels: tuple[int, ...]
    arrange: Callable[[Sequence[Tensor], Format | None], list[Tensor]]
    run: Callable[[list[Tensor], Sequence[Tensor] | None], Any]
    tensors: int
    name: str
    shares: bool = True


class Surroundings(NamedTuple):
    """What a layer's result depends on besides its tensors: those of the forward pass."""

    grad: bool
    autocast: Autocast
    format: Format | None

    @classmethod
    def of(cls, x: Tensor, format: Format | None) -> Surroundings:
        """Those of a call on ``x`` at this moment."""
        return cls(torch.is_grad_enabled(), autocast_now(x.device), format)


class Unfit(RuntimeError):
    """A layer does not do what a dense layer does: its ``name``, and a predicate."""

    def __str__(self) -> str:
        return " ".join(self.args)


class Expected(NamedTuple):
    """What a part has to return: a shape, and a type that fits the one that holds all features."""

    shape: torch.Size
    dtype: torch.dtype


OVERWRITES = "overwrites maps that others read"
CHANGES_ITSELF = (
    "{} changes its parameters in place when it runs, and would again in the backward pass: change "
    'them outside of the forward function, or build the block or network with recompute="none"'
)


def run_once(
    opaque: Opaque,
    surroundings: Surroundings,
    maps: Sequence[Tensor],
    tensors: Sequence[Tensor],
    learns: bool,
    expected: Expected | None = None,
) -> tuple[Tensor, Tensor]:
    """What a part makes of ``maps``, and the random state that it drew from, empty if it did not.

    Nothing is ``expected`` of what is no part of a block.

    Raises:
        Unfit: if its result cannot be recomputed, or is not as expected.
        RuntimeError: if it changes its parameters: they have changed now, so nothing can go on.
    """
    device = maps[0].device
    learns = learns and surroundings.grad
    leaves = _unconnected(maps, learns)
    with (
        ONE_AT_A_TIME if surroundings.grad else nullcontext(),
        torch.set_grad_enabled(surroundings.grad),
        as_autocast(surroundings.autocast),
        saved_tensors_hooks(_drop, _refuse),
    ):
        before = None if is_hollow(maps[0]) else random_state(device)
        taken = _with_versions(opaque.arrange(leaves, surroundings.format))
        versions = [x._version for x in taken]
        own = [x._version for x in tensors] if learns else []
        y = _run_noticing_overwritten_leaves(opaque, taken)
        if learns and [x._version for x in tensors] != own:
            raise RuntimeError(CHANGES_ITSELF.format(opaque.name))
        if before is None or torch.equal(before, random_state(device)):
            before = torch.empty(0, dtype=torch.uint8)
    if not isinstance(y, Tensor):
        raise Unfit(opaque.name, f"returns a {type(y).__name__}")
    if expected is not None:
        _check_dense(opaque, y, expected)
        if opaque.shares and [x._version for x in taken] != versions:
            raise Unfit(opaque.name, OVERWRITES)
    _check_leaves(opaque, y, [*leaves, *tensors])
    y, kept = y.detach(), [weakref.ref(leaf) for leaf in leaves]
    del leaves, taken
    if learns and _is_alive(kept):
        raise Unfit(opaque.name, "lets a tensor from inside escape, perhaps through a hook")
    return y, before


class Rebuilt(NamedTuple):
    """What ran again: its result, with the graph from the ``leaves``, its maps and then tensors."""

    y: Tensor
    leaves: list[Tensor]

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Those of the leaves that need one, from that of the result; the graph is lost."""
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        if not wanted or not self.y.requires_grad:
            return [None] * len(self.leaves)
        grad = grad.to(self.y.dtype)
        found = iter(torch.autograd.grad(self.y, wanted, grad, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in self.leaves]


def rebuild(
    opaque: Opaque,
    surroundings: Surroundings,
    maps: Sequence[Tensor],
    tensors: Sequence[Tensor],
    random: Tensor,
    needs: Sequence[bool],
) -> Rebuilt:
    """The graph that :func:`run_once` dropped; ``needs`` of each leaf whether it needs a gradient.

    ``random`` is the state that was drawn from.
    """
    inputs = [*maps, *tensors]
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    with (
        ONE_AT_A_TIME,
        torch.enable_grad(),
        as_autocast(surroundings.autocast),
        drawing_from(random, maps[0].device),
    ):
        taken = opaque.arrange(leaves[: len(maps)], surroundings.format)
        y = opaque.run(taken, leaves[len(maps) :])
    _check_leaves(opaque, y, leaves)
    return Rebuilt(y, leaves)


def is_same(y: Tensor, kept: Tensor, size: Tensor | None = None) -> Tensor:
    """Whether what was made again is what was ``kept``, up to rounding; no device is waited for.

    ``size`` is that of the values that were rounded, by default of the largest that was kept.
    """
    least = max(torch.finfo(y.dtype).eps, torch.finfo(kept.dtype).eps)
    y = y.to(kept.dtype)
    if y.is_cpu and not is_hollow(y) and torch.equal(y, kept):  # nearly always, and in one pass
        return torch.ones((), dtype=torch.bool)
    near = (y - kept).abs() <= least**0.5 * (kept.abs().max() if size is None else size)
    return (near | (y == kept) | (y.isnan() & kept.isnan())).all()


def check_same(found: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ``RuntimeError`` if :func:`is_same` found a layer, by its name, to differ."""
    if found and not is_hollow(found[0][1]):
        for (name, _), same in zip(found, torch.stack([s for _, s in found]).tolist(), strict=True):
            if not same:
                raise RuntimeError(
                    f"{name} computes something else when it is run again in the backward pass, "
                    "since something that it reads has changed: keep that in a buffer, or build "
                    'the block or network with recompute="none"'
                )


def _unconnected(maps: Sequence[Tensor], learns: bool) -> list[Tensor]:
    """The maps as leaves from which no gradient goes on."""
    leaves = [x.detach().requires_grad_(learns) for x in maps]
    for leaf in leaves if learns else ():
        leaf.register_hook(_refuse)
    return leaves


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def handed(x: Tensor) -> Tensor:
    """A leaf that nobody else reads, in the same memory, as a tensor that may be overwritten."""
    y: Tensor = _Handed.apply(x)
    return y


def _with_versions(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors so that it shows whether they are overwritten: of inference it does not."""
    if not torch.is_inference_mode_enabled():
        return tensors
    with torch.inference_mode(False):
        return [x.clone() for x in tensors]


def _run_noticing_overwritten_leaves(opaque: Opaque, taken: list[Tensor]) -> Any:
    try:
        return opaque.run(taken, None)
    except RuntimeError as error:
        if "leaf Variable that requires grad" in str(error):
            raise Unfit(opaque.name, OVERWRITES) from error
        raise


def _is_alive(tensors: Sequence[weakref.ref[Tensor]]) -> bool:
    """Whether somebody holds one of the tensors, and not only in a circle."""
    if all(tensor() is None for tensor in tensors):
        return False
    gc.collect()
    return any(tensor() is not None for tensor in tensors)


def _check_dense(opaque: Opaque, y: Tensor, expected: Expected) -> None:
    if y.shape != expected.shape:
        raise Unfit(opaque.name, f"returns {tuple(y.shape)} instead of {tuple(expected.shape)}")
    if torch.promote_types(y.dtype, expected.dtype) != expected.dtype:
        raise Unfit(opaque.name, f"returns {y.dtype} beside features of {expected.dtype}")


def _check_leaves(opaque: Opaque, y: Tensor, known: Sequence[Tensor]) -> None:
    """Raise :class:`Unfit` if a gradient would flow to anything but ``known``."""
    ids = {id(tensor) for tensor in known}
    made = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    waiting: list[Node] = [y.grad_fn] if y.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in made:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ids:
            raise Unfit(opaque.name, "learns a tensor that is not one of its parameters")
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def _drop(tensor: Tensor) -> None:
    """In the place of a saved tensor: nothing."""


def _refuse(_: object) -> Any:
    raise RuntimeError(
        "a tensor from inside a recomputed layer is not connected to the network, and has no "
        'gradient: build the block or network with recompute="none"'
    )


def random_state(device: torch.device) -> Tensor:
    """The state of the generators that a layer on ``device`` draws from, as bytes."""
    state = torch.get_rng_state()
    module = _generator_of(device)
    return state if module is None else torch.cat([state, module.get_rng_state(device)])


def set_random_state(state: Tensor, device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    module = _generator_of(device)
    if module is not None:
        module.set_rng_state(state[size:], device)


def _generator_of(device: torch.device) -> Any:
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


@contextmanager
def drawing_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """A context that draws from ``state``, and leaves the generators as they were."""
    if not state.numel():
        yield
        return
    state = state.cpu()
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
