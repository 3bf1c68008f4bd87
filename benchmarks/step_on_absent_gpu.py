"""CPU time of a step by Triton's kernels, on a GPU that is not there.

Run by ``benchmarks/host_time.py``, which reads the JSON that it prints, on the package of any
checkout. Triton binds the arguments of every launch, and launches nothing that was built for them;
convolutions return empty maps; all other operators run on a CPU. The network has the layers of
DenseNet-121, with an eighth of their channels, and maps are small: their calls take the time. Timed
once more without what Triton does at a launch: the rest is PyTorch's and ours.
"""

from __future__ import annotations

import json
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import efficient_densenet.kernels.triton as kernels

# All kernels, before the environment says what makes the package run them on a CPU.
for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
    if not found.name.endswith("interpreted"):
        import_module(found.name)


class AbsentGPU:
    """What Triton asks of a driver before each launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Built:
    """In place of what Triton would build for a kernel and some kinds of arguments."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        Built.launches += 1

    @staticmethod
    def build(function: JITFunction, key: str, signature: object, device: int, *_: object) -> Built:
        built = function.device_caches[device][0][key] = Built()
        return built


class Calls(TorchDispatchMode):
    """Context manager that counts calls of PyTorch's operators, views included."""

    count = 0

    def __torch_dispatch__(
        self,
        func: object,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def convolution(x: Tensor, weight: Tensor, bias: object, *geometry: Sequence[int]) -> Tensor:
    """An empty map of the shape that the convolution would leave."""
    stride, padding, dilation = geometry[:3]
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    positions = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    shape = (x.shape[0], weight.shape[0], *positions)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Empty gradients, as far as they are wanted."""
    made = (torch.empty_like(x), torch.empty_like(weight), x.new_empty(weight.shape[0]))
    return tuple(g if wanted else None for g, wanted in zip(made, rest[-1], strict=True))


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    driver.set_active(AbsentGPU())
    JITFunction._do_compile = Built.build
    os.environ["TRITON_INTERPRET"] = "1"
    library = torch.library.Library("aten", "IMPL")
    for replaced in (convolution, convolution_backward):
        library.impl(replaced.__name__, replaced, "CPU")

    from efficient_densenet import DenseNet

    model = DenseNet(4, (6, 12, 24, 16), 8, num_classes=10, kernels="triton")
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    Built.launches = 0
    with Calls() as calls:
        step()
    found = {"launches": Built.launches, "calls": calls.count, "seconds": seconds(step, repeats)}
    with patch.object(JITFunction, "run", lambda *args, **kwargs: None):
        found["without_triton"] = seconds(step, repeats)
    print(json.dumps(found))


def seconds(step: Callable[[], None], repeats: int) -> float:
    """The median CPU time of a step."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main(int(sys.argv[1]))
