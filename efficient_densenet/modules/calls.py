"""Calls of the recomputing functions: what modules are, read for an input, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function

from efficient_densenet.functional import autograd
from efficient_densenet.functional.modes import Recompute
from efficient_densenet.functional.opaque import (
    Surroundings,
    Unfit,
    random_state,
    set_random_state,
)
from efficient_densenet.functional.precision import Types, is_autocast, pools_to_float32, types_of
from efficient_densenet.functional.spec import BlockSpec, StemSpec
from efficient_densenet.functional.synchronise import joined_count
from efficient_densenet.kernels import whole
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.layout import is_hollow, outer_format
from efficient_densenet.modules.opaque import check_not_refused, refuse
from efficient_densenet.modules.reading import (
    Declined,
    Layer,
    OpaquePart,
    Unit,
    Unsupported,
    geometry,
    group_of,
    uses_batch_statistics,
)
from efficient_densenet.modules.running_statistics import Seen, update_running_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_input(x: Tensor) -> None:
    """Raise :class:`Unsupported` if no module at all could take the efficient path on ``x``."""
    if not isinstance(x, Tensor):
        raise Unsupported("the input", f"is a {type(x).__name__}")
    if x.numel() == 0:
        raise Declined("the batch", "is empty")
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting():
        raise Declined("the module", "is being exported or traced")
    if nn_module._has_any_global_hook():
        raise Unsupported("every module", "has a global hook")


def on_plain_tensors(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``run(*tensors)``, as PyTorch calls its own functions on subclasses of ``Tensor``.

    ``run`` gets plain tensors; what class its result has, and which metadata, is up to the
    ``__torch_function__`` of the subclass.
    """
    if not has_torch_function(tensors):
        return run(*tensors)
    out: Tensor = handle_torch_function(_run_on_plain_tensors, tensors, run, *tensors)
    return out


def _run_on_plain_tensors(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return run(*(x.as_subclass(Tensor) for x in tensors))


def check_dtypes(x: Tensor, units: Iterable[Unit]) -> None:
    """Raise :class:`Unsupported` if the naive network would refuse weights of their types.

    Without autocast a convolution wants its input's type, and batch norm that or float32.
    """
    if is_autocast(x):
        return
    for unit in units:
        weight, norm = unit.tensors.conv_weight, unit.tensors.weight
        if weight is not None and weight.dtype != x.dtype:
            raise Unsupported("the input", f"is {x.dtype}, and a convolution is {weight.dtype}")
        if (
            norm is not None
            and norm.dtype != x.dtype
            and (norm.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16))
        ):
            raise Unsupported("the input", f"is {x.dtype}, and a norm is {norm.dtype}")


def check_dims(x: Tensor, units: Iterable[Unit]) -> None:
    """Raise :class:`Unsupported` if a norm with no convolution after it would refuse the input."""
    for unit in units:
        if unit.tensors.conv_weight is None:
            try:
                unit.norm._check_input_dim(x)
            except ValueError as error:
                raise Unsupported("a norm", f"refuses the input: {error}") from error


def check_buffers_apart(units: Iterable[Unit], parts: Iterable[OpaquePart]) -> None:
    """Raise :class:`Unsupported` if a part and a norm would both learn the same buffer.

    Norms learn when the block has run, the part while it runs: not in the order of the layers.
    """
    own = {id(b) for unit in units if unit.norm.training for b in unit.norm._buffers.values()}
    for part in parts:
        if any(id(buffer) in own for buffer, _ in part.buffers):
            raise Unsupported(part.spec.name, "shares running statistics with another layer")


def check_opaque(x: Tensor, part: OpaquePart) -> None:
    """Raise :class:`Unsupported` if a part could not be run by its tensors, or run again."""
    name = part.spec.name
    if torch._C._are_functorch_transforms_active():
        raise Unsupported(name, "is not of known parts, and is transformed by torch.func")
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise Unsupported(name, "is not of known parts, and is captured in a CUDA graph")
    check_not_refused(part, x)
    for tensor in part.tensors:
        if tensor.device != x.device and tensor.dim():
            raise Unsupported(name, f"has tensors on {tensor.device}")


