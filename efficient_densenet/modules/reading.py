"""Reads ``nn`` modules as what they compute, or says why that is not supported.

Modules are read once a call: what has been replaced, frozen, hooked or switched to evaluation since
the last call is seen. Who asks catches :class:`Unsupported` and takes the naive path: for modules
``recomputing.py``, for neighbours that may run together ``sequence.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.functional.opaque import Opaque
from efficient_densenet.functional.spec import LayerSpec, UnitSpec, UnitTensors
from efficient_densenet.kernels.interface import Activation, Geometry, Pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Unsupported(Exception):
    """Why a call takes the naive path: a whole sentence, ``subject`` and ``predicate``.

    The subject is the path of a module, or what else it is about. There is no constructor, since
    ``torch.compile`` traces none of an exception.
    """

    def __str__(self) -> str:
        subject, predicate = self.args
        return f"{subject} {predicate}"


class Misfit(Unsupported):
    """The same where maps are of another size than a layer reads, or leaves."""


class Declined(Unsupported):
    """The same where the caller has decided it, and not what the modules are."""


Known = Mapping[type[nn.Module], Mapping[str, Callable[..., object]]]
"""Classes whose computation is known, with the methods that make it, as they were at import."""


def _as_imported(*classes: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> Known:
    return {cls: {name: getattr(cls, name) for name in methods} for cls in classes}


NORMS = _as_imported(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = _as_imported(nn.Conv1d, nn.Conv2d, nn.Conv3d, methods=("forward", "_conv_forward"))
AVG_POOLS = _as_imported(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS = _as_imported(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
POOLS = {**AVG_POOLS, **MAX_POOLS}
ACTIVATION_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("relu",),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.SiLU: ("silu",),
    nn.GELU: ("gelu",),
    nn.Identity: ("identity",),
}
"""The name of an activation module for the operations, and the attributes it takes."""
ACTIVATIONS = _as_imported(*ACTIVATION_NAMES)


def is_patched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or has_own_call(type(module))
    )


def has_own_call(cls: type[nn.Module]) -> bool:
    """Whether a class does not leave it to PyTorch how its forward is called."""
    plain = cls.__call__ is nn.Module.__call__ and cls._call_impl is nn.Module._call_impl
    return not plain


def check_plain(module: nn.Module, path: str) -> None:
    """Raise :class:`Unsupported` unless calling the module runs its class's forward alone."""
    if is_patched(module):
        raise Unsupported(path, "has hooks, or a forward or call of its own")


def check_known(module: nn.Module, path: str, known: Known) -> None:
    """Raise :class:`Unsupported` unless the module is exactly of one of the classes in ``known``.

    Subclasses may compute something else, and so may methods that have been replaced.
    """
    methods = known.get(type(module))
    if methods is None:
        raise Unsupported(path, f"is a {type(module).__name__}")
    for name, method in methods.items():
        if getattr(type(module), name) is not method or name in module.__dict__:
            raise Unsupported(path, f"has a {name} of its own")
    check_plain(module, path)


def read_norm(module: nn.Module, path: str) -> _BatchNorm:
    """A batch norm."""
    check_known(module, path, NORMS)
    assert isinstance(module, _BatchNorm)
    return module


def read_activation(module: nn.Module, path: str) -> Activation:
    """ReLU, LeakyReLU, ELU, SiLU, GELU, or none."""
    check_known(module, path, ACTIVATIONS)
    name, *parameters = ACTIVATION_NAMES[type(module)]
    if getattr(module, "approximate", "none") == "tanh":
        name += "_tanh"
    return Activation(name, tuple(float(getattr(module, p)) for p in parameters))


def read_conv(module: nn.Module, path: str) -> _ConvNd:
    """A convolution that pads with zeros, as many as it says."""
    check_known(module, path, CONVS)
    assert isinstance(module, _ConvNd)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unsupported(
            path,
            f"pads with {module.padding_mode!r}, {module.padding!r}: "
            "only a stated number of zeros is supported",
        )
    return module


def read_pool(module: nn.Module, path: str) -> Pool:
    """What an average or maximum pooling does."""
    check_known(module, path, POOLS)
    if getattr(module, "return_indices", False):
        raise Unsupported(path, "returns indices")
    dims = list(POOLS).index(type(module)) % 3 + 1
    return Pool(
        "average" if type(module) in AVG_POOLS else "maximum",
        _repeated(module, "kernel_size", dims),
        _repeated(module, "stride", dims),
        _repeated(module, "padding", dims),
        _repeated(module, "dilation", dims),
        bool(module.ceil_mode),
        bool(getattr(module, "count_include_pad", True)),
        getattr(module, "divisor_override", None),
    )


def _repeated(pool: nn.Module, name: str, dims: int) -> tuple[int, ...]:
    value = getattr(pool, name, 1)
    return tuple(value) if isinstance(value, tuple) else (value,) * dims


