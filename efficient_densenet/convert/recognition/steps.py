"""Operations that are known, read back from the value that they made: what each is, and of which
module.

What a step says is exactly what the module named does, or it is not a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.convert.recognition.region import Region
from efficient_densenet.convert.recording.graph import Node, Value
from efficient_densenet.convert.state.values import Nest, class_of
from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.reading import NORMS, Dropout, Unsupported, uses_batch_statistics


@dataclass(frozen=True)
class Norm:
    """A batch norm, by the path of its module."""

    path: str


@dataclass(frozen=True)
class Conv:
    """A convolution, by the path of its module."""

    path: str


What = Norm | Activation | Conv | Dropout | Pool


@dataclass(frozen=True)
class Step:
    """One step of a chain: what it is, the value that it reads, and its operations."""

    what: What
    input: Value
    nodes: tuple[Node, ...]


def chain(region: Region, value: Value, is_start: Callable[[Value], bool]) -> list[Step]:
    """The steps that lead to ``value``, from a value that ``is_start`` knows.

    Raises:
        Unsupported: if something on the way is no known step.
    """
    steps: list[Step] = []
    while not is_start(value):
        steps.append(step(region, value))
        value = steps[-1].input
    return steps[::-1]


def step(region: Region, value: Value) -> Step:
    """The step that made a value; raises :class:`Unsupported` if that is none that is known."""
    node = value.maker
    if node is None or node not in region.call:
        raise Unsupported("a map", f"comes from {value.path or 'elsewhere'}")
    read = _READERS.get(node.name)
    if read is None:
        raise _unknown(region, node)
    found = read(region, node)
    if value is not node.results[0]:
        raise _unknown(region, node)
    for part in found.nodes:
        region.check_expected(part)
    return found


def _name(region: Region, path: str) -> str:
    return region.relative(path) or "the module"


def _unknown(region: Region, node: Node) -> Unsupported:
    module = node.call.module
    if region.relative(node.call.path) and not any(True for _ in module.children()):
        return Unsupported(region.place(node), f"is a {type(module).__name__}")
    return Unsupported(region.place(node), f"computes {node.name}")


def _norm(region: Region, node: Node) -> Step:
    given = {name: node.inputs[name] for name in ("weight", "bias", "running_mean", "running_var")}
    path, norm = _owner(region, node, given.values(), _BatchNorm)
    tracks = norm.running_mean is not None and (norm.track_running_stats or not norm.training)
    expected: dict[str, str | None] = {
        name: None if getattr(norm, name) is None else name for name in ("weight", "bias")
    }
    expected |= {name: name if tracks else None for name in ("running_mean", "running_var")}
    _check_tensors(region, node, path, given, expected)
    training, momentum, eps = (node.inputs[name] for name in ("training", "momentum", "eps"))
    if (training, eps) != (uses_batch_statistics(norm), norm.eps):
        raise Unsupported(_name(region, path), "is not used as its attributes say")
    nodes = [node]
    if norm.training and tracks:
        if momentum != norm.momentum:
            raise Unsupported(_name(region, path), f"is used with a momentum of {momentum}")
        if node.call.path != path and class_of(norm) in NORMS:
            # Of these, schedules may change it: whether what was given follows is not known.
            raise Unsupported(_name(region, path), "is given its momentum by other code")
        if norm.num_batches_tracked is not None:
            nodes.append(_counting(region, path, node))
    return Step(Norm(region.relative(path)), node.inputs["input"], tuple(nodes))


def _counting(region: Region, path: str, norm: Node) -> Node:
    """The operation that counts a batch of a norm: the last one before the norm itself."""
    counter = f"{path}.num_batches_tracked".removeprefix(".")
    for node in reversed(region.recording.nodes[norm.call.start : norm.index]):
        if any(value.path == counter for value in node.effects):
            by_one = node.name == "add" and (node.inputs["other"], node.inputs["alpha"]) == (1, 1)
            if by_one and node.call is norm.call:
                return node
    raise Unsupported(_name(region, path), "does not count its batches")


def _conv(region: Region, node: Node) -> Step:
    given = {name: node.inputs[name] for name in ("weight", "bias")}
    path, conv = _owner(region, node, given.values(), _ConvNd)
    expected = {"weight": "weight", "bias": None if conv.bias is None else "bias"}
    _check_tensors(region, node, path, given, expected)
    names = ("stride", "padding", "dilation")
    used = [tuple(node.inputs[name]) for name in names] + [node.inputs["groups"]]
    says = [getattr(conv, name) for name in names] + [conv.groups]
    if node.inputs["transposed"] or conv.transposed or used != says:
        raise Unsupported(_name(region, path), "does not convolve as its attributes say")
    return Step(Conv(region.relative(path)), node.inputs["input"], (node,))


def _owner(region: Region, node: Node, given: Iterable[Nest], kind: type) -> tuple[str, Any]:
    """The module whose tensors an operation reads; if it reads none, the one that is running."""
    found = next((value for value in given if value is not None), None)
    if found is None:
        path = node.call.path
    elif found.path is None:
        raise Unsupported(
            region.place(node), f"computes {node.name} with a tensor that no module holds"
        )
    else:
        path = found.path.rpartition(".")[0]
    module: nn.Module = region.module(path)
    if not isinstance(module, kind):
        raise Unsupported(_name(region, path), f"is a {type(module).__name__}")
    return path, module


def _check_tensors(
    region: Region, node: Node, path: str, given: dict[str, Nest], expected: dict[str, str | None]
) -> None:
    prefix = f"{path}." if path else ""
    for name, value in given.items():
        held = expected[name]
        fits = (
            value is None
            if held is None
            else value is not None and value.path == prefix + held and value.maker is None
        )
        if not fits:
            raise Unsupported(region.place(node), f"computes {node.name} with another {name}")


def _activation(name: str, *parameters: str) -> Callable[[Region, Node], Step]:
    def read(region: Region, node: Node) -> Step:
        values = tuple(float(node.inputs[parameter]) for parameter in parameters)
        return Step(Activation(name, values), node.inputs["self"], (node,))

    return read


def _gelu(region: Region, node: Node) -> Step:
    name = "gelu_tanh" if node.inputs["approximate"] == "tanh" else "gelu"
    return Step(Activation(name), node.inputs["self"], (node,))


def _elu(region: Region, node: Node) -> Step:
    if (node.inputs["scale"], node.inputs["input_scale"]) != (1, 1):
        raise Unsupported(region.place(node), "is a scaled ELU")
    return _activation("elu", "alpha")(region, node)


def _dropout(region: Region, node: Node) -> Step:
    """``x * mask``, where the mask is ``bernoulli(1 - p) / (1 - p)``."""
    x, mask = node.inputs["self"], node.inputs["other"]
    nodes = [node]
    for name in ("div", "bernoulli"):
        made_by = nodes[-1].inputs["other" if name == "div" else "self"]
        if not isinstance(made_by, Value) or made_by.maker is None or made_by.maker.name != name:
            raise _unknown(region, node)
        nodes.append(made_by.maker)
    _, division, draw = nodes
    blank = draw.inputs["self"].maker
    nodes += [blank] if blank else []
    kept = draw.inputs["p"]
    if division.inputs["other"] != kept or draw.inputs["generator"] is not None:
        raise _unknown(region, node)
    whole_maps = (*x.shape[:2], *(1 for _ in x.shape[2:]))
    shared = any(use is not node and use in region.live for use in mask.uses)
    if shared or mask.shape not in (x.shape, whole_maps):
        raise _unknown(region, node)
    return Step(Dropout(1 - kept, mask.shape != x.shape), x, tuple(nodes))


def _pool(kind: str) -> Callable[[Region, Node], Step]:
    def read(region: Region, node: Node) -> Step:
        values, dims = node.inputs, len(node.inputs["self"].shape) - 2

        def per_dimension(name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
            value = values.get(name, 1)
            value = (value,) if isinstance(value, int) else tuple(value) or default
            return value * dims if len(value) == 1 else value

        size = per_dimension("kernel_size")
        pool = Pool(
            kind,
            size,
            per_dimension("stride", size),
            per_dimension("padding"),
            per_dimension("dilation"),
            values["ceil_mode"],
            values.get("count_include_pad", True),
            values.get("divisor_override"),
        )
        return Step(pool, values["self"], (node,))

    return read


def _squeeze(region: Region, node: Node) -> Step:
    """Pooling in one dimension is pooling in two, of which the first is a single row."""
    inner = step(region, node.inputs["self"])
    above = inner.input.maker
    if not isinstance(inner.what, Pool) or above is None or above.name != "unsqueeze":
        raise _unknown(region, node)
    dims = {node.inputs.get("dim"), above.inputs["dim"]} <= {-2, len(inner.input.shape) - 2}
    pool = inner.what
    last = {name: getattr(pool, name)[-1:] for name in ("kernel", "stride", "padding", "dilation")}
    if not dims or pool.kernel[:-1] != (1,) or pool.padding[:-1] != (0,):
        raise _unknown(region, node)
    nodes = (node, *inner.nodes, above)
    return Step(pool._replace(**last), above.inputs["self"], nodes)


_READERS: dict[str, Callable[[Region, Node], Step]] = {
    "native_batch_norm": _norm,
    "convolution": _conv,
    "relu": _activation("relu"),
    "silu": _activation("silu"),
    "gelu": _gelu,
    "leaky_relu": _activation("leaky_relu", "negative_slope"),
    "elu": _elu,
    "mul": _dropout,
    "avg_pool2d": _pool("average"),
    "avg_pool3d": _pool("average"),
    "max_pool2d_with_indices": _pool("maximum"),
    "max_pool3d_with_indices": _pool("maximum"),
    "squeeze": _squeeze,
}