@contextmanager
def undone_if_unfit(x: Tensor, parts: Iterable[OpaquePart]) -> Iterator[None]:
    """A context in which opaque parts run on ``x``.

    Raises:
        Unsupported: if one turns out not to fit; all buffers and random generators are then as
            before, so that the naive path may run.
    """
    state = None if is_hollow(x) else random_state(x.device)
    try:
        yield
    except Unfit as reason:
        for part in parts:
            part.undo()
            if part.spec.name == reason.args[0]:
                refuse(part, x, reason)
        if state is not None:
            set_random_state(state, x.device)
        raise Unsupported(*reason.args) from reason


def common_group(norms: Iterable[_BatchNorm], values: int) -> ProcessGroup | None:
    """The process group over which all these norms take batch statistics.

    ``values`` is the number of values per channel in this process.

    Raises:
        Unsupported: if norms differ in it, or their batch statistics cannot be.
    """
    groups: list[ProcessGroup | None] = []
    for norm in norms:
        if uses_batch_statistics(norm) and (group := group_of(norm)) not in groups:
            groups.append(group)
    if len(groups) > 1:
        raise Unsupported("some norms", "take the statistics of other processes than others do")
    if groups == [None] and values <= 1:
        raise Unsupported("the batch", "has at most one value per channel to take statistics of")
    if any(groups) and torch.compiler.is_compiling():
        raise Unsupported("the norms", "synchronise, which cannot be compiled")
    return groups[0] if groups else None


def are_small(values: int, dtype: torch.dtype, group: ProcessGroup | None) -> bool:
    """Whether maps of at most so many values may be normalised whole.

    Not where sizes are not known yet, or where batch norm's sums are those of several processes.
    """
    if torch.compiler.is_compiling() or group is not None:
        return False
    return values * dtype.itemsize <= whole.MOST_BYTES


