"""What a block's passes ask of a GPU that is not there: launches, and calls into PyTorch.

On shapes alone, where passes go as they would on a GPU: nothing is launched or computed.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet import EfficientDenseBlock
from efficient_densenet.kernels.layout import imagined_on, outer_format
from efficient_densenet.kernels.triton import launch


class Calls(NamedTuple):
    """By name: Triton's kernels, and PyTorch's operators, views included."""

    kernels: Counter[str]
    operators: Counter[str]

    def beyond(self, other: Calls) -> Calls:
        """Those that the other has not."""
        return Calls(self.kernels - other.kernels, self.operators - other.operators)


class Pass(TorchDispatchMode):
    """Context manager that counts the calls of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls(Counter(), Counter())

    def __enter__(self) -> Pass:
        def count(kernel: object, *_: object, **__: object) -> None:
            self.calls.kernels[kernel.__name__] += 1

        self._patched = patch.object(launch, "run", count)
        self._patched.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patched.stop()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        if func.namespace == "aten":
            self.calls.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls_of_block(layers: int, recompute: str, autocast: bool) -> tuple[Calls, Calls]:
    """Those of a block of bottleneck layers, forward and backward; its maps are one slab."""
    with FakeTensorMode(), imagined_on(torch.device("cuda")):
        block = EfficientDenseBlock(layers, 64, 4, 32, recompute=recompute)  # type: ignore[arg-type]
        x = torch.empty(8, 64, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
        with Pass() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(x)
        gradient = torch.empty_like(out)
        with Pass() as backward:
            out.backward(gradient)
    return forward.calls, backward.calls


def calls_of_layer(recompute: str, autocast: bool) -> tuple[Calls, Calls]:
    """Those of one layer, forward and backward: what a block has more of than a shorter one."""
    deep, shallow = (calls_of_block(layers, recompute, autocast) for layers in (3, 2))
    forward, backward = (a.beyond(b) for a, b in zip(deep, shallow, strict=True))
    return forward, backward


def calls_on_cpu(layers: int, recompute: str) -> int:
    """Operators of both passes of such a block on small maps, on the eager operations."""
    block = EfficientDenseBlock(layers, 64, 4, 32, recompute=recompute)  # type: ignore[arg-type]
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with Pass() as both:
        block(x).backward(torch.ones(2, 64 + 32 * layers, 4, 4))
    return both.calls.operators.total()


class Layouts(TorchDispatchMode):
    """Context manager that notes the memory formats of what convolutions read.

    ``changed`` counts the copies of maps into another format.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[torch.memory_format] = set()
        self.count = self.changed = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.count += 1
            self.read.add(outer_format(args[0]))
        if name in ("clone", "_to_copy") and out.dim() == 4:
            self.changed += outer_format(out) != outer_format(args[0])
        return out