class Dropout(NamedTuple):
    """Dropout as it is now: rate 0 in evaluation; of single values or of a sample's whole maps."""

    rate: float = 0.0
    drops_maps: bool = False


NO_DROPOUT = Dropout()


def keeps_size(conv: _ConvNd) -> bool:
    """Whether a convolution leaves maps as large as they were."""
    stride, padding, dilation, _ = geometry(conv)
    reach = tuple(d * (size - 1) for d, size in zip(dilation, conv.kernel_size, strict=True))
    return set(stride) == {1} and tuple(2 * p for p in padding) == reach


def is_pointwise(conv: _ConvNd) -> bool:
    """Whether a convolution looks at one position at a time, and at all of them."""
    return keeps_size(conv) and all(size == 1 for size in conv.kernel_size)


def is_plain_average(pool: Pool) -> bool:
    """Whether a pooling takes the mean of whole windows: it then commutes with a pointwise map."""
    return (
        pool.kind == "average"
        and not any(pool.padding)
        and not pool.ceil_mode
        and pool.divisor is None
    )


def geometry(conv: _ConvNd) -> Geometry:
    """How a convolution moves over its input."""
    assert not isinstance(conv.padding, str)
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def group_of(norm: _BatchNorm) -> ProcessGroup | None:
    """The process group over which a norm takes its batch's statistics, ``None`` for this process.

    As in ``nn.SyncBatchNorm``: only in training, and only where there are several processes.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    """Whether a batch norm would normalise with the statistics of its batch."""
    return norm.training or norm.running_mean is None


class Unit(NamedTuple):
    """BN - activation [- pooling] [- convolution] as it is now, ready to be computed."""

    norm: _BatchNorm
    spec: UnitSpec
    tensors: UnitTensors

    @property
    def leaves(self) -> int:
        """Channels that its convolution leaves, or its norm if it has none."""
        weight: Tensor | None = self.tensors.conv_weight
        return self.norm.num_features if weight is None else weight.shape[0]


class OpaquePart(NamedTuple):
    """What is run as it is, in the state in which it is now.

    Attributes:
        spec: how it is run.
        tensors: its parameters, and copies of its buffers.
        buffers: each buffer beside its copy.
        layer: the module of which it is a part, or all.
    """

    spec: Opaque
    tensors: tuple[Tensor, ...]
    buffers: tuple[tuple[Tensor, Tensor], ...]
    layer: nn.Module

    @torch.no_grad()
    def undo(self) -> None:
        """Let its buffers be what they were when it was read."""
        for buffer, copy in self.buffers:
            buffer.resize_(copy.shape).copy_(copy)


class Layer(NamedTuple):
    """A dense layer as it is now: what it computes, and the parts that it is made of."""

    spec: LayerSpec
    parts: tuple[Unit | OpaquePart, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[Unit | OpaquePart],
        path: str,
        channels: int,
        growth: int,
        dropout: Dropout = NO_DROPOUT,
    ) -> Layer:
        """The layer of these parts, which is called ``path`` in a reason.

        ``channels`` as in :class:`LayerSpec`. An opaque part is taken to leave what the unit after
        it reads, or at the end ``growth`` channels.

        Raises:
            Misfit: if a unit reads another number of channels than there are.
        """
        widths: list[int] = []
        reads = channels
        for i, part in enumerate(parts):
            after = parts[i + 1] if i + 1 < len(parts) else None
            if isinstance(part, Unit):
                expected = part.norm.num_features
                if expected != reads:
                    raise Misfit(path, f"expects {expected} channels and gets {reads}")
                reads = part.leaves
            else:
                reads = after.norm.num_features if isinstance(after, Unit) else growth
            widths.append(reads)
        specs = tuple([part.spec for part in parts])
        return cls(LayerSpec(specs, channels, tuple(widths), *dropout), tuple(parts))

    @property
    def units(self) -> list[Unit]:
        """Those of its parts that are units."""
        return [part for part in self.parts if isinstance(part, Unit)]

    @property
    def opaque(self) -> list[OpaquePart]:
        """Those of its parts that are none."""
        return [part for part in self.parts if isinstance(part, OpaquePart)]


def unit_of(
    norm: _BatchNorm,
    activation: Activation,
    conv: _ConvNd | None = None,
    pool: Pool | None = None,
) -> Unit:
    """The unit of modules that have been read."""
    running_mean = running_var = weight = bias = None
    batch_statistics = uses_batch_statistics(norm)
    if not batch_statistics:
        assert norm.running_mean is not None and norm.running_var is not None
        # Copies: the buffers may be written between forward and backward (DDP broadcasts them).
        running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    if conv is not None:
        weight, bias = conv.weight, conv.bias
    tensors = UnitTensors(norm.weight, norm.bias, running_mean, running_var, weight, bias)
    moves = None if conv is None else geometry(conv)
    spec = UnitSpec(norm.eps, batch_statistics, moves, pool, activation)
    return Unit(norm, spec, tensors)