@dataclass(frozen=True)
class BlockCall:
    """Dense layers one after the other, and then an exit that reads all features, on ``x``.

    Attributes:
        x: ``(N, channels, *spatial)``.
        layers: may be none if there is an exit.
        exit: what is returned instead of the features: of a transition or a head.
        recompute: as in :class:`BlockSpec`.
        kernels: which implementation of the operations to run on.
        group: the processes whose batch statistics are joined, ``None`` for this one alone.
        new_first: whether layers put their maps before those that they read.
    """

    x: Tensor
    layers: tuple[Layer, ...]
    exit: Unit | None
    recompute: Recompute
    kernels: str
    group: ProcessGroup | None
    new_first: bool = False

    @classmethod
    def of(
        cls,
        x: Tensor,
        layers: Iterable[Layer],
        exit: Unit | None,
        recompute: Recompute,
        kernels: str,
        new_first: bool = False,
    ) -> BlockCall:
        """The call, after a look at its norms; raises :class:`Unsupported`."""
        layers = tuple(layers)
        units = [unit for layer in layers for unit in layer.units]
        units += [exit] if exit else []
        check_dtypes(x, units)
        check_dims(x, units)
        for layer in layers:
            for part in layer.opaque:
                check_opaque(x, part)
                check_buffers_apart(units, [part])
        group = common_group([unit.norm for unit in units], x.numel() // x.shape[1])
        return cls(x, layers, exit, recompute, kernels, group, new_first)

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.x.shape[1] + sum(layer.spec.growth for layer in self.layers)

    def with_exit(self, exit: Unit) -> BlockCall:
        """The same call with an exit; raises :class:`Unsupported` if that cannot be."""
        expected = exit.norm.num_features
        if expected != self.channels:
            raise Unsupported("the norm", f"expects {expected} channels and gets {self.channels}")
        return BlockCall.of(self.x, self.layers, exit, self.recompute, self.kernels, self.new_first)

    @property
    def spec(self) -> BlockSpec:
        """What is computed, without modules."""
        spec = BlockSpec(
            layers=tuple([layer.spec for layer in self.layers]),
            exit=self.exit.spec if self.exit else None,
            input_channels=self.x.shape[1],
            recompute=self.recompute,
            types=types_of(self.x),
            kernels=self.kernels,
            process_group=self.group,
            surroundings=Surroundings.of(self.x, outer_format(self.x)) if self.opaque else None,
            new_first=self.new_first,
        )
        values = self.x.numel() // self.x.shape[1] * spec.widest
        return replace(spec, small=are_small(values, spec.types.features, self.group))

    @property
    def opaque(self) -> list[OpaquePart]:
        """The parts of its layers that are not known."""
        return [part for layer in self.layers for part in layer.opaque]

    def run(self) -> Tensor:
        """The features, or the result of the exit; buffers learn once.

        Raises:
            Unsupported: if an opaque part turned out not to fit; its buffers and the random
                generators are as they were before.
        """
        if not self.opaque:
            return on_plain_tensors(self._run, self.x)
        with undone_if_unfit(self.x, self.opaque):
            return on_plain_tensors(self._run, self.x)

    def _statistics_for(self, layer: Layer, features: Statistics) -> Statistics:
        """Statistics of which those that a layer reads are the first."""
        if not self.new_first:
            return features
        return features.of(slice(self.channels - layer.spec.channels, None))

    def _run(self, x: Tensor) -> Tensor:
        tensors = [part.tensors for layer in self.layers for part in layer.parts]
        tensors += [self.exit.tensors] if self.exit else []
        out, features, made = autograd.dense_block(x, self.spec, tensors)
        seen = [
            Seen(part.norm, statistics)
            for layer, inside in zip(self.layers, made, strict=True)
            for part, statistics in zip(
                layer.parts, (self._statistics_for(layer, features), *inside), strict=False
            )
            if isinstance(part, Unit)
        ]
        if self.exit:
            seen.append(Seen(self.exit.norm, features))
        values = x.numel() // x.shape[1]
        update_running_statistics(seen, joined_count(values, self.group, x.device))
        pool = self.exit.spec.pool if self.exit else None
        return out.float() if pools_to_float32(x, pool) else out


@dataclass(frozen=True)
class StemCall:
    """Convolution, norm, activation and pooling of an image, of which only the image is kept."""

    x: Tensor
    conv: nn.modules.conv._ConvNd
    unit: Unit
    kernels: str
    group: ProcessGroup | None

    @classmethod
    def of(cls, x: Tensor, conv: nn.modules.conv._ConvNd, unit: Unit, kernels: str) -> StemCall:
        """The call, after a look at its norm; raises :class:`Unsupported`."""
        if x.dim() != conv.weight.dim():
            raise Unsupported("the image", f"has {x.dim()} dimensions")
        check_dtypes(x, [unit._replace(tensors=unit.tensors._replace(conv_weight=conv.weight))])
        positions = geometry(conv).positions(x.shape[2:], conv.weight.shape[2:])
        group = common_group([unit.norm], len(x) * positions)
        return cls(x, conv, unit, kernels, group)

    @property
    def spec(self) -> StemSpec:
        """What is computed, without modules."""
        compute, conv = types_of(self.x).compute, self.conv
        positions = geometry(conv).positions(self.x.shape[2:], conv.weight.shape[2:])
        values = len(self.x) * positions * len(conv.weight)
        return StemSpec(
            conv=geometry(conv),
            unit=self.unit.spec,
            # The result of a convolution has the type in which it computes, and so has the rest.
            types=Types(compute, compute),
            kernels=self.kernels,
            process_group=self.group,
            small=are_small(values, compute, self.group),
        )

    def run(self) -> Tensor:
        """What is left after the pooling; running statistics are updated once."""
        return on_plain_tensors(self._run, self.x)

    def _run(self, x: Tensor) -> Tensor:
        conv = {"conv_weight": self.conv.weight, "conv_bias": self.conv.bias}
        tensors = self.unit.tensors._replace(**conv)
        out, statistics, values = autograd.stem(x, self.spec, tensors)
        count = joined_count(values, self.group, x.device)
        update_running_statistics([Seen(self.unit.norm, statistics)], count)
        return out.float() if pools_to_float32(x, self.unit.spec.pool) else out
